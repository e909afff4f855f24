"""The fused decode step: tokens [B], positions [B] to logits [B, V], appending to the KV cache.

    embed → for each layer: norm · qkv · attention · o + residual · norm · gate, up and activation · down + residual
          → norm · head

Every kernel of ours may overlap with the one in front on a GPU that can; what is done in torch in between just waits.
Nothing waits for the host, so that a step can be captured.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from onegpu.decoder.cache import KVCache
from onegpu.decoder.fused.plan import FusedPlan, LayerPlan, Norm
from onegpu.decoder.fused.recognise import EXPERTS, finish
from onegpu.errors import ArgumentError
from onegpu.kernels.decode_ops import rotary_decode_attention

__all__ = ["FusedStep"]

# As the universal step: experts over a few tokens, no size of which depends on a token's choice.
DECODE_EXPERTS = "batched_mm"


class FusedStep:
    """A `StepForward` over a recognised model and its KV cache.

    Args:
        plan: of `recognise`; its products are joined here if they are not yet.
        kv: the cache, of `onegpu.decoder.cache.KVCache`'s fields: `layers` with k, v, k_scale, v_scale; `capacity`.

    Raises:
        UnsupportedError: the cache is longer than the rotary frequencies are fixed for.
        ArgumentError: the cache has another number of layers.
    """

    def __init__(self, plan: FusedPlan, kv: KVCache) -> None:
        if len(kv.layers) != len(plan.layers):
            raise ArgumentError(f"the model has {len(plan.layers)} layers, the cache {len(kv.layers)}")
        self.plan, self.kv = plan, kv
        self.overlap = plan.device.type == "cuda"
        with torch.no_grad():
            self.tables = [rotary.table(kv.capacity, plan.dtype, plan.device) for rotary in plan.rotaries]
        plan.join()

    def __call__(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Logits [B, V] in the model's dtype for tokens int64 [B] at positions int32 [B]; row b is slot b."""
        with torch.no_grad(), experts_for_decoding(self.plan.experts_configs):
            hidden = self.embed(tokens)
            angles = self.angles(positions)
            for index, layer in enumerate(self.plan.layers):
                hidden = self.attention(index, hidden, positions, angles)
                hidden = self.mlp(layer, hidden)
            return self.logits(hidden)

    def embed(self, tokens: Tensor) -> Tensor:
        """[B] to [B, hidden]."""
        hidden: Tensor = self.plan.embed(tokens)
        multiplier = self.plan.embedding_multiplier
        return hidden if multiplier == 1.0 else hidden * multiplier

    def angles(self, positions: Tensor) -> list[tuple[Tensor, Tensor]]:
        """cos and sin [B, R] of each rotary embedding. A row beyond its slot's end stays in bounds."""
        if not self.tables:
            return []
        rows = positions.clamp(0, self.kv.capacity - 1)
        found = [table.index_select(0, rows) for table in self.tables]
        return [(both[:, 0], both[:, 1]) for both in found]

    def attention(self, index: int, hidden: Tensor, positions: Tensor, angles: list[tuple[Tensor, Tensor]]) -> Tensor:
        """The first half of a layer: [B, hidden] to [B, hidden]."""
        layer, cache = self.plan.layers[index], self.kv.layers[index]
        assert layer.products is not None
        qkv = layer.products.qkv(self.normed(layer.input_norm, hidden), overlap=self.overlap)
        if not layer.head_norm:
            qkv = self.norm_all_heads(layer, qkv)
        cos, sin = (None, None) if layer.rotary is None else angles[layer.rotary]
        head_norm = layer.q_norm if layer.head_norm else None
        x = rotary_decode_attention(
            qkv,
            cos,
            sin,
            cache.k,
            cache.v,
            positions,
            layer.num_heads,
            layer.scale,
            interleaved=layer.rotary is not None and self.plan.rotaries[layer.rotary].interleaved,
            q_norm=None if head_norm is None else head_norm.weight,
            k_norm=None if head_norm is None or layer.k_norm is None else layer.k_norm.weight,
            norm_eps=1e-6 if head_norm is None else head_norm.eps,
            norm_offset=0.0 if head_norm is None else head_norm.offset,
            window=layer.window,
            softcap=layer.softcap,
            sinks=layer.sinks,
            k_scale=cache.k_scale,
            v_scale=cache.v_scale,
            overlap=self.overlap,
        )
        if layer.post_attention_norm is None and layer.residual_multiplier == 1.0:
            return layer.products.o(x, residual=hidden, overlap=self.overlap)
        y = layer.products.o(x, overlap=self.overlap)
        return self.add(hidden, y, layer.post_attention_norm, layer.residual_multiplier)

    def mlp(self, layer: LayerPlan, hidden: Tensor) -> Tensor:
        """The second half of a layer: [B, hidden] to [B, hidden]."""
        assert layer.products is not None
        x = self.normed(layer.mlp_norm, hidden)
        if layer.products.gate_up is None or layer.products.down is None:
            return self.add(hidden, own_mlp(layer, x), layer.post_mlp_norm, layer.residual_multiplier)
        x = layer.products.gate_up(x, activation=layer.activation, gated=True, overlap=self.overlap)
        if layer.post_mlp_norm is None and layer.residual_multiplier == 1.0:
            return layer.products.down(x, residual=hidden, overlap=self.overlap)
        y = layer.products.down(x, overlap=self.overlap)
        return self.add(hidden, y, layer.post_mlp_norm, layer.residual_multiplier)

    def norm_all_heads(self, layer: LayerPlan, qkv: Tensor) -> Tensor:
        """Queries and keys normed over all heads at once, as OLMo 2 has it."""
        assert layer.q_norm is not None
        assert layer.k_norm is not None
        sizes = [layer.num_heads * layer.head_dim, *(2 * [layer.num_kv_heads * layer.head_dim])]
        q, k, v = torch.split(qkv, sizes, dim=-1)
        return torch.cat((layer.q_norm(q, self.overlap), layer.k_norm(k, self.overlap), v), dim=-1)

    def normed(self, norm: Norm | None, x: Tensor) -> Tensor:
        """x through a norm that may not be there."""
        return x if norm is None else norm(x, self.overlap)

    def add(self, hidden: Tensor, branch: Tensor, norm: Norm | None, multiplier: float) -> Tensor:
        """The residual sum where a norm or a factor stands before it."""
        return torch.add(hidden, self.normed(norm, branch), alpha=multiplier)

    def logits(self, hidden: Tensor) -> Tensor:
        """[B, hidden] to [B, V]."""
        plan = self.plan
        assert plan.joined_head is not None
        out = plan.joined_head(plan.norm(hidden, self.overlap), overlap=self.overlap)
        return finish(out, plan.logits_divisor, plan.logits_softcap)


def own_mlp(layer: LayerPlan, x: Tensor) -> Tensor:
    """[B, hidden] through the module's own forward, which knows [B, S, hidden]."""
    out = layer.mlp(x[:, None])
    result: Tensor = out[0] if isinstance(out, tuple) else out
    return result[:, 0]


@contextmanager
def experts_for_decoding(configs: tuple[Any, ...]) -> Iterator[None]:
    """Experts without the host, for the time of a step."""
    before = [getattr(config, EXPERTS) for config in configs]
    try:
        for config in configs:
            setattr(config, EXPERTS, DECODE_EXPERTS)
        yield
    finally:
        for config, value in zip(configs, before, strict=True):
            setattr(config, EXPERTS, value)
