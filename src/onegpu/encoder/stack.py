"""One stack of layers of a model, and the four places where we stand in it.

    tower   the innermost Transformers model around the layers: which attention it uses is set for one forward
    owner   the module that runs the layers one after another: a run begins at its entrance, ends at its exit
    layer   its forward is taken over: unpadded tokens go in, or the call is noted down to be run later
    inside  attention and bias of some architectures (`adapters`), fused parts (`fuse`)

At rest nothing but hooks and methods is there: class, config, weights and state dict are the plain model's.
"""

from __future__ import annotations

import inspect
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from onegpu.attention.interface import ADDITIVE, IMPLEMENTATION, register
from onegpu.attention.unpadded import UnpaddedBatch
from onegpu.encoder.adapters import OWN_ATTENTION, adapters_for
from onegpu.encoder.calls import MethodCall
from onegpu.encoder.graphs import GraphCache
from onegpu.encoder.options import EncoderOptions
from onegpu.encoder.run import Learned, Run
from onegpu.errors import ArgumentError

__all__ = ["LayerCall", "Stack"]


class LayerCall(MethodCall):
    """The forward of one layer. The first argument is the hidden states, whatever its name."""

    def __init__(self, module: nn.Module, stack: Stack) -> None:
        super().__init__(module)
        self.stack = stack
        self.names = list(inspect.signature(module.forward).parameters)

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The hidden states, and every other argument by name."""
        named = dict(zip(self.names, args, strict=False))
        named.update(kwargs)
        hidden = named.pop(self.names[0], None)
        return hidden, named

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        run = self.stack.run
        if self.removed or run is None:
            return self.plain(*args, **kwargs)
        return run.layer(self, args, kwargs)


@dataclass(slots=True, eq=False)
class Stack:
    """A layer stack and everything installed on it. `run` is the forward now under way, None at rest."""

    name: str
    tower: nn.Module
    owner: nn.Module
    layers: list[nn.Module]
    options: EncoderOptions
    first_token_matters: bool
    run: Run | None = None
    learned: Learned | None = None
    graphs: GraphCache = field(default_factory=GraphCache)
    hint: UnpaddedBatch | None = None  # the next batch, where the caller knows it
    outcomes: Counter[str] = field(default_factory=Counter)  # how each forward went, in words
    calls: list[MethodCall] = field(default_factory=list)
    fused: list[Any] = field(default_factory=list)
    handles: list[Any] = field(default_factory=list)
    enabled: bool = True
    saved: list[tuple[Any, Any]] = field(default_factory=list)

    def install(self) -> None:
        """Set hooks and methods."""
        register()
        self.calls = [*(LayerCall(layer, self) for layer in self.layers), *adapters_for(self)]
        for call in self.calls:
            call.install()
        self.handles = [
            self.tower.register_forward_pre_hook(TowerEntrance(self), with_kwargs=True),
            self.owner.register_forward_pre_hook(OwnerEntrance(self), with_kwargs=True),
            self.owner.register_forward_hook(OwnerExit(self), with_kwargs=True, always_call=True),
            self.tower.register_forward_hook(TowerExit(self), with_kwargs=True, always_call=True),
        ]

    def remove(self) -> None:
        """Take every hook and method away again."""
        for handle in self.handles:
            handle.remove()
        for call in reversed(self.calls):
            call.remove()
        self.graphs.clear()
        self.handles, self.calls = [], []

    @property
    def implementation(self) -> str:
        """The attention that a tower is given for the time of a forward."""
        own = any(type(m).__name__ in OWN_ATTENTION for layer in self.layers for m in layer.modules())
        return ADDITIVE if own else IMPLEMENTATION

    def why_plain(self, kwargs: dict[str, Any]) -> str | None:
        """A reason to let this forward be the plain model's, as far as the arguments tell it."""
        if not self.enabled:
            return "switched off"
        if self.layers[0].training:
            return "the model is in training mode"
        config = getattr(self.tower, "config", None)
        for flag in ("output_hidden_states", "output_attentions"):
            if kwargs.get(flag, getattr(config, flag, False)):
                return f"{flag} was asked for"
        if kwargs.get("past_key_values") is not None:
            return "a cache was given"
        return None


@dataclass(slots=True)
class TowerEntrance:
    """Before the tower: refuse what cannot fit, and set the attention for this forward."""

    stack: Stack

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stack = self.stack
        check_shapes(args, kwargs)
        reason = stack.why_plain(kwargs)
        if reason is not None:
            stack.outcomes[f"plain: {reason}"] += 1
            return
        name = stack.implementation
        seen: set[int] = set()
        for part in module.modules():
            config = getattr(part, "config", None)
            if id(config) not in seen and hasattr(config, "_attn_implementation_internal"):
                seen.add(id(config))
                stack.saved.append((config, config._attn_implementation_internal))
                config._attn_implementation_internal = name


def check_shapes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Ids and mask of one shape, as every tokenizer gives them."""
    ids = kwargs.get("input_ids", args[0] if args else None)
    mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
    if not isinstance(ids, Tensor) or not isinstance(mask, Tensor) or ids.is_floating_point():
        return
    if ids.dim() == mask.dim() == 2 and ids.shape != mask.shape and kwargs.get("past_key_values") is None:
        raise ArgumentError(
            f"attention_mask must have the shape of input_ids, {list(ids.shape)}; got {list(mask.shape)}",
            "pass the mask that the tokenizer returned with these ids",
        )


@dataclass(slots=True)
class TowerExit:
    """After the tower, also after an error: the config is as it was."""

    stack: Stack

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        while self.stack.saved:
            config, implementation = self.stack.saved.pop()
            config._attn_implementation_internal = implementation


@dataclass(slots=True)
class OwnerEntrance:
    """Before the layers: a run begins, unless the tower has chosen the plain way."""

    stack: Stack

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.stack.run = Run(self.stack) if self.stack.saved else None


@dataclass(slots=True)
class OwnerExit:
    """After the layers: what is unpadded is padded again, once."""

    stack: Stack

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        run, self.stack.run = self.stack.run, None
        if run is None or output is None:
            return None
        return run.finish(output)
