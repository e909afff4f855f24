"""`onegpu bench generate`: rows, tables, random weights, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

Call = Callable[..., Any]
SHORT = ("--runs", 1, "--new", 3, "--prompt", 5, "--device", "cpu")


@pytest.fixture
def shape(tmp_path: Path) -> Path:
    """A folder with a config.json and nothing else."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaConfig(vocab_size=200, max_position_embeddings=64, **sizes).save_pretrained(tmp_path)
    return tmp_path


def test_it_prints_a_table(call: Call, tiny: Path) -> None:
    result = call("bench", "generate", tiny, *SHORT)
    assert result.exit_code == 0, result.output
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in result.stdout.splitlines()]
    assert [line[:2] for line in lines[2:]] == [["nf4", "1"], ["int8", "1"], ["16bit", "1"]]
    assert {len(line) for line in lines} == {11}
    assert "greedy, 5 + 3 tokens, median of 1" in result.stderr
    assert "nf4, batch 1: LlamaForCausalLM: generates" in result.stderr


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
def test_peers_are_measured_in_the_same_run(call: Call, tiny: Path) -> None:
    result = call("bench", "generate", tiny, "--formats", "nf4", "--peers", "--batch", "1,2", "--json", *SHORT)
    said = json.loads(result.stdout)
    labels = ["nf4", "transformers", "transformers+static", "bitsandbytes:nf4"]
    assert [(row["format"], row["batch"]) for row in said["rows"]] == [(x, 1) for x in labels] + [
        (x, 2) for x in labels
    ]
    for row in said["rows"]:
        assert row["error"] == ""
        assert (row["new_tokens"], row["prompt_tokens"], row["runs"]) == (3, 5, 1)
        assert row["tokens_per_second"] > 0
        assert row["weight_bytes"] > 0
        assert row["bytes_per_step"] > 0
        assert row["bandwidth_percent"] is None
        assert row["peak_bytes"] is None
    assert said["versions"]["bitsandbytes"]
    assert said["threads"] >= 1
    assert said["random"] is False
    assert said["read_bandwidth"] is None


def test_random_weights_need_a_config_alone(call: Call, shape: Path) -> None:
    options = ("--random", "--formats", "nf4,16bit", "--kv", "int8", "--json")
    said = json.loads(call("bench", "generate", shape, *options, *SHORT).stdout)
    assert said["random"] is True
    nf4, half = said["rows"]
    assert nf4["error"] == half["error"] == ""
    assert nf4["weight_bytes"] < half["weight_bytes"]
    assert nf4["kv"] == "int8"


def test_a_cold_start_is_told(call: Call, shape: Path) -> None:
    result = call("bench", "generate", shape, "--random", "--formats", "nf4,16bit", "--cold", *SHORT)
    assert result.exit_code == 0, result.output
    head, _, first, second = result.stdout.splitlines()
    assert head.endswith("| ready, s |")
    assert first.endswith(", cold |")
    assert "cold" not in second


def test_a_failed_peer_has_its_row(call: Call, shape: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from onegpu.bench import random_model

    def absent(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(random_model, "import_module", absent)
    result = call("bench", "generate", shape, "--random", "--formats", "nf4,bitsandbytes:nf4", *SHORT)
    assert result.exit_code == 0, result.output
    rows = result.stdout.splitlines()[2:]
    assert rows[0].startswith("| nf4 | 1 | ")
    assert rows[1].startswith("| bitsandbytes:nf4 | 1 | ModuleNotFoundError: No module named 'bitsandbytes' |")
    assert rows[1].count("|") == rows[0].count("|")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--context", 62), "62 + 3 tokens are asked for; the model reads 64"),
        (("--batch", "1,x"), "--batch must be numbers separated by commas"),
        (("--batch", "0"), "--batch must be numbers separated by commas"),
        (("--kv", "int4"), "--kv must be one of"),
        (("--formats", "nf3"), "format must be one of"),
    ],
)
def test_it_refuses_what_cannot_be(call: Call, shape: Path, options: tuple[Any, ...], words: str) -> None:
    result = call("bench", "generate", shape, "--random", "--new", 3, "--device", "cpu", *options)
    assert result.exit_code == 1
    assert words in result.stderr


def test_an_unknown_shape_lists_the_known(call: Call) -> None:
    result = call("bench", "generate", "llama-9", "--random", *SHORT)
    assert result.exit_code == 1
    assert "llama-3.1-8b" in result.stderr
