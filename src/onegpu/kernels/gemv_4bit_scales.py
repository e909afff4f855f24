# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# mypy: disable-error-code="assignment"
"""The scales of a step of the few-row 4-bit kernel: which tiles a warp holds, loads, evaluation of nested scales.

The four lanes that share rows g and g + 8 of a tile need the same two scales. With `SHARED` they share the work
(`work_of_lane`): lane t % 4 fetches those of the t-th tile of a step alone (of every fourth where a step has more, one
of the two where it has fewer) and hands them to the other three when they come to that tile (`scale_pair`): a fourth of
the loads and registers for two shuffles a tile. Without it each lane loads all for itself.

Nested scales, which cost a look-up and two roundings beside, are always shared. A factor stands for 256 blocks: where
it cannot change along a row (`BY_ROW`) it is loaded once for each row group, as the offset is, else for each step.
"""

from __future__ import annotations

import triton
import triton.language as tl

from onegpu.kernels import asm_4bit as asm
from onegpu.kernels.lanes import load_element, same
from onegpu.kernels.overlap import ask_for

__all__ = [
    "ask_for_scales",
    "load_constants",
    "load_scales",
    "nested_scales",
    "row_tile_of",
    "scale_pair",
]


@triton.constexpr_function
def nested_types(groups, factors):
    return (tl.int32,) * groups + (tl.float32,) * factors


@triton.constexpr_function
def log2(value):
    return value.bit_length() - 1


