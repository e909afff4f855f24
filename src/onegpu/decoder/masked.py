"""The second universal way, for models that compute attention themselves: the whole slot and a mask over it.

A step gives the layers every key of the slots and a mask [B, capacity] with ones up to each row's position; the cache
reports itself full, so that the causal rule hides nothing more. Prompts run one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from onegpu.decoder.cache import KVCache, KVLayer
from onegpu.decoder.forward import ModelForward
from onegpu.decoder.views import Segment
from onegpu.kernels import append_kv

__all__ = ["MaskedPrefill", "MaskedStep"]


class PromptLayer(CacheLayerMixin):
    """Stores a prompt's keys and values in a slot, and gives them back as they came."""

    is_sliding = False

    def __init__(self, layer: KVLayer, slot: int) -> None:
        super().__init__()
        self.layer, self.slot = layer, slot

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the slots are there."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Store the prompt."""
        self.layer.write(self.slot, 0, key_states[0], value_states[0])
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that a mask covers."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """Nothing was there before."""
        return 0

    def get_max_length(self) -> int:
        """Tokens a slot can hold."""
        return self.layer.k.shape[2]

    def get_max_cache_shape(self) -> int:
        """The same under its older name."""
        return self.layer.k.shape[2]


class WholeSlotLayer(PromptLayer):
    """Stores one token per row at `positions` and gives the whole slots back."""

    # Transformers asks no mask of such a cache whether it could be left out, which would wait for the device.
    is_compileable = True

    def __init__(self, layer: KVLayer, positions: Tensor) -> None:
        super().__init__(layer, 0)
        self.positions = positions

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Store one token per row."""
        layer, rows = self.layer, self.positions.shape[0]
        append_kv(key_states[:, :, 0], value_states[:, :, 0], layer.k, layer.v, self.positions)
        return layer.k[:rows], layer.v[:rows]

    def get_mask_sizes(self, _query_length: int) -> tuple[int, int]:
        """The whole slot."""
        return self.get_max_length(), 0

    def get_seq_length(self) -> int:
        """All but the token that comes."""
        return self.get_max_length() - 1


class MaskedPrefill:
    """Prompts into slots, one forward each; none is taken in parts."""

    def __init__(self, model: nn.Module, kv: KVCache) -> None:
        self.forward = ModelForward(model, ours=False)
        self.kv = kv

    def __call__(self, segments: Sequence[Segment], tokens: Tensor, keep: Sequence[int]) -> Tensor:
        """Logits [len(keep), V] at places `keep` of the row [T] that the segments make."""
        found, first = [], 0
        for segment in segments:
            last = first + segment.length
            prompt = tokens[None, first:last]
            places = torch.arange(segment.length, device=tokens.device)[None]
            output = self.forward(
                decoding=False,
                attention_mask=torch.ones_like(places),
                past_key_values=Cache(layers=[PromptLayer(layer, segment.slot) for layer in self.kv.layers]),
                **{"inputs_embeds" if tokens.is_floating_point() else "input_ids": prompt},
                **self.forward.positional(places),
            )
            found += [output.logits[0, place - first] for place in keep if first <= place < last]
            first = last
        return torch.stack(found)


class MaskedStep:
    """A `StepForward`: tokens int64 [B], positions int32 [B] to logits [B, V], appending to the cache."""

    def __init__(self, model: nn.Module, kv: KVCache) -> None:
        self.forward = ModelForward(model, ours=False)
        self.kv = kv
        self.places = torch.arange(kv.capacity, device=kv.layers[0].k.device)

    def __call__(self, tokens: Tensor, positions: Tensor) -> Tensor:
        output = self.forward(
            decoding=True,
            input_ids=tokens[:, None],
            attention_mask=(self.places <= positions[:, None]).long(),
            past_key_values=Cache(layers=[WholeSlotLayer(layer, positions) for layer in self.kv.layers]),
            **self.forward.positional(positions.long()[:, None]),
        )
        logits: Tensor = output.logits[:, -1]
        return logits
