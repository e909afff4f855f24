"""Keys and values of every layer, in slots of a size known beforehand: row b of a step is slot b.

Memory is made once and written in place, so that a captured step finds it where it was. A new slot holds zeros, never
what was left in memory: what is masked is multiplied by zero, and zero times a NaN is a NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from onegpu.kernels.decode_reference import dequantize_kv, quantize_kv

__all__ = ["KVCache", "KVLayer", "LayerShape", "kv_bytes"]

STORED = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


@dataclass(frozen=True, slots=True)
class LayerShape:
    """One layer's heads: `num_heads` of keys and values, their two sizes, dtype, device and sliding window."""

    num_heads: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device
    window: int | None = None

    def token_bytes(self, kv_cache_dtype: str | None) -> int:
        """Bytes that one token takes."""
        size = self.dtype.itemsize if kv_cache_dtype is None else 1
        scales = 0 if kv_cache_dtype is None else 8
        return self.num_heads * ((self.head_dim + self.value_dim) * size + scales)


@dataclass(slots=True, eq=False)
class KVLayer:
    """k [slots, Hkv, capacity, D] and v [slots, Hkv, capacity, Dv]; in 8 bit with scales [slots, Hkv, capacity]."""

    k: Tensor
    v: Tensor
    k_scale: Tensor | None
    v_scale: Tensor | None
    window: int | None
    dtype: torch.dtype

    @classmethod
    def make(cls, shape: LayerShape, slots: int, capacity: int, kv_cache_dtype: str | None) -> KVLayer:
        """A layer of zeros."""
        stored = shape.dtype if kv_cache_dtype is None else STORED[kv_cache_dtype]
        size = (slots, shape.num_heads, capacity)
        k = torch.zeros(*size, shape.head_dim, dtype=stored, device=shape.device)
        v = torch.zeros(*size, shape.value_dim, dtype=stored, device=shape.device)
        scales = [None if kv_cache_dtype is None else torch.zeros(size, device=shape.device) for _ in range(2)]
        return cls(k, v, scales[0], scales[1], shape.window, shape.dtype)

    def write(self, slot: int, start: int, k: Tensor, v: Tensor) -> None:
        """Put keys and values [Hkv, n, D] of one sequence at start .. start + n - 1 of its slot."""
        for stored, scales, new in ((self.k, self.k_scale, k), (self.v, self.v_scale, v)):
            end = start + new.shape[1]
            if scales is None:
                stored[slot, :, start:end].copy_(new)
                continue
            stored[slot, :, start:end], scales[slot, :, start:end] = quantize_kv(new, stored.dtype)

    def scatter(self, slots: Tensor, places: Tensor, k: Tensor, v: Tensor) -> None:
        """Put keys and values [Hkv, T, D] of several sequences at `places` int64 [T] of `slots` int64 [T]."""
        for stored, scales, new in ((self.k, self.k_scale, k), (self.v, self.v_scale, v)):
            tokens = new.transpose(0, 1)
            if scales is None:
                stored[slots, :, places] = tokens
                continue
            codes, scale = quantize_kv(tokens, stored.dtype)
            # A device may not know how to scatter 8-bit floats: their bits are bytes.
            stored.view(torch.uint8)[slots, :, places] = codes.view(torch.uint8)
            scales[slots, :, places] = scale

    def read(self, slot: int, end: int) -> tuple[Tensor, Tensor]:
        """Keys and values [Hkv, end, D] of the first tokens of a slot, in the model's dtype."""
        out = []
        for stored, scales in ((self.k, self.k_scale), (self.v, self.v_scale)):
            kept = stored[slot, :, :end]
            if scales is not None:
                kept = dequantize_kv(kept, scales[slot, :, :end]).to(self.dtype)
            out.append(kept)
        return out[0], out[1]


class KVCache:
    """All layers. `slots` sequences of `capacity` tokens."""

    def __init__(
        self, shapes: Sequence[LayerShape], slots: int, capacity: int, kv_cache_dtype: str | None = None
    ) -> None:
        self.slots = slots
        self.capacity = capacity
        self.layers = [KVLayer.make(shape, slots, capacity, kv_cache_dtype) for shape in shapes]


def kv_bytes(shapes: Sequence[LayerShape], slots: int, capacity: int, kv_cache_dtype: str | None) -> int:
    """Bytes a cache takes."""
    return slots * capacity * sum(shape.token_bytes(kv_cache_dtype) for shape in shapes)