@triton.constexpr_function
def parts(TILES, UNROLL):
    """How many tiles of a step a lane has shared scales of."""
    assert TILES & (TILES - 1) == UNROLL & (UNROLL - 1) == 0, "tiles and unroll must be powers of two"
    return max(1, TILES * UNROLL // 4)


@triton.constexpr_function
def rows_of_lane(TILES, UNROLL):
    """Of how many rows of each: of both, or of one where a step has fewer tiles than there are lanes to share them."""
    return 2 if TILES * UNROLL >= 4 else 1


@triton.jit
def block_of(column_tile, BLOCKSIZE: tl.constexpr):
    """The (first) block of a row that a tile of 64 columns lies in; shifts, since `//` minds the sign."""
    if BLOCKSIZE == 32:
        block = column_tile * 2
    else:
        block = column_tile >> log2(BLOCKSIZE // 64)
    return block


@triton.jit
def row_tile_of(group, warp_n, row_tiles, tile, WARPS_N: tl.constexpr, TILES: tl.constexpr, GATED: tl.constexpr):
    """Which 16 rows of W the `tile`-th tile of a warp holds; beyond the last, some other that exists."""
    if GATED:
        half = row_tiles // 2
        pair = (group * WARPS_N + warp_n) * (TILES // 2) + (tile >> 1)
        if WARPS_N * TILES > 2:
            pair = tl.minimum(pair, half - 1)
        row_tile = pair + (tile & 1) * half
    else:
        row_tile = (group * WARPS_N + warp_n) * TILES + tile
        if WARPS_N * TILES > 1:
            row_tile = tl.minimum(row_tile, row_tiles - 1)
    return row_tile


@triton.jit
def work_of_lane(lane, part: tl.constexpr, TILES: tl.constexpr, UNROLL: tl.constexpr):
    """Which shared scales a lane has: of which tile along rows and along columns, from which row of it on."""
    tile = lane & (min(4, TILES * UNROLL) - 1)
    if part > 0:
        tile = tile + 4 * part
    row = lane // 4
    if rows_of_lane(TILES, UNROLL) == 1:
        row = row + (lane >> log2(TILES * UNROLL) & 1) * 8
    return tile >> log2(UNROLL), tile & (UNROLL - 1), row


@triton.jit
def ask_for_scales(
    absmax_ptr, nested_absmax_ptr, lane, row_tile, column_tile, N, K, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr
):
    """Have L2 fetch the scales of one tile, or the codes and factors that they are evaluated from."""
    blocks = K // BLOCKSIZE
    block = block_of(column_tile, BLOCKSIZE)
    place = lane // 4 * 2
    if BLOCKSIZE == 32:
        place = place + (lane & 1) * 16
    ask_for(absmax_ptr + (row_tile * blocks + block) * 16 + place)
    if NESTED:
        row = tl.minimum(row_tile * 16 + lane // 2, N - 1)
        ask_for(nested_absmax_ptr + (row * blocks + block >> 8))


@triton.jit
def load_constants(
    nested_absmax_ptr,
    nested_offset_ptr,
    lane,
    warp_n,
    group,  # which TILES * WARPS_N tiles of rows
    more,  # whether there is such a group
    N,
    K,
    BLOCKSIZE: tl.constexpr,
    BY_ROW: tl.constexpr,
    WARPS_N: tl.constexpr,
    TILES: tl.constexpr,
    UNROLL: tl.constexpr,
    GATED: tl.constexpr,
    OFFSETS: tl.constexpr,
):
    """What a lane's nested scales have in common along its rows, as a flat tuple: for each part the offset, and with
    `BY_ROW` a factor for each row."""
    wanted = lane * 0 + more
    blocks = K // BLOCKSIZE
    row_tiles = tl.cdiv(N, 16)
    constants = ()
    for part in tl.static_range(parts(TILES, UNROLL)):
        t, _, row = work_of_lane(lane, part, TILES, UNROLL)
        row_tile = row_tile_of(group, warp_n, row_tiles, t, WARPS_N, TILES, GATED)
        offset_ptr = nested_offset_ptr + (row_tile if OFFSETS else lane * 0)
        constants = constants + (load_element(offset_ptr, wanted),)  # noqa: RUF005, tuples of Triton know no unpacking
        if BY_ROW:
            for i in tl.static_range(rows_of_lane(TILES, UNROLL)):
                index = tl.minimum(row_tile * 16 + row + 8 * i, N - 1) * blocks >> 8
                constants = constants + (load_element(nested_absmax_ptr + index, wanted),)  # noqa: RUF005
    return constants


@triton.jit
def load_scales(
    absmax_ptr,
    nested_absmax_ptr,
    lane,
    warp_n,
    group,
    first,  # tile of 64 columns of this warp, the others lie WARPS_K apart
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
    """A lane's scales of TILES x UNROLL tiles, or if shared those it has, by part, block of a tile, row; of nested ones
    what they are evaluated from: codes, then factors. A flat tuple."""
    GROUPS: tl.constexpr = 2 if BLOCKSIZE == 32 else 1
    ROWS: tl.constexpr = rows_of_lane(TILES, UNROLL)
    blocks = K // BLOCKSIZE
    row_tiles = tl.cdiv(N, 16)
    g = lane // 4
    scales = ()
    if SHARED:
        for part in tl.static_range(parts(TILES, UNROLL)):
            t, u, row = work_of_lane(lane, part, TILES, UNROLL)
            row_tile = row_tile_of(group, warp_n, row_tiles, t, WARPS_N, TILES, GATED)
            column_tile = first + u * WARPS_K
            block = block_of(column_tile, BLOCKSIZE)
            load = lane * 0 + more
            if not EVEN_K:
                load = load & (column_tile < K // 64).to(tl.int32)
            place = g * 2
            if ROWS == 1:
                place = place + (row >> 3)
            addresses = ((absmax_ptr + (row_tile * blocks + block) * 16 + place).to(tl.int64),)
            if NESTED and not BY_ROW:
                # Two blocks of 32 in one tile begin at an even one, so one factor stands for both.
                flat = (row_tile * 16 + row) * blocks + block
                for i in tl.static_range(ROWS):
                    # Beyond the last row, some other factor that exists.
                    index = tl.minimum(flat + i * 8 * blocks >> 8, N * blocks - 1 >> 8)
                    addresses = addresses + ((nested_absmax_ptr + index).to(tl.int64),)  # noqa: RUF005
            if NESTED:
                scales = scales + tl.inline_asm_elementwise(
                    asm.load_nested(GROUPS, ROWS, not BY_ROW, not EVEN_K),
                    asm.load_nested_operands(GROUPS, ROWS, not BY_ROW),
                    addresses + (load,),  # noqa: RUF005
                    dtype=nested_types(GROUPS, 0 if BY_ROW else ROWS),
                    is_pure=False,
                    pack=1,
                )
            else:
                scales = scales + tl.inline_asm_elementwise(
                    asm.load_scales(GROUPS, ROWS, not EVEN_K),
                    asm.load_scales_operands(GROUPS, ROWS),
                    addresses + (load,),  # noqa: RUF005
                    dtype=same(tl.float32, GROUPS * ROWS),
                    is_pure=False,
                    pack=1,
                )
    else:
        for t in tl.static_range(TILES):
            row_tile = row_tile_of(group, warp_n, row_tiles, t, WARPS_N, TILES, GATED)
            for u in tl.static_range(UNROLL):
                column_tile = first + u * WARPS_K
                load = lane * 0 + more
                if not EVEN_K:
                    load = load & (column_tile < K // 64).to(tl.int32)
                address = (row_tile * blocks + block_of(column_tile, BLOCKSIZE)) * 16 + g * 2
                scales = scales + tl.inline_asm_elementwise(
                    asm.load_scales(GROUPS, 2, not EVEN_K),
                    asm.load_scales_operands(GROUPS, 2),
                    ((absmax_ptr + address).to(tl.int64), load),
                    dtype=same(tl.float32, 2 * GROUPS),
                    is_pure=False,
                    pack=1,
                )
    return scales


@triton.jit
def nested_scales(
    scales,
    constants,
    table,
    BLOCKSIZE: tl.constexpr,
    BY_ROW: tl.constexpr,
    TILES: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """The scales that a lane evaluates, of what `load_scales` and `load_constants` gave: float32, by part, block of a
    tile, row."""
    GROUPS: tl.constexpr = 2 if BLOCKSIZE == 32 else 1
    ROWS: tl.constexpr = rows_of_lane(TILES, UNROLL)
    LOADED: tl.constexpr = GROUPS if BY_ROW else GROUPS + ROWS
    HELD: tl.constexpr = 1 + ROWS if BY_ROW else 1
    out = ()
    for part in tl.static_range(parts(TILES, UNROLL)):
        operands = ()
        for i in tl.static_range(GROUPS):
            operands = operands + (scales[part * LOADED + i],)  # noqa: RUF005
        for i in tl.static_range(ROWS):
            factor = constants[part * HELD + 1 + i] if BY_ROW else scales[part * LOADED + GROUPS + i]
            operands = operands + (factor,)  # noqa: RUF005
        out = out + tl.inline_asm_elementwise(
            asm.nested_scales(GROUPS, ROWS),
            asm.nested_scales_operands(GROUPS, ROWS),
            operands + (constants[part * HELD], table),  # noqa: RUF005
            dtype=same(tl.float32, GROUPS * ROWS),
            is_pure=False,
            pack=1,
        )
    return out


@triton.jit
def scale_pair(
    scales,
    t: tl.constexpr,
    u: tl.constexpr,
    block: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    SHARED: tl.constexpr,
    TILES: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """The float32 scales of rows g and g + 8 for one block of a tile; shared ones from the lanes that have them."""
    GROUPS: tl.constexpr = 2 if BLOCKSIZE == 32 else 1
    ROWS: tl.constexpr = rows_of_lane(TILES, UNROLL)
    tile: tl.constexpr = t * UNROLL + u
    if SHARED:
        at: tl.constexpr = (tile // 4 * GROUPS + block) * ROWS
        pair = tl.inline_asm_elementwise(
            asm.share(tile % 4, tile % 4 if ROWS == 2 else tile + TILES * UNROLL),
            "=&f,=&f,f,f",
            (scales[at], scales[at + ROWS - 1]),
            dtype=same(tl.float32, 2),
            is_pure=False,
            pack=1,
        )
    else:
        pair = (scales[2 * (tile * GROUPS + block)], scales[2 * (tile * GROUPS + block) + 1])
    return pair
