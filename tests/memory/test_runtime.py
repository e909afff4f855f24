"""The cache is what Transformers' caches hold; the workspace is what a forward allocates, counted."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from onegpu.kernels.slices import SCRATCH
from onegpu.memory.geometry import read_geometry
from onegpu.memory.runtime import LIBRARY_BYTES, kv_bytes, loading_bytes, scratch_bytes, workspace_bytes
from onegpu.memory.weights import Weight
from tiny_models import MODELS

BY_NAME = {model.name: model for model in MODELS}
CONTEXT = 24


def cached_bytes(cache: Any) -> int:
    caches = (
        [cache.self_attention_cache, cache.cross_attention_cache]
        if hasattr(cache, "cross_attention_cache")
        else [cache]
    )
    layers = [layer for each in caches for layer in each.layers]
    return sum(t.numel() * t.element_size() for layer in layers for t in (layer.keys, layer.values))


def run(name: str, batch: int) -> tuple[Any, int]:
    model = BY_NAME[name].build(torch.bfloat16)
    ids = torch.randint(4, 90, (batch, CONTEXT))
    inputs = {"input_ids": ids}
    if BY_NAME[name].kind == "encoder-decoder":
        inputs["decoder_input_ids"] = ids
    with torch.no_grad():
        return read_geometry(model.config.to_dict()), cached_bytes(model(**inputs, use_cache=True).past_key_values)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "mixtral", "qwen3", "falcon", "falcon-new", "gpt-bigcode", "t5", "bart"]
)
def test_the_cache_is_exact(name: str, batch: int) -> None:
    geometry, held = run(name, batch)
    assert kv_bytes(geometry, CONTEXT, batch) == held


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gemma3"])
def test_layers_with_a_window_keep_no_more_than_it(name: str) -> None:
    """A growing cache holds one token less than its window, a static one the window."""
    geometry, held = run(name, 1)
    sliding = sum(window is not None for window in geometry.windows)
    assert sliding > 0
    assert kv_bytes(geometry, CONTEXT, 1) - held == sliding * 2 * geometry.values_per_token
    assert kv_bytes(geometry, 10 * CONTEXT, 1) < 10 * kv_bytes(geometry, CONTEXT, 1)


def test_latent_attention_keeps_one_latent_for_all_heads() -> None:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = DeepseekV3Config(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        kv_lora_rank=32,
        q_lora_rank=32,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=16,
        first_k_dense_replace=1,
    )
    model = DeepseekV3ForCausalLM(config).to(torch.bfloat16).eval()
    with torch.no_grad():
        held = cached_bytes(model(torch.zeros(1, CONTEXT, dtype=torch.long), use_cache=True).past_key_values)
    geometry = read_geometry(config.to_dict())
    assert geometry.values_per_token == 32 + 8
    assert kv_bytes(geometry, CONTEXT, 1) == held


def test_narrower_caches() -> None:
    geometry = read_geometry(BY_NAME["llama"].make_config().to_dict())
    vectors = 2 * 2 * CONTEXT * 2  # layers, keys and values, tokens, heads
    assert kv_bytes(geometry, CONTEXT, 1) == vectors * 16 * 2
    assert kv_bytes(geometry, CONTEXT, 1, "fp8") == vectors * (16 + 4)
    assert kv_bytes(geometry, CONTEXT, 1, "int8") == vectors * (16 + 4)


class PeakBytes(TorchDispatchMode):
    """The most bytes of storages that operators made and that were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        old = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(out):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is None or storage._cdata in old or storage._cdata in self.seen:
                continue
            self.seen.add(storage._cdata)
            self.alive += storage.nbytes()
            weakref.finalize(storage, self.freed, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.alive)
        return out

    def freed(self, key: int, num_bytes: int) -> None:
        self.seen.discard(key)
        self.alive -= num_bytes


@pytest.mark.parametrize("inner", [192, 704])
def test_the_workspace_is_what_a_prompt_allocates(inner: int) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=inner,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    ids = torch.zeros(1, 1024, dtype=torch.long)
    gc.collect()
    with torch.no_grad(), PeakBytes() as counted:
        model(ids, use_cache=True, logits_to_keep=1)
    geometry = read_geometry(config.to_dict())
    planned = kv_bytes(geometry, 1024, 1) + workspace_bytes(geometry, [], "16bit", 1024, 1) - LIBRARY_BYTES
    assert 0.99 * counted.peak <= planned <= 1.1 * counted.peak, (counted.peak, planned)


@pytest.mark.parametrize("inner", [192, 1408])
def test_the_workspace_of_a_long_prompt(inner: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through recognised layers, whole. Definitions of operators make copies that kernels do not: of few rows here."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from onegpu.decoder.cache import KVCache
    from onegpu.decoder.fused import FusedPlan, FusedPrompt, recognise
    from onegpu.decoder.fused.prompt import MOST_ROWS as THEIRS
    from onegpu.decoder.fused.rehearse import layer_shapes
    from onegpu.decoder.views import Segment
    from onegpu.kernels import prompt_ops
    from onegpu.memory.runtime import MOST_ROWS, PIECE_TOKENS

    assert MOST_ROWS == THEIRS
    monkeypatch.setattr(prompt_ops, "ROWS_AT_A_TIME", 16)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=inner,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    plan = recognise(model)
    assert isinstance(plan, FusedPlan)
    context = 2 * PIECE_TOKENS
    prompt = FusedPrompt(plan, KVCache(layer_shapes(plan), 1, context), PIECE_TOKENS)
    ids = torch.zeros(context, dtype=torch.long)
    gc.collect()
    with PeakBytes() as counted:
        prompt((Segment(0, 0, context),), ids, [context - 1])
    geometry = read_geometry(config.to_dict())
    angles = 2 * context * 2 * geometry.head_dim
    planned = workspace_bytes(geometry, [], "16bit", context, 1) - LIBRARY_BYTES - angles
    assert 0.85 * counted.peak <= planned <= 1.15 * counted.peak, (counted.peak, planned)


def test_experts_of_unknown_structure_are_dequantized_a_layer_at_a_time() -> None:
    names = [f"model.layers.{layer}.mlp.experts.{part}" for layer in (0, 1) for part in ("up", "down")]
    weights = [Weight(name, "experts", 4096, 64, 8, as_one=True) for name in names]
    assert scratch_bytes([replace(weight, as_one=False) for weight in weights], "nf4") == 0
    assert scratch_bytes(weights, "nf4") == 2 * 2 * 4096
    assert scratch_bytes(weights, "16bit") == 0
    assert loading_bytes(weights, "nf4") == 2 * 4096 // 8


def test_a_slice_of_a_matrix_is_dequantized_at_once() -> None:
    weights = [Weight("a.weight", "matrix", 1 << 27, 1 << 13), Weight("b.weight", "matrix", 100, 10)]
    assert scratch_bytes(weights, "nf4") == 2 * (1 << 25) == 2 * SCRATCH, "what the kernels take"
    assert scratch_bytes(weights, "int8") == 0
    assert loading_bytes(weights, "int8") == 2 << 27
    assert loading_bytes(weights, "16bit") == 0
