from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from onegpu.bench.measure import Timing, step_bytes
from onegpu.cli.answer import Answer, answer, bandwidth_share, closing_line, messages_for, speed_line
from onegpu.cli.models import Loaded, ModelName, load
from onegpu.cli.options import Sampling
from onegpu.memory import find_gpu
from tiny_checkpoint import tiny_llama

GREEDY = Sampling(max_new_tokens=16, temperature=0.0, top_p=1.0, seed=0)


@pytest.fixture(scope="module")
def loaded(tiny: Path) -> Loaded:
    return load(ModelName(str(tiny)), None, chosen=True, device="cpu")


def test_ctrl_c_keeps_what_was_said(loaded: Loaded) -> None:
    whole = answer(loaded, messages_for("hello", None), GREEDY, lambda _: None)
    said: list[str] = []

    def write(piece: str) -> None:
        said.append(piece)
        if len(said) == 3:
            raise KeyboardInterrupt

    cut = answer(loaded, messages_for("hello", None), GREEDY, write)
    assert cut.finish_reason == "interrupt"
    assert whole.text.startswith(cut.text.rstrip("\ufffd"))
    assert 3 <= cut.timing.new_tokens < whole.timing.new_tokens


def test_the_models_own_end_is_stop(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    given = answer(loaded, messages_for("hello", None), GREEDY, lambda _: None)
    assert given.finish_reason == "length"
    assert given.timing.new_tokens == 16
    inputs = loaded.tokenizer.apply_chat_template(
        messages_for("hello", None), add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        ids = loaded.model.generate(**inputs, max_new_tokens=16, do_sample=False)[0].tolist()[-16:]
    end = next(token for index, token in enumerate(ids) if index >= 2 and token not in ids[:index])
    monkeypatch.setattr(loaded.model.generation_config, "eos_token_id", [end])
    stopped = answer(loaded, messages_for("hello", None), GREEDY, lambda _: None)
    assert stopped.finish_reason == "stop"
    assert stopped.timing.new_tokens == ids.index(end) + 1


def test_the_closing_line_says_what_was_measured(loaded: Loaded) -> None:
    given = answer(loaded, messages_for("hello", None), GREEDY, lambda _: None)
    line = closing_line(loaded, given)
    speed = given.timing.tokens_per_second
    assert speed is not None
    for part in ("16bit", "in 16 bit ->", f"{loaded.load_seconds:.1f} s", f"{speed:.1f} tok/s", "cpu"):
        assert part in line


def test_the_share_of_the_bandwidth_is_that_of_the_datasheet(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    on_gpu = SimpleNamespace(
        device=torch.device("cuda"),
        config=model.config,
        parameters=model.parameters,
        buffers=model.buffers,
        named_modules=model.named_modules,
        get_output_embeddings=model.get_output_embeddings,
    )
    timing = Timing(prompt_tokens=8, new_tokens=5, ttft_ms=1.0, decode_ms=4e-3)
    read = step_bytes(model, 1, 10)
    assert read is not None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    bandwidth = find_gpu("H100 80GB HBM3").bandwidth
    assert bandwidth is not None
    assert bandwidth_share(on_gpu, timing) == pytest.approx(read / 1e-6 / bandwidth)
    given = Answer("", timing, "stop")
    line = speed_line(SimpleNamespace(model=on_gpu), given)  # type: ignore[arg-type]
    assert line == f"first token 1 ms · 1000000.0 tok/s, {read / 1e-6 / bandwidth:.0%} of the bandwidth limit"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU of tomorrow")
    assert bandwidth_share(on_gpu, timing) is None
    assert bandwidth_share(model, timing) is None


@pytest.mark.parametrize(
    ("text", "name", "revision"),
    [("org/name", "org/name", None), ("org/name@v1", "org/name", "v1"), ("gpt2", "gpt2", None)],
)
def test_a_revision_follows_the_name(text: str, name: str, revision: str | None) -> None:
    assert ModelName.parse(text) == ModelName(name, revision)


def test_a_folder_may_have_an_at_sign(tmp_path: Path) -> None:
    folder = tmp_path / "name@v1"
    folder.mkdir()
    assert ModelName.parse(str(folder)) == ModelName(str(folder))


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (GREEDY, {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}),
        (Sampling(3, 0.5, 0.9, 1), {"do_sample": True, "temperature": 0.5, "top_p": 0.9}),
    ],
)
def test_sampling_arguments(sampling: Sampling, expected: dict[str, Any]) -> None:
    assert sampling.arguments() == {"max_new_tokens": sampling.max_new_tokens} | expected
