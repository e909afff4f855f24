# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""LLM.int8() on the device: y = x @ W.T + bias with int8 rows on both sides and outlier columns in the dtype of x.

    quantize_rows_kernel   x to int8 rows; the outlier columns, listed in device memory (see `quantize_rows`)
    clear_columns_kernel   code 0 in those columns
    int8_kernel            int8 products into int32, then a loop over the listed columns

On Hopper `gemm_int8` does the last two.

Up to `weight_only_rows` rows of 16-bit x, reading W is what takes time and x stays as it is (`gemv_8bit`): at least as
exact, outliers need no list, and a row's result does not depend on the others of its call. The threshold then has no
effect. More rows, and float32 x, are quantized; CPUs always quantize.

The loop's length is read on the device, so nothing waits for a count, any number of outliers is right, and a captured
graph replays with whatever outliers its input has then.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from onegpu.formats.rowwise import INVERSE_127
from onegpu.kernels.gemm_codes import why_not_8bit, why_not_gemm
from onegpu.kernels.gemm_int8 import gemm_int8, why_not_int8
from onegpu.kernels.gemv_8bit import linear_8bit_rows
from onegpu.kernels.gemv_16bit import few_rows
from onegpu.kernels.launch import NO_CONTRACTION, on_device_of
from onegpu.kernels.quantize_rows import clear_columns, quantize_and_list

__all__ = ["linear_8bit", "weight_only_rows"]

INVERSE_16129 = tl.constexpr(6.2000122852623463e-05)
INVERSE_127_32 = tl.constexpr(INVERSE_127)
# Outlier columns per step; twice as many would spill registers.
OUTLIER_TILE = 16
# Beyond, int8 tensor cores make up for the kernels that quantize x: later where `gemm_8bit` runs, and of small weights.
WEIGHT_ONLY_ROWS = 32
WEIGHT_ONLY_GEMM_ROWS = 192
WEIGHT_ONLY_SMALL_ROWS = 256
SMALL_WEIGHT = 2**24


@triton.jit
def add_exact_product(x, weight, acc):
    """acc + x @ weight with exact products: codes up to 127 fit every dtype, and float32 is three bfloat16 parts."""
    if x.dtype == tl.float32:
        code = weight.to(tl.bfloat16)
        high = x.to(tl.bfloat16)
        rest = tl.where(tl.abs(high.to(tl.float32)) < float("inf"), x - high.to(tl.float32), 0.0)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        acc = tl.dot(low, code, acc)
        acc = tl.dot(middle, code, acc)
        acc = tl.dot(high, code, acc)
    else:
        acc = tl.dot(x, weight.to(x.dtype), acc)
    return acc


