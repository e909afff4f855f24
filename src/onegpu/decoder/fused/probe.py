"""The plain model, watched: what its modules pass to each other, and what they ask of attention.

watch    one token in two rows at two positions. Attention over a single key gives that key's value whatever the query
         is. So hidden states do not depend on the token's position, and the rows show what positions do to queries and
         keys, and nothing else
noted    the first tokens of the first row of a forward that is made for something else
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

__all__ = ["AttentionCall", "ModuleCall", "PlainRun", "Probe", "noted", "watch", "watched"]


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """What one layer handed to attention: q [B, Hq, 1, D], k [B, Hkv, 1, D], v, and its numbers."""

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
    """What a forward of one token showed: the calls of watched modules in order, attention's, and the logits [B, V]."""

    logits: Tensor
    attention: list[AttentionCall]
    calls: list[ModuleCall] = field(default_factory=list)

    def of(self, module: nn.Module) -> ModuleCall | None:
        """The one call of a module; None if it was called never or more than once."""
        found = [call for call in self.calls if call.module is module]
        return found[0] if len(found) == 1 else None


@dataclass(frozen=True, slots=True)
class PlainRun:
    """The plain model on tokens [1, n]: logits [1, n, V], and the calls of its layers and what is directly in them."""

    tokens: Tensor
    logits: Tensor
    calls: dict[nn.Module, ModuleCall]


@contextmanager
def watched(modules: list[nn.Module], calls: list[ModuleCall]) -> Iterator[None]:
    """Note the calls of `modules` for a while."""

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given, first = given_to(args, kwargs), output[0] if isinstance(output, tuple) else output
        if isinstance(given, Tensor) and isinstance(first, Tensor):
            calls.append(ModuleCall(module, given, first))

    handles = [module.register_forward_hook(note, with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def noted(model: Any, shape: tuple[int, int], count: int) -> Iterator[dict[nn.Module, ModuleCall]]:
    """Note what a decoder's layers and its last norm are given and give in a forward of tokens [B, S] of this shape.

    Only the first `count` tokens of the first row are kept, [1, count, hidden]; what is of another shape is not noted.
    """
    calls: dict[nn.Module, ModuleCall] = {}

    def part(tensor: Tensor) -> Tensor | None:
        if tensor.shape[:2] == shape and tensor.dim() == 3:
            return tensor[:1, :count].clone()
        if tensor.dim() == 2 and tensor.shape[0] == shape[0] * shape[1]:
            return tensor[None, :count].clone()
        return None

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given, first = given_to(args, kwargs), output[0] if isinstance(output, tuple) else output
        if isinstance(given, Tensor) and isinstance(first, Tensor):
            kept = part(given), part(first)
            if kept[0] is not None and kept[1] is not None:
                calls[module] = ModuleCall(module, kept[0], kept[1])

    handles = [module.register_forward_hook(note, with_kwargs=True) for module in inner_modules(model)]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def inner_modules(model: Any) -> list[nn.Module]:
    """A decoder's layers, what is directly in them, and the norm behind; nothing where it is not made so."""
    try:
        decoder = model.get_decoder()
    except (AttributeError, NotImplementedError):
        return []
    layers, norm = getattr(decoder, "layers", None), getattr(decoder, "norm", None)
    if not isinstance(layers, nn.ModuleList) or not isinstance(norm, nn.Module):
        return []
    return [norm, *(module for layer in layers for module in (layer, *layer.children()))]


def given_to(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A module's input among its arguments."""
    return args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values()), None))


def watch(
    model: nn.Module, modules: list[nn.Module], token: int, positions: tuple[int, ...], device: torch.device
) -> Probe:
    """Run one token through the plain model, in a row for each position, noting the calls of `modules`."""
    forward = ModelForward(model, ours=True)
    view = RecordingView()
    calls: list[ModuleCall] = []
    places = torch.tensor(positions, device=device)[:, None]
    with torch.no_grad(), by_definition(model), watched(modules, calls):
        output = forward(
            decoding=True,
            input_ids=torch.full((len(positions), 1), token, device=device),
            attention_mask=mask_with(view, device),
            **forward.positional(places),
        )
    return Probe(output.logits[:, -1], view.calls, calls)
