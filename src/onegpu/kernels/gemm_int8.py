# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""y = x @ W.T + bias of LLM.int8() on Hopper: int8 products, and the outlier columns of x in 16 bit.

The kernel is that of `gemm_codes` with codes on both sides. What is here brings the outlier columns together before it:
as many as `CAPACITY` are tiles for the tensor cores; the kernel reads how many there are, so nothing waits for a count.
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

__all__ = ["gemm_int8", "why_not_int8"]


# Rows of x or of W that a program gathers, and columns at a time.
GATHER_ROWS: Final = 64
GATHER_COLUMNS: Final = 32
# Columns that the product takes as one tile.
PRODUCT_COLUMNS: Final = tl.constexpr(64)


@triton.jit(do_not_specialize=["M", "N", "x_programs"])
def gather_columns_kernel(
    x_ptr,  # [M, K]
    stride_xm,
    x_codes_ptr,  # int8 [M, K]
    codes_ptr,  # int8 [N, K]
    stride_cn,
    columns_ptr,  # int32 [K]
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
):
    """Outlier columns side by side, zeros after them to a whole tile, and code 0 for x in all of them.

    Tiles without any are not written.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    tile = tl.arange(0, TILE)
    # Asked for beside the count: it waits for one of them, not for both in turn.
    column = tl.load(columns_ptr + tile, mask=tile < K, other=0)
    count = tl.load(count_ptr)
    end = tl.cdiv(count, PRODUCT_COLUMNS) * PRODUCT_COLUMNS
    program = tl.program_id(0)
    if program < x_programs:
        row = (program * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
        is_row = (row < M)[:, None]
        for start in range(0, end, TILE):
            place = start + tile
            inside = is_row & (place < count)[None, :]
            if start < CAPACITY:
                value = tl.load(x_ptr + row[:, None] * stride_xm + column[None, :], mask=inside, other=0.0)
                tl.store(x_out_ptr + row[:, None] * CAPACITY + place[None, :], value, mask=is_row)
            tl.store(x_codes_ptr + row[:, None] * K + column[None, :], tl.zeros((BLOCK, TILE), tl.int8), mask=inside)
            column = tl.load(columns_ptr + place + TILE, mask=place + TILE < count, other=0)
    else:
        row = ((program - x_programs) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
        is_row = (row < N)[:, None]
        for start in range(0, tl.minimum(end, CAPACITY), TILE):
            place = start + tile
            inside = is_row & (place < count)[None, :]
            code = tl.load(codes_ptr + row[:, None] * stride_cn + column[None, :], mask=inside, other=0)
            tl.store(codes_out_ptr + row[:, None] * CAPACITY + place[None, :], code, mask=is_row)
            column = tl.load(columns_ptr + place + TILE, mask=place + TILE < count, other=0)


def gather_columns(x: Tensor, x_codes: Tensor, codes: Tensor, columns: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """The first `CAPACITY` of the listed columns, of x [M, CAPACITY] and of codes [N, CAPACITY].

    In `x_codes` all of the listed columns become 0. Where the device can, this begins before the kernel in front has
    ended, of which nothing is read before it has, and lets the next one begin.
    """
    (M, K), N = x.shape, codes.shape[0]
    x_out = torch.empty(M, CAPACITY, dtype=x.dtype, device=x.device)
    codes_out = torch.empty(N, CAPACITY, dtype=torch.int8, device=x.device)
    x_programs = triton.cdiv(M, GATHER_ROWS)
    overlap = overlaps(x.device, True)
    launch = {"launch_pdl": True} if overlap else {}
    with on_device_of(x):
        gather_columns_kernel[(x_programs + triton.cdiv(N, GATHER_ROWS),)](
            x, x.stride(0), x_codes, codes, codes.stride(0), columns, count, x_out, codes_out, M, N, K, x_programs,
            CAPACITY=CAPACITY, OVERLAP=overlap, BLOCK=GATHER_ROWS, TILE=GATHER_COLUMNS, num_warps=4, num_stages=1,
            **launch, **NO_CONTRACTION,
        )  # fmt: skip
    return x_out, codes_out


def why_not_int8(x: Tensor, codes: Tensor) -> str | None:
    """None where `gemm_int8` takes x [M, K] and the codes of W, else the reason in a sentence."""
    if x.shape[1] % 16:
        return "rows of codes do not lie on 16 bytes"
    return why_not_gemm(x.device, x.dtype) or why_not_8bit(codes)


def gemm_int8(
    y: Tensor,
    x: Tensor,
    x_codes: Tensor,
    x_stats: Tensor,
    codes: Tensor,
    row_stats: Tensor,
    bias: Tensor | None,
    outliers: tuple[Tensor, Tensor] | None,
    config: Config | None = None,
) -> None:
    """Write x @ (codes * row_stats / 127).T + bias into y.

    Args:
        y: [M, N], contiguous, in the dtype of x.
        x: [M, K], bfloat16 or float16, elements of a row side by side; `why_not_int8` is None.
        x_codes, x_stats: int8 [M, K] and float32 [M]: x without its outliers, `quantize_and_list`, which may have let
            this one begin: W alone is read before that one has ended. Codes in the listed columns become 0.
        codes, row_stats: int8 [N, K] and float32 [N], of W.
        outliers: int32 [K] and int32 [1]: columns that `x_codes` leaves out, and how many; None: none.
        config: instead of `configure`'s choice.

    Raises:
        DeviceError: the kernel does not compile or the driver refuses it.
    """
    (M, K), N = x.shape, codes.shape[0]
    config = config or configure(M, N, K, processors(x.device), bits=8, x_bits=8)
    kind = Kind(
        config.tokens, 8, 1, x.dtype, gated=False, activation=None, x_bits=8, warpgroups=config.warpgroups
    )  # fmt: skip
    if outliers is None:
        left_out, more = LeftOut(x, x_stats, codes), map_nothing()
    else:
        columns, count = outliers
        outlier_x, outlier_codes = gather_columns(x, x_codes, codes, columns, count)
        left_out = LeftOut(x, x_stats, codes, count, columns, outlier_x)
        more = map_codes(outlier_codes, kind.shape.rows)
    maps = (map_codes(codes, kind.shape.rows, kind.shape.columns), more)
    multiply(
        y, x_codes, maps, Codebook(), bias, None, kind, config.splits,
        overlap=True, row_stats=row_stats, left_out=left_out,
    )  # fmt: skip
