"""Decoders that look at an encoder's states: their keys and values are computed once, with the prompt.

As in `masked`, layers compute attention themselves over whole slots. All rows are at the same place, which the cache
tells as a number on the device; rows that are finished stay behind and are looked at by nobody.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from onegpu.decoder.cache import KVCache, KVLayer, LayerShape
from onegpu.decoder.forward import ModelForward
from onegpu.decoder.masked import PromptLayer, WholeSlotLayer
from onegpu.decoder.views import Segment

__all__ = ["CrossedCache", "CrossedPrefill", "CrossedStep"]


class CrossedCache(KVCache):
    """Slots with the encoder's side of each: `cross` layers of `source` places, and `mask` [slots, 1, 1, source].

    `hidden` [slots, source, width] holds the encoder's states, of which decode steps read the shape alone.
    """

    def __init__(
        self,
        shapes: Sequence[LayerShape],
        cross_shapes: Sequence[LayerShape],
        slots: int,
        capacity: int,
        source: int,
        width: int,
    ) -> None:
        super().__init__(shapes, slots, capacity)
        first = cross_shapes[0]
        self.source = source
        self.cross = [KVLayer.make(shape, slots, source, None) for shape in cross_shapes]
        self.mask = torch.ones(slots, 1, 1, source, dtype=torch.bool, device=first.device)
        self.hidden = torch.zeros(slots, source, width, dtype=first.dtype, device=first.device)

    def load(self, hidden: Tensor, mask: Tensor | None) -> None:
        """Take up an encoder's states [B, S, width] and their mask [B, S], None where all are real."""
        rows, length = hidden.shape[:2]
        self.hidden.zero_()
        self.hidden[:rows, :length] = hidden
        # A row that nobody is in must see something: no key at all is no number.
        self.mask.fill_(True)
        self.mask[:rows] = False
        self.mask[:rows, 0, 0, :length] = (
            torch.ones(rows, length, dtype=torch.bool) if mask is None else mask != 0
        ).to(self.mask.device)


class CrossLayer(PromptLayer):
    """The encoder's side of one layer: stored when it is computed, kept from then on."""

    def __init__(self, layer: KVLayer, rows: int, is_stored: bool) -> None:
        super().__init__(layer, 0)
        self.keys = layer.k[:rows]
        self.values = layer.v[:rows]
        self.is_initialized = is_stored

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Store the keys and values of all rows."""
        rows = key_states.shape[0]
        k, v = self.layer.k[:rows], self.layer.v[:rows]
        k.copy_(key_states)
        v.copy_(value_states)
        self.is_initialized = True
        return k, v

    def get_seq_length(self) -> int:
        """Whether there is something, as Transformers asks it."""
        return self.layer.k.shape[2] if self.is_initialized else 0


class PromptsLayer(PromptLayer):
    """Stores prompts of one length, one per slot."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Store the prompts of slots 0, 1, ..."""
        rows, length = key_states.shape[0], key_states.shape[2]
        self.layer.k[:rows, :, :length] = key_states
        self.layer.v[:rows, :, :length] = value_states
        return key_states, value_states


class PlacedLayer(WholeSlotLayer):
    """Stores one token per row, and says on the device where the rows are."""

    def __init__(self, layer: KVLayer, positions: Tensor, place: Tensor) -> None:
        super().__init__(layer, positions)
        self.place = place

    def get_seq_length(self) -> Any:
        """int64 []: where the rows are that go on."""
        return self.place


class CrossedPrefill:
    """The first tokens of all rows, with the encoder's states that were loaded."""

    def __init__(self, model: nn.Module, kv: CrossedCache) -> None:
        self.forward = ModelForward(model, ours=False)
        self.kv = kv

    def __call__(self, segments: Sequence[Segment], tokens: Tensor, keep: Sequence[int]) -> Tensor:
        """Logits [rows, V] of the last token of each row; the segments are slots 0, 1, ... and of one length."""
        rows, length = len(segments), segments[0].length
        assert [(s.slot, s.start, s.length) for s in segments] == [(row, 0, length) for row in range(rows)]
        assert list(keep) == [length * (row + 1) - 1 for row in range(rows)]
        own = Cache(layers=[PromptsLayer(layer, 0) for layer in self.kv.layers])
        cross = Cache(layers=[CrossLayer(layer, rows, is_stored=False) for layer in self.kv.cross])
        ids = tokens.view(rows, length)
        output = self.forward(
            decoding=False,
            decoder_input_ids=ids,
            decoder_attention_mask=torch.ones_like(ids),
            past_key_values=EncoderDecoderCache(own, cross),
            **encoder_side(self.kv, rows),
        )
        logits: Tensor = output.logits[:, -1]
        return logits


class CrossedStep:
    """A `StepForward`: tokens int64 [B], positions int32 [B] to logits [B, V], appending to the cache."""

    def __init__(self, model: nn.Module, kv: CrossedCache) -> None:
        self.forward = ModelForward(model, ours=False)
        self.kv = kv
        self.seen = torch.ones(kv.slots, kv.capacity, dtype=torch.int64, device=kv.mask.device)

    def __call__(self, tokens: Tensor, positions: Tensor) -> Tensor:
        rows, place = tokens.shape[0], positions.amax().long()
        own = Cache(layers=[PlacedLayer(layer, positions, place) for layer in self.kv.layers])
        cross = Cache(layers=[CrossLayer(layer, rows, is_stored=True) for layer in self.kv.cross])
        output = self.forward(
            decoding=True,
            decoder_input_ids=tokens[:, None],
            decoder_attention_mask=self.seen[:rows],
            past_key_values=EncoderDecoderCache(own, cross),
            **encoder_side(self.kv, rows),
        )
        logits: Tensor = output.logits[:, -1]
        return logits


def encoder_side(kv: CrossedCache, rows: int) -> dict[str, Any]:
    """What a forward is given of the encoder."""
    hidden = kv.hidden[:rows]
    return {"encoder_outputs": BaseModelOutput(last_hidden_state=hidden), "attention_mask": kv.mask[:rows]}
