# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# mypy: disable-error-code="assignment, misc"
"""Weights to 4-bit codes on the device.

The kernel does the float32 steps of its definition in `onegpu.formats` in the same order, with IEEE reciprocals, so
that the bytes are the same as on a CPU; only the sums of the scale search are added in another order.
NaN in a block gives it scale 0, as the definition has it. Largest magnitudes are found on the bits of float32, whose
order is that of the magnitudes, with NaN above infinity.

Plain quantization is bound by memory, which leaves some twenty instructions for a weight; the kernel takes fewer, by
having a weight stay in the thread that loaded it until its code is stored, 16 bytes of weights to a load. Programs are
single warps, for the table of `codes` to be in reach of all their threads.
"""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from onegpu.formats.scale_search import FACTOR_STEPS, MULTIPLIERS
from onegpu.kernels.codes import encode, look_up, threshold_table, value_table
from onegpu.kernels.launch import NO_CONTRACTION, on_device_of, reciprocal

__all__ = ["quantize_4bit"]

# Weights per program; the scale search keeps more of each in registers.
TILE = 2048
SEARCH_TILE = 512

INFINITY_BITS: Final = tl.constexpr(0x7F800000)
MAGNITUDE_BITS: Final = tl.constexpr(0x7FFFFFFF)
NF4_MULTIPLIERS: Final = tl.constexpr(MULTIPLIERS["nf4"])
FP4_MULTIPLIERS: Final = tl.constexpr(MULTIPLIERS["fp4"])
NUM_NF4_MULTIPLIERS: Final = tl.constexpr(len(MULTIPLIERS["nf4"]))
NUM_FP4_MULTIPLIERS: Final = tl.constexpr(len(MULTIPLIERS["fp4"]))
STEPS: Final = tl.constexpr(float(FACTOR_STEPS))


@triton.jit
def nearest(y, steps, table, QUANT_TYPE: tl.constexpr):
    """The table value of each scaled weight."""
    return look_up(table, encode(y, steps, QUANT_TYPE, True) & 15)


@triton.jit
def search_factor(y, importance, steps, QUANT_TYPE: tl.constexpr, MULTIPLIERS: tl.constexpr, COUNT: tl.constexpr):
    """Factor of least squared error for each block of scaled weights y: `formats.scale_search.search_scale`."""
    table = value_table(QUANT_TYPE)
    error = nearest(y, steps, table, QUANT_TYPE) - y
    least = tl.sum(error * error * importance, axis=1)
    best = tl.full(least.shape, 1.0, tl.float32)
    for i in tl.static_range(COUNT):
        values = nearest(y * MULTIPLIERS[i], steps, table, QUANT_TYPE)
        weighted = values * importance
        denominator = tl.sum(values * weighted, axis=1)
        # A block whose values are all zero proposes nothing.
        usable = denominator > 0
        ratio = tl.math.div_rn(tl.sum(y * weighted, axis=1), tl.where(usable, denominator, 1.0))
        factor = tl.math.div_rn(tl.floor(ratio * STEPS + 0.5), STEPS)
        error = values * factor[:, None] - y
        total = tl.sum(error * error * importance, axis=1)
        better = usable & (total < least)
        best = tl.where(better, factor, best)
        least = tl.where(better, total, least)
    return best


@triton.jit
def largest_of(magnitude, axis: tl.constexpr):
    """The largest float32 magnitude along an axis, as bits: above INFINITY_BITS if there is NaN."""
    return tl.max(magnitude.to(tl.int32, bitcast=True) & MAGNITUDE_BITS, axis=axis)


