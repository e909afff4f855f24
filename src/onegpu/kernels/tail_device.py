# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""The tail of a product (`onegpu.kernels.tail`) for Triton kernels, and the tail alone for products of other libraries.

Everything is float32; erf and exp are the device's own, within a few units of the last place of float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from onegpu.kernels.launch import on_device_of
from onegpu.kernels.tail import out_features

__all__ = ["activate", "tail_of"]

BLOCK = 1024


@triton.jit
def activate(t, ACTIVATION: tl.constexpr):
    """act(t) of a float32 t; ACTIVATION is one of `tail.ACTIVATIONS`, or None."""
    if ACTIVATION == "silu":
        t = t / (1.0 + tl.exp(-t))
    elif ACTIVATION == "gelu":
        t = 0.5 * t * (1.0 + tl.erf(t * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # 0.5 * (1 + tanh(z)) is the logistic function of 2 z.
        t = t / (1.0 + tl.exp(t * (-1.5957691216057308 - 0.07135481627159471 * t * t)))
    elif ACTIVATION == "relu":
        # NaN stays.
        t = tl.where(t < 0.0, 0.0, t)
    return t


@triton.jit(do_not_specialize=["N_OUT"])
def tail_kernel(
    t_ptr,  # float32 [M, N]
    stats_ptr,  # float32 [N], read if SCALED
    bias_ptr,  # [N], read if HAS_BIAS
    residual_ptr,  # [M, N_OUT], read if HAS_RESIDUAL
    stride_rm,
    y_ptr,  # [M, N_OUT]
    N_OUT,
    factor,
    SCALED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    m = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = n < N_OUT
    row_ptr = t_ptr + m * N_OUT * (2 if GATED else 1)
    y = tl.load(row_ptr + n, mask=mask, other=0.0)
    if SCALED:
        y *= tl.load(stats_ptr + n, mask=mask, other=0.0) * factor
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=mask, other=0.0).to(tl.float32)
    y = activate(y, ACTIVATION)
    if GATED:
        up = tl.load(row_ptr + N_OUT + n, mask=mask, other=0.0)
        if SCALED:
            up *= tl.load(stats_ptr + N_OUT + n, mask=mask, other=0.0) * factor
        if HAS_BIAS:
            up += tl.load(bias_ptr + N_OUT + n, mask=mask, other=0.0).to(tl.float32)
        y *= up
    if HAS_RESIDUAL:
        y += tl.load(residual_ptr + m * stride_rm + n, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + m * N_OUT + n, y.to(y_ptr.dtype.element_ty), mask=mask)


def tail_of(
    y: Tensor,
    t: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    gated: bool,
    row_stats: Tensor | None = None,
    factor: float = 1.0,
) -> None:
    """Write the tail of t * row_stats * factor + bias into y.

    Args:
        y: [M, N], or [M, N/2] if gated; contiguous.
        t: float32 [M, N], contiguous.
        bias, row_stats: [N], contiguous; or None.
        residual: as y, elements of a row side by side; or None.
    """
    M, N = t.shape
    N_OUT = out_features(N, gated)
    with on_device_of(t):
        # Launches take 65,535 rows at most in this dimension of the grid.
        for first in range(0, M, 65535):
            part = slice(first, min(first + 65535, M))
            tail_kernel[(triton.cdiv(N_OUT, BLOCK), part.stop - part.start)](
                t[part],
                t if row_stats is None else row_stats,
                t if bias is None else bias,
                t if residual is None else residual[part],
                0 if residual is None else residual.stride(0),
                y[part],
                N_OUT,
                factor,
                SCALED=row_stats is not None,
                HAS_BIAS=bias is not None,
                HAS_RESIDUAL=residual is not None,
                ACTIVATION=activation,
                GATED=gated,
                BLOCK_N=BLOCK,
                num_warps=4,
            )


def float32_product(rows: Tensor, weight: Tensor) -> Tensor:
    """rows @ weight.T as the vendor's library sums it, in float32: [M, N]."""
    if rows.dtype == torch.float32 or not rows.is_cuda:
        return rows.float() @ weight.float().t()
    return torch.mm(rows, weight.t(), out_dtype=torch.float32)
