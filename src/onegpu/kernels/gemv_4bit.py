# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# mypy: disable-error-code="assignment"
"""y = tail(x @ W.T) for a tiled 4-bit W and up to 32 rows of x: one kernel, bound by reading W.

    t[m, n] = (sum over blocks b of absmax[n, b] * sum over k in b of table[code[n, k]] * x[m, k]) / c + bias[n]
    y = round(tail(t))                                    the activation and residual of `onegpu.kernels.tail`

with table = the codebook times c, rounded to the dtype of x (`asm_4bit`), products exact, all sums in float32 and one
rounding at the end. Nested scales are evaluated here (`gemv_4bit_scales`), so only their 8-bit codes are read. W comes
in the tiles of `onegpu.formats.tiling`.

A warp takes `TILES` tiles of 16 rows by `UNROLL` tiles of 64 columns at a time; of a program's warps, `WARPS_N` lie
side by side along rows of W and the rest split K. A program walks row groups with the stride of the grid, and every
load of codes, scales and (while registers last) x is issued one step before it is used, across row groups too: what
counts is bytes in flight. In a round of one step, what was loaded moves to the registers that the next step reads, and
so is waited for at the end of its own; in a round of two (where registers last) it stays where it is. Where a step can
be all of K there need be no loop (`ONCE`): all weights of a program are asked for at once, x follows tile by tile, and
sums over warps go through what was the table's memory, each warp adding up its share. With `GATED` a warp's tiles are
pairs, one of rows n and one of rows n + N / 2, so that a gate and what it multiplies meet in one thread.

Everything that touches registers of a tensor core is inline assembly on values of shape [warps, 32 lanes], whose
element index is the thread's own index; so are the stores (see `lanes`). The operands of x are rows in their
natural order.

With `OVERLAP` (compute capability 9.0 and up) the kernel begins while the one before it still runs.

    "edges"      It asks L2 for W's part of its first step, and waits; nothing of W is in a register before. That is
                 always safe: L2 sees what others still write, so what was fetched too early is not stale. The kernel
                 after it may begin at once.
    "weights"    It loads its first weights and fills its table, and only then waits; the kernel after it may begin
                 as soon as it has waited. Only where the caller allows it: whatever wrote W must have finished before
                 the kernel in front of this one began to let others start.

Either way x, residual and y are touched after the wait alone.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from onegpu.config import NESTED_BLOCKSIZE
from onegpu.kernels import asm_4bit as asm
from onegpu.kernels.gemv_4bit_config import Config, configure
from onegpu.kernels.gemv_4bit_finish import finish_once, finish_one_row, finish_rows
from onegpu.kernels.gemv_4bit_scales import (
    ask_for_scales,
    load_constants,
    load_scales,
    nested_scales,
    row_tile_of,
    scale_pair,
)
from onegpu.kernels.lanes import dtype_name, same, slice_of, zeros
from onegpu.kernels.launch import NO_CONTRACTION, capability, nested_arguments, on_device_of, processors
from onegpu.kernels.overlap import ask_for

__all__ = ["constants", "gemv_4bit", "gemv_4bit_kernel", "processors", "why_not_gemv"]

BFLOAT16_CAPABILITY = (8, 0)
OLDEST_CAPABILITY = (7, 5)
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@triton.jit
def ask_for_weights(
    tiled_ptr, absmax_ptr, nested_absmax_ptr, lane, warp_n, warp_k, group, N, K,
    BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, WARPS_N: tl.constexpr, WARPS_K: tl.constexpr, TILES: tl.constexpr,
    UNROLL: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """Have L2 fetch what `load_weights` will load of the first step of a group that exists."""
    columns = K // 64
    row_tiles = tl.cdiv(N, 16)
    for t in tl.static_range(TILES):
        row_tile = row_tile_of(group, warp_n, row_tiles, t, WARPS_N, TILES, GATED)
        for u in tl.static_range(UNROLL):
            column = tl.minimum(warp_k + u * WARPS_K, columns - 1)
            ask_for(tiled_ptr + (row_tile * columns + column) * 128 + lane * 4)
            ask_for_scales(absmax_ptr, nested_absmax_ptr, lane, row_tile, column, N, K, BLOCKSIZE, NESTED)


@triton.jit
def load_weights(
    tiled_ptr,
    absmax_ptr,
    nested_absmax_ptr,
    lane,
    warp_n,
    warp_k,
    group,  # which TILES * WARPS_N tiles of rows
    step,  # which UNROLL * warps along K
    more,  # whether there is anything to load
    N,
    K,
    BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,
    SHARED: tl.constexpr,
    BY_ROW: tl.constexpr,
    WARPS_N: tl.constexpr,
    WARPS_K: tl.constexpr,
    TILES: tl.constexpr,
    UNROLL: tl.constexpr,
    EVEN_K: tl.constexpr,
    GATED: tl.constexpr,
):
    """A lane's codes and scales of TILES x UNROLL tiles, as flat tuples."""
    columns = K // 64
    row_tiles = tl.cdiv(N, 16)
    first = step * (WARPS_K * UNROLL) + warp_k
    load = (lane * 0 + more).to(tl.int32)
    codes = ()
    for t in tl.static_range(TILES):
        row_tile = row_tile_of(group, warp_n, row_tiles, t, WARPS_N, TILES, GATED)
        address = (tiled_ptr + (row_tile * columns + first) * 128 + lane * 4).to(tl.int64)
        guards = (load,)
        if not EVEN_K:
            guards = ()
            for u in tl.static_range(UNROLL):
                guards = guards + (load & (first + u * WARPS_K < columns).to(tl.int32),)  # noqa: RUF005
        codes = codes + tl.inline_asm_elementwise(
            asm.load_codes(UNROLL, WARPS_K * 512, not EVEN_K),
            asm.load_codes_operands(UNROLL, not EVEN_K),
            (address,) + guards,  # noqa: RUF005
            dtype=same(tl.int32, 4 * UNROLL),
            is_pure=False,
            pack=1,
        )
    scales = load_scales(
        absmax_ptr, nested_absmax_ptr, lane, warp_n, group, first, load, N, K,
        BLOCKSIZE, NESTED, SHARED, BY_ROW, WARPS_N, WARPS_K, TILES, UNROLL, EVEN_K, GATED,
    )  # fmt: skip
    return codes, scales


