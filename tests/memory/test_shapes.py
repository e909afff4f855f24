"""The numbers of known shapes give the parameters that their names promise."""

from __future__ import annotations

import pytest

from onegpu.memory.geometry import read_geometry
from onegpu.memory.known import STRUCTURES, tensors_from_config
from onegpu.memory.shapes import SHAPES

# Parameters as their authors count them, in millions.
COUNTS = {
    "smollm2-135m": 134.5,
    "smollm2-1.7b": 1711.4,
    "llama-3.2-1b": 1235.8,
    "llama-3.2-3b": 3212.7,
    "llama-3.1-8b": 8030.3,
    "llama-3.1-70b": 70553.7,
    "mistral-7b": 7248.0,
    "mixtral-8x7b": 46702.8,
    "qwen2.5-7b": 7615.6,
    "qwen3-0.6b": 596.0,
    "qwen3-8b": 8190.7,
    "qwen3-30b-a3b": 30532.1,
    "gemma-2-9b": 9241.7,
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameters(name: str) -> None:
    counted = sum(info.numel for info in tensors_from_config(SHAPES[name]).values())
    assert counted / 1e6 == pytest.approx(COUNTS[name], abs=0.1)


def test_all_are_counted_that_can_be() -> None:
    assert {name for name, fields in SHAPES.items() if fields["model_type"] in STRUCTURES} == set(COUNTS)


@pytest.mark.parametrize("name", SHAPES)
def test_geometry(name: str) -> None:
    geometry = read_geometry(SHAPES[name])
    assert geometry.kind == "decoder"
    assert geometry.layers == SHAPES[name]["num_hidden_layers"]
