# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""y = x @ W.T + bias of LLM.int8() on Hopper: int8 products, and the outlier columns of x in 16 bit.

The kernel is that of `gemm_codes` with codes on both sides. What is here brings the outlier columns together before it:
as many as `CAPACITY` are tiles for the tensor cores; the kernel reads how many there are, so nothing waits for a count.
Which columns these are comes as bits. Each program of the kernel here looks its own ones up; the product, which waits
for all of them, puts the bits back to 0.
"""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from onegpu.kernels.gemm_codes import (
    CAPACITY,
    Codebook,
    Kind,
    LeftOut,
    map_codes,
    map_nothing,
    multiply,
    why_not_8bit,
    why_not_gemm,
)
from onegpu.kernels.gemm_codes_config import Config, configure
from onegpu.kernels.launch import NO_CONTRACTION, on_device_of, processors
from onegpu.kernels.overlap import overlaps
from onegpu.kernels.quantize_rows import count_bits, load_flags

__all__ = ["gemm_int8", "why_not_int8"]


# Rows of x or of W that a program gathers, and columns at a time.
GATHER_ROWS: Final = 64
GATHER_COLUMNS: Final = 32
# Groups of words of 32 columns among which a program looks for a column, which stay in registers; and words of one, at
# most: the words of longer rows are looked through in turn.
GATHER_GROUPS: Final = 128
GATHER_WORDS: Final = 8
# Columns that the product takes as one tile.
PRODUCT_COLUMNS: Final = tl.constexpr(64)


@triton.jit
def place_of_bit(flags, rank):
    """Where in each int32 the bit is that is 1 and has `rank` such bits below it; any place if there is none."""
    v = flags.to(tl.uint32, bitcast=True)
    # How many of 2, 4, 8 and 16 bits are 1, side by side.
    twos = v - ((v >> 1) & 0x55555555)
    fours = (twos & 0x33333333) + ((twos >> 2) & 0x33333333)
    eights = (fours + (fours >> 4)) & 0x0F0F0F0F
    # Halves are searched, of what is left: those of the lower half, or, less these, those of the upper one.
    low = ((eights + (eights >> 8)) & 31).to(tl.int32)
    is_upper = rank >= low
    place, rank = tl.where(is_upper, 16, 0), tl.where(is_upper, rank - low, rank)
    low = ((eights >> place) & 15).to(tl.int32)
    is_upper = rank >= low
    place, rank = tl.where(is_upper, place + 8, place), tl.where(is_upper, rank - low, rank)
    low = ((fours >> place) & 15).to(tl.int32)
    is_upper = rank >= low
    place, rank = tl.where(is_upper, place + 4, place), tl.where(is_upper, rank - low, rank)
    low = ((twos >> place) & 3).to(tl.int32)
    is_upper = rank >= low
    place, rank = tl.where(is_upper, place + 2, place), tl.where(is_upper, rank - low, rank)
    return place + (rank >= ((v >> place) & 1).to(tl.int32)).to(tl.int32)


@triton.jit
def column_of(bits_ptr, word, rank, mask, K, WORDS: tl.constexpr):
    """The columns whose bits, in `WORDS` words from `word` on, have `rank` before them. These were read just before."""
    flags = tl.load(bits_ptr + word, mask=mask, other=0)
    number, found = count_bits(flags), word
    for i in tl.static_range(1, WORDS):
        following = tl.load(bits_ptr + word + i, mask=mask & (word + i < tl.cdiv(K, 32)), other=0)
        # Once it is in a word, it is not past it.
        is_past = rank >= number
        rank = tl.where(is_past, rank - number, rank)
        number = tl.where(is_past, count_bits(following), number)
        flags = tl.where(is_past, following, flags)
        found = tl.where(is_past, word + i, found)
    return found * 32 + place_of_bit(flags, rank)


@triton.jit
def gather(
    source_ptr,  # [rows, K]
    stride,
    out_ptr,  # [rows, CAPACITY]
    rows,
    program,  # of those that share the rows
    x_codes_ptr,
    bits_ptr,
    columns_ptr,
    K,
    IS_X: tl.constexpr,  # of x, whose codes are cleared, all of them; of W's codes nothing is wanted beyond CAPACITY
    CAPACITY: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    GROUPS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """See `gather_columns_kernel`. How many columns there are."""
    # Offsets of 32 bits from the program's first row take half the registers. The last row stands for those beyond it.
    first_row = program.to(tl.int64) * BLOCK
    source_ptr += first_row * stride
    out_ptr += first_row * CAPACITY
    x_codes_ptr += first_row * K
    row = tl.minimum(tl.arange(0, BLOCK), rows - 1 - program * BLOCK)[:, None]
    zero = tl.zeros((BLOCK, TILE), tl.int8)
    group = tl.arange(0, GROUPS)
    count = 0
    for first in range(0, tl.cdiv(K, 32), GROUPS * WORDS):
        flags = load_flags(bits_ptr, first + group[:, None] * WORDS + tl.arange(0, WORDS)[None, :], K)
        number = tl.sum(count_bits(flags), axis=1)
        here = tl.sum(number, axis=0)
        # Columns up to the end of a group, of which there are fewer than 2**16, and groups up to there.
        up_to = tl.cumsum(number, axis=0) * (2 * GROUPS) + group + 1
        if IS_X:
            end = here
        else:
            end = tl.minimum(here, CAPACITY - count)
        for start in range(0, end, TILE):
            rank = start + tl.arange(0, TILE)
            # The last group that ends before this column.
            behind = up_to[:, None] < ((rank + 1) * (2 * GROUPS))[None, :]
            passed = tl.max(tl.where(behind, up_to[:, None], 0), axis=0)
            word = first + passed % (2 * GROUPS) * WORDS
            column = column_of(bits_ptr, word, rank - passed // (2 * GROUPS), rank < here, K, WORDS)
            place = count + rank
            inside = rank < here
            is_tile = (inside & (place < CAPACITY))[None, :]
            value = tl.load(source_ptr + (row * stride + column[None, :]), mask=is_tile, other=0)
            tl.store(out_ptr + (row * CAPACITY + place[None, :]), value, mask=is_tile)
            if IS_X:
                tl.store(x_codes_ptr + (row * K + column[None, :]), zero, mask=inside[None, :])
                if program == 0:
                    tl.store(columns_ptr + place, column, mask=inside)
        count += here
    end = tl.minimum(tl.cdiv(count, PRODUCT_COLUMNS) * PRODUCT_COLUMNS, CAPACITY)
    for start in range(count, end, TILE):
        place = start + tl.arange(0, TILE)
        nothing = zero.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + (row * CAPACITY + place[None, :]), nothing, mask=(place < end)[None, :])
    return count


@triton.jit(do_not_specialize=["M", "N", "x_programs"])
def gather_columns_kernel(
    x_ptr,  # [M, K]
    stride_xm,
    x_codes_ptr,  # int8 [M, K]
    codes_ptr,  # int8 [N, K]
    stride_cn,
    bits_ptr,  # int32 [ceil(K / 32)], a bit for each column
    columns_ptr,  # int32 [K], the first `count` are written
    count_ptr,  # int32 [1]
    x_out_ptr,  # [M, CAPACITY]
    codes_out_ptr,  # int8 [N, CAPACITY]
    M,
    N,
    K,
    x_programs,
    CAPACITY: tl.constexpr,
    OVERLAP: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    GROUPS: tl.constexpr,
    WORDS: tl.constexpr,  # of a group
):
    """Outlier columns side by side, zeros after them to a whole tile, and code 0 for x in all of them; their list.

    Tiles without any are not written.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    program = tl.program_id(0)
    if program < x_programs:
        count = gather(
            x_ptr, stride_xm, x_out_ptr, M, program,
            x_codes_ptr, bits_ptr, columns_ptr, K, True, CAPACITY, BLOCK, TILE, GROUPS, WORDS,
        )  # fmt: skip
        if program == 0:
            tl.store(count_ptr, count)
    else:
        gather(
            codes_ptr, stride_cn, codes_out_ptr, N, program - x_programs,
            x_codes_ptr, bits_ptr, columns_ptr, K, False, CAPACITY, BLOCK, TILE, GROUPS, WORDS,
        )  # fmt: skip


