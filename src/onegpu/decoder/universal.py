"""The universal way: prompts and steps through Transformers' own layers, attention over our slots.

prefill   prompts joined in one row [1, T] without padding, positions restarting
step      tokens [B], positions [B] -> logits [B, V]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from onegpu.attention.causal_interface import mask_with
from onegpu.decoder.cache import KVCache
from onegpu.decoder.forward import ModelForward
from onegpu.decoder.views import DecodeView, HostDecodeView, PrefillView, Segment, slot_cache

__all__ = ["PrefillInputs", "UniversalPrefill", "UniversalStep"]


@dataclass(frozen=True, slots=True)
class PrefillInputs:
    """What a row of prompts is, beside its tokens: its view of the slots, positions [1, T], places to keep."""

    view: PrefillView
    position_ids: Tensor
    wanted: Tensor


class UniversalPrefill:
    """Prompts into slots. `view` is the last one used, for what the layers asked of it."""

    def __init__(self, model: nn.Module, kv: KVCache) -> None:
        self.forward = ModelForward(model, ours=True)
        self.kv = kv
        self.view: PrefillView | None = None

    def __call__(self, segments: Sequence[Segment], tokens: Tensor, keep: Sequence[int]) -> Tensor:
        """Logits [len(keep), V] at places `keep` of a row.

        Args:
            segments: what the row is made of, in order.
            tokens: ids int64 [T], or embeddings [T, hidden].
        """
        return self.run(tokens, self.inputs(segments, keep, tokens.device))

    def inputs(self, segments: Sequence[Segment], keep: Sequence[int], device: torch.device) -> PrefillInputs:
        """The device's side of a row, copied there without waiting."""
        places = [place for segment in segments for place in range(segment.start, segment.end)]
        return PrefillInputs(
            view=PrefillView(self.kv, tuple(segments), device),
            position_ids=torch.tensor(places).to(device, non_blocking=True)[None],
            wanted=torch.tensor(list(keep)).to(device, non_blocking=True),
        )

    def run(self, tokens: Tensor, inputs: PrefillInputs) -> Tensor:
        """The same, all of whose inputs are on the device."""
        view = self.view = inputs.view
        slim = {"logits_to_keep": inputs.wanted} if "logits_to_keep" in self.forward.names else {}
        name = "inputs_embeds" if tokens.is_floating_point() else "input_ids"
        output = self.forward(
            decoding=False,
            attention_mask=mask_with(view, tokens.device),
            past_key_values=slot_cache(view, 0),
            **{name: tokens[None]},
            **self.forward.positional(inputs.position_ids),
            **slim,
        )
        logits: Tensor = output.logits[0]
        return logits if slim else logits[inputs.wanted]


class UniversalStep:
    """A `StepForward`: tokens int64 [B], positions int32 [B] to logits [B, V], appending to the cache."""

    def __init__(self, model: nn.Module, kv: KVCache) -> None:
        self.forward = ModelForward(model, ours=True)
        self.kv = kv
        self.view: DecodeView | None = None

    def __call__(self, tokens: Tensor, positions: Tensor) -> Tensor:
        make = HostDecodeView if tokens.device.type == "cpu" else DecodeView
        view = self.view = make(self.kv, positions)
        output = self.forward(
            decoding=True,
            input_ids=tokens[:, None],
            attention_mask=mask_with(view, tokens.device),
            past_key_values=slot_cache(view, self.kv.capacity - 1),
            **self.forward.positional(positions.long()[:, None]),
        )
        logits: Tensor = output.logits[:, -1]
        return logits
