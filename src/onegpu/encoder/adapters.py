"""What some architectures need beside the common way: attention of their own, and biases by relative position.

Five attention classes of the BERT family compute scores themselves instead of asking Transformers' attention
interface. They are alike but for the names of their products and what they return, so each is a row here. They run
their own code whenever they are given a mask, and ours when they are given an `AttentionView`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from onegpu.attention.interface import attend
from onegpu.attention.unpadded import AttentionView, RelativeBias
from onegpu.encoder.calls import MethodCall

if TYPE_CHECKING:
    from onegpu.encoder.stack import Stack

__all__ = ["OWN_ATTENTION", "AttentionCall", "BiasCall", "adapters_for"]

# A bias table is made for a multiple of this many columns, so that few sizes occur.
SPAN_STEP: Final = 64


@dataclass(frozen=True, slots=True)
class OwnAttention:
    """How one class names its three products, and what it returns around the result."""

    products: tuple[str, str, str] = ("query", "key", "value")
    output: str | None = None
    returns: Callable[[Tensor], tuple[Any, ...]] = lambda out: (out, None)


OWN_ATTENTION: Final = {
    "MPNetSelfAttention": OwnAttention(("q", "k", "v"), "o", lambda out: (out,)),
    "RemBertSelfAttention": OwnAttention(),
    "RoFormerSelfAttention": OwnAttention(),
    "TapasSelfAttention": OwnAttention(returns=lambda out: (out,)),
    "ViltSelfAttention": OwnAttention(returns=lambda out: (out,)),
}


class AttentionCall(MethodCall):
    """The forward of one attention module of `OWN_ATTENTION`: hidden [1, T, hidden] to the same."""

    def __call__(self, hidden_states: Tensor, attention_mask: Any = None, *args: Any, **kwargs: Any) -> Any:
        if self.removed or not isinstance(attention_mask, AttentionView):
            return self.plain(hidden_states, attention_mask, *args, **kwargs)
        row = OWN_ATTENTION[type(self.module).__name__]
        module: Any = self.module
        shape = (*hidden_states.shape[:-1], -1, module.attention_head_size)
        query, key, value = (getattr(module, name)(hidden_states).view(shape).transpose(1, 2) for name in row.products)
        bias = kwargs.get("position_bias")
        extra = args[0] if args else None
        if isinstance(extra, RelativeBias):
            bias = extra
        angles = kwargs.get("sinusoidal_pos", extra if isinstance(extra, Tensor) else None)
        if angles is not None:
            if module.rotary_value:
                query, key, value = module.apply_rotary_position_embeddings(angles, query, key, value)
            else:
                query, key = module.apply_rotary_position_embeddings(angles, query, key)
        out = attend(query, key, value, attention_mask, module.attention_head_size**-0.5, bias).flatten(2)
        return row.returns(out if row.output is None else getattr(module, row.output)(out))


def bias_table(row: Tensor, column: Tensor) -> Tensor:
    """[H, 2 * S - 1] by distance, from the bias of query 0 to all keys [H, S] and of all queries to key 0 [H, S]."""
    return torch.cat([column.flip(1)[:, :-1], row], dim=1).float().contiguous()


class BiasCall(MethodCall):
    """A method that makes a bias [1, H, S, S] from relative positions: on unpadded tokens, a table by distance.

    T5's `compute_bias(query_length, key_length, ...)` is asked with the number of tokens, MPNet's
    `compute_position_bias(hidden, ...)` before the layers, with the padded batch.
    """

    def __init__(self, module: nn.Module, name: str, stack: Stack) -> None:
        super().__init__(module, name)
        self.stack = stack

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        run = self.stack.run
        if self.removed or run is None or run.is_plain:
            return self.plain(*args, **kwargs)
        if self.name == "compute_position_bias":
            hidden: Tensor = args[0]
            span = round_up(hidden.shape[1], SPAN_STEP)
            square = self.plain(hidden.new_empty(1, span, 1))[0]
            return RelativeBias(bias_table(square[:, 0], square[:, :, 0]), lambda: self.plain(*args, **kwargs))
        if run.pending is None:
            return self.plain(*args, **kwargs)
        span = round_up(run.seqlen, SPAN_STEP)
        device = kwargs.get("device")
        row = self.plain(1, span, device=device)[0, :, 0]
        column = self.plain(span, 1, device=device)[0, :, :, 0]
        return RelativeBias(bias_table(row, column), lambda: self.plain(*args, **kwargs))


def round_up(number: int, step: int) -> int:
    return (number + step - 1) // step * step


def adapters_for(stack: Stack) -> list[MethodCall]:
    """The methods to set for this stack, not yet set."""
    calls: list[MethodCall] = []
    if hasattr(stack.owner, "compute_position_bias"):
        calls.append(BiasCall(stack.owner, "compute_position_bias", stack))
    for layer in stack.layers:
        for module in layer.modules():
            if type(module).__name__ in OWN_ATTENTION:
                calls.append(AttentionCall(module))
            if hasattr(module, "compute_bias") and isinstance(
                getattr(module, "relative_attention_bias", None), nn.Embedding
            ):
                calls.append(BiasCall(module, "compute_bias", stack))
    return calls
