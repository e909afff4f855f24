# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""4-bit codes back to weights: out = round(code * scale), one float32 product and one rounding per element.

Bit for bit what `formats.blockwise.dequantize_4bit` gives. A program decodes a few whole blocks, so that each scale
is read once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from onegpu.kernels.launch import NO_CONTRACTION, decode, load_scale, nested_arguments, on_device_of

__all__ = ["dequantize_4bit", "dequantize_blocks"]

# Weights per program: 8 KiB of float32 in registers, 16 bytes of codes per thread.
TILE = 4096


@triton.jit
def dequantize_kernel(
    packed_ptr,  # uint8 [ceil(n / 2)]
    absmax_ptr,  # float32 or uint8 [num_blocks]
    nested_absmax_ptr,
    nested_code_ptr,
    nested_offset_ptr,
    out_ptr,  # [stop - start]
    first,  # block that out begins with
    start,  # its first element
    stop,  # element that out ends before
    QUANT_TYPE: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    block = first + tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    scale = load_scale(
        absmax_ptr, nested_absmax_ptr, nested_code_ptr, nested_offset_ptr, block, block * BLOCKSIZE < stop, NESTED
    )
    byte = block[:, None] * (BLOCKSIZE // 2) + tl.arange(0, BLOCKSIZE // 2)[None, :]
    pair = tl.load(packed_ptr + byte, mask=byte * 2 < stop, other=0).to(tl.int32)
    high = decode(pair >> 4, QUANT_TYPE) * scale[:, None]
    low = decode(pair & 15, QUANT_TYPE) * scale[:, None]
    value = tl.reshape(tl.join(high, low), (BLOCKS, BLOCKSIZE))
    element = block[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]
    tl.store(out_ptr + (element - start), value.to(out_ptr.dtype.element_ty), mask=element < stop)


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
    if n == 0:
        return
    blocks = max(1, TILE // blocksize)
    grid = (triton.cdiv(triton.cdiv(n, blocksize), blocks),)
    with on_device_of(packed):
        dequantize_kernel[grid](
            packed.contiguous(),
            *scales,
            out,
            first,
            first * blocksize,
            first * blocksize + n,
            QUANT_TYPE=quant_type,
            BLOCKSIZE=blocksize,
            NESTED=scales[0].dtype == torch.uint8,
            BLOCKS=blocks,
            num_warps=4,
            **NO_CONTRACTION,
        )
