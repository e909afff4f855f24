from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

Call = Callable[..., Any]


def plain_answer(folder: Path, prompt: str, max_new_tokens: int) -> str:
    """What plain Transformers says to the chat template's prompt."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_stdout_is_the_answer_of_plain_transformers(call: Call, tiny: Path) -> None:
    result = call("run", tiny, "hello", "-q", "none", "-n", 24, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert result.stdout == plain_answer(tiny, "hello", 24) + "\n"
    assert "tok/s" in result.stderr
    assert "16bit" in result.stderr


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8"])
def test_json_says_what_was_measured(call: Call, tiny: Path, quantization: str) -> None:
    result = call("run", tiny, "hello", "-q", quantization, "-n", 8, "--json", "--device", "cpu")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["format"] == quantization
    assert 1 <= said["new_tokens"] <= 8
    # One token per byte, and one for each of <|start|>, <|end|> and <|start|>.
    assert said["prompt_tokens"] == len("user\nhello\nassistant\n") + 3
    assert said["finish_reason"] in ("length", "stop")
    assert said["weight_bytes"] < said["weight_bytes_16bit"]
    assert said["weight_bytes_16bit"] == 2 * sum(
        parameter.numel() for parameter in AutoModelForCausalLM.from_pretrained(tiny).parameters()
    )
    assert said["load_seconds"] > 0
    assert said["ttft_ms"] > 0
    # A CUDA wheel may leave its local part (+cu130) out of its metadata.
    assert said["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert "cpu" in said["device"]


def test_the_fast_path_is_the_default_and_plain_turns_it_off(call: Call, tiny: Path) -> None:
    options = ("-q", "none", "-n", 6, "--json", "--device", "cpu")
    fast = json.loads(call("run", tiny, "hello", *options).stdout)
    plain = json.loads(call("run", tiny, "hello", "--plain", *options).stdout)
    assert "generates" in fast["path"]
    assert plain["path"] == ""
    assert fast["text"] == plain["text"]
    assert fast["bandwidth_share"] is None


def test_nf4_is_the_default(call: Call, tiny: Path) -> None:
    said = json.loads(call("run", tiny, "hi", "-n", 2, "--json", "--device", "cpu").stdout)
    assert said["format"] == "nf4"


def test_the_prompt_may_come_from_stdin(call: Call, tiny: Path) -> None:
    options = ("-q", "none", "-n", 12, "--device", "cpu")
    assert call("run", tiny, "-", *options, stdin="hello").stdout == call("run", tiny, "hello", *options).stdout


def test_the_same_seed_draws_the_same_answer(call: Call, tiny: Path) -> None:
    drawn = [
        call("run", tiny, "hi", "-t", 2.0, "-n", 24, "--seed", seed, "--device", "cpu").stdout for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_model_without_a_template_takes_the_prompt_as_it_is(call: Call, tiny_plain: Path) -> None:
    said = json.loads(call("run", tiny_plain, "hello", "-n", 2, "--json", "--device", "cpu").stdout)
    assert said["prompt_tokens"] == len("hello")
    result = call("run", tiny_plain, "hello", "--system", "be kind", "--device", "cpu")
    assert result.exit_code == 1
    assert "no chat template" in result.stderr


def test_a_prompt_longer_than_the_model_reads_is_refused(call: Call, tiny: Path) -> None:
    result = call("run", tiny, "x" * 300, "--device", "cpu")
    assert result.exit_code == 1
    assert "reads 255" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("/no/such/folder", "hi"), "no folder /no/such/folder"),
        (("org/there-is-no-such-model", "hi"), "no model called 'org/there-is-no-such-model'"),
        (("@main", "hi"), "MODEL must be"),
        (("TINY", "hi", "--device", "tpu"), "--device must be"),
        (("TINY", "hi", "-q", "int8", "--double-quant"), "--double-quant is for 4 bit"),
        (("TINY", "hi", "--device", "cuda:99"), "CUDA devices here"),
    ],
)
def test_errors_are_one_line_and_a_hint(call: Call, tiny: Path, arguments: tuple[str, ...], words: str) -> None:
    result = call("run", *(str(tiny) if argument == "TINY" else argument for argument in arguments))
    assert result.exit_code == 1
    assert result.stdout == ""
    first, *rest = result.stderr.strip().splitlines()
    assert first.startswith("error: ")
    assert words in first
    assert "Traceback" not in result.stderr
    assert not rest or (rest[0] == "" and rest[1].startswith("hint: "))


def test_debug_lets_the_error_through(call: Call) -> None:
    result = call("--debug", "run", "/no/such/folder", "hi")
    assert type(result.exception).__name__ == "NotFoundError"


@pytest.mark.parametrize(
    "arguments", [("run",), ("run", "m", "p", "-q", "nf5"), ("run", "m", "p", "-t", "-1"), ("walk",)]
)
def test_wrong_usage_is_two(call: Call, arguments: tuple[str, ...]) -> None:
    assert call(*arguments).exit_code == 2
