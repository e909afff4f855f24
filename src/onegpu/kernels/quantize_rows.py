# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Rows to int8, with outlier columns left out, on the device: the definition is `onegpu.formats.rowwise.quantize_rows`.

    quantize_rows_kernel   stats, and codes in which outlier elements are 0; which columns have an outlier, as a list
    clear_columns_kernel   code 0 in the listed columns, for which every row must have been seen

x is read once, but for rows beyond `WHOLE_ROW`, which do not fit in registers. A program keeps the columns in which it
saw outliers as bits and adds them to those of the others when it ends; the one that ends last lists them. Bits and the
count of who has ended lie in `tickets`: 0 before and after, so that nothing has to be cleared first.

Each step is the definition's, in float32 and in its order. Largest magnitudes are found on the bits of float32, whose
order is that of the magnitudes, with NaN above infinity: NaN in a row makes its stat NaN.
"""

from __future__ import annotations

import functools
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from onegpu.formats.blockwise import FLOAT16_MAX
from onegpu.kernels.launch import NO_CONTRACTION, on_device_of, processors, reciprocal, to_float16_range
from onegpu.kernels.overlap import overlaps
from onegpu.kernels.quantize import MAGNITUDE_BITS, largest_of
from onegpu.kernels.tickets import tickets

__all__ = ["clear_columns", "quantize_8bit_rows", "quantize_and_list"]

# The longest row that fits in registers as a whole, and elements per step of a longer one.
WHOLE_ROW: Final = 16384
ROW_TILE: Final = 2048
# Warps of a processor that have room for their registers, 64 a thread.
RESIDENT_WARPS: Final = 32
# Words of 32 columns that are listed at a time.
LIST_TILE: Final = 1024
CLEAR_ROWS: Final = 128
CLEAR_COLUMNS: Final = 16

# Added to a float32 below 2**22, it leaves the nearest whole number, half to even, in the low bits.
MAGIC: Final = tl.constexpr(1.5 * 2.0**23)


@triton.jit
def load_float16(pointers, mask, SATURATE: tl.constexpr):
    """float32 copy of values rounded to float16; beyond its range infinite, unless they are to saturate."""
    x = tl.load(pointers, mask=mask, other=0.0)
    if SATURATE:
        a = to_float16_range(x)
    else:
        a = x.to(tl.float16).to(tl.float32)
    return a


@triton.jit
def store_codes(pointers, a, stat, mask):
    """round-half-even(a * (1 / stat) * 127) as int8."""
    if stat == stat:
        scaled = a * (reciprocal(stat) * 127.0)
        tl.store(pointers, (scaled + MAGIC).to(tl.int32, bitcast=True).to(tl.int8), mask=mask)
    else:
        # The scale is 0, and NaN has code 0 too.
        tl.store(pointers, tl.zeros(a.shape, tl.int8), mask=mask)


@triton.jit
def bits_of(flags, LENGTH: tl.constexpr):
    """int32 [LENGTH / 16] from booleans [LENGTH], the first one lowest: a thread has 16 columns, as it stores them."""
    bit = tl.full((1, 16), 1, tl.int32) << tl.arange(0, 16)[None, :]
    return tl.sum(tl.where(tl.reshape(flags, (LENGTH // 16, 16)), bit, 0), axis=1)


@triton.jit
def add_bits(counters_ptr, first, words, bits, LENGTH: tl.constexpr):
    """Puts them into words of 32, of which there are `words` and these begin at `first`; zeros stay unsaid."""
    low, high = tl.split(tl.reshape(bits, (LENGTH // 32, 2)))
    both = low | (high << 16)
    word = first + tl.arange(0, LENGTH // 32)
    tl.atomic_or(counters_ptr + word, both, mask=(both != 0) & (word < words), sem="relaxed", scope="gpu")


@triton.jit
def count_bits(word):
    """How many bits of each int32 are 1."""
    v = word.to(tl.uint32, bitcast=True)
    v = v - ((v >> 1) & 0x55555555)
    v = (v & 0x33333333) + ((v >> 2) & 0x33333333)
    v = (v + (v >> 4)) & 0x0F0F0F0F
    v += v >> 8
    return ((v + (v >> 16)) & 63).to(tl.int32)


@triton.jit
def list_columns(counters_ptr, columns_ptr, count_ptr, outlier_ptr, K, MARK: tl.constexpr, BLOCK: tl.constexpr):
    """Columns whose bits are 1, in order, and their number; the bits become 0. See `quantize_rows_kernel`."""
    words = tl.cdiv(K, 32)
    count = tl.zeros((1,), tl.int32)
    for start in range(0, words, BLOCK):
        word = start + tl.arange(0, BLOCK)
        flags = tl.load(counters_ptr + word, mask=word < words, other=0)
        # A threshold that is 0 in float16 makes outliers of what lies beyond K.
        left = K - word * 32
        flags = tl.where(left < 32, flags & ((1 << (left & 31)) - 1), flags)
        number = count_bits(flags)
        place = count + tl.cumsum(number, axis=0) - number
        if MARK:
            for i in range(32):
                column = word * 32 + i
                tl.store(outlier_ptr + column, ((flags >> i) & 1).to(tl.uint8), mask=column < K)
        # The lowest that is left in each word: most have none, few more than one.
        for _ in range(tl.max(number, axis=0)):
            lowest = flags & -flags
            tl.store(columns_ptr + place, word * 32 + count_bits(lowest - 1), mask=flags != 0)
            flags ^= lowest
            place += 1
        count += tl.sum(number, axis=0)
        # Not before every thread has read its words, for which those before it are summed.
        tl.store(counters_ptr + word, tl.zeros((BLOCK,), tl.int32), mask=word < words)
    tl.store(count_ptr + tl.arange(0, 1), count)


@triton.jit(do_not_specialize=["M"])
def quantize_rows_kernel(
    x_ptr,  # [M, K]
    stride_xm,
    row_stats_ptr,  # float32 [M]
    codes_ptr,  # int8 [M, K]
    columns_ptr,  # int32 [K], the first `count` are written; these four are used if OUTLIERS
    count_ptr,  # int32 [1]
    outlier_ptr,  # uint8 [K], 1 where a column has an outlier, written if MARK
    counters_ptr,  # int32 [ceil(K / 32) + 1], 0 before and after: a bit for each column, then programs that have ended
    limit,  # least magnitude of an outlier; what saturates is one anyway
    M,
    K,
    OUTLIERS: tl.constexpr,
    MARK: tl.constexpr,
    LEAD: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STEPS: tl.constexpr,  # 1 where BLOCK_K holds a row, which then is read once
    BLOCK_W: tl.constexpr,
):
    if LEAD:
        tl.extra.cuda.gdc_launch_dependents()
    k = tl.arange(0, BLOCK_K)
    words = tl.cdiv(K, 32)
    seen = tl.zeros((BLOCK_K // 16,), tl.int32)
    for m in range(tl.program_id(0), M, tl.num_programs(0)):
        row = tl.cast(m, tl.int64)
        x_row_ptr = x_ptr + row * stride_xm
        codes_row_ptr = codes_ptr + row * K
        if STEPS == 1:
            a = load_float16(x_row_ptr + k, k < K, not OUTLIERS)
            if OUTLIERS:
                is_outlier = tl.abs(a) >= limit
                seen |= bits_of(is_outlier, BLOCK_K)
                a = tl.where(is_outlier, 0.0, a)
            stat = largest_of(a, 0).to(tl.float32, bitcast=True)
            store_codes(codes_row_ptr + k, a, stat, k < K)
        else:
            largest = tl.zeros((BLOCK_K,), tl.int32)
            for start in range(0, K, BLOCK_K):
                a = load_float16(x_row_ptr + start + k, k < K - start, not OUTLIERS)
                if OUTLIERS:
                    is_outlier = tl.abs(a) >= limit
                    add_bits(counters_ptr, start // 32, words, bits_of(is_outlier, BLOCK_K), BLOCK_K)
                    a = tl.where(is_outlier, 0.0, a)
                largest = tl.maximum(largest, a.to(tl.int32, bitcast=True) & MAGNITUDE_BITS)
            stat = tl.max(largest, axis=0).to(tl.float32, bitcast=True)
            for start in range(0, K, BLOCK_K):
                a = load_float16(x_row_ptr + start + k, k < K - start, not OUTLIERS)
                if OUTLIERS:
                    a = tl.where(tl.abs(a) >= limit, 0.0, a)
                store_codes(codes_row_ptr + start + k, a, stat, k < K - start)
        tl.store(row_stats_ptr + row, stat)
    if OUTLIERS:
        if STEPS == 1:
            add_bits(counters_ptr, 0, words, seen, BLOCK_K)
        # Every thread's bits must be there before the one that counts this program does so.
        tl.debug_barrier()
        if tl.atomic_add(counters_ptr + words, 1, sem="acq_rel", scope="gpu") == tl.num_programs(0) - 1:
            tl.store(counters_ptr + words, 0)
            list_columns(counters_ptr, columns_ptr, count_ptr, outlier_ptr, K, MARK, BLOCK_W)


@triton.jit(do_not_specialize=["M"])
def clear_columns_kernel(
    codes_ptr,  # int8 [M, K]
    columns_ptr,  # int32 [K], the first `count` are read
    count_ptr,  # int32 [1]
    M,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,  # columns at a time
):
    row = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    count = tl.load(count_ptr)
    for start in range(0, count, BLOCK_O):
        place = start + tl.arange(0, BLOCK_O)
        column = tl.load(columns_ptr + place, mask=place < count, other=0)
        mask = (row < M)[:, None] & (place < count)[None, :]
        tl.store(codes_ptr + row[:, None] * K + column[None, :], tl.zeros((BLOCK_M, BLOCK_O), tl.int8), mask=mask)


def row_settings(K: int) -> dict[str, int]:
    """How a program of `quantize_rows_kernel` works: 32 elements to a thread, all of a row if they can be."""
    block = max(256, triton.next_power_of_2(K))
    words = min(LIST_TILE, block // 32)
    if block > WHOLE_ROW:
        return {"BLOCK_K": ROW_TILE, "STEPS": 2, "BLOCK_W": words, "num_warps": 4}
    return {"BLOCK_K": block, "STEPS": 1, "BLOCK_W": words, "num_warps": max(1, block // 1024)}


def quantize_8bit_rows(x: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Launcher of the operator `quantize_8bit_rows`; its arguments have been checked."""
    M, K = x.shape
    x = x.detach() if x.stride(1) == 1 else x.detach().contiguous()
    is_marked = M > 0 and threshold > 0
    outlier_cols = (torch.empty if is_marked else torch.zeros)(K, dtype=torch.bool, device=x.device)
    codes, row_stats, listed = quantize(x, threshold, outlier_cols)
    if listed is not None:
        clear_columns(codes, *listed)
    return codes, row_stats, outlier_cols


