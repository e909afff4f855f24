# mypy: allow-untyped-decorators
"""PTX for the 4-bit product at few rows: each function writes one block of inline assembly, at compile time.

The pieces, in the order in which `gemv_4bit` uses them:

    load_codes, load_scales, load_x    a lane's bytes of one tile, of its scales (`load_nested`: of what they are
                                       computed from), of x
    fill_table                         256 pairs of table values in shared memory, a copy for each of 32 lanes
    nested_scales                      computed
    share                              scales handed to the lanes that need them too
    multiply                           look up, then `mma.sync`: 16 rows x 64 columns times 8 (or 16, 32) rows of x
    sum_one_row, sum_rows,             sums over the warps that share rows, through shared memory
    sum_everywhere
    store                              scale, bias, one rounding, one element

A byte of codes is a pair of weights, and the table maps it to both values as one 32-bit register of 16-bit floats:
exactly a register of the tensor core's left operand. Entry e of lane l lies at table + 128 e + 4 l, so that lanes
never meet in a bank. `dp4a` with 0x80 in one byte computes 128 * byte + base in one instruction.

Table values are the codebook times a constant, rounded to 16 bit; the constant is taken off the sums in float32.
It is chosen so that rounding hurts least (`TABLE_SCALE`). Relative to the weight, over normal weights in blocks of
64, the error's root mean square and its mean are

                                          bfloat16             float16
    dequantize, rounded by each weight    1.66e-3,  0          2.07e-4,  0
    NF4 as it is, rounded                 1.36e-3,  4.6e-4     1.84e-4, -2.9e-5
    NF4 times the constant, rounded       0.95e-3, -1.4e-5     0.88e-4, -4e-6
    FP4 times 12                          exact to float32: its values are twelfths of small numbers

so that the product is more exact than one with a dequantized weight. Shared memory is declared in the assembly,
which Triton does not see: `static_bytes` counts it.
"""

from __future__ import annotations

import struct
from typing import Final

import torch
import triton

from onegpu.formats.codebooks import FP4_CODE, NF4_CODE

__all__ = [
    "TABLE_SCALE",
    "chunk",
    "fill_table",
    "inverse_scale",
    "load_codes",
    "load_element",
    "load_nested",
    "load_scales",
    "load_x",
    "multiply",
    "nested_scales",
    "share",
    "static_bytes",
    "stay_behind",
    "store",
    "sum_everywhere",
    "sum_everywhere_operands",
    "sum_one_row",
    "sum_one_row_operands",
    "sum_rows",
    "sums_fit",
    "table_values",
]

# (quant_type, dtype) to what the codebook is multiplied by before it is rounded.
TABLE_SCALE: Final = {
    ("nf4", "bf16"): 1.2418212890625,
    ("nf4", "fp16"): 1.5751953125,
    ("fp4", "bf16"): 12.0,
    ("fp4", "fp16"): 12.0,
}
CODEBOOK: Final = {"nf4": NF4_CODE, "fp4": FP4_CODE}
DTYPE: Final = {"bf16": torch.bfloat16, "fp16": torch.float16}
TABLE_BYTES: Final = 32768
MAP_BYTES: Final = 1024


def table_values(quant_type: str, dtype: str) -> torch.Tensor:
    """The 16 table values as the kernel multiplies them: float64 [16], to be divided by `TABLE_SCALE`."""
    scaled = torch.tensor(CODEBOOK[quant_type], dtype=torch.float64) * TABLE_SCALE[quant_type, dtype]
    return scaled.to(DTYPE[dtype]).double()


def table_words(quant_type: str, dtype: str) -> tuple[str, ...]:
    """Low bytes of the 16 values as four words, then their high bytes."""
    bits = table_values(quant_type, dtype).to(DTYPE[dtype]).view(torch.uint16).tolist()
    halves = bytes(value & 255 for value in bits) + bytes(value >> 8 for value in bits)
    return tuple(f"0x{word:08x}" for word in struct.unpack("<8I", halves))


def float32(value: float) -> float:
    """The nearest float32."""
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


