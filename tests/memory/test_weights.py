"""Which tensors are quantized, told by name and shape; the bytes themselves are held to real models in test_plan."""

from __future__ import annotations

from typing import Any

import pytest

from onegpu.memory.source import TensorInfo
from onegpu.memory.weights import Weight, bytes_in, read_weights

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 96,
    "num_hidden_layers": 2,
    "tie_word_embeddings": False,
    "num_experts": 4,
}


def role(name: str, *shape: int, **config: Any) -> str | None:
    """The role of one tensor beside a head; None where it is left out."""
    tensors = {name: TensorInfo("BF16", shape), "lm_head.weight": TensorInfo("BF16", (96, 64))}
    found = [weight.role for weight in read_weights(tensors, CONFIG | config) if weight.name == name]
    return found[0] if found else None


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("model.layers.0.self_attn.q_proj.weight", (64, 64), "matrix"),
        ("model.layers.0.self_attn.q_proj.bias", (64,), "kept"),
        ("model.layers.0.input_layernorm.weight", (64,), "kept"),
        ("model.embed_tokens.weight", (96, 64), "embedding"),
        ("bert.embeddings.token_type_embeddings.weight", (2, 64), "embedding"),
        ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", (32, 4), "embedding"),
        ("albert.encoder.embedding_hidden_mapping_in.weight", (64, 128), "matrix"),
        ("model.layers.0.mlp.gate.weight", (4, 64), "kept"),
        ("model.layers.0.mlp.shared_expert_gate.weight", (1, 64), "matrix"),
        ("model.layers.0.mlp.experts.gate_up_proj", (4, 64, 128), "experts"),
        ("vision.patch_embed.proj.weight", (64, 3, 8, 8), "kept"),
        ("model.layers.0.mixer.A_log", (64, 16), "kept"),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", (32,), None),
        ("h.0.attn.bias", (1, 1, 64, 64), None),
        ("model.layers.2.mlp.up_proj.weight", (64, 64), None),
        ("mtp.layers.0.mlp.up_proj.weight", (64, 64), None),
    ],
)
def test_roles(name: str, shape: tuple[int, ...], expected: str | None) -> None:
    assert role(name, *shape) == expected


def test_what_a_model_keeps_in_float32() -> None:
    assert role("encoder.block.0.layer.1.DenseReluDense.wo.weight", 64, 64, model_type="t5") == "kept"
    assert role("encoder.block.0.layer.1.DenseReluDense.wo.weight", 64, 64) == "matrix"


def test_a_tied_head_is_there_once() -> None:
    tensors = {name: TensorInfo("F32", (96, 64)) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    both = read_weights(tensors, CONFIG)
    assert [(weight.role, weight.tied) for weight in both] == [("embedding", False), ("head", False)]
    once = read_weights(tensors, CONFIG | {"tie_word_embeddings": True})
    assert [(weight.role, weight.tied) for weight in once] == [("embedding", True)]


def test_experts_of_one_file_each_become_one_weight() -> None:
    shapes = {"w1": (128, 64), "w2": (64, 128), "w3": (128, 64)}
    tensors = {
        f"model.layers.0.block_sparse_moe.experts.{expert}.{part}.weight": TensorInfo("BF16", shape)
        for expert in range(4)
        for part, shape in shapes.items()
    }
    up, down = read_weights(tensors, CONFIG)
    assert (up.role, up.numel, up.rows, up.experts) == ("experts", 4 * 2 * 128 * 64, 4 * 256, 4)
    assert (down.numel, down.rows, down.experts) == (4 * 64 * 128, 4 * 64, 4)


def test_bytes_of_an_odd_matrix() -> None:
    weight = Weight("a", "matrix", 7 * 9, rows=7)
    assert bytes_in(weight, "16bit") == 126
    assert bytes_in(weight, "int8") == 63 + 28
    assert bytes_in(weight, "nf4") == bytes_in(weight, "fp4") == 32 + 4
    assert bytes_in(weight, "nf4+double") == 32 + 1 + 4 + 1024 + 4


def test_experts_that_are_not_whole_blocks_stay() -> None:
    weight = Weight("a", "experts", 4 * 100, rows=40, experts=4)
    assert bytes_in(weight, "nf4") == 800
    assert bytes_in(weight, "int8") == 400 + 160