@triton.jit(do_not_specialize=["first", "period"])
def quantize_4bit_kernel(
    weight_ptr,  # [n]
    importance_ptr,  # float32 [period], read if HAS_IMPORTANCE
    packed_ptr,  # uint8 [ceil(n / 2)]
    absmax_ptr,  # float32 [num_blocks]
    first,  # block that the first program begins with
    n,
    period,  # importance repeats after so many weights
    QUANT_TYPE: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    SCALE_SEARCH: tl.constexpr,
    HAS_IMPORTANCE: tl.constexpr,
    WHOLE: tl.constexpr,  # every program has BLOCKS whole blocks
    BLOCKS: tl.constexpr,
    PARTS: tl.constexpr,  # of a block, which a thread has eight weights of each; 1 for the scale search
):
    PART: tl.constexpr = BLOCKSIZE // PARTS
    # Bytes that the eight, or with float32 four, weights of one load become.
    BYTES: tl.constexpr = 64 // weight_ptr.dtype.element_ty.primitive_bitwidth
    steps = threshold_table(QUANT_TYPE)
    start = first.to(tl.int64) + tl.program_id(0).to(tl.int64) * BLOCKS
    block = tl.arange(0, BLOCKS)
    element = block[:, None] * BLOCKSIZE + tl.arange(0, PART)[None, :]
    byte = block[:, None] * (BLOCKSIZE // 2) + tl.max_contiguous(tl.arange(0, PART // 2), BYTES)[None, :]
    weight_ptr += start * BLOCKSIZE
    left = n - start * BLOCKSIZE
    weights = ()
    for i in tl.static_range(PARTS):
        if WHOLE:
            part = tl.load(weight_ptr + element + i * PART)
        else:
            part = tl.load(weight_ptr + element + i * PART, mask=element + i * PART < left, other=0.0)
        weights = weights + (part.to(tl.float32),)  # noqa: RUF005, tuples of Triton know no unpacking
    magnitude = tl.abs(weights[0])
    for i in tl.static_range(1, PARTS):
        magnitude = tl.maximum(magnitude, tl.abs(weights[i]), propagate_nan=tl.PropagateNan.ALL)
    bits = largest_of(magnitude, 1)
    # A block that holds NaN gets no scale.
    scale = tl.where(bits > INFINITY_BITS, 0, bits).to(tl.float32, bitcast=True)
    if SCALE_SEARCH:
        y = weights[0] * reciprocal(scale)[:, None]
        importance = tl.full((BLOCKS, BLOCKSIZE), 1.0, tl.float32)
        if HAS_IMPORTANCE:
            # In 32 bits, if there are no more, a remainder takes a quarter of the instructions.
            NARROW: tl.constexpr = tl.uint32 if period.dtype == tl.int32 else tl.int64
            place = ((start * BLOCKSIZE) % period).to(NARROW)
            place = (place + element.to(NARROW)) % period.to(NARROW)
            importance = tl.load(importance_ptr + place, mask=element < left, other=0.0)
        if QUANT_TYPE == "nf4":
            scale *= search_factor(y, importance, steps, QUANT_TYPE, NF4_MULTIPLIERS, NUM_NF4_MULTIPLIERS)
        else:
            scale *= search_factor(y, importance, steps, QUANT_TYPE, FP4_MULTIPLIERS, NUM_FP4_MULTIPLIERS)

    inverse = reciprocal(scale)
    packed_ptr += start * (BLOCKSIZE // 2)
    for i in tl.static_range(PARTS):
        codes = encode(weights[i] * inverse[:, None], steps, QUANT_TYPE, SCALE_SEARCH)
        high, low = tl.split(tl.reshape(codes, (BLOCKS, PART // 2, 2)))
        pair = (high * 16 + (low & 15)).to(tl.uint8)
        if WHOLE:
            tl.store(packed_ptr + byte + i * (PART // 2), pair)
        else:
            tl.store(packed_ptr + byte + i * (PART // 2), pair, mask=(byte + i * (PART // 2)) * 2 < left)
    scale = tl.where(inverse == 0, 0.0, scale)
    if WHOLE:
        tl.store(absmax_ptr + start + block, scale)
    else:
        tl.store(absmax_ptr + start + block, scale, mask=block * BLOCKSIZE < left)


def tile_of(blocksize: int, scale_search: bool) -> dict[str, int]:
    """How a program works: `BLOCKS`, `PARTS` and `num_warps`."""
    if scale_search:
        # Blocks as long as a tile have their sums over more warps, and the table in shared memory.
        return {"BLOCKS": max(1, SEARCH_TILE // blocksize), "PARTS": 1, "num_warps": max(1, blocksize // SEARCH_TILE)}
    if blocksize > TILE:
        return {"BLOCKS": 1, "PARTS": 4, "num_warps": 4}
    return {"BLOCKS": TILE // blocksize, "PARTS": 8 if blocksize == TILE else 2, "num_warps": 1}


def quantize_4bit(
    weight: Tensor, quant_type: str, blocksize: int, scale_search: bool = False, importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Launcher of the operator `quantize_4bit`; its arguments have been checked."""
    weight = weight.detach().contiguous()
    n = weight.numel()
    packed = torch.empty((n + 1) // 2, dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(triton.cdiv(n, blocksize), dtype=torch.float32, device=weight.device)
    importance = None if importance is None else importance.detach().contiguous()
    settings = tile_of(blocksize, scale_search)
    whole, rest = divmod(n, settings["BLOCKS"] * blocksize)
    with on_device_of(weight):
        # What is left over has a launch of its own, so that no program but that one compares places.
        for first, programs, is_whole in ((0, whole, True), (whole * settings["BLOCKS"], int(rest > 0), False)):
            if programs == 0:
                continue
            quantize_4bit_kernel[(programs,)](
                weight,
                absmax if importance is None else importance,
                packed,
                absmax,
                first,
                n,
                1 if importance is None else importance.numel(),
                QUANT_TYPE=quant_type,
                BLOCKSIZE=blocksize,
                SCALE_SEARCH=scale_search,
                HAS_IMPORTANCE=importance is not None,
                WHOLE=is_whole,
                **settings,
                **NO_CONTRACTION,
            )
    return packed, absmax
