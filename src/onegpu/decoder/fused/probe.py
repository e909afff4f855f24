"""One token through the plain model, watched: what its modules pass to each other, and what they ask of attention.

Attention over a single key gives that key's value whatever the query is. So hidden states do not depend on the token's
position, and two probes at different positions show what positions do to queries and keys, and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from onegpu.attention.causal_interface import CacheView, mask_with
from onegpu.decoder.forward import ModelForward
from onegpu.nn.definition import by_definition

__all__ = ["AttentionCall", "ModuleCall", "Probe", "watch", "watched"]


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """What one layer handed to attention: q [1, Hq, 1, D], k [1, Hkv, 1, D], v, and its numbers."""

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    window: int | None
    softcap: float | None
    sinks: Tensor | None


@dataclass(frozen=True, slots=True)
class ModuleCall:
    """One call of a module: its first argument, its output or the first part of it."""

    module: nn.Module
    given: Tensor
    output: Tensor


class RecordingView(CacheView):
    """Notes what it is asked and answers with the values, as attention over one key does."""

    def __init__(self) -> None:
        self.calls: list[AttentionCall] = []

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
        self.calls.append(AttentionCall(query, key, value, scale, window, softcap, sinks))
        return value.repeat_interleave(query.shape[1] // value.shape[1], dim=1).transpose(1, 2)


@dataclass(slots=True)
class Probe:
    """What a forward of one token showed: the calls of watched modules in order, attention's, and the logits [1, V]."""

    logits: Tensor
    attention: list[AttentionCall]
    calls: list[ModuleCall] = field(default_factory=list)

    def of(self, module: nn.Module) -> ModuleCall | None:
        """The one call of a module; None if it was called never or more than once."""
        found = [call for call in self.calls if call.module is module]
        return found[0] if len(found) == 1 else None


@contextmanager
def watched(modules: list[nn.Module], calls: list[ModuleCall]) -> Iterator[None]:
    """Note the calls of `modules` for a while."""

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values()), None))
        first = output[0] if isinstance(output, tuple) else output
        if isinstance(given, Tensor) and isinstance(first, Tensor):
            calls.append(ModuleCall(module, given, first))

    handles = [module.register_forward_hook(note, with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def watch(model: nn.Module, modules: list[nn.Module], token: int, position: int, device: torch.device) -> Probe:
    """Run one token at `position` through the plain model, noting the calls of `modules`."""
    forward = ModelForward(model, ours=True)
    view = RecordingView()
    calls: list[ModuleCall] = []
    place = torch.full((1, 1), position, device=device)
    with torch.no_grad(), by_definition(model), watched(modules, calls):
        output = forward(
            decoding=True,
            input_ids=torch.full((1, 1), token, device=device),
            attention_mask=mask_with(view, device),
            **forward.positional(place),
        )
    return Probe(output.logits[:, -1], view.calls, calls)
