"""Embeddings of the real tokens only: the model's embedding module is called late, once it is known which they are.

On the way between embeddings and layers a model passes the padded embeddings on. It is given memory with nothing in it
yet; the stack knows that memory again, and computes the embeddings of the unpadded ids instead, inside the graph. Where
the forward turns out to be the plain model's, the memory is filled before anyone reads it. Whether a model really
passes it on untouched, a proof has shown beforehand, with NaN in place of nothing.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from onegpu.attention.unpadded import UnpaddedBatch
from onegpu.encoder.calls import MethodCall

if TYPE_CHECKING:
    from onegpu.encoder.arena import Arena
    from onegpu.encoder.stack import Stack

__all__ = ["EmbeddingCall", "LateEmbedding", "TouchedError"]

TOKEN_INPUTS: Final = ("input_ids", "token_type_ids", "position_ids")
KNOWN: Final = {*TOKEN_INPUTS, "inputs_embeds", "past_key_values_length"}


class TouchedError(Exception):
    """Someone used the embeddings before they were there: the forward has to begin anew, the plain way."""


@dataclass(slots=True, eq=False)
class LateEmbedding:
    """One call put off: what it was given, what was returned in its place, which inputs the arena holds."""

    call: EmbeddingCall
    given: dict[str, Any]
    placeholder: Tensor
    names: tuple[str, ...]
    arena: Arena
    is_settled: bool = False

    def fill(self) -> None:
        """Compute the padded embeddings after all."""
        if not self.is_settled:
            self.is_settled = True
            self.placeholder.copy_(self.call.plain(**self.given))

    def tokens(self, batch: UnpaddedBatch) -> Tensor:
        """Embeddings of the batch's tokens, [1, T, hidden], from what the arena holds by then."""
        given = {name: self.arena.inputs[name].index_select(0, batch.indices)[None] for name in self.names}
        if self.call.takes_positions and "position_ids" not in given:
            given["position_ids"] = batch.positions.long()[None]
        out: Tensor = self.call.plain(**given)
        return out


class EmbeddingCall(MethodCall):
    """The forward of a tower's embedding module: each token's own, from ids, types and positions."""

    def __init__(self, module: nn.Module, stack: Stack) -> None:
        super().__init__(module)
        self.stack = stack
        self.takes_positions = "position_ids" in self.__signature__.parameters
        self.seen: Tensor | None = None  # what it returned in this forward
        self.size = 0
        self.dtype: torch.dtype | None = None

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Takes ids, and nothing that is not known here."""
        names = inspect.signature(module.forward).parameters
        return "input_ids" in names and set(names) <= KNOWN

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        stack = self.stack
        if self.removed or not stack.entered:
            return self.plain(*args, **kwargs)
        late = self.put_off(args, kwargs) if stack.early is not None and stack.embeds_late else None
        if late is not None:
            stack.late = late
            return late.placeholder
        self.seen = self.plain(*args, **kwargs)
        return self.seen

    def learn(self, hidden: Any) -> None:
        """Called by the first layer: what the layers get is what was returned here, of this size and dtype."""
        if self.seen is not None and hidden is self.seen:
            self.size, self.dtype = hidden.shape[-1], hidden.dtype
        self.seen = None

    def put_off(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LateEmbedding | None:
        """The call as one to be made later; None where it is not one of the simple kind."""
        stack, early = self.stack, self.stack.early
        assert early is not None
        if self.dtype is None or any(m._forward_hooks or m._forward_pre_hooks for m in self.module.modules()):
            return None
        try:
            given = self.__signature__.bind(*args, **kwargs).arguments
        except TypeError:
            return None
        given = {name: value for name, value in given.items() if value is not None}
        ids = given.get("input_ids")
        if not isinstance(ids, Tensor) or ids.shape != early.mask.shape or ids.device != early.mask.device:
            return None
        if "inputs_embeds" in given or given.get("past_key_values_length", 0) != 0:
            return None
        inputs = {name: given[name] for name in TOKEN_INPUTS if name in given}
        if "position_ids" not in inputs and hasattr(self.module, "create_position_ids_from_input_ids"):
            module: Any = self.module
            inputs["position_ids"] = module.create_position_ids_from_input_ids(ids, module.padding_idx)
        for value in inputs.values():
            if not isinstance(value, Tensor) or value.dim() != 2 or value.is_floating_point():
                return None
            if value.shape[1] != ids.shape[1] or value.shape[0] not in (1, ids.shape[0]):
                return None
        arena = stack.graphs.arena_on(ids.device)
        for name, value in inputs.items():
            arena.hold(name, value, ids.shape)
        placeholder = torch.empty((*ids.shape, self.size), dtype=self.dtype, device=ids.device)
        if stack.is_proving:
            placeholder.fill_(torch.nan)
        return LateEmbedding(self, given, placeholder, tuple(inputs), arena)
