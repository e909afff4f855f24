# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# mypy: disable-error-code="assignment"
"""y = tail(x @ W.T) for int8 W in rows and up to 32 rows of x in 16 bit: one kernel, bound by reading W.

    t[m, n] = (sum over k of codes[n, k] * x[m, k]) * (row_stats[n] / 127) + bias[n]
    y = round(tail(t))                                    the activation and residual of `onegpu.kernels.tail`

with exact products, all sums in float32 and one rounding at the end. Its plan is that of `gemv_4bit`: a warp takes
`TILES` tiles of 16 rows by `UNROLL` tiles of 64 columns at a time; of a program's warps, `WARPS_N` lie side by side
along rows of W and the rest split K; a program walks row groups with the stride of the grid; what the next step needs
of W is asked for before this one is computed, across row groups too. Here W lies in its own rows, and the tiles of a
step lie side by side, so that a warp reads whole lines.

Rows beyond the last are the last one once more, and not stored. With `GATED` a warp's tiles are pairs, one of rows n
and one of rows n + N_OUT. Within a bucket of M (1; 2-8; 9-16; 17-32) a row's result does not depend on the others.

With `OVERLAP` (compute capability 9.0 and up) the kernel begins while the one before it still runs. "edges": it asks
L2 for its first weights, which sees what others still write, and waits before it loads anything: always safe.
"weights": it loads its first weights and their scales, and only then waits. So whatever wrote W must have finished
before the kernel in front of this one began to let others start.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from onegpu.kernels import asm_4bit, asm_int8
from onegpu.kernels.gemv_4bit import why_not_gemv
from onegpu.kernels.gemv_4bit_config import Config
from onegpu.kernels.gemv_int8_config import configure, is_even_k
from onegpu.kernels.lanes import dtype_name, load_element, same, slice_of, store_element, sums_of_warps, zeros
from onegpu.kernels.launch import NO_CONTRACTION, capability, on_device_of, processors
from onegpu.kernels.overlap import ask_for
from onegpu.kernels.tail_device import activate

__all__ = ["constants", "gemv_int8", "gemv_int8_kernel", "why_not_gemv_int8", "why_not_rows"]

TENSOR_CORE_16 = (8, 0)


@triton.constexpr_function
def second_half(tile, gated):
    """1 where a tile is of the rows from N_OUT on."""
    return tile % 2 if gated else 0


@triton.jit
def first_row(group, warp_n, tile: tl.constexpr, WARPS_N: tl.constexpr, TILES: tl.constexpr, GATED: tl.constexpr):
    """The first of the 16 columns of y that the `tile`-th tile of a warp is for; with `GATED` two tiles are."""
    PER: tl.constexpr = 2 if GATED else 1
    return ((group * WARPS_N + warp_n) * (TILES // PER) + tile // PER) * 16


@triton.jit
def ask_for_weights(
    weight_ptr, stride_wn, lane, warp_n, warp_k, group, N_OUT, K,
    WARPS_N: tl.constexpr, TILES: tl.constexpr, UNROLL: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """Have L2 fetch what `load_weights` will load of the first step; at the ends of W, what is there."""
    for t in tl.static_range(TILES):
        for half in tl.static_range(2):
            row = first_row(group, warp_n, t, WARPS_N, TILES, GATED) + lane // 4 + 8 * half
            row = (tl.minimum(row, N_OUT - 1) + second_half(t, GATED) * N_OUT).to(tl.int64)
            for u in tl.static_range(UNROLL):
                column = warp_k * (UNROLL * 64) + 64 * u + lane % 4 * 16
                ask_for(weight_ptr + row * stride_wn + tl.minimum(column, K - 16))


@triton.jit
def load_weights(
    weight_ptr,
    stride_wn,
    lane,
    warp_n,
    warp_k,
    group,  # which TILES * WARPS_N tiles of rows
    step,  # which UNROLL * warps along K
    more,  # whether there is anything to load
    N_OUT,
    K,
    WARPS_N: tl.constexpr,
    WARPS_K: tl.constexpr,
    TILES: tl.constexpr,
    UNROLL: tl.constexpr,
    EVEN_K: tl.constexpr,
    GATED: tl.constexpr,
):
    """A lane's codes of TILES x UNROLL tiles, eight words each, as a flat tuple."""
    column = (step * WARPS_K + warp_k) * (UNROLL * 64) + lane % 4 * 16
    load = (lane * 0 + more).to(tl.int32)
    guards = (load,)
    if not EVEN_K:
        guards = ()
        for u in tl.static_range(UNROLL):
            guards = guards + (load & (column + 64 * u < K).to(tl.int32),)  # noqa: RUF005
    codes = ()
    for t in tl.static_range(TILES):
        row = first_row(group, warp_n, t, WARPS_N, TILES, GATED) + lane // 4
        upper = (tl.minimum(row, N_OUT - 1) + second_half(t, GATED) * N_OUT).to(tl.int64)
        lower = (tl.minimum(row + 8, N_OUT - 1) + second_half(t, GATED) * N_OUT).to(tl.int64)
        addresses = (
            (weight_ptr + upper * stride_wn + column).to(tl.int64),
            (weight_ptr + lower * stride_wn + column).to(tl.int64),
        )
        codes = codes + tl.inline_asm_elementwise(
            asm_int8.load_codes(UNROLL, not EVEN_K),
            asm_int8.load_codes_operands(UNROLL, not EVEN_K),
            addresses + guards,
            dtype=same(tl.int32, 8 * UNROLL),
            is_pure=False,
            pack=1,
        )
    return codes


