# mypy: allow-untyped-decorators
"""PTX for the int8 product at few rows: each function writes one block of inline assembly, at compile time.

    declare       shared memory for sums over warps
    load_codes    a lane's bytes of two rows of W
    load_x        a lane's values of one row of x
    multiply      widen, then `mma.sync`: 16 rows x 64 columns times 8 (or 16, 32) rows of x

What is not about int8 comes from `asm_4bit`: sums over warps, loads and stores of one element.

W stays in its rows. Of a tile of 16 rows x 64 columns, lane 4 g + t holds columns 16 t to 16 t + 15 of rows g and
g + 8, so that four lanes read 64 bytes of a row. Word s of these 16 bytes is the lane's part of the s-th step of the
tensor core: the order of columns within a tile is the kernel's own, as long as x has the same.

Widening is exact and takes five instructions for four codes. A code plus 128, alone in the lower byte of a 16-bit
float, is that number of the format's smallest units, since the smallest normal numbers are as far apart as subnormal
ones. One `fma`, which keeps subnormal operands, multiplies it by a power of two and takes the 128 off again:

    bfloat16   (code + 128) * 2**-133 * 2**127 - 2     = code * 2**-6
    float16    (code + 128) * 2**-24  * 2**15  - 1/4   = code * 2**-9

What is left (`UNIT`) is taken off the sums in float32.
"""

from __future__ import annotations

from typing import Final

import triton

from onegpu.formats.rowwise import INVERSE_127
from onegpu.kernels.asm_4bit import MMA, outputs

__all__ = [
    "UNIT",
    "declare",
    "load_codes",
    "load_codes_operands",
    "load_x",
    "load_x_operands",
    "multiply",
    "multiply_operands",
]

# Bytes 0 and 1 of a word, and bytes 2 and 3, each under a byte of another.
PAIRS: Final = ("0x4140", "0x4342")
# The power of two that a code is multiplied by, and what it is added to, as pairs of 16-bit floats.
TIMES: Final = {"bf16": "0x7f007f00", "fp16": "0x78007800"}
MINUS: Final = {"bf16": "0xc000c000", "fp16": "0xb400b400"}
UNIT: Final = {"bf16": 2.0**-6, "fp16": 2.0**-9}


@triton.constexpr_function
def declare(bytes_for_sums: int) -> str:
    """Shared memory; must reach PTX exactly once, before `asm_4bit.sum_one_row` and `sum_rows`. Operand: a zero out."""
    return f".shared .align 16 .b8 onegpu_sums[{bytes_for_sums}];\nmov.b32 $0, 0;"


@triton.constexpr_function
def load_codes(unroll: int, guarded: bool) -> str:
    """16 bytes of rows g and g + 8 of each of `unroll` tiles side by side; read once, so L1 keeps none of them.

    No load moves past a barrier: without it the assembler, to save registers, would put them behind the work that they
    are meant to run beside.

    Operands: for each tile four words of row g and four of row g + 8 out; the two addresses; for each tile if
    `guarded` else once, whether to load.
    """
    count = 8 * unroll
    text = "{ .reg .pred p;\n"
    for u in range(unroll):
        if guarded:
            text += "".join([f"mov.b32 ${8 * u + i}, 0; " for i in range(8)])
        if guarded or u == 0:
            text += f"setp.ne.b32 p, ${count + 2 + u}, 0;\n"
        for half in range(2):
            words = ",".join([f"${8 * u + 4 * half + i}" for i in range(4)])
            text += f"@p ld.global.L1::no_allocate.v4.b32 {{{words}}}, [${count + half} + {64 * u}];\n"
    return text + "bar.warp.sync 0xffffffff; }"


@triton.constexpr_function
def load_codes_operands(unroll: int, guarded: bool) -> str:
    return outputs("r", 8 * unroll) + ",l,l" + ",r" * (unroll if guarded else 1)


@triton.constexpr_function
def load_x(guarded: bool) -> str:
    """A lane's 16 values of one row of x, side by side. Operands: eight words out; the address; whether to load."""
    text = "{ .reg .pred p; "
    if guarded:
        text += "setp.ne.b32 p, $9, 0; " + "".join([f"mov.b32 ${i}, 0; " for i in range(8)])
    guard = "@p " if guarded else ""
    text += f"{guard}ld.global.v4.b32 {{$0,$1,$2,$3}}, [$8]; {guard}ld.global.v4.b32 {{$4,$5,$6,$7}}, [$8 + 16]; "
    return text + "}"


@triton.constexpr_function
def load_x_operands(guarded: bool) -> str:
    return outputs("r", 8) + (",l,r" if guarded else ",l")


@triton.constexpr_function
def widen(pairs: tuple[str, str], word: str, dtype: str) -> str:
    """The four codes of a word, times `UNIT`, as two pairs of 16-bit floats, into registers of these names."""
    text = f"xor.b32 v, {word}, 0x80808080; "
    kind = "bf16x2" if dtype == "bf16" else "f16x2"
    for i in range(2):
        text += f"prmt.b32 o, v, 0, {PAIRS[i]}; fma.rn.{kind} {pairs[i]}, o, times, minus;\n"
    return text


@triton.constexpr_function
def multiply(columns: int, dtype: str, depth: int) -> str:
    """One tile times 8 * `columns` rows of x, times `UNIT`.

    Operands: four float32 out for each eight rows of x: rows g and g + 8 of the tile, each for rows 2 t and 2 t + 1
    of x, as [row of the tile, row of x]. Then eight words of codes, eight words for each eight rows of x. `depth` is
    that of the tensor core's step: 16, or 8 before compute capability 8.0.
    """
    count = 4 * columns
    text = "{ .reg .b32 w0,w1,w2,w3,v,o,times,minus;\n"
    text += f"mov.b32 times, {TIMES[dtype]}; mov.b32 minus, {MINUS[dtype]};\n"
    text += "".join([f"mov.b32 ${i}, 0f00000000; " for i in range(count)]) + "\n"
    for s in range(4):
        text += widen(("w0", "w2"), f"${count + s}", dtype) + widen(("w1", "w3"), f"${count + 4 + s}", dtype)
        for c in range(columns):
            d = "{" + ",".join([f"${4 * c + i}" for i in range(4)]) + "}"
            b = count + 8 + 8 * c + 2 * s
            if depth == 16:
                text += f"{MMA[dtype, 16]} {d},{{w0,w1,w2,w3}},{{${b},${b + 1}}},{d};\n"
            else:
                text += f"{MMA[dtype, 8]} {d},{{w0,w1}},{{${b}}},{d};\n"
                text += f"{MMA[dtype, 8]} {d},{{w2,w3}},{{${b + 1}}},{d};\n"
    return text + "}"


@triton.constexpr_function
def multiply_operands(columns: int) -> str:
    return outputs("f", 4 * columns) + ",r" * (8 + 8 * columns)


@triton.constexpr_function
def inverse_scale(dtype: str) -> float:
    """What makes a sum and its row's largest magnitude the product; float32."""
    return INVERSE_127 / UNIT[dtype]