@triton.jit
def load_rows(
    x_ptr,
    stride_xm,
    lane,
    warp_k,
    step,
    M,
    K,
    ONE_ROW: tl.constexpr,
    COLUMNS: tl.constexpr,
    WARPS_K: tl.constexpr,
    UNROLL: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """A lane's part of x for one step: 8 words for each tile along K and each eight rows, as a flat tuple."""
    x = ()
    for u in tl.static_range(UNROLL):
        column = step * (WARPS_K * UNROLL) + warp_k + u * WARPS_K
        for c in tl.static_range(COLUMNS):
            # With one row all lanes read it; of the tensor core's eight results seven are not looked at.
            row = lane * 0 if ONE_ROW else tl.minimum(lane // 4 + 8 * c, M - 1)
            address = (x_ptr + row * stride_xm + column * 64 + lane % 4 * 8).to(tl.int64)
            operands = (address,)
            if not EVEN_K:
                operands = (address, (column < K // 64).to(tl.int32))
            x = x + tl.inline_asm_elementwise(
                asm.load_x(not EVEN_K),
                asm.load_x_operands(not EVEN_K),
                operands,
                dtype=same(tl.int32, 8),
                is_pure=False,
                pack=1,
            )
    return x


@triton.jit
def multiply_column(
    sums,
    codes,
    scales,
    x,  # of this tile along K alone
    table,
    u: tl.constexpr,  # which one of a step
    BLOCKSIZE: tl.constexpr,
    SHARED: tl.constexpr,
    ONE_ROW: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILES: tl.constexpr,
    UNROLL: tl.constexpr,
    DTYPE: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """`sums` with the products of one tile along K added."""
    GROUPS: tl.constexpr = 2 if BLOCKSIZE == 32 else 1
    SUMS: tl.constexpr = asm.num_products(COLUMNS, ONE_ROW, 1)
    added = ()
    for t in tl.static_range(TILES):
        products = tl.inline_asm_elementwise(
            asm.multiply(COLUMNS, ONE_ROW, GROUPS, DTYPE, DEPTH),
            asm.multiply_operands(COLUMNS, ONE_ROW, GROUPS),
            slice_of(codes, 4 * (t * UNROLL + u), 4) + x + (table,),
            dtype=same(tl.float32, GROUPS * SUMS),
            is_pure=False,
            pack=1,
        )
        pairs = ()
        for i in tl.static_range(GROUPS):
            pairs = pairs + scale_pair(scales, t, u, i, BLOCKSIZE, SHARED, TILES, UNROLL)
        for i in tl.static_range(SUMS):
            total = tl.fma(products[i], pairs[i if ONE_ROW else i // 2 % 2], sums[t * SUMS + i])
            if GROUPS == 2:
                total = tl.fma(products[SUMS + i], pairs[2 + (i if ONE_ROW else i // 2 % 2)], total)
            added = added + (total,)  # noqa: RUF005
    return added


@triton.jit
def multiply_step(
    sums,
    codes,
    scales,
    held,
    x,
    table,
    BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,
    SHARED: tl.constexpr,
    BY_ROW: tl.constexpr,
    ONE_ROW: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILES: tl.constexpr,
    UNROLL: tl.constexpr,
    DTYPE: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """`sums` with the products of one step added."""
    if NESTED:
        scales = nested_scales(scales, held, table, BLOCKSIZE, BY_ROW, TILES, UNROLL)
    for u in tl.static_range(UNROLL):
        now_x = slice_of(x, 8 * COLUMNS * u, 8 * COLUMNS)
        sums = multiply_column(
            sums, codes, scales, now_x, table, u,
            BLOCKSIZE, SHARED, ONE_ROW, COLUMNS, TILES, UNROLL, DTYPE, DEPTH,
        )  # fmt: skip
    return sums


@triton.jit
def multiply_at_once(
    codes, scales, held, x_ptr, stride_xm, lane, warp_k, table, M, K,
    BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, SHARED: tl.constexpr, BY_ROW: tl.constexpr, ONE_ROW: tl.constexpr,
    COLUMNS: tl.constexpr, WARPS_K: tl.constexpr, TILES: tl.constexpr, UNROLL: tl.constexpr, EVEN_K: tl.constexpr,
    AHEAD: tl.constexpr, DTYPE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """The sums of a step that is all of K; x of the next tile along K is asked for before this one's is used, or with
    `AHEAD` all of x before any is."""
    sums = zeros(lane * 0, TILES * asm.num_products(COLUMNS, ONE_ROW, 1))
    FIRST: tl.constexpr = UNROLL if AHEAD else 1
    x = ()
    for u in tl.static_range(FIRST):
        x = x + load_rows(
            x_ptr, stride_xm, lane, warp_k, u, M, K, ONE_ROW, COLUMNS, WARPS_K, 1, EVEN_K
        )  # fmt: skip
    if NESTED:
        scales = nested_scales(scales, held, table, BLOCKSIZE, BY_ROW, TILES, UNROLL)
    for u in tl.static_range(UNROLL):
        if FIRST + u < UNROLL:
            x = x + load_rows(
                x_ptr, stride_xm, lane, warp_k, FIRST + u, M, K, ONE_ROW, COLUMNS, WARPS_K, 1, EVEN_K
            )  # fmt: skip
        now_x = slice_of(x, 8 * COLUMNS * u, 8 * COLUMNS)
        sums = multiply_column(
            sums, codes, scales, now_x, table, u,
            BLOCKSIZE, SHARED, ONE_ROW, COLUMNS, TILES, UNROLL, DTYPE, DEPTH,
        )  # fmt: skip
    return sums


@triton.jit(do_not_specialize=["M", "N", "K", "stride_xm"])
def gemv_4bit_kernel(
    tiled_ptr,  # int32 [ceil(N / 16), K / 64, 32 lanes, 4]
    absmax_ptr,  # float32 [ceil(N / 16), K / BLOCKSIZE, 8, 2], or uint8 if NESTED
    nested_absmax_ptr,  # float32 [ceil(N * K / BLOCKSIZE / 256)], read if NESTED; so are the next two
    nested_code_ptr,  # float32 [256]
    nested_offset_ptr,  # float32 [], or [ceil(N / 16)] if OFFSETS
    x_ptr,  # [M, K], rows on 16-byte boundaries
    stride_xm,
    bias_ptr,  # [N], read if HAS_BIAS
    residual_ptr,  # as y, read if HAS_RESIDUAL
    y_ptr,  # [M, N], or [M, N / 2] if GATED
    M,
    N,
    K,
    QUANT_TYPE: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,
    SHARED: tl.constexpr,  # four lanes share scales; nested ones always
    BY_ROW: tl.constexpr,  # a factor of nested scales stands for whole rows
    OFFSETS: tl.constexpr,  # of nested scales, one for each row tile: weights quantized apart and joined
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,  # of `onegpu.kernels.tail`, or None
    GATED: tl.constexpr,
    ONE_ROW: tl.constexpr,  # M is 1
    COLUMNS: tl.constexpr,  # M / 8, rounded up to a power of two
    WARPS: tl.constexpr,
    WARPS_N: tl.constexpr,
    TILES: tl.constexpr,
    UNROLL: tl.constexpr,
    EVEN_K: tl.constexpr,  # the program's warps and their steps divide K / 64
    AHEAD: tl.constexpr,  # x is loaded a step ahead too
    OVERLAP: tl.constexpr,  # None, "edges" or "weights"
    DEPTH: tl.constexpr,  # of one tensor core step: 16, on Turing 8
    ROUND: tl.constexpr,  # steps in a round of the loop, 1 or 2
    ONCE: tl.constexpr,  # a program has one row group and one step, so there is no loop
):
    WARPS_K: tl.constexpr = WARPS // WARPS_N
    SUMS: tl.constexpr = TILES * asm.num_products(COLUMNS, ONE_ROW, 1)
    DTYPE: tl.constexpr = dtype_name(x_ptr.dtype.element_ty)
    thread = tl.arange(0, WARPS)[:, None] * 32 + tl.arange(0, 32)[None, :]
    lane = thread % 32
    warp_n = thread // 32 % WARPS_N
    warp_k = thread // 32 // WARPS_N
    groups = tl.cdiv(N, 16 * TILES * WARPS_N)
    steps = tl.cdiv(K // 64, WARPS_K * UNROLL)
    group = tl.program_id(0)
    step = 0
    if OVERLAP == "edges":
        tl.extra.cuda.gdc_launch_dependents()
        ask_for_weights(
            tiled_ptr, absmax_ptr, nested_absmax_ptr, lane, warp_n, warp_k, group, N, K,
            BLOCKSIZE, NESTED, WARPS_N, WARPS_K, TILES, UNROLL, GATED,
        )  # fmt: skip
        tl.extra.cuda.gdc_wait()
    codes, scales = load_weights(
        tiled_ptr, absmax_ptr, nested_absmax_ptr, lane, warp_n, warp_k, group, step, True, N, K,
        BLOCKSIZE, NESTED, SHARED, BY_ROW, WARPS_N, WARPS_K, TILES, UNROLL, EVEN_K, GATED,
    )  # fmt: skip
    held = ()
    if NESTED:
        held = load_constants(
            nested_absmax_ptr, nested_offset_ptr, lane, warp_n, group, 1, N, K,
            BLOCKSIZE, BY_ROW, WARPS_N, TILES, UNROLL, GATED, OFFSETS,
        )  # fmt: skip
    map_address = (nested_code_ptr + thread * 0).to(tl.int64)
    table = tl.inline_asm_elementwise(
        asm.fill_table(WARPS, QUANT_TYPE, DTYPE, asm.sum_bytes(WARPS, WARPS_N, TILES, SUMS, ONE_ROW, ONCE), NESTED),
        "=r,l",
        (map_address,),
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
    if OVERLAP == "weights":
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if ONCE:
        sums = multiply_at_once(
            codes, scales, held, x_ptr, stride_xm, lane, warp_k, table, M, K,
            BLOCKSIZE, NESTED, SHARED, BY_ROW, ONE_ROW, COLUMNS, WARPS_K, TILES, UNROLL, EVEN_K, AHEAD, DTYPE, DEPTH,
        )  # fmt: skip
        if ONE_ROW:
            finish_one_row(
                sums, y_ptr, bias_ptr, residual_ptr, thread, group, 0, N,
                QUANT_TYPE, HAS_BIAS, HAS_RESIDUAL, ACTIVATION, GATED, WARPS, TILES,
            )  # fmt: skip
        else:
            finish_once(
                sums, y_ptr, bias_ptr, residual_ptr, thread, group, M, N,
                QUANT_TYPE, HAS_BIAS, HAS_RESIDUAL, ACTIVATION, GATED, COLUMNS, WARPS, WARPS_N, TILES,
            )  # fmt: skip
    else:
        if AHEAD:
            x = load_rows(
                x_ptr, stride_xm, lane, warp_k, step, M, K, ONE_ROW, COLUMNS, WARPS_K, UNROLL, EVEN_K
            )  # fmt: skip
        total = tl.cdiv(groups - group, tl.num_programs(0)) * steps
        sums = zeros(thread * 0, SUMS)
        turn = 0
        for i in range(0, total, ROUND):
            for part in tl.static_range(ROUND):
                # Each step of a round of two has registers of its own: handing loaded ones on would wait for them.
                ends = step + 1 == steps
                last = ends
                if ROUND == 2:
                    # The second step of the last round may be one too many.
                    last = ends & (group < groups)
                next_step = tl.where(ends, 0, step + 1)
                next_group = tl.where(ends, group + tl.num_programs(0), group)
                more = i + part + 1 < total
                if not AHEAD and ROUND == 1:
                    now_x = load_rows(
                        x_ptr, stride_xm, lane, warp_k, step, M, K, ONE_ROW, COLUMNS, WARPS_K, UNROLL, EVEN_K
                    )  # fmt: skip
                next_codes, next_scales = load_weights(
                    tiled_ptr, absmax_ptr, nested_absmax_ptr, lane, warp_n, warp_k, next_group, next_step, more, N, K,
                    BLOCKSIZE, NESTED, SHARED, BY_ROW, WARPS_N, WARPS_K, TILES, UNROLL, EVEN_K, GATED,
                )  # fmt: skip
                if AHEAD:
                    now_x = x
                    x = load_rows(
                        x_ptr, stride_xm, lane, warp_k, next_step, M, K, ONE_ROW, COLUMNS, WARPS_K, UNROLL, EVEN_K
                    )  # fmt: skip
                if ROUND == 2:
                    tl.inline_asm_elementwise(
                        asm.stay_behind(), "=r,r", (thread,), dtype=tl.int32, is_pure=False, pack=1
                    )  # fmt: skip
                if not AHEAD and ROUND == 2:
                    now_x = load_rows(
                        x_ptr, stride_xm, lane, warp_k, step, M, K, ONE_ROW, COLUMNS, WARPS_K, UNROLL, EVEN_K
                    )  # fmt: skip
                sums = multiply_step(
                    sums, codes, scales, held, now_x, table,
                    BLOCKSIZE, NESTED, SHARED, BY_ROW, ONE_ROW, COLUMNS, TILES, UNROLL, DTYPE, DEPTH,
                )  # fmt: skip
                if last:
                    if NESTED:
                        held = load_constants(
                            nested_absmax_ptr, nested_offset_ptr, lane, warp_n, next_group, more.to(tl.int32), N, K,
                            BLOCKSIZE, BY_ROW, WARPS_N, TILES, UNROLL, GATED, OFFSETS,
                        )  # fmt: skip
                    if ONE_ROW:
                        finish_one_row(
                            sums, y_ptr, bias_ptr, residual_ptr, thread, group, turn, N,
                            QUANT_TYPE, HAS_BIAS, HAS_RESIDUAL, ACTIVATION, GATED, WARPS, TILES,
                        )  # fmt: skip
                        turn = 1 - turn
                    else:
                        finish_rows(
                            sums, y_ptr, bias_ptr, residual_ptr, lane, warp_n, warp_k, group, M, N,
                            QUANT_TYPE, HAS_BIAS, HAS_RESIDUAL, ACTIVATION, GATED, COLUMNS, WARPS, WARPS_N, TILES,
                        )  # fmt: skip
                    sums = zeros(thread * 0, SUMS)
                codes = next_codes
                scales = next_scales
                step = next_step
                group = next_group


@functools.cache
def why_not_gemv(device: torch.device, dtype: torch.dtype) -> str | None:
    """None where this kernel runs for x of `dtype` on a CUDA device, else the reason in a sentence."""
    if torch.version.hip is not None:
        return "it is written in NVIDIA's assembly"
    if dtype not in (torch.bfloat16, torch.float16):
        return "tensor cores take 16-bit x only"
    needed = BFLOAT16_CAPABILITY if dtype == torch.bfloat16 else OLDEST_CAPABILITY
    if torch.cuda.get_device_capability(device) < needed:
        return f"{DTYPES[dtype]} needs compute capability {needed[0]}.{needed[1]}"
    return None


def constants(
    config: Config,
    M: int,
    K: int,
    quant_type: str,
    blocksize: int,
    *,
    nested: bool,
    has_bias: bool,
    overlap: bool,
    capability: tuple[int, int],
    has_residual: bool = False,
    activation: str | None = None,
    gated: bool = False,
    offsets: bool = False,
) -> dict[str, Any]:
    """Compile-time arguments of the kernel, and `num_warps` and `launch_pdl` beside them."""
    overlapping = config.overlap(overlap, capability)
    columns = next(columns for columns in (1, 2, 4) if 8 * columns >= M)
    once = config.holds(K) and (M == 1 or asm.sums_fit(config.warps, config.tiles * 4 * columns))
    return {
        "QUANT_TYPE": quant_type,
        "BLOCKSIZE": blocksize,
        "NESTED": nested,
        "SHARED": nested or config.shares,
        "BY_ROW": nested and NESTED_BLOCKSIZE % (K // blocksize) == 0,
        "OFFSETS": offsets,
        "HAS_BIAS": has_bias,
        "HAS_RESIDUAL": has_residual,
        "ACTIVATION": activation,
        "GATED": gated,
        "ONE_ROW": M == 1,
        "COLUMNS": columns,
        "WARPS": config.warps,
        "WARPS_N": config.warps_n,
        "TILES": config.tiles,
        "UNROLL": config.unroll,
        "EVEN_K": config.is_even_k(K),
        "AHEAD": config.ahead and not runs_out_of_registers(M, config, capability),
        "OVERLAP": overlapping,
        "DEPTH": 16 if capability >= BFLOAT16_CAPABILITY else 8,
        "ROUND": 2 if config.twice and not once else 1,
        "ONCE": once,
        "num_warps": config.warps,
        "launch_pdl": overlapping is not None,
    }


def runs_out_of_registers(M: int, config: Config, capability: tuple[int, int]) -> bool:
    """Whether x a step ahead would make the program spill."""
    return M > 8 and config.unroll == 2 and capability >= (12, 0)


def gemv_4bit(
    y: Tensor,
    rows: Tensor,
    tiled: Tensor,
    absmax: Tensor,
    bias: Tensor | None,
    quant_type: str,
    blocksize: int,
    nested: tuple[Tensor, Tensor, Tensor] | None = None,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
    gated: bool = False,
    overlap: bool = False,
    config: Config | None = None,
) -> None:
    """Write the tail of rows @ W.T + bias into y.

    Args:
        y: [M, N], or [M, N / 2] if gated; contiguous, M from 1 to `MAX_ROWS`, in the dtype of `rows`.
        rows: [M, K], bfloat16 or float16, elements of a row side by side, rows on 16-byte boundaries.
        tiled, absmax: `onegpu.formats.tiling`'s codes and scales of W [N, K], contiguous.
        nested: `nested_absmax`, `nested_code`, `nested_offset` where absmax is uint8; the last one for all, or one
            for each row tile.
        residual: as y, contiguous.
        activation, gated: of `onegpu.kernels.tail`; gated needs N to be a multiple of 32.
        overlap: read W before the kernel in front has ended. Without it the kernel may begin before that all the
            same, ask L2 for W, which is safe even where W is being written, and wait (see the top of this file).
        config: instead of `configure`'s choice.
    """
    M, K = rows.shape
    N = 2 * y.shape[1] if gated else y.shape[1]
    config = configure(M, N, K, overlap, gated, nested is not None) if config is None else config
    device = rows.device
    scales = nested_arguments(absmax, *(nested or (None, None, None)))
    settings = constants(
        config,
        M,
        K,
        quant_type,
        blocksize,
        nested=nested is not None,
        offsets=nested is not None and nested[2].dim() == 1,
        has_bias=bias is not None,
        has_residual=residual is not None,
        activation=activation,
        gated=gated,
        overlap=overlap,
        capability=capability(device),
    )
    with on_device_of(rows):
        gemv_4bit_kernel[(config.grid(N, processors(device)),)](
            tiled.view(torch.int32),
            *scales,
            rows,
            rows.stride(0),
            y if bias is None else bias,
            y if residual is None else residual,
            y,
            M,
            N,
            K,
            **settings,
            **NO_CONTRACTION,
        )
