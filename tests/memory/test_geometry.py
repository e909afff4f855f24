"""Geometry under the names that families use, and sentences for what a config does not say."""

from __future__ import annotations

from typing import Any

import pytest

from onegpu.errors import ConfigError
from onegpu.memory.geometry import read_geometry

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 96,
    "max_position_embeddings": 512,
}


@pytest.mark.parametrize("missing", ["hidden_size", "num_hidden_layers", "num_attention_heads"])
def test_what_is_missing_is_named(missing: str) -> None:
    config = {key: value for key, value in LLAMA.items() if key != missing}
    with pytest.raises(ConfigError, match=rf"config\.json of llama does not say its number of \w+: .*{missing}"):
        read_geometry(config)


@pytest.mark.parametrize("value", [0, -1, "8", True, 2.5])
def test_a_count_must_be_a_positive_integer(value: Any) -> None:
    with pytest.raises(ConfigError, match="the number of layers must be a positive integer; got"):
        read_geometry(LLAMA | {"num_hidden_layers": value})


@pytest.mark.parametrize(
    ("changes", "windows"),
    [
        ({}, [None] * 6),
        ({"sliding_window": 8}, [8] * 6),
        ({"sliding_window": 8, "use_sliding_window": False}, [None] * 6),
        ({"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 4}, [None] * 4 + [8] * 2),
        ({"sliding_window": 8, "model_type": "gemma2"}, [8, None] * 3),
        ({"sliding_window": 8, "sliding_window_pattern": 3}, [8, 8, None] * 2),
        ({"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 3}, [8, None] * 3),
        ({"attention_chunk_size": 16, "layer_types": ["chunked_attention"] * 6}, [16] * 6),
        ({"layer_types": ["linear_attention", "full_attention"] * 3}, [None] * 3),
        ({"num_kv_shared_layers": 2}, [None] * 4),
    ],
)
def test_windows_and_layers_without_a_cache(changes: dict[str, Any], windows: list[int | None]) -> None:
    assert list(read_geometry(LLAMA | changes).windows) == windows


def test_layers_with_another_state_are_noted() -> None:
    geometry = read_geometry(LLAMA | {"layer_types": ["linear_attention", "full_attention"] * 3})
    assert geometry.notes == ("3 of 6 layers keep no cache that grows; their small state is left out",)


def test_a_multimodal_model_is_read_by_its_text_part() -> None:
    geometry = read_geometry({"model_type": "llava", "text_config": LLAMA, "vision_config": {"hidden_size": 9}})
    assert (geometry.model_type, geometry.hidden, geometry.vocab) == ("llama", 64, 96)


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (LLAMA, "decoder"),
        (LLAMA | {"model_type": "bert"}, "encoder"),
        (LLAMA | {"model_type": "bert", "is_decoder": True}, "decoder"),
        (LLAMA | {"model_type": "bart", "is_encoder_decoder": True}, "encoder-decoder"),
    ],
)
def test_kinds(config: dict[str, Any], kind: str) -> None:
    geometry = read_geometry(config)
    assert geometry.kind == kind
    assert bool(geometry.windows) == (kind != "encoder")


def test_experts() -> None:
    config = LLAMA | {"num_local_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    geometry = read_geometry(config)
    assert (geometry.experts, geometry.chosen, geometry.inner) == (8, 2, 32)
