"""The layers as a list of calls, to be run over a batch, over a graph's buffers, or as the plain model would.

What only passes from call to call (T5's position bias) is a `Ref`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from onegpu.attention.unpadded import AttentionView, RelativeBias, UnpaddedBatch

if TYPE_CHECKING:
    from onegpu.encoder.stack import LayerCall

__all__ = ["Program", "Ref", "densified", "densify", "outside_tensors", "run_program", "substitute", "with_batch"]


@dataclass(frozen=True, slots=True)
class Ref:
    """Item `item` of what call number `call` returns."""

    call: int
    item: int


Program = list[tuple["LayerCall", dict[str, Any]]]


def run_program(program: Program, hidden: Tensor) -> Tensor:
    """The layers one after another, each with its arguments."""
    outs: list[Any] = []
    for call, rest in program:
        given = {name: outs[v.call][v.item] if isinstance(v, Ref) else v for name, v in rest.items()}
        out = call.plain(hidden, **given)
        outs.append(out)
        hidden = out[0] if isinstance(out, tuple) else out
    return hidden


def outside_tensors(program: Program) -> tuple[Tensor, ...]:
    """Every tensor the layers are given beside hidden states and batch, each once."""
    found: dict[int, Tensor] = {}

    def visit(value: Any) -> None:
        if isinstance(value, Tensor):
            found.setdefault(id(value), value)
        elif isinstance(value, RelativeBias):
            visit(value.table)
        elif isinstance(value, tuple):
            for part in value:
                visit(part)

    for _, rest in program:
        for value in rest.values():
            visit(value)
    return tuple(found.values())


def substitute(program: Program, buffers: dict[int, Tensor]) -> Program:
    """The same program over a graph's buffers."""

    def visit(value: Any) -> Any:
        if isinstance(value, Tensor):
            return buffers[id(value)]
        if isinstance(value, RelativeBias):
            return RelativeBias(buffers[id(value.table)], value.make_dense)
        if isinstance(value, tuple):
            return tuple(visit(part) for part in value)
        return value

    return [(call, {name: visit(value) for name, value in rest.items()}) for call, rest in program]


def with_batch(program: Program, batch: UnpaddedBatch | None, is_fixed: bool = False) -> Program:
    """The same program, its attention over this batch; `is_fixed` as a graph wants it."""
    if batch is None:
        return program
    views: dict[int, AttentionView] = {}

    def visit(value: Any) -> Any:
        if not isinstance(value, AttentionView):
            return value
        if id(value) not in views:
            views[id(value)] = replace(value, batch=batch, fixed=is_fixed or value.fixed)
        return views[id(value)]

    return [(call, {name: visit(value) for name, value in rest.items()}) for call, rest in program]


def densify(value: Any) -> Any:
    return value.dense() if isinstance(value, RelativeBias) else value


def densified(rest: dict[str, Any]) -> dict[str, Any]:
    """A layer's arguments as the plain model would have made them."""
    return {name: densify(value) for name, value in rest.items()}
