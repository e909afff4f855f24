# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# mypy: disable-error-code="assignment, misc"
"""Weights to 4-bit codes, and rows to int8, on the device.

Each kernel does the float32 steps of its definition in `onegpu.formats` in the same order, with IEEE reciprocals, so
that the bytes are the same as on a CPU; only the sums of the scale search are added in another order.
NaN in a block gives it scale 0, NaN in a row makes the row's stat NaN, as the definitions have it. Largest magnitudes
are found on the bits of float32, whose order is that of the magnitudes, with NaN above infinity.

Plain quantization is bound by memory, which leaves some twenty instructions for a weight; the kernels take fewer, by
having a weight stay in the thread that loaded it until its code is stored, 16 bytes of weights to a load. Programs of
the 4-bit kernel are single warps, for the table of `codes` to be in reach of all their threads.
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
from onegpu.kernels.codes import encode, look_up, threshold_table, value_table
from onegpu.kernels.launch import NO_CONTRACTION, on_device_of, reciprocal, to_float16_range

__all__ = ["float16_threshold", "quantize_4bit", "quantize_8bit_rows"]

# Weights per program of the 4-bit kernel; the scale search keeps more of each in registers.
TILE = 2048
SEARCH_TILE = 512
# Elements per step of the kernels that see a row in parts, and the longest row that fits in registers as a whole.
ROW_TILE = 2048
WHOLE_ROW = 16384

INFINITY_BITS: Final = tl.constexpr(0x7F800000)
MAGNITUDE_BITS: Final = tl.constexpr(0x7FFFFFFF)
# Added to a float32 below 2**22, it leaves the nearest whole number, half to even, in the low bits.
MAGIC: Final = tl.constexpr(1.5 * 2.0**23)
NF4_MULTIPLIERS: Final = tl.constexpr(MULTIPLIERS["nf4"])
FP4_MULTIPLIERS: Final = tl.constexpr(MULTIPLIERS["fp4"])
NUM_NF4_MULTIPLIERS: Final = tl.constexpr(len(MULTIPLIERS["nf4"]))
NUM_FP4_MULTIPLIERS: Final = tl.constexpr(len(MULTIPLIERS["fp4"]))
STEPS: Final = tl.constexpr(float(FACTOR_STEPS))


@triton.jit
def nearest(y, steps, table, QUANT_TYPE: tl.constexpr):
    """The table value of each scaled weight."""
    return look_up(table, encode(y, steps, QUANT_TYPE, True) & 15)


@triton.jit
def search_factor(y, importance, steps, QUANT_TYPE: tl.constexpr, MULTIPLIERS: tl.constexpr, COUNT: tl.constexpr):
    """Factor of least squared error for each block of scaled weights y: `formats.scale_search.search_scale`."""
    table = value_table(QUANT_TYPE)
    error = nearest(y, steps, table, QUANT_TYPE) - y
    least = tl.sum(error * error * importance, axis=1)
    best = tl.full(least.shape, 1.0, tl.float32)
    for i in tl.static_range(COUNT):
        values = nearest(y * MULTIPLIERS[i], steps, table, QUANT_TYPE)
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
def largest_of(magnitude, axis: tl.constexpr):
    """The largest float32 magnitude along an axis, as bits: above INFINITY_BITS if there is NaN."""
    return tl.max(magnitude.to(tl.int32, bitcast=True) & MAGNITUDE_BITS, axis=axis)


@triton.jit(do_not_specialize=["first", "period"])
def quantize_4bit_kernel(
    weight_ptr,  # [n]
    importance_ptr,  # float32 [period], read if HAS_IMPORTANCE
    packed_ptr,  # uint8 [ceil(n / 2)]
    absmax_ptr,  # float32 [num_blocks]
    first,  # block that the first program begins with
    n,
    period,  # importance repeats after so many weights
    QUANT_TYPE: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    SCALE_SEARCH: tl.constexpr,
    HAS_IMPORTANCE: tl.constexpr,
    WHOLE: tl.constexpr,  # every program has BLOCKS whole blocks
    BLOCKS: tl.constexpr,
    PARTS: tl.constexpr,  # of a block, which a thread has eight weights of each; 1 for the scale search
):
    PART: tl.constexpr = BLOCKSIZE // PARTS
    # Bytes that the eight, or with float32 four, weights of one load become.
    BYTES: tl.constexpr = 64 // weight_ptr.dtype.element_ty.primitive_bitwidth
    steps = threshold_table(QUANT_TYPE)
    start = first.to(tl.int64) + tl.program_id(0).to(tl.int64) * BLOCKS
    block = tl.arange(0, BLOCKS)
    element = block[:, None] * BLOCKSIZE + tl.arange(0, PART)[None, :]
    byte = block[:, None] * (BLOCKSIZE // 2) + tl.max_contiguous(tl.arange(0, PART // 2), BYTES)[None, :]
    weight_ptr += start * BLOCKSIZE
    left = n - start * BLOCKSIZE
    weights = ()
    for i in tl.static_range(PARTS):
        if WHOLE:
            part = tl.load(weight_ptr + element + i * PART)
        else:
            part = tl.load(weight_ptr + element + i * PART, mask=element + i * PART < left, other=0.0)
        weights = weights + (part.to(tl.float32),)  # noqa: RUF005, tuples of Triton know no unpacking
    magnitude = tl.abs(weights[0])
    for i in tl.static_range(1, PARTS):
        magnitude = tl.maximum(magnitude, tl.abs(weights[i]), propagate_nan=tl.PropagateNan.ALL)
    bits = largest_of(magnitude, 1)
    # A block that holds NaN gets no scale.
    scale = tl.where(bits > INFINITY_BITS, 0, bits).to(tl.float32, bitcast=True)
    if SCALE_SEARCH:
        y = weights[0] * reciprocal(scale)[:, None]
        importance = tl.full((BLOCKS, BLOCKSIZE), 1.0, tl.float32)
        if HAS_IMPORTANCE:
            # In 32 bits, if there are no more, a remainder takes a quarter of the instructions.
            NARROW: tl.constexpr = tl.uint32 if period.dtype == tl.int32 else tl.int64
            place = ((start * BLOCKSIZE) % period).to(NARROW)
            place = (place + element.to(NARROW)) % period.to(NARROW)
            importance = tl.load(importance_ptr + place, mask=element < left, other=0.0)
        if QUANT_TYPE == "nf4":
            scale *= search_factor(y, importance, steps, QUANT_TYPE, NF4_MULTIPLIERS, NUM_NF4_MULTIPLIERS)
        else:
            scale *= search_factor(y, importance, steps, QUANT_TYPE, FP4_MULTIPLIERS, NUM_FP4_MULTIPLIERS)

    inverse = reciprocal(scale)
    packed_ptr += start * (BLOCKSIZE // 2)
    for i in tl.static_range(PARTS):
        codes = encode(weights[i] * inverse[:, None], steps, QUANT_TYPE, SCALE_SEARCH)
        high, low = tl.split(tl.reshape(codes, (BLOCKS, PART // 2, 2)))
        pair = (high * 16 + (low & 15)).to(tl.uint8)
        if WHOLE:
            tl.store(packed_ptr + byte + i * (PART // 2), pair)
        else:
            tl.store(packed_ptr + byte + i * (PART // 2), pair, mask=(byte + i * (PART // 2)) * 2 < left)
    scale = tl.where(inverse == 0, 0.0, scale)
    if WHOLE:
        tl.store(absmax_ptr + start + block, scale)
    else:
        tl.store(absmax_ptr + start + block, scale, mask=block * BLOCKSIZE < left)


@triton.jit
def to_int8(a, stat):
    """codes = round-half-even(a * (1 / stat) * 127), zero for NaN."""
    scaled = a * (reciprocal(stat) * 127.0)
    scaled = tl.where(scaled == scaled, scaled, 0.0)
    return (scaled + MAGIC).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def quantize_whole_rows_kernel(
    x_ptr,  # [M, K]
    stride_xm,
    row_stats_ptr,  # float32 [M]
    codes_ptr,  # int8 [M, K]
    K,
    BLOCK_K: tl.constexpr,
    STEPS: tl.constexpr,  # 1 where BLOCK_K holds a row, which then is read once
):
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride_xm
    codes_ptr += row * K
    k = tl.arange(0, BLOCK_K)
    if STEPS == 1:
        a = to_float16_range(tl.load(x_ptr + k, mask=k < K, other=0.0))
        stat = largest_of(a, 0).to(tl.float32, bitcast=True)
        tl.store(codes_ptr + k, to_int8(a, stat), mask=k < K)
    else:
        largest = tl.zeros((BLOCK_K,), tl.int32)
        for start in range(0, K, BLOCK_K):
            a = to_float16_range(tl.load(x_ptr + start + k, mask=k < K - start, other=0.0))
            largest = tl.maximum(largest, a.to(tl.int32, bitcast=True) & MAGNITUDE_BITS)
        stat = tl.max(largest, axis=0).to(tl.float32, bitcast=True)
        for start in range(0, K, BLOCK_K):
            a = to_float16_range(tl.load(x_ptr + start + k, mask=k < K - start, other=0.0))
            tl.store(codes_ptr + start + k, to_int8(a, stat), mask=k < K - start)
    tl.store(row_stats_ptr + row, stat)


@triton.jit
def row_stats_kernel(
    x_ptr,  # [M, K]
    stride_xm,
    row_stats_ptr,  # float32 [M]
    outlier_ptr,  # uint8 [K], zeros; becomes 1 where a column has an outlier
    K,
    limit,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    largest = tl.zeros((BLOCK_K,), tl.int32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a = tl.abs(to_float16_range(tl.load(x_ptr + row * stride_xm + k, mask=k < K, other=0.0)))
        is_outlier = a >= limit
        # Every program that stores here stores the same value.
        tl.store(outlier_ptr + k, tl.full((BLOCK_K,), 1, tl.uint8), mask=is_outlier & (k < K))
        a = tl.where(is_outlier, 0.0, a)
        largest = tl.maximum(largest, a.to(tl.int32, bitcast=True) & MAGNITUDE_BITS)
    tl.store(row_stats_ptr + row, tl.max(largest, axis=0).to(tl.float32, bitcast=True))


@triton.jit
def quantize_rows_kernel(
    x_ptr,  # [M, K]
    stride_xm,
    row_stats_ptr,  # float32 [M]
    outlier_ptr,  # uint8 [K]
    codes_ptr,  # int8 [M, K]
    K,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    a = to_float16_range(tl.load(x_ptr + row * stride_xm + k, mask=k < K, other=0.0))
    a = tl.where(tl.load(outlier_ptr + k, mask=k < K, other=0) != 0, 0.0, a)
    tl.store(codes_ptr + row * K + k, to_int8(a, tl.load(row_stats_ptr + row)), mask=k < K)


def tile_of(blocksize: int, scale_search: bool) -> dict[str, int]:
    """How a program of the 4-bit kernel works: `BLOCKS`, `PARTS` and `num_warps`."""
    if scale_search:
        # Blocks as long as a tile have their sums over more warps, and the table in shared memory.
        return {"BLOCKS": max(1, SEARCH_TILE // blocksize), "PARTS": 1, "num_warps": max(1, blocksize // SEARCH_TILE)}
    if blocksize > TILE:
        return {"BLOCKS": 1, "PARTS": 4, "num_warps": 4}
    return {"BLOCKS": TILE // blocksize, "PARTS": 8 if blocksize == TILE else 2, "num_warps": 1}


def row_settings(K: int) -> dict[str, int]:
    """How a program of `quantize_whole_rows_kernel` works: 32 elements to a thread, all of a row if they can be."""
    block = max(256, triton.next_power_of_2(K))
    if block > WHOLE_ROW:
        return {"BLOCK_K": ROW_TILE, "STEPS": 2, "num_warps": 4}
    return {"BLOCK_K": block, "STEPS": 1, "num_warps": max(1, block // 1024)}


def quantize_4bit(
    weight: Tensor, quant_type: str, blocksize: int, scale_search: bool = False, importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Launcher of the operator `quantize_4bit`; its arguments have been checked."""
    weight = weight.detach().contiguous()
    n = weight.numel()
    packed = torch.empty((n + 1) // 2, dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(triton.cdiv(n, blocksize), dtype=torch.float32, device=weight.device)
    importance = None if importance is None else importance.detach().contiguous()
    settings = tile_of(blocksize, scale_search)
    whole, rest = divmod(n, settings["BLOCKS"] * blocksize)
    with on_device_of(weight):
        # What is left over has a launch of its own, so that no program but that one compares places.
        for first, programs, is_whole in ((0, whole, True), (whole * settings["BLOCKS"], int(rest > 0), False)):
            if programs == 0:
                continue
            quantize_4bit_kernel[(programs,)](
                weight,
                absmax if importance is None else importance,
                packed,
                absmax,
                first,
                n,
                1 if importance is None else importance.numel(),
                QUANT_TYPE=quant_type,
                BLOCKSIZE=blocksize,
                SCALE_SEARCH=scale_search,
                HAS_IMPORTANCE=importance is not None,
                WHOLE=is_whole,
                **settings,
                **NO_CONTRACTION,
            )
    return packed, absmax


def quantize_8bit_rows(x: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Launcher of the operator `quantize_8bit_rows`; its arguments have been checked.

    With outliers two kernels, because the columns to leave out are known only when every row has been read.
    """
    M, K = x.shape
    x = x.detach() if x.stride(1) == 1 else x.detach().contiguous()
    codes = torch.empty(M, K, dtype=torch.int8, device=x.device)
    row_stats = torch.empty(M, dtype=torch.float32, device=x.device)
    outlier_cols = torch.zeros(K, dtype=torch.bool, device=x.device)
    if M == 0 or K == 0:
        return codes, row_stats.zero_(), outlier_cols
    if threshold == 0:
        with on_device_of(x):
            quantize_whole_rows_kernel[(M,)](x, x.stride(0), row_stats, codes, K, **row_settings(K), **NO_CONTRACTION)
        return codes, row_stats, outlier_cols
    flags = outlier_cols.view(torch.uint8)
    block = min(ROW_TILE, triton.next_power_of_2(K))
    settings = {"BLOCK_K": block, "num_warps": 4, **NO_CONTRACTION}
    with on_device_of(x):
        row_stats_kernel[(M,)](x, x.stride(0), row_stats, flags, K, float16_threshold(threshold), **settings)
        quantize_rows_kernel[(M, triton.cdiv(K, block))](x, x.stride(0), row_stats, flags, codes, K, **settings)
    return codes, row_stats, outlier_cols


@functools.cache
def float16_threshold(threshold: float) -> float:
    """The threshold as float16 has it; one above the range means its largest value, where inputs saturate."""
    return float(torch.tensor(min(threshold, FLOAT16_MAX), dtype=torch.float16))
