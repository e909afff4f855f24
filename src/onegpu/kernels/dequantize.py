# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# mypy: disable-error-code="assignment, misc"
"""4-bit codes back to weights: out = round(code * scale), one float32 product and one rounding per element.

Bit for bit what `formats.blockwise.dequantize_4bit` gives. A program is a single warp with the table of `codes`, and
decodes a few whole blocks, so that each scale is read once. A thread has the codes of the 16 bytes that it stores.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from onegpu.kernels.codes import look_up, value_table
from onegpu.kernels.launch import NO_CONTRACTION, load_scale, nested_arguments, on_device_of

__all__ = ["dequantize_4bit", "dequantize_blocks"]

# Weights per program: 64 for each thread.
TILE = 2048


@triton.jit(do_not_specialize=["first", "skipped"])
def dequantize_kernel(
    packed_ptr,  # uint8 [at least so many bytes as blocks up to first and n weights more have]
    absmax_ptr,  # float32 or uint8, one for each of those blocks
    nested_absmax_ptr,
    nested_code_ptr,
    nested_offset_ptr,
    out_ptr,  # [n]
    first,  # block that out begins with
    skipped,  # blocks after it that are another launch's
    n,
    QUANT_TYPE: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,
    WHOLE: tl.constexpr,  # every program has BLOCKS whole blocks
    BLOCKS: tl.constexpr,
    PARTS: tl.constexpr,  # of a block, which are decoded one after another
):
    PART: tl.constexpr = BLOCKSIZE // PARTS
    BYTES: tl.constexpr = 64 // out_ptr.dtype.element_ty.primitive_bitwidth
    table = value_table(QUANT_TYPE)
    start = skipped.to(tl.int64) + tl.program_id(0).to(tl.int64) * BLOCKS
    block = tl.arange(0, BLOCKS)
    byte = block[:, None] * (BLOCKSIZE // 2) + tl.max_contiguous(tl.arange(0, PART // 2), BYTES)[None, :]
    element = block[:, None] * BLOCKSIZE + tl.arange(0, PART)[None, :]
    packed_ptr += (first + start) * (BLOCKSIZE // 2)
    out_ptr += start * BLOCKSIZE
    left = n - start * BLOCKSIZE
    pairs = ()
    for i in tl.static_range(PARTS):
        if WHOLE:
            pair = tl.load(packed_ptr + byte + i * (PART // 2))
        else:
            pair = tl.load(packed_ptr + byte + i * (PART // 2), mask=(byte + i * (PART // 2)) * 2 < left, other=0)
        pairs = pairs + (pair.to(tl.int32),)  # noqa: RUF005, tuples of Triton know no unpacking
    scale = load_scale(
        absmax_ptr, nested_absmax_ptr, nested_code_ptr, nested_offset_ptr, first + start + block,
        block * BLOCKSIZE < left, NESTED,
    )  # fmt: skip
    for i in tl.static_range(PARTS):
        code = tl.reshape(tl.join(pairs[i] >> 4, pairs[i] & 15), (BLOCKS, PART))
        value = (look_up(table, code) * scale[:, None]).to(out_ptr.dtype.element_ty)
        if WHOLE:
            tl.store(out_ptr + element + i * PART, value)
        else:
            tl.store(out_ptr + element + i * PART, value, mask=element + i * PART < left)


def dequantize_4bit(
    packed: Tensor,
    absmax: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
    quant_type: str,
    blocksize: int,
    nested_absmax: Tensor | None = None,
    nested_code: Tensor | None = None,
    nested_offset: Tensor | None = None,
) -> Tensor:
    """Launcher of the operator `dequantize_4bit`; its arguments have been checked."""
    out = torch.empty(tuple(shape), dtype=dtype, device=packed.device)
    scales = nested_arguments(absmax, nested_absmax, nested_code, nested_offset)
    dequantize_blocks(out, packed, scales, first=0, n=math.prod(shape), quant_type=quant_type, blocksize=blocksize)
    return out


def dequantize_blocks(
    out: Tensor,
    packed: Tensor,
    scales: tuple[Tensor, Tensor, Tensor, Tensor],
    *,
    first: int,
    n: int,
    quant_type: str,
    blocksize: int,
) -> None:
    """Decode `n` weights from block `first` on into `out`, contiguous and of any floating dtype.

    Args:
        packed: all codes of the weight, uint8.
        scales: as `launch.nested_arguments` gives them, of the whole weight.
    """
    settings = tile_of(blocksize)
    blocks = settings["BLOCKS"]
    whole, rest = divmod(n, blocks * blocksize)
    packed = packed.contiguous()
    with on_device_of(packed):
        # What is left over has a launch of its own, so that no program but that one compares places.
        for skipped, programs, is_whole in ((0, whole, True), (whole * blocks, int(rest > 0), False)):
            if programs == 0:
                continue
            dequantize_kernel[(programs,)](
                packed,
                *scales,
                out,
                first,
                skipped,
                n,
                QUANT_TYPE=quant_type,
                BLOCKSIZE=blocksize,
                NESTED=scales[0].dtype == torch.uint8,
                WHOLE=is_whole,
                **settings,
                **NO_CONTRACTION,
            )


def tile_of(blocksize: int) -> dict[str, int]:
    """How a program works: `BLOCKS`, `PARTS` and `num_warps`."""
    if blocksize > TILE:
        return {"BLOCKS": 1, "PARTS": 2 * blocksize // TILE, "num_warps": 1}
    return {"BLOCKS": TILE // blocksize, "PARTS": 2, "num_warps": 1}