@triton.jit
def load_stats(
    stats_ptr, thread, warp_n, group, more, N_OUT,
    WARPS_N: tl.constexpr, TILES: tl.constexpr, GATED: tl.constexpr, ONE_ROW: tl.constexpr,
):  # fmt: skip
    """Scales of the rows whose sums a lane will have: rows g and g + 8 of each tile, or as `finish_one_row` has them.

    Asked for along with weights, since at the end they would be waited for.
    """
    stats = ()
    if ONE_ROW:
        row = group * (8 * TILES if GATED else 16 * TILES) + thread
        wanted = (thread < (8 * TILES if GATED else 16 * TILES)) & (row < N_OUT) & more
        stats = (load_element(stats_ptr + row, wanted),)
        if GATED:
            stats = stats + (load_element(stats_ptr + N_OUT + row, wanted),)  # noqa: RUF005
    else:
        for t in tl.static_range(TILES):
            for half in tl.static_range(2):
                row = first_row(group, warp_n, t, WARPS_N, TILES, GATED) + thread % 32 // 4 + 8 * half
                pointer = stats_ptr + second_half(t, GATED) * N_OUT + row
                stats = stats + (load_element(pointer, (row < N_OUT) & more),)  # noqa: RUF005
    return stats


@triton.jit
def load_rows(
    x_ptr, stride_xm, lane, warp_k, step, M, K,
    ONE_ROW: tl.constexpr, COLUMNS: tl.constexpr, WARPS_K: tl.constexpr, UNROLL: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """A lane's part of x for one step: 8 words for each tile along K and each eight rows, as a flat tuple."""
    x = ()
    for u in tl.static_range(UNROLL):
        column = (step * WARPS_K + warp_k) * (UNROLL * 64) + u * 64 + lane % 4 * 16
        for c in tl.static_range(COLUMNS):
            # With one row all lanes read it, and the tensor core's eight results are the same.
            row = lane * 0 if ONE_ROW else tl.minimum(lane // 4 + 8 * c, M - 1)
            operands = ((x_ptr + row.to(tl.int64) * stride_xm + column).to(tl.int64),)
            if not EVEN_K:
                operands = operands + ((column < K).to(tl.int32),)  # noqa: RUF005
            x = x + tl.inline_asm_elementwise(
                asm_int8.load_x(not EVEN_K),
                asm_int8.load_x_operands(not EVEN_K),
                operands,
                dtype=same(tl.int32, 8),
                is_pure=False,
                pack=1,
            )
    return x


@triton.jit
def multiply_step(
    sums, codes, x,
    COLUMNS: tl.constexpr, TILES: tl.constexpr, UNROLL: tl.constexpr, DTYPE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """`sums` with the products of one step added; each tile's begin at zero, so that tiles do not wait for others."""
    SUMS: tl.constexpr = 4 * COLUMNS
    for u in tl.static_range(UNROLL):
        added = ()
        for t in tl.static_range(TILES):
            products = tl.inline_asm_elementwise(
                asm_int8.multiply(COLUMNS, DTYPE, DEPTH),
                asm_int8.multiply_operands(COLUMNS),
                slice_of(codes, 8 * (t * UNROLL + u), 8) + slice_of(x, 8 * COLUMNS * u, 8 * COLUMNS),
                dtype=same(tl.float32, SUMS),
                is_pure=False,
                pack=1,
            )
            for i in tl.static_range(SUMS):
                added = added + (sums[t * SUMS + i] + products[i],)  # noqa: RUF005
        sums = added
    return sums


@triton.jit
def scaled(value, stats, bias, HAS_BIAS: tl.constexpr, DTYPE: tl.constexpr):
    """The product itself, from a sum of `asm_int8.multiply`."""
    value = value * (stats * asm_int8.inverse_scale(DTYPE))
    if HAS_BIAS:
        value = value + bias
    return value


@triton.jit
def finish_one_row(
    sums, stats, y_ptr, bias_ptr, residual_ptr, thread, group, turn, N_OUT,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
    WARPS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """The sums of all warps, one column of y for each of the first threads."""
    DTYPE: tl.constexpr = dtype_name(y_ptr.dtype.element_ty)
    row = group * (8 * TILES if GATED else 16 * TILES) + thread
    wanted = (thread < (8 * TILES if GATED else 16 * TILES)) & (row < N_OUT)
    bias = thread * 0.0
    other_bias = thread * 0.0
    residual = thread * 0.0
    if HAS_BIAS:
        bias = load_element(bias_ptr + row, wanted)
        if GATED:
            other_bias = load_element(bias_ptr + N_OUT + row, wanted)
    if HAS_RESIDUAL:
        residual = load_element(residual_ptr + row, wanted)
    mine = ()
    for t in tl.static_range(TILES):
        mine = mine + (sums[4 * t], sums[4 * t + 2])  # noqa: RUF005
    values = tl.inline_asm_elementwise(
        asm_4bit.sum_one_row(WARPS, TILES, GATED),
        asm_4bit.sum_one_row_operands(TILES),
        mine + (thread * 0 + turn,),  # noqa: RUF005
        dtype=same(tl.float32, 2),
        is_pure=False,
        pack=1,
    )
    value = activate(scaled(values[0], stats[0], bias, HAS_BIAS, DTYPE), ACTIVATION)
    if GATED:
        value = value * scaled(values[1], stats[1], other_bias, HAS_BIAS, DTYPE)
    if HAS_RESIDUAL:
        value = value + residual
    store_element(y_ptr + row, value, wanted)


@triton.jit
def finish_rows(
    sums, stats, y_ptr, bias_ptr, residual_ptr, stride_rm, lane, warp_n, warp_k, group, M, N_OUT,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
    COLUMNS: tl.constexpr, WARPS: tl.constexpr, WARPS_N: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """The sums of the warps that share rows of W, in the layout of the tensor core."""
    DTYPE: tl.constexpr = dtype_name(y_ptr.dtype.element_ty)
    SUMS: tl.constexpr = 4 * COLUMNS
    PER: tl.constexpr = 2 if GATED else 1
    residuals = ()
    biases = ()
    # All of them asked for at once, and before warps wait for each other.
    for t in tl.static_range(0, TILES, PER):
        n = first_row(group, warp_n, t, WARPS_N, TILES, GATED) + lane // 4
        for half in tl.static_range(2 if HAS_BIAS else 0):
            for second in tl.static_range(PER):
                wanted = (warp_k == 0) & (n + 8 * half < N_OUT)
                biases = biases + (load_element(bias_ptr + second * N_OUT + n + 8 * half, wanted),)  # noqa: RUF005
        for i in tl.static_range(SUMS if HAS_RESIDUAL else 0):
            m = i // 4 * 8 + i % 2 + lane % 4 * 2
            wanted = (warp_k == 0) & (m < M) & (n + i // 2 % 2 * 8 < N_OUT)
            at = m.to(tl.int64) * stride_rm + n + i // 2 % 2 * 8
            residuals = residuals + (load_element(residual_ptr + at, wanted),)  # noqa: RUF005
    values = sums_of_warps(sums, TILES * SUMS, WARPS, WARPS_N)
    for t in tl.static_range(0, TILES, PER):
        n = first_row(group, warp_n, t, WARPS_N, TILES, GATED) + lane // 4
        for i in tl.static_range(SUMS):
            m = i // 4 * 8 + i % 2 + lane % 4 * 2
            wanted = (warp_k == 0) & (m < M) & (n + 8 * (i // 2 % 2) < N_OUT)
            bias = lane * 0.0
            other_bias = lane * 0.0
            if HAS_BIAS:
                bias = biases[2 * t + PER * (i // 2 % 2)]
                if GATED:
                    other_bias = biases[2 * t + PER * (i // 2 % 2) + 1]
            value = activate(scaled(values[t * SUMS + i], stats[2 * t + i // 2 % 2], bias, HAS_BIAS, DTYPE), ACTIVATION)
            if GATED:
                value = value * scaled(
                    values[(t + 1) * SUMS + i], stats[2 * t + 2 + i // 2 % 2], other_bias, HAS_BIAS, DTYPE
                )
            if HAS_RESIDUAL:
                value = value + residuals[t // PER * SUMS + i]
            store_element(y_ptr + m * N_OUT + n + 8 * (i // 2 % 2), value, wanted)


@triton.jit(do_not_specialize=["M", "N_OUT", "K", "stride_xm", "stride_wn", "stride_rm"])
def gemv_int8_kernel(
    weight_ptr,  # int8 [N, K], rows on 16-byte boundaries; N is N_OUT, twice that if GATED
    stride_wn,
    stats_ptr,  # float32 [N]
    x_ptr,  # [M, K], rows on 16-byte boundaries
    stride_xm,
    bias_ptr,  # [N], read if HAS_BIAS
    residual_ptr,  # [M, N_OUT], read if HAS_RESIDUAL
    stride_rm,
    y_ptr,  # [M, N_OUT]
    M,
    N_OUT,
    K,  # a multiple of 16
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
    EVEN_K: tl.constexpr,  # the program's warps and their steps divide K
    AHEAD: tl.constexpr,  # x is loaded a step ahead too
    OVERLAP: tl.constexpr,  # None, "edges" or "weights"
    DEPTH: tl.constexpr,  # of one tensor core step: 16, on Turing 8
):
    WARPS_K: tl.constexpr = WARPS // WARPS_N
    SUMS: tl.constexpr = TILES * 4 * COLUMNS
    BYTES: tl.constexpr = asm_4bit.sum_bytes(WARPS, WARPS_N, TILES, SUMS, ONE_ROW, False)
    DTYPE: tl.constexpr = dtype_name(x_ptr.dtype.element_ty)
    thread = tl.arange(0, WARPS)[:, None] * 32 + tl.arange(0, 32)[None, :]
    lane = thread % 32
    warp_n = thread // 32 % WARPS_N
    warp_k = thread // 32 // WARPS_N
    groups = tl.cdiv(N_OUT, 16 * TILES * WARPS_N // (2 if GATED else 1))
    steps = tl.cdiv(K, 64 * WARPS_K * UNROLL)
    group = tl.program_id(0)
    step = 0
    if OVERLAP == "edges":
        tl.extra.cuda.gdc_launch_dependents()
        ask_for_weights(
            weight_ptr, stride_wn, lane, warp_n, warp_k, group, N_OUT, K, WARPS_N, TILES, UNROLL, GATED
        )  # fmt: skip
        tl.extra.cuda.gdc_wait()
    codes = load_weights(
        weight_ptr, stride_wn, lane, warp_n, warp_k, group, step, True, N_OUT, K,
        WARPS_N, WARPS_K, TILES, UNROLL, EVEN_K, GATED,
    )  # fmt: skip
    stats = load_stats(stats_ptr, thread, warp_n, group, True, N_OUT, WARPS_N, TILES, GATED, ONE_ROW)
    if BYTES:
        tl.inline_asm_elementwise(asm_int8.declare(BYTES), "=r,r", (thread,), dtype=tl.int32, is_pure=False, pack=1)
    if OVERLAP == "weights":
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if AHEAD:
        x = load_rows(x_ptr, stride_xm, lane, warp_k, step, M, K, ONE_ROW, COLUMNS, WARPS_K, UNROLL, EVEN_K)
    total = tl.cdiv(groups - group, tl.num_programs(0)) * steps
    sums = zeros(thread * 0, SUMS)
    turn = 0
    for i in range(0, total, 2):
        for half in tl.static_range(2):
            # Two steps a round, each with registers of its own: to hand loaded ones on would be to wait for them.
            ends = step + 1 == steps
            last = ends & (group < groups)
            next_step = tl.where(ends, 0, step + 1)
            next_group = tl.where(ends, group + tl.num_programs(0), group)
            more = i + half + 1 < total
            next_codes = load_weights(
                weight_ptr, stride_wn, lane, warp_n, warp_k, next_group, next_step, more, N_OUT, K,
                WARPS_N, WARPS_K, TILES, UNROLL, EVEN_K, GATED,
            )  # fmt: skip
            if AHEAD:
                now_x = x
            else:
                now_x = load_rows(
                    x_ptr, stride_xm, lane, warp_k, step, M, K, ONE_ROW, COLUMNS, WARPS_K, UNROLL, EVEN_K
                )  # fmt: skip
            if AHEAD:
                x = load_rows(
                    x_ptr, stride_xm, lane, warp_k, next_step, M, K, ONE_ROW, COLUMNS, WARPS_K, UNROLL, EVEN_K
                )  # fmt: skip
            next_stats = load_stats(stats_ptr, thread, warp_n, next_group, more, N_OUT, WARPS_N, TILES, GATED, ONE_ROW)
            sums = multiply_step(sums, codes, now_x, COLUMNS, TILES, UNROLL, DTYPE, DEPTH)
            if last:
                if ONE_ROW:
                    finish_one_row(
                        sums, stats, y_ptr, bias_ptr, residual_ptr, thread, group, turn, N_OUT,
                        HAS_BIAS, HAS_RESIDUAL, ACTIVATION, GATED, WARPS, TILES,
                    )  # fmt: skip
                    turn = 1 - turn
                else:
                    finish_rows(
                        sums, stats, y_ptr, bias_ptr, residual_ptr, stride_rm, lane, warp_n, warp_k, group, M, N_OUT,
                        HAS_BIAS, HAS_RESIDUAL, ACTIVATION, GATED, COLUMNS, WARPS, WARPS_N, TILES,
                    )  # fmt: skip
                sums = zeros(thread * 0, SUMS)
            codes = next_codes
            stats = next_stats
            step = next_step
            group = next_group


@functools.cache
def why_not_gemv_int8(device: torch.device, dtype: torch.dtype) -> str | None:
    """None where this kernel runs for x of `dtype` on a device, else the reason in a sentence."""
    if device.type != "cuda":
        return "it is written in NVIDIA's assembly"
    return why_not_gemv(device, dtype)


def why_not_rows(codes: Tensor) -> str | None:
    """None where this kernel takes codes [N, K], else the reason in a sentence."""
    if codes.shape[1] % 16:
        return "K is no multiple of 16"
    if codes.stride(1) != 1 or codes.stride(0) % 16 or codes.data_ptr() % 16:
        return "rows of codes do not lie on 16 bytes"
    return None


def constants(
    config: Config,
    M: int,
    K: int,
    *,
    has_bias: bool,
    has_residual: bool,
    activation: str | None,
    gated: bool,
    overlap: bool,
    capability: tuple[int, int],
) -> dict[str, Any]:
    """Compile-time arguments of the kernel, and `num_warps` and `launch_pdl` beside them."""
    overlapping = config.overlap(overlap, capability)
    return {
        "HAS_BIAS": has_bias,
        "HAS_RESIDUAL": has_residual,
        "ACTIVATION": activation,
        "GATED": gated,
        "ONE_ROW": M == 1,
        "COLUMNS": next(columns for columns in (1, 2, 4) if 8 * columns >= M),
        "WARPS": config.warps,
        "WARPS_N": config.warps_n,
        "TILES": config.tiles,
        "UNROLL": config.unroll,
        "EVEN_K": is_even_k(config, K),
        "AHEAD": config.ahead,
        "OVERLAP": overlapping,
        "DEPTH": 16 if capability >= TENSOR_CORE_16 else 8,
        "num_warps": config.warps,
        "launch_pdl": overlapping is not None,
    }


def gemv_int8(
    y: Tensor,
    rows: Tensor,
    codes: Tensor,
    row_stats: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    activation: str | None = None,
    gated: bool = False,
    *,
    overlap: bool = False,
    config: Config | None = None,
) -> None:
    """Write the tail of rows @ (codes * row_stats / 127).T + bias into y.

    Args:
        y: [M, N], or [M, N / 2] if gated; contiguous, M from 1 to `MAX_ROWS`, in the dtype of `rows`.
        rows: [M, K], bfloat16 or float16, elements of a row side by side, rows on 16-byte boundaries.
        codes: int8 [N, K] that `why_not_rows` has nothing against.
        row_stats: float32 [N], contiguous.
        bias: [N], contiguous; or None.
        residual: as y, elements of a row side by side; or None.
        activation, gated: of `onegpu.kernels.tail`.
        overlap: read W before the kernel in front has ended. Without it the kernel may begin before that all the
            same, ask L2 for W, which is safe even where W is being written, and wait (see the top of this file).
        config: instead of `configure`'s choice.
    """
    M, K = rows.shape
    N = codes.shape[0]
    config = configure(M, N, K, gated) if config is None else config
    device = rows.device
    settings = constants(
        config,
        M,
        K,
        has_bias=bias is not None,
        has_residual=residual is not None,
        activation=activation,
        gated=gated,
        overlap=overlap,
        capability=capability(device),
    )
    with on_device_of(rows):
        gemv_int8_kernel[(config.grid(N, processors(device)),)](
            codes,
            codes.stride(0),
            row_stats,
            rows,
            rows.stride(0),
            y if bias is None else bias,
            y if residual is None else residual,
            0 if residual is None else residual.stride(0),
            y,
            M,
            y.shape[1],
            K,
            **settings,
            **NO_CONTRACTION,
        )
