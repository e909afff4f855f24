"""Tokens per second are bytes over bandwidth, and the bytes are those a token needs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from onegpu.memory.geometry import read_geometry
from onegpu.memory.speed import EFFICIENCY, LAYER_SECONDS, bytes_per_token, tokens_per_second
from onegpu.memory.weights import FORMATS, Weight
from tiny_models import MODELS

GEOMETRY = read_geometry({model.name: model for model in MODELS}["mixtral"].make_config().to_dict())
TABLE = Weight("model.embed_tokens.weight", "embedding", 1000)
HEAD = Weight("lm_head.weight", "head", 1000)
EXPERTS = Weight("model.layers.0.mlp.experts.up", "experts", 4096, 64, 4)
TOWER = Weight("vision_tower.layers.0.weight", "matrix", 500, 10)


def test_a_token_reads_the_head_and_not_the_table() -> None:
    assert bytes_per_token(GEOMETRY, [TABLE, HEAD], "16bit", 0, "16bit") == 2000
    assert bytes_per_token(GEOMETRY, [replace(TABLE, tied=True)], "16bit", 0, "16bit") == 2000


def test_a_token_reads_the_experts_it_chooses() -> None:
    assert bytes_per_token(GEOMETRY, [EXPERTS], "16bit", 0, "16bit") == 4096
    assert bytes_per_token(GEOMETRY, [EXPERTS], "nf4", 0, "16bit") == (2048 + 4 * 64) // 2


def test_a_token_reads_no_image_tower() -> None:
    assert bytes_per_token(GEOMETRY, [TOWER], "16bit", 0, "16bit") == 0


def test_the_formula() -> None:
    speed = tokens_per_second(GEOMETRY, [HEAD], "nf4", context=0, kv_dtype="16bit", bandwidth=1e9)
    assert speed == pytest.approx(1 / (2000 / (1e9 * EFFICIENCY["nf4"]) + GEOMETRY.layers * LAYER_SECONDS))
    assert set(EFFICIENCY) == set(FORMATS)


def test_unknown_bandwidth_and_encoders_have_none() -> None:
    assert tokens_per_second(GEOMETRY, [HEAD], "nf4", context=9, kv_dtype="16bit", bandwidth=None) is None
    encoder = replace(GEOMETRY, kind="encoder")
    assert tokens_per_second(encoder, [HEAD], "nf4", context=9, kv_dtype="16bit", bandwidth=1e9) is None
