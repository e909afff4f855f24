"""y = tail(x @ W.T) for a 16-bit W: `gemv_rows` for few rows of x, the vendor's library for many.

The library's way also serves float32 x, and GPUs that have no tensor cores for `gemv_rows`. Where it cannot add the
tail itself, its float32 result goes through `tail_device.tail_of`, so that y is rounded once on every way.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from onegpu.kernels import gemv_rows
from onegpu.kernels.launch import capability
from onegpu.kernels.tail import out_features
from onegpu.kernels.tail_device import float32_product, tail_of

__all__ = ["few_rows", "linear_16bit"]

# Elements of a float32 product at a time: 256 MiB.
SCRATCH = 2**26
DOT_CAPABILITY = (8, 0)
# Without tensor cores in Triton, each row of x reads W again, out of L2.
ROWS_WITHOUT_DOT = 4


def linear_16bit(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    gated: bool = False,
    overlap: bool = False,
) -> Tensor:
    """Launcher of the operator `linear_16bit`; its arguments have been checked."""
    N, K = weight.shape
    rows = in_rows(x)
    M = rows.shape[0]
    y = torch.empty(M, out_features(N, gated), dtype=x.dtype, device=x.device)
    shape = (*x.shape[:-1], y.shape[1])
    if M == 0:
        return y.view(shape)
    weight = weight.detach()
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    bias = None if bias is None else bias.detach().contiguous()
    residual = None if residual is None else in_rows(residual)
    if few_rows(x.device, x.dtype) >= M:
        config = None if _has_dot(x.device) else gemv_rows.configure(1, N, K, 2)
        gemv_rows.multiply(y, rows, weight, None, bias, residual, activation, gated, overlap=overlap, config=config)
        return y.view(shape)
    if activation is None and residual is None and (bias is None or bias.dtype == x.dtype):
        return F.linear(rows, weight, bias).view(shape)
    if activation is None and residual is not None and bias is None:
        return torch.addmm(residual, rows, weight.t(), out=y).view(shape)
    step = max(1, SCRATCH // N)
    for first in range(0, M, step):
        part = slice(first, min(first + step, M))
        t = float32_product(rows[part], weight)
        tail_of(y[part], t, bias, None if residual is None else residual[part], activation, gated)
    return y.view(shape)


def few_rows(device: torch.device, dtype: torch.dtype) -> int:
    """Up to how many rows of x `gemv_rows` takes on a device; 0 for none."""
    if dtype == torch.float32:
        return 0
    return gemv_rows.MAX_ROWS if _has_dot(device) else ROWS_WITHOUT_DOT


def in_rows(x: Tensor) -> Tensor:
    """[..., K] as [M, K], elements of a row side by side."""
    rows = x.detach().reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def on_16_bytes(rows: Tensor) -> Tensor:
    """Rows of elements side by side, each on a 16-byte boundary."""
    if rows.stride(1) == 1 and rows.stride(0) % 8 == 0 and rows.data_ptr() % 16 == 0:
        return rows
    return rows.clone(memory_format=torch.contiguous_format)


def _has_dot(device: torch.device) -> bool:
    return torch.version.hip is not None or capability(device) >= DOT_CAPABILITY
