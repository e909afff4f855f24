# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# mypy: disable-error-code="assignment"
"""How the few-row 4-bit kernel ends: sums of warps that share rows of W added up, tail, one rounding, stores.

Three ways, by what lies in a thread's registers: of one row of x, of more by the warps that share rows of W, and of
more by all warps where the table's memory is free (`finish_once`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from onegpu.kernels import asm_4bit as asm
from onegpu.kernels.lanes import dtype_name, load_element, same, store_element, sums_of_warps
from onegpu.kernels.tail_device import activate

__all__ = ["finish_once", "finish_one_row", "finish_rows"]


@triton.jit
def scaled(value, bias, QUANT_TYPE: tl.constexpr, DTYPE: tl.constexpr, HAS_BIAS: tl.constexpr):
    """The product itself: the table's constant taken off, the bias added."""
    value = value * asm.inverse_scale(QUANT_TYPE, DTYPE)
    if HAS_BIAS:
        value = value + bias
    return value


@triton.jit
def finish_one_row(
    sums, y_ptr, bias_ptr, residual_ptr, thread, group, turn, N,
    QUANT_TYPE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
    GATED: tl.constexpr, WARPS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """The sums of all warps, one row of W for each of the first threads; with `GATED` two rows."""
    DTYPE: tl.constexpr = dtype_name(y_ptr.dtype.element_ty)
    rows = N // 2 if GATED else N
    row = group * (8 * TILES if GATED else 16 * TILES) + thread
    wanted = (thread < (8 * TILES if GATED else 16 * TILES)) & (row < rows)
    bias = thread * 0.0
    other_bias = thread * 0.0
    residual = thread * 0.0
    if HAS_BIAS:
        bias = load_element(bias_ptr + row, wanted)
        if GATED:
            other_bias = load_element(bias_ptr + rows + row, wanted)
    if HAS_RESIDUAL:
        residual = load_element(residual_ptr + row, wanted)
    values = tl.inline_asm_elementwise(
        asm.sum_one_row(WARPS, TILES, GATED),
        asm.sum_one_row_operands(TILES),
        sums + (thread * 0 + turn,),  # noqa: RUF005
        dtype=same(tl.float32, 2),
        is_pure=False,
        pack=1,
    )
    value = scaled(values[0], bias, QUANT_TYPE, DTYPE, HAS_BIAS)
    if ACTIVATION is not None:
        value = activate(value, ACTIVATION)
    if GATED:
        value = value * scaled(values[1], other_bias, QUANT_TYPE, DTYPE, HAS_BIAS)
    if HAS_RESIDUAL:
        value = value + residual
    store_element(y_ptr + row, value, wanted)


@triton.jit
def load_residuals(residual_ptr, lane, warp_k, first_row, eight: tl.constexpr, M, rows):
    """A lane's four elements of the residual for one tile and eight rows of x, in the order of its sums."""
    out = ()
    for i in tl.static_range(4):
        row = first_row + i // 2 * 8
        column = eight * 8 + i % 2 + lane % 4 * 2
        wanted = (warp_k == 0) & (column < M) & (row < rows)
        out = out + (load_element(residual_ptr + column * rows + row, wanted),)  # noqa: RUF005
    return out


@triton.jit
def finish_rows(
    sums, y_ptr, bias_ptr, residual_ptr, lane, warp_n, warp_k, group, M, N,
    QUANT_TYPE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
    GATED: tl.constexpr, COLUMNS: tl.constexpr, WARPS: tl.constexpr, WARPS_N: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """The sums of the warps that share rows of W, in the layout of the tensor core."""
    DTYPE: tl.constexpr = dtype_name(y_ptr.dtype.element_ty)
    SUMS: tl.constexpr = 4 * COLUMNS
    PER: tl.constexpr = 2 if GATED else 1
    rows = N // 2 if GATED else N
    biases = ()
    residuals = ()
    # Asked for at once, and before warps wait for each other; residuals of more rows would take too many registers.
    for t in tl.static_range(TILES // PER):
        first_row = ((group * WARPS_N + warp_n) * (TILES // PER) + t) * 16 + lane // 4
        for half in tl.static_range(2 if HAS_BIAS else 0):
            row = first_row + 8 * half
            for second in tl.static_range(PER):
                wanted = (warp_k == 0) & (row < rows)
                biases = biases + (load_element(bias_ptr + second * rows + row, wanted),)  # noqa: RUF005
        if HAS_RESIDUAL and COLUMNS == 1:
            residuals = residuals + load_residuals(residual_ptr, lane, warp_k, first_row, 0, M, rows)
    values = sums_of_warps(sums, TILES * SUMS, WARPS, WARPS_N)
    for t in tl.static_range(TILES // PER):
        for i in tl.static_range(SUMS):
            tile = (group * WARPS_N + warp_n) * (TILES // PER) + t
            row = tile * 16 + i // 2 % 2 * 8 + lane // 4
            column = i // 4 * 8 + i % 2 + lane % 4 * 2
            wanted = (warp_k == 0) & (column < M) & (row < rows)
            if HAS_RESIDUAL and COLUMNS > 1 and i % 4 == 0:
                residuals = load_residuals(residual_ptr, lane, warp_k, tile * 16 + lane // 4, i // 4, M, rows)
            bias = lane * 0.0
            other_bias = lane * 0.0
            if HAS_BIAS:
                bias = biases[PER * (2 * t + i // 2 % 2)]
                if GATED:
                    other_bias = biases[PER * (2 * t + i // 2 % 2) + 1]
            value = scaled(values[PER * t * SUMS + i], bias, QUANT_TYPE, DTYPE, HAS_BIAS)
            if ACTIVATION is not None:
                value = activate(value, ACTIVATION)
            if GATED:
                value = value * scaled(values[(PER * t + 1) * SUMS + i], other_bias, QUANT_TYPE, DTYPE, HAS_BIAS)
            if HAS_RESIDUAL:
                value = value + residuals[t * SUMS + i if COLUMNS == 1 else i % 4]
            store_element(y_ptr + column * rows + row, value, wanted)


@triton.jit
def finish_once(
    sums, y_ptr, bias_ptr, residual_ptr, thread, group, M, N,
    QUANT_TYPE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
    GATED: tl.constexpr, COLUMNS: tl.constexpr, WARPS: tl.constexpr, WARPS_N: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """As `finish_rows`, by all warps, where no table is needed any more: each adds up some of the sums."""
    DTYPE: tl.constexpr = dtype_name(y_ptr.dtype.element_ty)
    SUMS: tl.constexpr = 4 * COLUMNS
    PER: tl.constexpr = 2 if GATED else 1
    # A warp's results in the layout of the tensor core, of all tiles side by side along rows.
    RESULTS: tl.constexpr = WARPS_N * TILES // PER * SUMS
    EACH: tl.constexpr = (RESULTS + WARPS - 1) // WARPS
    rows = N // 2 if GATED else N
    lane = thread % 32
    places = ()
    biases = ()
    other_biases = ()
    residuals = ()
    for e in tl.static_range(EACH):
        result = thread // 32 + e * WARPS
        place = tl.minimum(result, RESULTS - 1)
        tile = place // SUMS
        i = place % SUMS
        places = places + ((tile * PER * SUMS + i) * 128,)  # noqa: RUF005
        row = (group * (WARPS_N * TILES // PER) + tile) * 16 + i // 2 % 2 * 8 + lane // 4
        column = i // 4 * 8 + i % 2 + lane % 4 * 2
        wanted = (result < RESULTS) & (column < M) & (row < rows)
        if HAS_BIAS:
            biases = biases + (load_element(bias_ptr + row, wanted),)  # noqa: RUF005
            if GATED:
                other_biases = other_biases + (load_element(bias_ptr + rows + row, wanted),)  # noqa: RUF005
        if HAS_RESIDUAL:
            residuals = residuals + (load_element(residual_ptr + column * rows + row, wanted),)  # noqa: RUF005
    PAIR: tl.constexpr = SUMS if GATED else 0
    values = tl.inline_asm_elementwise(
        asm.sum_everywhere(WARPS, WARPS_N, TILES * SUMS, EACH, PAIR),
        asm.sum_everywhere_operands(TILES * SUMS, EACH, PAIR),
        sums + places,
        dtype=same(tl.float32, EACH * PER),
        is_pure=False,
        pack=1,
    )
    for e in tl.static_range(EACH):
        result = thread // 32 + e * WARPS
        tile = result // SUMS
        i = result % SUMS
        row = (group * (WARPS_N * TILES // PER) + tile) * 16 + i // 2 % 2 * 8 + lane // 4
        column = i // 4 * 8 + i % 2 + lane % 4 * 2
        wanted = (result < RESULTS) & (column < M) & (row < rows)
        value = scaled(values[PER * e], biases[e] if HAS_BIAS else lane * 0.0, QUANT_TYPE, DTYPE, HAS_BIAS)
        if ACTIVATION is not None:
            value = activate(value, ACTIVATION)
        if GATED:
            other_bias = other_biases[e] if HAS_BIAS else lane * 0.0
            value = value * scaled(values[PER * e + 1], other_bias, QUANT_TYPE, DTYPE, HAS_BIAS)
        if HAS_RESIDUAL:
            value = value + residuals[e]
        store_element(y_ptr + column * rows + row, value, wanted)
