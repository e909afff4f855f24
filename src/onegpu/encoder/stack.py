"""One stack of layers of a model, and the four places where we stand in it.

    tower   the innermost Transformers model around the layers: which attention it uses is set for one forward; the
            mask is read here already, where that was proved to be the one that the layers get
    owner   the module that runs the layers one after another: a run begins at its entrance, ends at its exit
    layer   its forward is taken over: unpadded tokens go in, or the call is noted down to be run later
    inside  attention and bias of some architectures (`adapters`), fused parts (`fuse`)

and, before the layers, the tower's embeddings, which may be put off until padding is out of the way (`embeddings`).

Each place is a method set on one module (`calls`). At rest there is nothing else: class, config, weights and state dict
are the plain model's.
"""

from __future__ import annotations

import inspect
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from onegpu.attention.interface import ADDITIVE, IMPLEMENTATION, register
from onegpu.attention.unpadded import UnpaddedBatch
from onegpu.encoder.adapters import OWN_ATTENTION, adapters_for
from onegpu.encoder.arena import Arena, EarlyBatch
from onegpu.encoder.calls import MethodCall
from onegpu.encoder.embeddings import EmbeddingCall, LateEmbedding, TouchedError
from onegpu.encoder.graphs import GraphCache
from onegpu.encoder.options import EncoderOptions
from onegpu.encoder.run import Learned, Run, pad_output
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
    last_batch: UnpaddedBatch | None = None  # of the forward under way, once its layers are done
    wants_states: bool = False  # this forward is asked for every layer's hidden states
    early: EarlyBatch | None = None  # the batch of this forward, begun before the embeddings
    late: LateEmbedding | None = None  # the embeddings of this forward, not yet made
    embeddings: EmbeddingCall | None = None
    embeds_late: bool = False  # proved that embeddings may be put off
    passes_mask_on: bool = False  # proved that the layers' mask is the tower's own
    probe: Tensor | None = None  # the mask of a proof
    is_proving: bool = False
    implementation: str = IMPLEMENTATION

    def install(self) -> None:
        """Set the methods."""
        register()
        own = any(type(m).__name__ in OWN_ATTENTION for layer in self.layers for m in layer.modules())
        self.implementation = ADDITIVE if own else IMPLEMENTATION
        for call in (*(LayerCall(layer, self) for layer in self.layers), *adapters_for(self)):
            self.add(call)
        embeddings = getattr(self.tower, "embeddings", None)
        if isinstance(embeddings, nn.Module) and self.owner is not embeddings and EmbeddingCall.fits(embeddings):
            self.embeddings = EmbeddingCall(embeddings, self)
            self.add(self.embeddings)
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
        self.graphs.arena = None
        self.calls = []

    def parts(self) -> list[nn.Module]:
        """All modules that graphs are captured from."""
        return self.layers if self.embeddings is None else [*self.layers, self.embeddings.module]

    def why_plain(self, kwargs: dict[str, Any]) -> str | None:
        """A reason to let this forward be the plain model's, as far as the arguments tell it."""
        if not self.enabled:
            return "switched off"
        if self.layers[0].training:
            return "the model is in training mode"
        config = getattr(self.tower, "config", None)
        if kwargs.get("output_attentions", getattr(config, "output_attentions", False)):
            return "output_attentions was asked for"
        if kwargs.get("past_key_values") is not None:
            return "a cache was given"
        return None

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The tower's arguments, the mask a bool one that is being read already, where that can be.

        What is begun here is found by the first layer, if the mask it gets is this very one.
        """
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        if not isinstance(mask, Tensor) or not self.can_begin(mask):
            return args, kwargs
        real = mask.to(torch.bool)
        self.early = self.graphs.arena_on(real.device).begin(real)
        if "attention_mask" in kwargs:
            return args, {**kwargs, "attention_mask": real}
        return (args[0], real, *args[2:]), kwargs

    def can_begin(self, mask: Tensor) -> bool:
        """Whether this forward will be one of the graphs', as far as can be told before it."""
        if mask.dim() != 2 or not Arena.fits(mask):
            return False
        if not self.passes_mask_on or self.learned is None or not self.learned.chained or self.hint is not None:
            return False
        if self.wants_states or not self.options.graphs or self.graphs.refused or torch.is_grad_enabled():
            return False
        first = next(self.layers[0].parameters(), None)
        if first is None or first.device != mask.device or torch.is_autocast_enabled(mask.device.type):
            return False
        return mask.device.type == "cuda" or self.graphs.works_anywhere


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
        flags = (kwargs.get("output_hidden_states"), getattr(stack.tower.config, "output_hidden_states", False))
        stack.wants_states = bool(flags[1] if flags[0] is None else flags[0])
        try:
            for config, _ in before:
                config._attn_implementation_internal = stack.implementation
            stack.entered = True
            output = self.forward(args, kwargs)
            return output if stack.last_batch is None else pad_output(output, stack.last_batch)
        finally:
            stack.entered, stack.wants_states = False, False
            stack.run = stack.early = stack.late = stack.last_batch = None
            for config, implementation in before:
                config._attn_implementation_internal = implementation

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The plain forward of the tower; anew, with embeddings where they were, if someone looked for them there."""
        stack = self.stack
        args_now, kwargs_now = stack.begin(args, kwargs)
        try:
            output = self.plain(*args_now, **kwargs_now)
            if stack.late is None or stack.late.is_settled:
                return output
        except TouchedError:
            pass
        stack.embeds_late = False
        stack.run = stack.early = stack.late = stack.last_batch = None
        return self.plain(*args, **kwargs)


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
        if kwargs.get("output_hidden_states"):
            stack.wants_states = True
        try:
            output = run.finish(self.plain(*args, **kwargs))
            stack.last_batch = run.batch if stack.wants_states and not run.is_plain else None
            return output
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