# Compile-time functions may look constants up but call nothing of the standard library.
WORDS: Final = {key: table_words(*key) for key in TABLE_SCALE}
INVERSE: Final = {key: float32(1.0 / value) for key, value in TABLE_SCALE.items()}
MMA: Final = {
    ("bf16", 16): "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32",
    ("fp16", 16): "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32",
    ("bf16", 8): "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32",
    ("fp16", 8): "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32",
}
TO_FLOAT: Final = {
    # From bfloat16 there is no conversion before compute capability 9.0; its bits are the upper half of a float32.
    "bf16": "@p ld.global.b16 h, [$1]; mov.b32 $0, {z, h}; ",
    "fp16": "@p ld.global.b16 h, [$1]; cvt.f32.f16 $0, h; ",
    "fp32": "@p ld.global.f32 $0, [$1]; ",
}


@triton.constexpr_function
def outputs(kind: str, count: int) -> str:
    """Constraints of `count` outputs that are written before all inputs are read."""
    return ",".join(["=&" + kind] * count)


@triton.constexpr_function
def chunk(warps: int, sums: int) -> int:
    """How many sums go through shared memory at a time: 8 KiB for all warps."""
    return min(sums, 64 // warps)


@triton.constexpr_function
def sums_fit(warps: int, sums: int) -> bool:
    """Whether all sums of all warps fit where the table was, once nobody looks anything up in it any more."""
    return warps * sums * 128 <= TABLE_BYTES


@triton.constexpr_function
def sum_bytes(warps: int, warps_n: int, tiles: int, sums: int, one_row: bool, once: bool) -> int:
    """Shared memory for sums over warps, beside the table; `once` they lie where the table was."""
    if warps == warps_n or (once and not one_row):
        return 0
    return 2 * warps * 16 * tiles * 4 if one_row else warps * chunk(warps, sums) * 128


@triton.constexpr_function
def static_bytes(warps: int, warps_n: int, tiles: int, sums: int, one_row: bool, nested: bool, once: bool) -> int:
    """All shared memory that the assembly declares."""
    return TABLE_BYTES + (MAP_BYTES if nested else 0) + sum_bytes(warps, warps_n, tiles, sums, one_row, once)


@triton.constexpr_function
def load_codes(unroll: int, stride: int, guarded: bool) -> str:
    """16 bytes of each of `unroll` tiles that lie `stride` bytes apart; read once, so L1 keeps none of them.

    Operands: 4 * unroll words out; an address and, for each tile if `guarded` else once, whether to load.
    """
    count = 4 * unroll
    text = "{ .reg .pred p;\n"
    for u in range(unroll):
        words = ",".join([f"${4 * u + i}" for i in range(4)])
        if guarded:
            for i in range(4):
                text += f"mov.b32 ${4 * u + i}, 0; "
        if guarded or u == 0:
            text += f"setp.ne.b32 p, ${count + 1 + u}, 0; "
        text += f"@p ld.global.L1::no_allocate.v4.b32 {{{words}}}, [${count} + {u * stride}];\n"
    return text + "}"


@triton.constexpr_function
def stay_behind() -> str:
    """What keeps loads in front of it, and memory operations after it there: the assembler, to save registers, would
    put loads behind the work that they are meant to run beside. Operands: a zero out; anything."""
    return "bar.warp.sync 0xffffffff; mov.b32 $0, 0;"


@triton.constexpr_function
def load_codes_operands(unroll: int, guarded: bool) -> str:
    return outputs("r", 4 * unroll) + ",l" + ",r" * (unroll if guarded else 1)


@triton.constexpr_function
def load_scales(groups: int, rows: int, guarded: bool) -> str:
    """Scales of one tile, of `rows` rows (two for rows g and g + 8, or one); zeros where `guarded` and not loaded.

    Operands: a float32 out for each of `groups` blocks and each row; the address, whether to load.
    """
    count = rows * groups
    text = "{ .reg .pred p;\n"
    if guarded:
        for i in range(count):
            text += f"mov.b32 ${i}, 0; "
    text += f"setp.ne.b32 p, ${count + 1}, 0;\n"
    for group in range(groups):
        i = rows * group
        kind, out = ("v2.f32", f"{{${i},${i + 1}}}") if rows == 2 else ("f32", f"${i}")
        text += f"@p ld.global.{kind} {out}, [${count} + {64 * group}];\n"
    return text + "}"


@triton.constexpr_function
def load_scales_operands(groups: int, rows: int) -> str:
    return outputs("f", rows * groups) + ",l,r"


@triton.constexpr_function
def load_nested(groups: int, rows: int, with_factors: bool, guarded: bool) -> str:
    """What the nested scales of one tile are computed from; zeros where `guarded` and not loaded.

    Operands: for each of `groups` blocks one word with the codes of `rows` rows (two for rows g and g + 8, or one),
    and `with_factors` a float32 for each row out. Then the address of the codes, `with_factors` those of the factors,
    and whether to load.
    """
    factors = rows if with_factors else 0
    count = groups + factors
    text = "{ .reg .pred p;\n"
    if guarded:
        for i in range(count):
            text += f"mov.b32 ${i}, 0; "
    text += f"setp.ne.b32 p, ${count + 1 + factors}, 0;\n"
    for group in range(groups):
        # Straight into 32 bits: a conversion would have to wait for the load.
        text += f"@p ld.global.u{8 * rows} ${group}, [${count} + {16 * group}];\n"
    for i in range(factors):
        text += f"@p ld.global.f32 ${groups + i}, [${count + 1 + i}];\n"
    return text + "}"


@triton.constexpr_function
def load_nested_operands(groups: int, rows: int, with_factors: bool) -> str:
    factors = rows if with_factors else 0
    return outputs("r", groups) + ",=&f" * factors + ",l" * (1 + factors) + ",r"


@triton.constexpr_function
def nested_scales(groups: int, rows: int) -> str:
    """Scales from codes and factors: map[code] * factor + offset, product and sum each rounded.

    Operands: a float32 out for each of `groups` blocks and `rows` rows; for each block a word of codes; a factor for
    each row, the offset, the table's address.
    """
    count = groups * rows
    factor = count + groups
    offset, table = factor + rows, factor + rows + 1
    text = f"{{ .reg .b32 a,o; .reg .f32 m; and.b32 a, ${table}, -128;\n"
    for group in range(groups):
        for i in range(rows):
            text += f"dp4a.u32.u32 o, ${count + group}, 0x{4 << (8 * i):x}, a; ld.shared.f32 m, [o + {TABLE_BYTES}]; "
            text += f"mul.rn.f32 m, m, ${factor + i}; add.rn.f32 ${rows * group + i}, m, ${offset};\n"
    return text + "}"


@triton.constexpr_function
def nested_scales_operands(groups: int, rows: int) -> str:
    return outputs("f", groups * rows) + ",r" * groups + ",f" * (rows + 1) + ",r"


@triton.constexpr_function
def share(first: int, second: int) -> str:
    """The scales of rows g and g + 8, from the `first` and the `second` of each four lanes.

    Operands: both out; what a lane has for each, the same where it has one alone.
    """
    return "".join(
        [f"shfl.sync.idx.b32 ${i}, ${2 + i}, {lane}, 0x1c1f, 0xffffffff; " for i, lane in enumerate((first, second))]
    )


@triton.constexpr_function
def load_x(guarded: bool) -> str:
    """A lane's 16 values of one row of x: columns 0..7 and 32..39 from the address on."""
    if not guarded:
        return "{ ld.global.v4.b32 {$0,$1,$2,$3}, [$8]; ld.global.v4.b32 {$4,$5,$6,$7}, [$8 + 64]; }"
    text = "{ .reg .pred p; setp.ne.b32 p, $9, 0; "
    for i in range(8):
        text += f"mov.b32 ${i}, 0; "
    return text + "@p ld.global.v4.b32 {$0,$1,$2,$3}, [$8]; @p ld.global.v4.b32 {$4,$5,$6,$7}, [$8 + 64]; }"


@triton.constexpr_function
def load_x_operands(guarded: bool) -> str:
    return outputs("r", 8) + (",l,r" if guarded else ",l")


@triton.constexpr_function
def declare(bytes_for_sums: int, nested: bool) -> str:
    """Shared memory; must reach PTX exactly once. The map of nested scales lies behind the table."""
    text = f".shared .align 128 .b8 onegpu_table[{TABLE_BYTES + (MAP_BYTES if nested else 0)}];\n"
    if bytes_for_sums:
        text += f".shared .align 16 .b8 onegpu_sums[{bytes_for_sums}];\n"
    return text


@triton.constexpr_function
def fill_table(warps: int, quant_type: str, dtype: str, bytes_for_sums: int, nested: bool) -> str:
    """Declare shared memory, fill the table (and the map of nested scales), wait for all warps.

    Operands: the address of this lane's copy of entry 0 out; for nested scales the address of the map, else anything.

    The 16 values are immediates, picked by byte permutes: an entry's two nibbles select bytes among the lower eight
    values and among the upper eight, and their top bits select between the two. A thread writes 16 bytes at a time,
    four copies; lanes that write different entries take different slots at a time, so eight lanes cover all banks.
    The map is asked for in front of that and stored behind it: nobody waits for it with nothing to do.
    """
    threads = 32 * warps
    passes = max(1, 256 // threads)
    shared_by = max(1, threads // 256)
    slots = 8 // shared_by
    bits = 1 if shared_by == 2 else 0
    words = WORDS[quant_type, dtype]
    text = declare(bytes_for_sums, nested)
    text += "{ .reg .b32 t,e,i,s,a,b,l,h,w,p,q,n,base;\n"
    text += "mov.u32 t, %tid.x; mov.u32 base, onegpu_table;\n"
    if nested:
        text += "{ .reg .b64 g; "
        for k in range(passes):
            text += f".reg .pred m{k}; .reg .b32 d{k}; .reg .f32 f{k};\n"
            text += f"add.u32 d{k}, t, {k * threads}; setp.lt.u32 m{k}, d{k}, 256; mul.wide.u32 g, d{k}, 4; "
            text += f"add.u64 g, g, $1; @m{k} ld.global.f32 f{k}, [g]; mad.lo.u32 d{k}, d{k}, 4, base;\n"
    for k in range(passes):
        text += f"shr.u32 e, t, {bits}; add.u32 e, e, {k * threads};\n"
        text += "shr.u32 i, e, 4; and.b32 n, e, 15; shl.b32 n, n, 4; or.b32 i, i, n;\n"
        text += "and.b32 s, i, 0x88; shr.u32 s, s, 1; or.b32 s, s, 0x10; and.b32 i, i, 0x77;\n"
        for half in range(2):
            o, out = 4 * half, "h" if half else "l"
            text += f"mov.b32 p, {words[o]}; mov.b32 w, {words[o + 1]}; prmt.b32 a, p, w, i;\n"
            text += (
                f"mov.b32 p, {words[o + 2]}; mov.b32 w, {words[o + 3]}; prmt.b32 b, p, w, i; prmt.b32 {out}, a, b, s;\n"
            )
        text += "prmt.b32 w, l, h, 0x5140; shl.b32 p, e, 7; add.u32 p, p, base;\n"
        text += f"and.b32 q, e, {slots - 1}; and.b32 n, t, {shared_by - 1}; mul.lo.u32 n, n, {slots};\n"
        for j in range(slots):
            text += f"xor.b32 s, q, {j}; add.u32 s, s, n; shl.b32 s, s, 4; add.u32 s, s, p; "
            text += "st.shared.v4.b32 [s], {w,w,w,w};\n"
    if nested:
        text += "".join([f"@m{k} st.shared.f32 [d{k} + {TABLE_BYTES}], f{k};\n" for k in range(passes)]) + "}\n"
    return text + "bar.sync 0; and.b32 t, t, 31; shl.b32 t, t, 2; add.u32 $0, base, t; }"


@triton.constexpr_function
def num_products(columns: int, one_row: bool, groups: int) -> int:
    """Sums that `multiply` gives: two or four for each eight rows of x, for each block of a tile."""
    return groups * (2 if one_row else 4 * columns)


@triton.constexpr_function
def accumulators(c: int, first: int, one_row: bool) -> str:
    """The sums of the c-th eight rows of x, from operand `first` on; with one row, half of them are not looked at."""
    if one_row:
        return f"{{${first},u0,${first + 1},u1}}"
    return "{" + ",".join([f"${first + 4 * c + i}" for i in range(4)]) + "}"


@triton.constexpr_function
def multiply(columns: int, one_row: bool, groups: int, dtype: str, depth: int) -> str:
    """One tile times 8 * `columns` rows of x.

    Operands: `num_products` float32 out, by block of the tile, then by eight rows of x: rows g and g + 8 of the
    tile for row 2 t of x and for row 2 t + 1; with `one_row` for the first alone. Then four words of codes, eight
    words for each eight rows of x, the table's address. `depth` is that of the tensor core's step: 16, or 8 before
    compute capability 8.0; for two blocks it is 8.
    """
    count = num_products(columns, one_row, groups)
    block = count // groups
    codes, x = count, count + 4
    table = x + 8 * columns
    text = "{ .reg .b32 o,w0,w1,w2,w3; .reg .f32 u0,u1;\n"
    for i in range(count):
        text += f"mov.b32 ${i}, 0f00000000; "
    if one_row:
        text += "mov.b32 u0, 0f00000000; mov.b32 u1, 0f00000000;"
    for j in range(4):
        text += "\n"
        for i in range(4):
            text += f"dp4a.u32.u32 o, ${codes + j}, 0x{0x80 << (8 * i):x}, ${table}; ld.shared.b32 w{i}, [o];\n"
        for c in range(columns):
            b = x + 8 * c + j
            d = [accumulators(c, group * block, one_row) for group in range(groups)]
            if depth == 16 and groups == 1:
                text += f"{MMA[dtype, 16]} {d[0]},{{w0,w1,w2,w3}},{{${b},${b + 4}}},{d[0]};\n"
            else:
                # The halves of a step are columns below and from 32 on: blocks of their own where blocks are of 32.
                text += f"{MMA[dtype, 8]} {d[0]},{{w0,w1}},{{${b}}},{d[0]};\n"
                text += f"{MMA[dtype, 8]} {d[-1]},{{w2,w3}},{{${b + 4}}},{d[-1]};\n"
    return text + "}"


@triton.constexpr_function
def multiply_operands(columns: int, one_row: bool, groups: int) -> str:
    return outputs("f", num_products(columns, one_row, groups)) + ",r" * (4 + 8 * columns + 1)


@triton.constexpr_function
def sum_one_row(warps: int, tiles: int, gated: bool) -> str:
    """Sums over all warps; thread i < 16 * tiles gets row i.

    With `gated`, thread i < 8 * tiles gets two: row i % 16 of tile 2 (i // 16) and of the tile after it.

    Operands: two sums out, the second of use only if `gated`; two sums for each tile (rows g and g + 8, right in the
    lanes with t = 0); 0 or 1 by turns, which picks one of two buffers, so that one barrier is enough.
    """
    stride = 64 * tiles
    text = "{ .reg .b32 t,l,w,g,b,v; .reg .f32 f; .reg .pred p,q;\n"
    text += (
        "mov.u32 t, %tid.x; and.b32 l, t, 31; shr.u32 w, t, 5; shr.u32 g, l, 2; and.b32 l, l, 3; setp.eq.u32 p, l, 0;\n"
    )
    text += f"mov.u32 b, onegpu_sums; mad.lo.u32 b, ${2 * tiles + 2}, {warps * stride}, b;\n"
    text += f"mad.lo.u32 v, w, {stride}, b; mad.lo.u32 v, g, 4, v;\n"
    for t in range(tiles):
        for half in range(2):
            text += f"@p st.shared.f32 [v + {64 * t + 32 * half}], ${2 + 2 * t + half};\n"
    threads = 8 * tiles if gated else 16 * tiles
    text += "bar.sync 0; mov.b32 $0, 0f00000000; mov.b32 $1, 0f00000000; mov.b32 f, 0f00000000; "
    text += f"setp.lt.u32 q, t, {threads};\n"
    if gated:
        text += "shr.u32 v, t, 4; and.b32 w, t, 15; shl.b32 v, v, 5; add.u32 v, v, w; mad.lo.u32 v, v, 4, b;\n"
    else:
        text += "mad.lo.u32 v, t, 4, b;\n"
    for k in range(warps):
        text += f"@q ld.shared.f32 f, [v + {k * stride}]; add.rn.f32 $0, $0, f;\n"
        if gated:
            text += f"@q ld.shared.f32 f, [v + {k * stride + 64}]; add.rn.f32 $1, $1, f;\n"
    return text + "}"


@triton.constexpr_function
def sum_one_row_operands(tiles: int) -> str:
    return outputs("f", 2) + ",f" * (2 * tiles) + ",r"


@triton.constexpr_function
def sum_rows(warps: int, warps_n: int, count: int) -> str:
    """`count` sums over the warps that share rows; right in the first `warps_n` warps.

    Operands: `count` sums out, `count` in. Warp w works on rows w % warps_n.
    """
    text = "{ .reg .b32 t,l,w,b,v; .reg .f32 f; .reg .pred q;\n"
    text += "mov.u32 t, %tid.x; and.b32 l, t, 31; shr.u32 w, t, 5; mov.u32 b, onegpu_sums; mad.lo.u32 b, l, 4, b;\n"
    text += f"mad.lo.u32 v, w, {128 * count}, b; mov.b32 f, 0f00000000;\n"
    for i in range(count):
        text += f"st.shared.f32 [v + {128 * i}], ${count + i};\n"
    text += f"bar.sync 0; setp.lt.u32 q, w, {warps_n};\n"
    for i in range(count):
        text += f"mov.b32 ${i}, ${count + i};\n"
        for k in range(1, warps // warps_n):
            text += f"@q ld.shared.f32 f, [v + {(k * warps_n * count + i) * 128}]; add.rn.f32 ${i}, ${i}, f;\n"
    return text + "bar.sync 0; }"


@triton.constexpr_function
def sum_everywhere(warps: int, warps_n: int, count: int, each: int, pair: int) -> str:
    """Sums over the warps that share rows, `each` of them in every thread; the table's memory is lost.

    Operands: `each` sums out, with `pair` twice as many; `count` sums in; for `each` where it lies among all sums of
    the warps side by side along rows, in bytes: 128 a sum. With `pair` the sum `pair` behind it follows it.
    """
    per = 2 if pair else 1
    out = each * per
    text = "{ .reg .b32 t,l,w,b,v; .reg .f32 f; mov.u32 t, %tid.x; and.b32 l, t, 31; shr.u32 w, t, 5;\n"
    text += f"mov.u32 b, onegpu_table; mad.lo.u32 b, l, 4, b; mad.lo.u32 v, w, {128 * count}, b; bar.sync 0;\n"
    for i in range(count):
        text += f"st.shared.f32 [v + {128 * i}], ${out + i};\n"
    text += "bar.sync 0;\n"
    for e in range(each):
        text += f"add.u32 v, b, ${out + count + e};\n"
        for p in range(per):
            total, place = f"${per * e + p}", 128 * p * pair
            text += f"ld.shared.f32 {total}, [v + {place}];\n"
            for _ in range(1, warps // warps_n):
                place += 128 * warps_n * count
                text += f"ld.shared.f32 f, [v + {place}]; add.rn.f32 {total}, {total}, f;\n"
    return text + "}"


@triton.constexpr_function
def sum_everywhere_operands(count: int, each: int, pair: int) -> str:
    return outputs("f", each * (2 if pair else 1)) + ",f" * count + ",r" * each


@triton.constexpr_function
def inverse_scale(quant_type: str, dtype: str) -> float:
    """What takes the table's constant off again."""
    return INVERSE[quant_type, dtype]


@triton.constexpr_function
def load_element(dtype: str) -> str:
    """One element as float32, 0 where it is not asked for. Operands: it; its address, whether to load."""
    text = "{ .reg .pred p; .reg .b16 h,z; setp.ne.b32 p, $2, 0; mov.b16 z, 0; mov.b16 h, 0; "
    return text + "mov.b32 $0, 0f00000000;\n" + TO_FLOAT[dtype] + "}"


@triton.constexpr_function
def store(dtype: str) -> str:
    """Round once, write one element. Operands: nothing of use out; its address, the value, whether to write."""
    convert = "cvt.rn.bf16.f32" if dtype == "bf16" else "cvt.rn.f16.f32"
    return (
        "{ .reg .pred p; .reg .b16 h; setp.ne.b32 p, $3, 0; "
        f"{convert} h, $2; @p st.global.b16 [$1], h; mov.b32 $0, 0; }}"
    )
