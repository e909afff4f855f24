"""What one forward sees of the cache: a decode step, or the prompts of a prefill joined in one row.

layer.update(k, v)      the new keys go to their slots         SlotLayer -> view.store
attend(q, k, v)         attention over what is in the slots    the attention function -> view.attend
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.cache_utils import Cache, CacheLayerMixin

from onegpu.attention.causal_interface import CacheView
from onegpu.attention.prefill import PrefillBounds, prefill_attention
from onegpu.decoder.cache import KVCache, KVLayer
from onegpu.kernels import append_kv, decode_attention

__all__ = ["DecodeView", "HostDecodeView", "PrefillView", "Segment", "SlotView", "slot_cache"]


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of one prompt's tokens: `length` of them, the first at place `start` of slot `slot`."""

    slot: int
    start: int
    length: int

    @property
    def end(self) -> int:
        """How many tokens the slot holds afterwards."""
        return self.start + self.length


class SlotView(CacheView):
    """A view of a `KVCache`. `windows` notes the window that each layer asked for, `attended` which layers did."""

    def __init__(self, kv: KVCache) -> None:
        self.kv = kv
        self.layer: KVLayer | None = None
        self.windows: dict[int, int | None] = {}
        self.index = -1

    def take(self, index: int, k: Tensor, v: Tensor) -> None:
        """Store a layer's new keys and values; the attention that follows is this layer's."""
        self.index, self.layer = index, self.kv.layers[index]
        self.store(self.layer, k, v)

    def current(self, window: int | None) -> KVLayer:
        """The layer whose attention runs, noting its window."""
        layer = self.layer
        assert layer is not None
        self.windows[self.index] = window
        return layer

    @abstractmethod
    def store(self, layer: KVLayer, k: Tensor, v: Tensor) -> None:
        """Put new keys and values in their places."""


class DecodeView(SlotView):
    """One new token per row, at `positions` [B]."""

    def __init__(self, kv: KVCache, positions: Tensor) -> None:
        super().__init__(kv)
        self.positions = positions

    def store(self, layer: KVLayer, k: Tensor, v: Tensor) -> None:
        append_kv(k[:, :, 0], v[:, :, 0], layer.k, layer.v, self.positions, layer.k_scale, layer.v_scale)

    def attend(
        self,
        query: Tensor,
        key: Tensor,  # noqa: ARG002
        value: Tensor,  # noqa: ARG002
        scale: float,
        window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        layer = self.current(window)
        out = decode_attention(
            query[:, :, 0],
            layer.k,
            layer.v,
            self.positions,
            scale,
            window=window,
            softcap=softcap,
            sinks=sinks,
            k_scale=layer.k_scale,
            v_scale=layer.v_scale,
        )
        return out[:, None]


class HostDecodeView(DecodeView):
    """The same on a CPU, where places are known: views of the slots, without the way through operators."""

    def __init__(self, kv: KVCache, positions: Tensor) -> None:
        super().__init__(kv, positions)
        self.places = positions.tolist()

    def store(self, layer: KVLayer, k: Tensor, v: Tensor) -> None:
        if layer.k_scale is not None:
            super().store(layer, k, v)
            return
        for row, place in enumerate(self.places):
            of_row(layer.k, row).narrow(2, place, 1).copy_(of_row(k, row))
            of_row(layer.v, row).narrow(2, place, 1).copy_(of_row(v, row))

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        layer = self.layer
        assert layer is not None
        is_plain = softcap is None and sinks is None and layer.k_scale is None
        if not is_plain or key.shape[-1] != value.shape[-1]:
            return super().attend(query, key, value, scale, window, softcap, sinks)
        self.current(window)
        rows = []
        for row, place in enumerate(self.places):
            start = 0 if window is None else max(0, place + 1 - window)
            k, v = (of_row(slots, row).narrow(2, start, place + 1 - start) for slots in (layer.k, layer.v))
            q = of_row(query, row)
            rows.append(scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=q.shape[1] != k.shape[1]))
        out = rows[0] if len(rows) == 1 else torch.cat(rows)
        return out.transpose(1, 2)


def of_row(rows: Tensor, row: int) -> Tensor:
    """One of several rows, [1, ...]. A view costs microseconds, of which a step on a CPU has few to lose."""
    return rows if rows.shape[0] == 1 else rows.narrow(0, row, 1)


class PrefillView(SlotView):
    """Several prompts, or one chunk of one, joined in a row of T tokens."""

    def __init__(self, kv: KVCache, segments: tuple[Segment, ...], device: torch.device) -> None:
        super().__init__(kv)
        self.segments = segments
        lengths = tuple(segment.length for segment in segments)
        self.bounds = PrefillBounds.of(lengths, tuple(segment.end for segment in segments), device)
        self.continues = any(segment.start for segment in segments)
        self.slots = self.places = None
        if len(segments) > 1:
            slots = [segment.slot for segment in segments for _ in range(segment.length)]
            places = [place for segment in segments for place in range(segment.start, segment.end)]
            self.slots, self.places = torch.tensor([slots, places]).to(device, non_blocking=True)

    def store(self, layer: KVLayer, k: Tensor, v: Tensor) -> None:
        if self.slots is None or self.places is None:
            layer.write(self.segments[0].slot, self.segments[0].start, k[0], v[0])
        else:
            layer.scatter(self.slots, self.places, k[0], v[0])

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        layer = self.current(window)
        if self.continues:
            read = [layer.read(segment.slot, segment.end) for segment in self.segments]
            key, value = (torch.cat([pair[i] for pair in read], 1)[None] for i in range(2))
        q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
        out = prefill_attention(q, k, v, self.bounds, scale, window=window, softcap=softcap, sinks=sinks)
        return out[None]


class SlotLayer(CacheLayerMixin):
    """One layer of a `SlotCache`. The keys it gives back are the new ones: attention finds the others in the view."""

    is_sliding = False

    def __init__(self, view: SlotView, index: int, seen: int) -> None:
        super().__init__()
        self.view, self.index, self.seen = view, index, seen
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the slots are there."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Store the new keys and values."""
        self.view.take(self.index, key_states, value_states)
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that a mask would cover."""
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        """The length reported; where tokens really are, positions say."""
        return self.seen

    def get_max_length(self) -> int:
        """Tokens a slot can hold."""
        return self.view.kv.capacity

    def get_max_cache_shape(self) -> int:
        """The same under its older name."""
        return self.view.kv.capacity


def slot_cache(view: SlotView, seen: int) -> Cache:
    """A Transformers `Cache` whose layers write into the slots of a view. `seen`: the length it reports."""
    return Cache(layers=[SlotLayer(view, index, seen) for index in range(len(view.kv.layers))])
