"""What a model became, in words and in values."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import onegpu
from onegpu.errors import UnsupportedError
from onegpu.reporting import Report, spread
from tiny_checkpoint import save_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("reporting") / "model")


def load(folder: Path, **arguments: object) -> Report:
    return onegpu.report(onegpu.AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", **arguments))


def test_a_model_in_4_bit(folder: Path) -> None:
    found = load(folder, load_in_4bit=True)
    page = str(found)
    assert page.splitlines()[0] == "LlamaForCausalLM on cpu, bfloat16"
    assert f"{found.num_quantized} × nf4" in page
    assert " of the model's bytes in bfloat16)" in page
    assert "  kernel    linear_4bit: " in page
    assert found.quantized_bytes < found.original_bytes
    assert found.total_bytes < load(folder, dtype=torch.bfloat16).total_bytes
    (kept,) = [line for line in page.splitlines() if line.startswith("  kept")]
    assert "lm_head" in kept or "embed" in kept
    assert json.loads(json.dumps(found.to_dict()))["num_quantized"] == found.num_quantized


def test_a_plain_model(folder: Path) -> None:
    page = str(load(folder, dtype=torch.bfloat16))
    assert "nothing quantized" in page
    assert "kernel" not in page


def test_a_name_that_matches_nothing_is_told(folder: Path) -> None:
    config = onegpu.QuantConfig(skip_modules=["no_such_part"])
    page = str(load(folder, quantization_config=config))
    assert "  note      skip_modules 'no_such_part' matched no module" in page


def test_an_optimized_model_says_how_it_generates(folder: Path) -> None:
    model = onegpu.AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", load_in_4bit=True)
    onegpu.optimize(model)
    assert "  fast path LlamaForCausalLM: generates through " in str(onegpu.report(model))


def test_a_model_on_several_devices_is_told_by_parts() -> None:
    assert spread({"a": 0, "b": 0, "c": "cpu"}) == "cuda:0 (2 parts), cpu (1 parts)"


def test_it_takes_a_model() -> None:
    with pytest.raises(UnsupportedError, match=r"report\(\) takes a model; got str"):
        onegpu.report("my-model")