def gather_columns(x: Tensor, x_codes: Tensor, codes: Tensor, bits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The columns whose bits are 1: the first `CAPACITY` of x and of codes, and their list.

    In `x_codes` all of these columns become 0. Where the device can, this begins before the kernel in front has ended,
    of which nothing is read before it has, and lets the next one begin.

    Args:
        x, x_codes: [M, K] and int8 [M, K], contiguous codes.
        codes: int8 [N, K].
        bits: int32 [ceil(K / 32)], of `quantize_and_mark`; stay.

    Returns:
        As x [M, CAPACITY] and int8 [N, CAPACITY], after those columns zeros to a multiple of 64, the rest undefined;
        int32 [K] and int32 [1], the columns in order and how many.
    """
    (M, K), N = x.shape, codes.shape[0]
    x_out = torch.empty(M, CAPACITY, dtype=x.dtype, device=x.device)
    codes_out = torch.empty(N, CAPACITY, dtype=torch.int8, device=x.device)
    columns = torch.empty(K, dtype=torch.int32, device=x.device)
    count = torch.empty(1, dtype=torch.int32, device=x.device)
    x_programs = triton.cdiv(M, GATHER_ROWS)
    overlap = overlaps(x.device, True)
    launch = {"launch_pdl": True} if overlap else {}
    with on_device_of(x):
        gather_columns_kernel[(x_programs + triton.cdiv(N, GATHER_ROWS),)](
            x, x.stride(0), x_codes, codes, codes.stride(0), bits, columns, count, x_out, codes_out,
            M, N, K, x_programs, CAPACITY=CAPACITY, OVERLAP=overlap, **gather_settings(K), **launch, **NO_CONTRACTION,
        )  # fmt: skip
    return x_out, codes_out, columns, count


def gather_settings(K: int) -> dict[str, int]:
    """How a program of `gather_columns_kernel` works."""
    words = min(GATHER_WORDS, triton.next_power_of_2(triton.cdiv(K, 32 * GATHER_GROUPS)))
    sizes = {"BLOCK": GATHER_ROWS, "TILE": GATHER_COLUMNS, "GROUPS": GATHER_GROUPS, "WORDS": words}
    return {**sizes, "num_warps": 4, "num_stages": 1}


def why_not_int8(x: Tensor, codes: Tensor) -> str | None:
    """None where `gemm_int8` takes x [M, K] and the codes of W, else the reason in a sentence."""
    if x.shape[1] % 16:
        return "rows of codes do not lie on 16 bytes"
    if GATHER_ROWS * max(x.stride(0), codes.stride(0)) >= 2**31:
        return f"{GATHER_ROWS} rows of x or of codes span more than 2**31 elements"
    return why_not_gemm(x.device, x.dtype) or why_not_8bit(codes)


def gemm_int8(
    y: Tensor,
    x: Tensor,
    x_codes: Tensor,
    x_stats: Tensor,
    codes: Tensor,
    row_stats: Tensor,
    bias: Tensor | None,
    bits: Tensor | None,
    config: Config | None = None,
) -> None:
    """Write x @ (codes * row_stats / 127).T + bias into y.

    Args:
        y: [M, N], contiguous, in the dtype of x.
        x: [M, K], bfloat16 or float16, elements of a row side by side; `why_not_int8` is None.
        x_codes, x_stats: int8 [M, K] and float32 [M]: x without its outliers, `quantize_and_mark`, which may have let
            this one begin: W alone is read before that one has ended. Codes in the columns left out become 0.
        codes, row_stats: int8 [N, K] and float32 [N], of W.
        bits: int32 [ceil(K / 32)]: columns that `x_codes` leaves out, as `quantize_and_mark` says; None: none. They
            become 0, also where this raises.
        config: instead of `configure`'s choice.

    Raises:
        DeviceError: the kernel does not compile or the driver refuses it.
    """
    try:
        (M, K), N = x.shape, codes.shape[0]
        config = config or configure(M, N, K, processors(x.device), bits=8, x_bits=8)
        kind = Kind(
            config.tokens, 8, 1, x.dtype, gated=False, activation=None, x_bits=8, warpgroups=config.warpgroups
        )  # fmt: skip
        if bits is None:
            left_out, more = LeftOut(x, x_stats, codes), map_nothing()
        else:
            outlier_x, outlier_codes, columns, count = gather_columns(x, x_codes, codes, bits)
            left_out = LeftOut(x, x_stats, codes, count, columns, outlier_x, bits)
            more = map_codes(outlier_codes, kind.shape.rows)
        maps = (map_codes(codes, kind.shape.rows, kind.shape.columns), more)
        multiply(
            y, x_codes, maps, Codebook(), bias, None, kind, config.splits,
            overlap=True, row_stats=row_stats, left_out=left_out,
        )  # fmt: skip
    except BaseException:
        # The product did not begin, which would have done it.
        if bits is not None:
            bits.zero_()
        raise
