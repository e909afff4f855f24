# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""4-bit codes by table, for kernels that do little else: the codes of scaled weights, and the values of codes.

A table has 16 entries; in a program of one warp they lie one in each lane, and looking one up is one shuffle. Choosing
by selects, as `launch.decode` does, takes fifteen instructions, which is fewer than it costs to get at a shuffle where
codes are not in registers of a single warp.

A code counts the thresholds below a value. A polynomial guesses it, either exactly or one too low; the threshold above
the guess, looked up, decides which. So the result is exact, as `formats.codebooks.encode` gives it, with some seven
instructions and one shuffle, and the polynomial only has to be right to within a quarter of a code.
"""

from __future__ import annotations

from typing import Final

import triton
import triton.language as tl

from onegpu.formats.codebooks import FP4_BOUNDARIES, NF4_BOUNDARIES
from onegpu.kernels.launch import decode, select_of_16

__all__ = ["encode", "look_up", "threshold_table", "value_table"]

NF4_STEPS: Final = tl.constexpr((*NF4_BOUNDARIES, float("inf")))
FP4_STEPS: Final = tl.constexpr((*FP4_BOUNDARIES, float("inf")) * 2)
# Added to a float32 below 2**22, it leaves the nearest whole number in the low bits.
MAGIC: Final = tl.constexpr(1.5 * 2.0**23)


@triton.jit
def value_table(QUANT_TYPE: tl.constexpr):
    """The values of codes 0..15: float32 [16]."""
    return decode(tl.arange(0, 16), QUANT_TYPE)


@triton.jit
def threshold_table(QUANT_TYPE: tl.constexpr):
    """The threshold above each count, infinity after the last: float32 [16]."""
    if QUANT_TYPE == "nf4":
        steps = select_of_16(tl.arange(0, 16), NF4_STEPS)
    else:
        steps = select_of_16(tl.arange(0, 16), FP4_STEPS)
    return steps


@triton.jit
def look_up(table, index):
    """table[index] for a table [16] and indices 0..15 of any shape."""
    return tl.reshape(tl.gather(table, tl.reshape(index, (index.numel,)), 0), index.shape)


@triton.jit
def encode(scaled, steps, QUANT_TYPE: tl.constexpr, CLAMP: tl.constexpr):
    """The code of each scaled weight in the low four bits of an int32; the other bits mean nothing.

    `steps` is the threshold table. Without `CLAMP` no magnitude may be above 1 by more than rounding; NaN may be there.
    """
    if QUANT_TYPE == "nf4":
        # The maximum passes over NaN, whose code is 0.
        scaled = tl.maximum(scaled, -1.0)
        if CLAMP:
            scaled = tl.minimum(scaled, 1.0)
        # 7.25 + 11.5 s - 4.5 s**3, less half, rounded: between the code - 0.76 and the code + 0.72 on [-1, 1].
        guess = tl.fma(tl.fma(scaled * scaled, -4.5, 11.5), scaled, MAGIC + 6.75)
        code = _count(scaled, guess, steps)
    else:
        magnitude = tl.maximum(tl.abs(scaled), 0.0)
        if CLAMP:
            magnitude = tl.minimum(magnitude, 1.0)
        # 7/16 + 11.5 m - 5 m**2, less half, rounded: within 0.64 of the count on [0, 1].
        guess = tl.fma(tl.fma(magnitude, -5.0, 11.5), magnitude, MAGIC - 0.0625)
        count = _count(magnitude, guess, steps)
        # Magnitudes in order of size have the codes 0 1 6 7 4 5 2 3.
        code = (count ^ ((count & 2) * 2)) + (scaled < 0).to(tl.int32) * 8
    return code


@triton.jit
def _count(value, guess, steps):
    """How many thresholds lie below, in the low bits; a difference is negative where the value is above."""
    guess = guess.to(tl.int32, bitcast=True)
    left = look_up(steps, guess & 15) - value
    return guess + (left.to(tl.uint32, bitcast=True) >> 31).to(tl.int32)