def quantize_and_list(
    x: Tensor, threshold: float = 0.0, *, lead: bool = False
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """Rows of x in int8 with code 0 for outlier elements, and the columns that these are in: one launch.

    Codes of the other elements of those columns have still to become 0: `clear_columns`, or `gemm_int8`, which
    does that on its way.

    Args:
        x: [M, K], elements of a row side by side.
        threshold: as in `onegpu.formats.rowwise.quantize_rows`.
        lead: let the next kernel begin before this one has ended, where the device can; that one waits by itself, and
            may read before that whatever this one does not write. This one begins when the kernel in front has ended.

    Returns:
        int8 [M, K]; float32 [M]; and, unless the threshold is 0 or x is empty, int32 [K] and int32 [1]: the columns,
        the first so many, in order.
    """
    return quantize(x, threshold, lead=lead)


def quantize(
    x: Tensor, threshold: float, outlier_cols: Tensor | None = None, *, lead: bool = False
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """See `quantize_and_list`; with columns listed, writes `outlier_cols`, bool [K], too."""
    M, K = x.shape
    device = x.device
    codes = torch.empty(M, K, dtype=torch.int8, device=device)
    if M == 0 or K == 0:
        return codes, torch.zeros(M, dtype=torch.float32, device=device), None
    row_stats = torch.empty(M, dtype=torch.float32, device=device)
    settings: dict[str, Any] = row_settings(K)
    programs, listed, counters = M, None, row_stats
    if threshold > 0:
        if settings["STEPS"] == 1:
            # As many as run side by side, and each counts once that it has ended.
            programs = min(M, processors(device) * (RESIDENT_WARPS // settings["num_warps"]))
        listed = torch.empty(K, dtype=torch.int32, device=device), torch.empty(1, dtype=torch.int32, device=device)
        counters = tickets(triton.cdiv(K, 32) + 1, device)
    columns, count = listed or (row_stats, row_stats)
    with on_device_of(x):
        quantize_rows_kernel[(programs,)](
            x,
            x.stride(0),
            row_stats,
            codes,
            columns,
            count,
            codes if outlier_cols is None else outlier_cols.view(torch.uint8),
            counters,
            float16_threshold(threshold),
            M,
            K,
            OUTLIERS=threshold > 0,
            MARK=outlier_cols is not None,
            LEAD=overlaps(device, lead),
            num_stages=1,
            **settings,
            **NO_CONTRACTION,
        )
    return codes, row_stats, listed


def clear_columns(codes: Tensor, columns: Tensor, count: Tensor) -> None:
    """Code 0 in the first `count` of the listed columns.

    Args:
        codes: int8 [M, K], contiguous.
        columns, count: int32 [K] and [1], of `quantize_and_list`.
    """
    M, K = codes.shape
    with on_device_of(codes):
        clear_columns_kernel[(triton.cdiv(M, CLEAR_ROWS),)](
            codes, columns, count, M, K, BLOCK_M=CLEAR_ROWS, BLOCK_O=CLEAR_COLUMNS, num_warps=4
        )


@functools.cache
def float16_threshold(threshold: float) -> float:
    """The threshold as float16 has it; one above the range means its largest value, where inputs saturate."""
    return float(torch.tensor(min(threshold, FLOAT16_MAX), dtype=torch.float16))
