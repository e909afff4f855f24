"""What may follow a product in the same kernel: bias, activation or gated activation, residual; then one rounding.

    t = x @ W.T + bias                                   float32, [..., N]
    a = act(t[..., : N/2]) * t[..., N/2 :]               if gated
        act(t)                                           with an activation that is not gated
        t                                                without one
    y = round(a + residual)                              to the dtype of x, [..., N] or [..., N/2]

This is the definition in torch; `tail_device` says the same to Triton.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

from onegpu.errors import ArgumentError

__all__ = ["ACTIVATIONS", "apply_tail", "check_tail", "out_features"]

ACTIVATIONS: Final = ("silu", "gelu", "gelu_tanh", "relu")
FUNCTIONS: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda t: F.gelu(t, approximate="tanh"),
    "relu": F.relu,
}


def out_features(N: int, gated: bool) -> int:
    """Columns of y for a weight of N rows."""
    return N // 2 if gated else N


def check_tail(op: str, x: Tensor, N: int, residual: Tensor | None, activation: str | None, gated: bool) -> None:
    """Refuse a tail that does not fit a product of x [..., K] and a weight of N rows.

    Raises:
        ArgumentError: an unknown activation, gating without one or of an odd N, a residual of another shape or dtype.
    """
    if activation is not None and activation not in ACTIVATIONS:
        known = ", ".join(repr(name) for name in ACTIVATIONS)
        raise ArgumentError(f"{op}: activation must be None or one of {known}; got {activation!r}")
    if gated and activation is None:
        raise ArgumentError(f"{op}: gated needs an activation; got None")
    if gated and N % 2:
        raise ArgumentError(f"{op}: gated needs an even number of rows, gate then up; got {N}")
    if residual is None:
        return
    expected = (*x.shape[:-1], out_features(N, gated))
    if residual.dtype != x.dtype or residual.shape != expected:
        raise ArgumentError(
            f"{op}: residual must be {x.dtype} {list(expected)}, like the result; "
            f"got {residual.dtype} {list(residual.shape)}"
        )


def apply_tail(t: Tensor, residual: Tensor | None, activation: str | None, gated: bool, dtype: torch.dtype) -> Tensor:
    """y of the definition above, from a float32 t that has its bias already.

    Args:
        t: float32 [..., N].
        residual: [..., N], or [..., N/2] if gated; or None.
        activation: one of `ACTIVATIONS`, or None.
        dtype: of the result.
    """
    if activation is not None and gated:
        gate, up = t.chunk(2, dim=-1)
        t = FUNCTIONS[activation](gate) * up
    elif activation is not None:
        t = FUNCTIONS[activation](t)
    if residual is not None:
        t = t + residual
    return t.to(dtype)