@triton.jit
def int8_kernel(
    x_ptr,  # [M, K], the outlier columns are read
    stride_xm,
    x_codes_ptr,  # int8 [M, K]
    x_stats_ptr,  # float32 [M]
    columns_ptr,  # int32 [K], the first `count` entries
    count_ptr,  # int32 [1]
    codes_ptr,  # int8 [N, K]
    row_stats_ptr,  # float32 [N]
    bias_ptr,  # [N], read if HAS_BIAS
    y_ptr,  # [M, N]
    M,
    N,
    K,
    HAS_OUTLIERS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN: tl.constexpr,  # K is a multiple of BLOCK_K
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_O: tl.constexpr,  # outlier columns at a time
):
    m = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    a_ptrs = x_codes_ptr + m[:, None] * K + k[None, :]
    b_ptrs = codes_ptr + n[None, :] * K + k[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for start in range(0, K, BLOCK_K):
        if EVEN:
            a = tl.load(a_ptrs, mask=(m < M)[:, None], other=0)
            b = tl.load(b_ptrs, mask=(n < N)[None, :], other=0)
        else:
            a = tl.load(a_ptrs, mask=(m < M)[:, None] & (k < K - start)[None, :], other=0)
            b = tl.load(b_ptrs, mask=(n < N)[None, :] & (k < K - start)[:, None], other=0)
        acc = tl.dot(a, b, acc, out_dtype=tl.int32)
        a_ptrs += BLOCK_K
        b_ptrs += BLOCK_K

    x_stats = tl.load(x_stats_ptr + m, mask=m < M, other=0.0)
    row_stats = tl.load(row_stats_ptr + n, mask=n < N, other=0.0)
    y = acc.to(tl.float32) * x_stats[:, None] * row_stats[None, :] * INVERSE_16129
    if HAS_OUTLIERS:
        outliers = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        count = tl.load(count_ptr)
        for start in range(0, count, BLOCK_O):
            place = start + tl.arange(0, BLOCK_O)
            column = tl.load(columns_ptr + place, mask=place < count, other=0)
            mask = (m < M)[:, None] & (place < count)[None, :]
            x = tl.load(x_ptr + m[:, None] * stride_xm + column[None, :], mask=mask, other=0.0)
            mask = (n < N)[None, :] & (place < count)[:, None]
            weight = tl.load(codes_ptr + n[None, :] * K + column[:, None], mask=mask, other=0)
            outliers = add_exact_product(x, weight, outliers)
        y += outliers * row_stats[None, :] * INVERSE_127_32
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    tl.store(
        y_ptr + m[:, None] * N + n[None, :], y.to(y_ptr.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :]
    )


def weight_only_rows(x: Tensor, codes: Tensor) -> int:
    """Up to how many rows x stays as it is in a product with these codes."""
    if why_not_gemm(x.device, x.dtype) is None and why_not_8bit(codes) is None:
        return WEIGHT_ONLY_SMALL_ROWS if codes.numel() <= SMALL_WEIGHT else WEIGHT_ONLY_GEMM_ROWS
    return min(WEIGHT_ONLY_ROWS, few_rows(x.device, x.dtype))


def linear_8bit(x: Tensor, codes: Tensor, row_stats: Tensor, bias: Tensor | None, threshold: float = 0.0) -> Tensor:
    """Launcher of the operator `linear_8bit`; its arguments have been checked."""
    N, K = codes.shape
    rows = x.detach().reshape(-1, K)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    M = rows.shape[0]
    if weight_only_rows(x, codes) >= M:
        return linear_8bit_rows(x, codes, row_stats, bias)
    y = torch.empty(M, N, dtype=x.dtype, device=x.device)
    bias = None if bias is None else bias.detach().contiguous()
    row_stats = row_stats.contiguous()
    if why_not_int8(rows, codes) is None:
        x_codes, x_stats, listed = quantize_and_list(rows, threshold, lead=True)
        gemm_int8(y, rows, x_codes, x_stats, codes, row_stats, bias, listed)
        return y.view(*x.shape[:-1], N)
    x_codes, x_stats, listed = quantize_and_list(rows, threshold)
    has_outliers = listed is not None
    if listed is not None:
        clear_columns(x_codes, *listed)
    columns, count = listed or (x_stats, x_stats)
    narrow = (has_outliers and x.dtype == torch.float32) or torch.version.hip is not None
    tiles = _configure(M, narrow=narrow)
    with on_device_of(x):
        int8_kernel[(triton.cdiv(N, tiles["BLOCK_N"]), triton.cdiv(M, tiles["BLOCK_M"]))](
            rows,
            rows.stride(0),
            x_codes,
            x_stats,
            columns,
            count,
            codes.contiguous(),
            row_stats,
            y if bias is None else bias,
            y,
            M,
            N,
            K,
            HAS_OUTLIERS=has_outliers,
            HAS_BIAS=bias is not None,
            EVEN=K % tiles["BLOCK_K"] == 0,
            BLOCK_O=OUTLIER_TILE,
            **tiles,
            **NO_CONTRACTION,
        )
    return y.view(*x.shape[:-1], N)


def _configure(M: int, *, narrow: bool) -> dict[str, int]:
    """Tile sizes by rows of x. They fit the 99 KiB of shared memory of consumer cards, and 255 registers a thread.

    Args:
        narrow: half as wide, for the three parts of float32 outliers, and for AMD's 64 KiB of shared memory.
    """
    if M <= 16:
        return {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 4}
    if M <= 64:
        return {"BLOCK_M": triton.next_power_of_2(M), "BLOCK_N": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 3}
    if narrow:
        return {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 128, "num_warps": 8, "num_stages": 3}
    return {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 128, "num_warps": 8, "num_stages": 3}
