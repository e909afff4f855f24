"""One stack of layers of a model, and the four places where we stand in it.

    tower   the innermost Transformers model around the layers: which attention it uses is set for one forward
    owner   the module that runs the layers one after another: a run begins at its entrance, ends at its exit
    layer   its forward is taken over: unpadded tokens go in, or the call is noted down to be run later
    inside  attention and bias of some architectures (`adapters`), fused parts (`fuse`)

Each place is a method set on one module (`calls`). At rest there is nothing else: class, config, weights and state dict
are the plain model's.
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
    enabled: bool = True
    entered: bool = False  # inside the tower's forward, and not on the plain way
    ran_unpadded: bool = False  # the last forward did
    implementation: str = IMPLEMENTATION

    def install(self) -> None:
        """Set the methods."""
        register()
        own = any(type(m).__name__ in OWN_ATTENTION for layer in self.layers for m in layer.modules())
        self.implementation = ADDITIVE if own else IMPLEMENTATION
        for call in (*(LayerCall(layer, self) for layer in self.layers), *adapters_for(self)):
            self.add(call)
        self.add(OwnerCall(self.owner, self))
        self.add(TowerCall(self.tower, self))

    def add(self, call: MethodCall) -> None:
        """Set one method; `remove` takes it away."""
        call.install()
        self.calls.append(call)

    def remove(self) -> None:
        """Take every method away again."""
        for call in reversed(self.calls):
            call.remove()
        self.graphs.clear()
        self.calls = []

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


class TowerCall(MethodCall):
    """The forward of the tower: refuse what cannot fit, and set the attention for its time, also if it fails.

    A method, not a hook: some callers, sentence-transformers among them, call `forward` past the hooks.
    """

    def __init__(self, module: nn.Module, stack: Stack) -> None:
        super().__init__(module)
        self.stack = stack
        self.configs = configs_of(module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        stack = self.stack
        if self.removed:
            return self.plain(*args, **kwargs)
        check_shapes(args, kwargs)
        reason = stack.why_plain(kwargs)
        if reason is not None:
            stack.outcomes[f"plain: {reason}"] += 1
            return self.plain(*args, **kwargs)
        before = [(config, config._attn_implementation_internal) for config in self.configs]
        try:
            for config, _ in before:
                config._attn_implementation_internal = stack.implementation
            stack.entered = True
            return self.plain(*args, **kwargs)
        finally:
            stack.entered, stack.run = False, None
            for config, implementation in before:
                config._attn_implementation_internal = implementation


def configs_of(tower: nn.Module) -> list[Any]:
    """The configs that attention modules of a tower look into, each once."""
    found = {id(config): config for part in tower.modules() if (config := getattr(part, "config", None)) is not None}
    return [config for config in found.values() if hasattr(config, "_attn_implementation_internal")]


class OwnerCall(MethodCall):
    """The forward of the module that runs the layers: a run begins, and what is unpadded is padded again, once."""

    def __init__(self, module: nn.Module, stack: Stack) -> None:
        super().__init__(module)
        self.stack = stack

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        stack = self.stack
        if self.removed or not stack.entered:
            return self.plain(*args, **kwargs)
        stack.run = run = Run(stack)
        try:
            return run.finish(self.plain(*args, **kwargs))
        finally:
            stack.run = None


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
