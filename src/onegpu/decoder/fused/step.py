"""The fused decode step: tokens [B], positions [B] to logits [B, V], appending to the KV cache.

    embed → for each layer: norm · qkv · attention · o + residual · norm · gate, up and activation · down + residual
          → norm · head

Nothing waits for the host, so that a step can be captured.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from onegpu.decoder.cache import KVCache
from onegpu.decoder.fused.layers import FusedLayers
from onegpu.decoder.fused.plan import FusedPlan
from onegpu.decoder.fused.recognise import EXPERTS
from onegpu.kernels.decode_ops import rotary_decode_attention

__all__ = ["FusedStep"]

# As the universal step: experts over a few tokens, no size of which depends on a token's choice.
DECODE_EXPERTS = "batched_mm"


class FusedStep(FusedLayers):
    """A `StepForward` over a recognised model and its KV cache.

    Args:
        plan: of `recognise`; its products are joined here if they are not yet.
        kv: the cache, of `onegpu.decoder.cache.KVCache`'s fields: `layers` with k, v, k_scale, v_scale; `capacity`.

    Raises:
        UnsupportedError: the cache is longer than the rotary frequencies are fixed for.
        ArgumentError: the cache has another number of layers.
    """

    def __init__(self, plan: FusedPlan, kv: KVCache) -> None:
        with torch.no_grad():
            self.tables = [rotary.table(kv.capacity, plan.dtype, plan.device) for rotary in plan.rotaries]
        super().__init__(plan, kv)

    def __call__(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Logits [B, V] in the model's dtype for tokens int64 [B] at positions int32 [B]; row b is slot b."""
        with torch.no_grad(), experts_for_decoding(self.plan.experts_configs):
            hidden = self.embed(tokens)
            angles = self.angles(positions)
            for index, layer in enumerate(self.plan.layers):
                hidden = self.attention(index, hidden, positions, angles)
                hidden = self.mlp(layer, hidden)
            return self.logits(hidden)

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
        cos, sin = (None, None) if layer.rotary is None else angles[layer.rotary]
        head_norm = layer.q_norm if layer.head_norm else None
        x = rotary_decode_attention(
            self.qkv(layer, hidden),
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
        return self.after_attention(layer, x, hidden)


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
