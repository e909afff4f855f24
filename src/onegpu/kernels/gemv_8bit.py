"""y = tail(x @ (codes * row_stats / 127).T), x in 16 bit: the weight-only way of LLM.int8() at few rows.

Codes are exact in bfloat16 and float16, so every way multiplies them as they are and scales float32 sums.

few     `gemv_int8` on NVIDIA, up to 32 rows, where rows of codes lie on 16 bytes
more    `gemm_8bit` on Hopper: W widened on its way into the tensor cores
else    up to SPLIT_ROWS `gemv_rows`, which reads W once for every 64 rows; above, rows of W widened in scratch memory,
        then the vendor's library; also for float32 x
"""

from __future__ import annotations

import torch
from torch import Tensor

from onegpu.formats.rowwise import INVERSE_127
from onegpu.kernels import gemv_rows
from onegpu.kernels.gemm_codes import gemm_8bit, why_not_8bit, why_not_gemm
from onegpu.kernels.gemm_codes_config import least_rows
from onegpu.kernels.gemv_16bit import few_rows, in_rows, on_16_bytes
from onegpu.kernels.gemv_int8 import gemv_int8, why_not_gemv_int8, why_not_rows
from onegpu.kernels.gemv_int8_config import MAX_ROWS, MOST_ROWS
from onegpu.kernels.tail import out_features
from onegpu.kernels.tail_device import float32_product, tail_of

__all__ = ["linear_8bit_rows"]

# Reading int8 weights four times is quicker than once and writing and reading them in 16 bit.
SPLIT_ROWS = 256
# Widened weights, and elements of a float32 product, at a time.
SCRATCH = 2**26


def linear_8bit_rows(
    x: Tensor,
    codes: Tensor,
    row_stats: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    gated: bool = False,
    overlap: bool = False,
) -> Tensor:
    """Launcher of the operator `linear_8bit_rows`; its arguments have been checked."""
    N, K = codes.shape
    rows = in_rows(x)
    M = rows.shape[0]
    y = torch.empty(M, out_features(N, gated), dtype=x.dtype, device=x.device)
    shape = (*x.shape[:-1], y.shape[1])
    codes = codes if codes.stride(1) == 1 else codes.contiguous()
    row_stats = row_stats.contiguous()
    bias = None if bias is None else bias.detach().contiguous()
    residual = None if residual is None else in_rows(residual)
    if M == 0:
        return y.view(shape)
    if takes_gemv(rows, codes):
        gemv_int8(y, on_16_bytes(rows), codes, row_stats, bias, residual, activation, gated, overlap=overlap)
        return y.view(shape)
    if takes_gemm(rows, codes):
        gemm_8bit(
            y, on_16_bytes(rows), codes, row_stats, bias,
            residual=residual, activation=activation, gated=gated, overlap=overlap,
        )  # fmt: skip
        return y.view(shape)
    limit = few_rows(x.device, x.dtype)
    at_once = limit if 0 < M <= limit * (SPLIT_ROWS // gemv_rows.MAX_ROWS) else max(1, SCRATCH // N)
    for first in range(0, M, at_once):
        part = slice(first, min(first + at_once, M))
        added = None if residual is None else residual[part]
        if at_once == limit:
            config = None if limit == gemv_rows.MAX_ROWS else gemv_rows.configure(1, N, K, 1)
            gemv_rows.multiply(
                y[part], rows[part], codes, row_stats, bias, added, activation, gated, overlap=overlap, config=config
            )
        else:
            t = _product(rows[part], codes)
            tail_of(y[part], t, bias, added, activation, gated, row_stats, INVERSE_127)
    return y.view(shape)


def takes_gemv(rows: Tensor, codes: Tensor) -> bool:
    """Whether `gemv_int8` runs, and is quicker than what else there is."""
    M = rows.shape[0]
    if M > MAX_ROWS or why_not_gemv_int8(rows.device, rows.dtype) is not None or why_not_rows(codes) is not None:
        return False
    return M <= MOST_ROWS or not runs_gemm(rows, codes)


def takes_gemm(rows: Tensor, codes: Tensor) -> bool:
    """Whether `gemm_8bit` runs, and is quicker than `gemv_rows`."""
    return rows.shape[0] >= least_rows(codes.shape[0], codes.shape[1], 8) and runs_gemm(rows, codes)


def runs_gemm(rows: Tensor, codes: Tensor) -> bool:
    return why_not_gemm(rows.device, rows.dtype) is None and why_not_8bit(codes) is None


def _product(rows: Tensor, codes: Tensor) -> Tensor:
    """rows @ codes.T, float32 [M, N]; codes widened to the dtype of x, some rows at a time."""
    N, K = codes.shape
    step = max(1, SCRATCH // K)
    if step >= N:
        return float32_product(rows, codes.to(rows.dtype))
    t = torch.empty(rows.shape[0], N, dtype=torch.float32, device=rows.device)
    for first in range(0, N, step):
        part = slice(first, min(first + step, N))
        t[:, part] = float32_product(rows, codes[part].to(rows.dtype))
    return t
