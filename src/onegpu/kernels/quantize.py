# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Weights to 4-bit codes, and rows to int8, on the device.

Each kernel does the float32 steps of its definition in `onegpu.formats` in the same order, with IEEE reciprocals, so
that the bytes are the same as on a CPU; only the sums of the scale search are added in another order.
NaN in a block gives it scale 0, NaN in a row makes the row's stat NaN, as the definitions have it.
"""

from __future__ import annotations

import functools
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from onegpu.formats.blockwise import FLOAT16_MAX
from onegpu.formats.scale_search import FACTOR_STEPS, MULTIPLIERS
from onegpu.kernels.launch import (
    NO_CONTRACTION,
    decode,
    encode,
    on_device_of,
    reciprocal,
    round_half_even,
    to_float16_range,
)

__all__ = ["float16_threshold", "quantize_4bit", "quantize_8bit_rows"]

# Weights per program of the 4-bit kernel; the scale search keeps more of them in registers at once.
TILE = 2048
SEARCH_TILE = 1024
# Elements per step of the row kernels.
ROW_TILE = 1024

NF4_MULTIPLIERS: Final = tl.constexpr(MULTIPLIERS["nf4"])
FP4_MULTIPLIERS: Final = tl.constexpr(MULTIPLIERS["fp4"])
NUM_NF4_MULTIPLIERS: Final = tl.constexpr(len(MULTIPLIERS["nf4"]))
NUM_FP4_MULTIPLIERS: Final = tl.constexpr(len(MULTIPLIERS["fp4"]))
STEPS: Final = tl.constexpr(float(FACTOR_STEPS))


@triton.jit
def search_factor(y, importance, QUANT_TYPE: tl.constexpr, MULTIPLIERS: tl.constexpr, COUNT: tl.constexpr):
    """Factor of least squared error for each block of scaled weights y: `formats.scale_search.search_scale`."""
    error = decode(encode(y, QUANT_TYPE), QUANT_TYPE) - y
    least = tl.sum(error * error * importance, axis=1)
    best = tl.full(least.shape, 1.0, tl.float32)
    for i in tl.static_range(COUNT):
        values = decode(encode(y * MULTIPLIERS[i], QUANT_TYPE), QUANT_TYPE)
        weighted = values * importance
        denominator = tl.sum(values * weighted, axis=1)
        # A block whose values are all zero proposes nothing.
        usable = denominator > 0
        ratio = tl.math.div_rn(tl.sum(y * weighted, axis=1), tl.where(usable, denominator, 1.0))
        factor = tl.math.div_rn(tl.floor(ratio * STEPS + 0.5), STEPS)
        error = values * factor[:, None] - y
        total = tl.sum(error * error * importance, axis=1)
        better = usable & (total < least)
        best = tl.where(better, factor, best)
        least = tl.where(better, total, least)
    return best


@triton.jit
def quantize_4bit_kernel(
    weight_ptr,  # [n]
    importance_ptr,  # float32 [period], read if HAS_IMPORTANCE
    packed_ptr,  # uint8 [ceil(n / 2)]
    absmax_ptr,  # float32 [num_blocks]
    n,
    period,  # importance repeats after so many weights
    QUANT_TYPE: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    SCALE_SEARCH: tl.constexpr,
    HAS_IMPORTANCE: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    element = block[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]
    weight = tl.load(weight_ptr + element, mask=element < n, other=0.0).to(tl.float32)

    # The maximum passes over NaN; a block that holds one gets no scale.
    scale = tl.max(tl.abs(weight), axis=1)
    has_nan = tl.max((weight != weight).to(tl.int32), axis=1) != 0
    scale = tl.where(has_nan, 0.0, scale)
    if SCALE_SEARCH:
        y = weight * reciprocal(scale)[:, None]
        importance = tl.full((BLOCKS, BLOCKSIZE), 1.0, tl.float32)
        if HAS_IMPORTANCE:
            importance = tl.load(importance_ptr + element % period, mask=element < n, other=0.0)
        if QUANT_TYPE == "nf4":
            scale *= search_factor(y, importance, QUANT_TYPE, NF4_MULTIPLIERS, NUM_NF4_MULTIPLIERS)
        else:
            scale *= search_factor(y, importance, QUANT_TYPE, FP4_MULTIPLIERS, NUM_FP4_MULTIPLIERS)

    inverse = reciprocal(scale)
    codes = encode(weight * inverse[:, None], QUANT_TYPE)
    high, low = tl.split(tl.reshape(codes, (BLOCKS, BLOCKSIZE // 2, 2)))
    byte = block[:, None] * (BLOCKSIZE // 2) + tl.arange(0, BLOCKSIZE // 2)[None, :]
    tl.store(packed_ptr + byte, ((high << 4) | low).to(tl.uint8), mask=byte * 2 < n)
    tl.store(absmax_ptr + block, tl.where(inverse == 0, 0.0, scale), mask=block * BLOCKSIZE < n)


@triton.jit
def row_stats_kernel(
    x_ptr,  # [M, K]
    stride_xm,
    row_stats_ptr,  # float32 [M]
    outlier_ptr,  # uint8 [K], zeros; becomes 1 where a column has an outlier
    K,
    limit,
    HAS_OUTLIERS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    largest = tl.zeros((BLOCK_K,), tl.float32)
    has_nan = tl.zeros((BLOCK_K,), tl.int32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a = tl.abs(to_float16_range(tl.load(x_ptr + row * stride_xm + k, mask=k < K, other=0.0)))
        if HAS_OUTLIERS:
            is_outlier = a >= limit
            # Every program that stores here stores the same value.
            tl.store(outlier_ptr + k, tl.full((BLOCK_K,), 1, tl.uint8), mask=is_outlier & (k < K))
            a = tl.where(is_outlier, 0.0, a)
        has_nan |= (a != a).to(tl.int32)
        largest = tl.maximum(largest, a)
    stat = tl.where(tl.max(has_nan, axis=0) != 0, float("nan"), tl.max(largest, axis=0))
    tl.store(row_stats_ptr + row, stat)


@triton.jit
def quantize_rows_kernel(
    x_ptr,  # [M, K]
    stride_xm,
    row_stats_ptr,  # float32 [M]
    outlier_ptr,  # uint8 [K]
    codes_ptr,  # int8 [M, K]
    K,
    HAS_OUTLIERS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    a = to_float16_range(tl.load(x_ptr + row * stride_xm + k, mask=k < K, other=0.0))
    if HAS_OUTLIERS:
        a = tl.where(tl.load(outlier_ptr + k, mask=k < K, other=0) != 0, 0.0, a)
    scaled = a * (reciprocal(tl.load(row_stats_ptr + row)) * 127.0)
    scaled = tl.where(scaled == scaled, scaled, 0.0)
    tl.store(codes_ptr + row * K + k, round_half_even(scaled).to(tl.int8), mask=k < K)


def quantize_4bit(
    weight: Tensor, quant_type: str, blocksize: int, scale_search: bool = False, importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Launcher of the operator `quantize_4bit`; its arguments have been checked."""
    weight = weight.detach().contiguous()
    n = weight.numel()
    packed = torch.empty((n + 1) // 2, dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(triton.cdiv(n, blocksize), dtype=torch.float32, device=weight.device)
    if n == 0:
        return packed, absmax
    importance = None if importance is None else importance.detach().contiguous()
    blocks = max(1, (SEARCH_TILE if scale_search else TILE) // blocksize)
    with on_device_of(weight):
        quantize_4bit_kernel[(triton.cdiv(triton.cdiv(n, blocksize), blocks),)](
            weight,
            absmax if importance is None else importance,
            packed,
            absmax,
            n,
            1 if importance is None else importance.numel(),
            QUANT_TYPE=quant_type,
            BLOCKSIZE=blocksize,
            SCALE_SEARCH=scale_search,
            HAS_IMPORTANCE=importance is not None,
            BLOCKS=blocks,
            num_warps=4,
            **NO_CONTRACTION,
        )
    return packed, absmax


def quantize_8bit_rows(x: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Launcher of the operator `quantize_8bit_rows`; its arguments have been checked.

    Two kernels, because the columns to leave out are known only when every row has been read.
    """
    M, K = x.shape
    x = x.detach() if x.stride(1) == 1 else x.detach().contiguous()
    codes = torch.empty(M, K, dtype=torch.int8, device=x.device)
    row_stats = torch.zeros(M, dtype=torch.float32, device=x.device)
    outlier_cols = torch.zeros(K, dtype=torch.bool, device=x.device)
    if M == 0 or K == 0:
        return codes, row_stats, outlier_cols
    flags = outlier_cols.view(torch.uint8)
    block = min(ROW_TILE, triton.next_power_of_2(K))
    settings = {"HAS_OUTLIERS": threshold > 0, "BLOCK_K": block, "num_warps": 4, **NO_CONTRACTION}
    with on_device_of(x):
        row_stats_kernel[(M,)](x, x.stride(0), row_stats, flags, K, float16_threshold(threshold), **settings)
        quantize_rows_kernel[(M, triton.cdiv(K, block))](x, x.stride(0), row_stats, flags, codes, K, **settings)
    return codes, row_stats, outlier_cols


@functools.cache
def float16_threshold(threshold: float) -> float:
    """The threshold as float16 has it; one above the range means its largest value, where inputs saturate."""
    return float(torch.tensor(min(threshold, FLOAT16_MAX), dtype=torch.float16))
