"""The fused prompt: rows of packed tokens into their slots, by the same products as the fused step.

    embed → for each layer: norm · qkv · rotation, k and v to their slots · attention · o + residual
                            norm · gate, up and activation · down + residual
          → norm · head, of the places asked for

Attention sees a whole row at once, in views of qkv or of a slot; MLPs take a long row in pieces, so that no more is
alive than attention needs. Of the last layer only what is asked for goes on behind the keys and values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from onegpu.attention.prefill import PrefillBounds, prefill_attention
from onegpu.decoder.cache import KVCache, KVLayer
from onegpu.decoder.fused.layers import FusedLayers
from onegpu.decoder.fused.plan import FusedPlan, LayerPlan
from onegpu.decoder.views import Segment
from onegpu.kernels import rotate_and_append

__all__ = ["FusedPrompt", "PromptInputs"]

# An MLP takes a quarter of a long row at a time, and no more tokens than these: more are no quicker.
MOST_PIECES: Final = 4
MOST_ROWS: Final = 8192
ROWS_OF_TILES: Final = 256
# From so many tokens on it pays to attend for the last one alone where only that is wanted. More than graphs take.
LONG: Final = 1024

Angles = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class PromptInputs:
    """What a row is, beside its tokens: its segments, where each token goes (int32 [T]), its position, the wanted."""

    segments: tuple[Segment, ...]
    bounds: PrefillBounds
    slots: Tensor
    places: Tensor
    positions: Tensor
    wanted: Tensor

    @property
    def continues(self) -> bool:
        """Whether there are keys from before."""
        return any(segment.start for segment in self.segments)


class FusedPrompt(FusedLayers):
    """A `Prefill` over a recognised model and its KV cache.

    Args:
        plan: of `recognise`; its products are joined here if they are not yet.
        chunk: tokens that an MLP takes at least, where there are so many.

    Raises:
        UnsupportedError: the cache is longer than the rotary frequencies are fixed for.
        ArgumentError: the cache has another number of layers.
    """

    def __init__(self, plan: FusedPlan, kv: KVCache, chunk: int) -> None:
        for rotary in plan.rotaries:
            rotary.check(kv.capacity)
        super().__init__(plan, kv)
        self.chunk = chunk

    def __call__(self, segments: Sequence[Segment], tokens: Tensor, keep: Sequence[int]) -> Tensor:
        """Logits [len(keep), V] at places `keep` of a row; see `UniversalPrefill`."""
        inputs = self.inputs(segments, keep, tokens.device)
        newest = None
        if len(segments) == 1 and list(keep) == [tokens.shape[0] - 1] and tokens.shape[0] >= LONG:
            newest = PrefillBounds.of((1,), (segments[0].end,), tokens.device)
        return self.run(tokens, inputs, newest)

    def inputs(self, segments: Sequence[Segment], keep: Sequence[int], device: torch.device) -> PromptInputs:
        """The device's side of a row, copied there without waiting."""
        slots = torch.cat([torch.full((s.length,), s.slot, dtype=torch.int32) for s in segments])
        places = torch.cat([torch.arange(s.start, s.end, dtype=torch.int32) for s in segments])
        slots, places = (t.to(device, non_blocking=True) for t in (slots, places))
        lengths = tuple(segment.length for segment in segments)
        return PromptInputs(
            segments=tuple(segments),
            bounds=PrefillBounds.of(lengths, tuple(segment.end for segment in segments), device),
            slots=slots,
            places=places,
            positions=places.long(),
            wanted=torch.tensor(list(keep)).to(device, non_blocking=True),
        )

    def run(self, tokens: Tensor, inputs: PromptInputs, newest: PrefillBounds | None = None) -> Tensor:
        """The same, all of whose inputs are on the device. `newest`: bounds of the last token, the only one wanted."""
        with torch.no_grad():
            hidden = self.embed(tokens)
            angles = self.angles(inputs)
            for index in range(len(self.plan.layers) - 1):
                hidden = self.attention(index, hidden, inputs, angles)
                hidden = self.long_mlp(self.plan.layers[index], hidden)
            return self.logits(self.last_layer(hidden, inputs, angles, newest))

    def embed(self, tokens: Tensor) -> Tensor:
        """Ids [T], or embeddings [T, hidden], to [T, hidden]."""
        if not tokens.is_floating_point():
            return super().embed(tokens)
        multiplier = self.plan.embedding_multiplier
        return tokens if multiplier == 1.0 else tokens * multiplier

    def angles(self, inputs: PromptInputs) -> Angles:
        """cos and sin [T, R] of each rotary embedding."""
        return [rotary.cos_sin(inputs.positions, self.plan.dtype) for rotary in self.plan.rotaries]

    def attention(self, index: int, hidden: Tensor, inputs: PromptInputs, angles: Angles) -> Tensor:
        """The first half of a layer: [T, hidden] to [T, hidden]."""
        layer, cache = self.plan.layers[index], self.kv.layers[index]
        qkv = self.appended(layer, cache, hidden, inputs, angles)
        x = attend(layer, cache, qkv, inputs)
        del qkv
        return self.after_attention(layer, x, hidden)

    def last_layer(self, hidden: Tensor, inputs: PromptInputs, angles: Angles, newest: PrefillBounds | None) -> Tensor:
        """The last layer of the wanted tokens: [T, hidden] to [wanted, hidden]."""
        layer, cache = self.plan.layers[-1], self.kv.layers[-1]
        qkv = self.appended(layer, cache, hidden, inputs, angles)
        x = attend(layer, cache, qkv, inputs, newest)
        x = x if newest is not None else x.index_select(0, inputs.wanted)
        hidden = self.after_attention(layer, x, hidden.index_select(0, inputs.wanted))
        return self.mlp(layer, hidden)

    def appended(
        self, layer: LayerPlan, cache: KVLayer, hidden: Tensor, inputs: PromptInputs, angles: Angles
    ) -> Tensor:
        """qkv [T, (Hq + 2 Hkv) * D], queries and keys normed and turned; keys and values are in their slots too."""
        qkv = self.qkv(layer, hidden)
        self.append(layer, cache, qkv, inputs, angles)
        return qkv

    def append(self, layer: LayerPlan, cache: KVLayer, qkv: Tensor, inputs: PromptInputs, angles: Angles) -> None:
        """Norm and turn queries and keys where they lie, put keys and values in their slots."""
        cos, sin = (None, None) if layer.rotary is None else angles[layer.rotary]
        head_norm = layer.q_norm if layer.head_norm else None
        rotate_and_append(
            qkv,
            cos,
            sin,
            cache.k,
            cache.v,
            inputs.slots,
            inputs.places,
            layer.num_heads,
            interleaved=layer.rotary is not None and self.plan.rotaries[layer.rotary].interleaved,
            q_norm=None if head_norm is None else head_norm.weight,
            k_norm=None if head_norm is None or layer.k_norm is None else layer.k_norm.weight,
            norm_eps=1e-6 if head_norm is None else head_norm.eps,
            norm_offset=0.0 if head_norm is None else head_norm.offset,
            k_scale=cache.k_scale,
            v_scale=cache.v_scale,
        )

    def long_mlp(self, layer: LayerPlan, hidden: Tensor) -> Tensor:
        """The second half of a layer, in pieces; may write to `hidden`."""
        rows = self.rows_at_once(hidden.shape[0])
        if rows >= hidden.shape[0]:
            return self.mlp(layer, hidden)
        for first in range(0, hidden.shape[0], rows):
            part = slice(first, first + rows)
            hidden[part] = self.mlp(layer, hidden[part])
        return hidden

    def rows_at_once(self, tokens: int) -> int:
        """Of a row of so many tokens, how many an MLP takes: equal pieces of whole tiles."""
        most = max(self.chunk, min(MOST_ROWS, -(-tokens // MOST_PIECES)))
        if tokens <= most:
            return tokens
        piece = -(-tokens // -(-tokens // most))
        return -(-piece // ROWS_OF_TILES) * ROWS_OF_TILES

    def own_mlp(self, layer: LayerPlan, x: Tensor) -> Tensor:
        """[T, hidden] through the module's own forward, as one sequence."""
        out = layer.mlp(x[None])
        result: Tensor = out[0] if isinstance(out, tuple) else out
        return result.view_as(x)


def attend(
    layer: LayerPlan, cache: KVLayer, qkv: Tensor, inputs: PromptInputs, newest: PrefillBounds | None = None
) -> Tensor:
    """Attention of a row's tokens, or of the newest alone: [T, Hq * D]. Nothing is copied but for several slots."""
    heads = [layer.num_heads, layer.num_kv_heads, layer.num_kv_heads]
    q, k, v = torch.split(qkv.view(qkv.shape[0], sum(heads), layer.head_dim), heads, 1)
    if inputs.continues:
        read = [cache.read(segment.slot, segment.end) for segment in inputs.segments]
        k, v = (
            (parts[0] if len(parts) == 1 else torch.cat(parts, 1)).transpose(0, 1) for parts in zip(*read, strict=True)
        )
    q, bounds = (q, inputs.bounds) if newest is None else (q[-1:], newest)
    out = prefill_attention(q, k, v, bounds, layer.scale, window=layer.window, softcap=layer.softcap, sinks=layer.sinks)
    return out.flatten(1)
