"""Block-wise quantization: 4-bit weights with one scale per block, and 8-bit scales for the scales.

A tensor is read flat, in row-major order; `blocksize` consecutive weights share one float32 scale `absmax`, and the
last block may be shorter. Every step is float32, whatever the dtype of the weight:

    reciprocal = 1 / absmax          rounded
    scaled     = weight * reciprocal rounded
    code       = the table entry that `codebooks.encode` picks
    weight'    = code value * absmax, rounded once, straight to the dtype asked for

A block whose absmax is below the smallest normal float32 counts as zero: absmax 0, the code of 0.0 throughout.
Nested ("double") quantization (QLoRA, arXiv 2305.14314, section 3) takes the mean off the scales and stores the rest
in 8 bit, 256 scales to a block.
Work goes in chunks of whole blocks, so that what is needed beyond input and output stays small and in cache.
These functions never read a value back to the host; whether weights are finite is asked by `check_finite`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from onegpu.config import BLOCKSIZES, NESTED_BLOCKSIZE, check_choice
from onegpu.errors import ArgumentError, CheckpointError, ConfigError
from onegpu.formats.codebooks import QUANT_TYPES_4BIT, ZERO_CODE, codebook, dynamic_map, encode, reciprocal
from onegpu.formats.packing import pack, packed_bytes
from onegpu.formats.scale_search import search_scale

__all__ = [
    "FLOAT16_MAX",
    "NestedAbsmax",
    "check_finite",
    "dequantize_4bit",
    "dequantize_absmax",
    "num_blocks",
    "quantize_4bit",
    "quantize_absmax",
    "quantize_dynamic",
]

FLOAT16_MAX = 65504.0
WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CHUNK = 2**20


class NestedAbsmax(NamedTuple):
    """Scales in 8 bit: `code[codes] * absmax` of each block of 256, plus `offset`."""

    codes: Tensor  # uint8 [m], one per 4-bit block
    absmax: Tensor  # float32 [ceil(m / 256)]
    code: Tensor  # float32 [256], the dynamic map
    offset: Tensor  # float32 [], the mean of the scales


def num_blocks(n: int, blocksize: int) -> int:
    """Blocks that `n` elements fall into: ceil(n / blocksize)."""
    return -(-n // blocksize)


def quantize_4bit(
    weight: Tensor,
    quant_type: str,
    blocksize: int,
    *,
    scale_search: bool = False,
    importance: Tensor | None = None,
    signed: bool = True,
) -> tuple[Tensor, Tensor]:
    """Quantize a weight of any shape to NF4 or FP4.

    Args:
        weight: float32, float16 or bfloat16, any shape; n elements. Must be finite (see `check_finite`).
        quant_type: `nf4` or `fp4`.
        blocksize: weights per scale, one of `onegpu.config.BLOCKSIZES`.
        scale_search: choose each block's scale by least squared error (`onegpu.formats.scale_search`).
        importance: with `scale_search`, float32 weights >= 0 of the squared errors: [K], one per input column, or
            the shape of `weight`.
        signed: with `scale_search`, whether a scale may be negative, which turns NF4's table around.

    Returns:
        packed: uint8 [ceil(n / 2)], two codes to a byte, an odd n padded with the code of 0.0.
        absmax: float32 [ceil(n / blocksize)].

    Raises:
        ArgumentError: another dtype, or importance that does not fit.
        ConfigError: another quant_type or blocksize, or importance without scale_search.
    """
    check_choice("quant_type", quant_type, QUANT_TYPES_4BIT)
    check_choice("blocksize", blocksize, BLOCKSIZES)
    if weight.dtype not in WEIGHT_DTYPES:
        raise ArgumentError(f"weight must be float32, float16 or bfloat16; got {weight.dtype}")
    if importance is not None and not scale_search:
        raise ConfigError("importance is of use only with scale_search; got scale_search=False")
    importance = None if importance is None else _check_importance(importance, weight)
    flat = weight.detach().reshape(-1)
    n = flat.numel()
    packed = torch.empty(packed_bytes(n), dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(num_blocks(n, blocksize), dtype=torch.float32, device=weight.device)
    chunk = max(CHUNK, blocksize)
    for start in range(0, n, chunk):
        part = flat[start : start + chunk]
        blocks = _as_blocks(part.float(), blocksize)
        scale = blocks.abs().amax(dim=1)
        if scale_search:
            counts = None if importance is None else _as_blocks(_slice(importance, start, len(part)), blocksize)
            scale = search_scale(blocks, scale, quant_type, importance=counts, signed=signed)
        inverse = reciprocal(scale)
        codes = encode(blocks * inverse[:, None], quant_type)
        first = start // blocksize
        absmax[first : first + len(scale)] = scale.masked_fill_(inverse == 0, 0.0)
        packed[start // 2 : start // 2 + packed_bytes(len(part))] = pack(
            codes.view(-1)[: len(part)], ZERO_CODE[quant_type]
        )
    return packed, absmax


def dequantize_4bit(
    packed: Tensor, absmax: Tensor, shape: Sequence[int], dtype: torch.dtype, quant_type: str, blocksize: int
) -> Tensor:
    """The weight that packed codes stand for: one float32 product per element, rounded once to `dtype`.

    Args:
        packed: uint8 [ceil(n / 2)] with n the product of `shape`.
        absmax: float32 [ceil(n / blocksize)].
        shape, dtype: of the result.

    Raises:
        ArgumentError: a length or dtype that does not fit.
        ConfigError: another quant_type or blocksize.
    """
    check_choice("quant_type", quant_type, QUANT_TYPES_4BIT)
    check_choice("blocksize", blocksize, BLOCKSIZES)
    n = math.prod(shape)
    _check_flat("packed", packed, torch.uint8, packed_bytes(n))
    _check_flat("absmax", absmax, torch.float32, num_blocks(n, blocksize))
    out = torch.empty(n, dtype=dtype, device=packed.device)
    code = codebook(quant_type, packed.device)
    # One look-up per byte gives both of its values.
    pairs = torch.stack([code.repeat_interleave(16), code.repeat(16)], dim=1)
    chunk = max(CHUNK, blocksize)
    for start in range(0, n, chunk):
        stop = min(start + chunk, n)
        part = packed[start // 2 : packed_bytes(stop)]
        values = torch.index_select(pairs, 0, part.int()).view(-1)[: stop - start]
        blocks = _as_blocks(values, blocksize)
        first = start // blocksize
        blocks = blocks * absmax[first : first + len(blocks), None]
        out[start:stop] = blocks.view(-1)[: stop - start]
    return out.view(tuple(shape))


def quantize_absmax(absmax: Tensor) -> NestedAbsmax:
    """Store scales in 8 bit: take their mean off, scale each 256 to [-1, 1], take the nearest entry of the map.

    The mean is accumulated in float64 and rounded once.

    Args:
        absmax: float32 [m].

    Raises:
        ArgumentError: another dtype or rank.
    """
    _check_flat("absmax", absmax, torch.float32, absmax.numel())
    code = dynamic_map(absmax.device)
    if absmax.numel() == 0:
        return NestedAbsmax(absmax.to(torch.uint8), absmax, code, absmax.new_zeros(()))
    offset = absmax.mean(dtype=torch.float64).float()
    codes, scale = quantize_dynamic(absmax - offset, code, NESTED_BLOCKSIZE)
    return NestedAbsmax(codes, scale, code, offset)


def quantize_dynamic(values: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Each value of a flat float32 tensor as the nearest entry of an increasing table, by blocks scaled to [-1, 1].

    A value halfway between two entries takes the even index.

    Returns:
        codes: uint8 [n].
        absmax: float32 [ceil(n / blocksize)].
    """
    blocks = _as_blocks(values, blocksize)
    absmax = blocks.abs().amax(dim=1)
    scaled = (blocks * reciprocal(absmax)[:, None]).view(-1)[: values.numel()]
    middles = (code[:-1] + code[1:]) * 0.5
    low = torch.bucketize(scaled, middles, out_int32=True)
    high = torch.bucketize(scaled, middles, out_int32=True, right=True)
    return torch.where(low % 2 == 0, low, high).to(torch.uint8), absmax


def dequantize_absmax(nested: NestedAbsmax) -> Tensor:
    """The scales that 8-bit codes stand for: float32 [m]; the product is rounded, then the offset is added.

    Raises:
        ArgumentError: a length or dtype that does not fit.
    """
    m = nested.codes.numel()
    _check_flat("nested codes", nested.codes, torch.uint8, m)
    _check_flat("nested absmax", nested.absmax, torch.float32, num_blocks(m, NESTED_BLOCKSIZE))
    _check_flat("nested code", nested.code, torch.float32, 256)
    values = torch.index_select(nested.code, 0, nested.codes.int())
    blocks = _as_blocks(values, NESTED_BLOCKSIZE) * nested.absmax[:, None]
    return blocks.view(-1)[:m] + nested.offset


def check_finite(weight: Tensor, name: str, limit: float | None = None) -> None:
    """Refuse a weight that holds NaN or infinity, or magnitudes above `limit` (`FLOAT16_MAX` for int8 rows).

    Reads one number back to the host: for loading and quantizing on demand, never for a forward pass.

    Raises:
        CheckpointError: names the tensor.
    """
    if weight.numel() == 0:
        return
    low, high = (float(value) for value in torch.aminmax(weight.detach()))
    if not (math.isfinite(low) and math.isfinite(high)):
        raise CheckpointError(
            f"tensor {name!r} holds NaN or infinity; expected finite weights",
            "the checkpoint is damaged, or its training diverged; quantizing it would hide that",
        )
    largest = max(-low, high)
    if limit is not None and largest > limit:
        raise CheckpointError(
            f"tensor {name!r} holds a weight of magnitude {largest:g}; expected at most {limit:g}",
            "int8 rows pass through float16; use nf4, or leave this module in 16 bit",
        )


def _check_importance(importance: Tensor, weight: Tensor) -> Tensor:
    """Flat importance, of one row if it is per column."""
    if importance.dtype != torch.float32 or importance.shape not in (weight.shape, weight.shape[-1:]):
        raise ArgumentError(
            f"importance must be float32 {list(weight.shape[-1:])} or {list(weight.shape)}; "
            f"got {str(importance.dtype).removeprefix('torch.')} {list(importance.shape)}"
        )
    return importance.detach().reshape(-1)


def _slice(cycle: Tensor, start: int, length: int) -> Tensor:
    """`length` elements from `start` of a flat tensor repeated without end."""
    if start + length <= len(cycle):
        return cycle[start : start + length]
    return cycle[torch.arange(start, start + length, device=cycle.device) % len(cycle)]


def _as_blocks(flat: Tensor, blocksize: int) -> Tensor:
    missing = -flat.numel() % blocksize
    if missing:
        flat = torch.nn.functional.pad(flat, (0, missing))
    return flat.view(-1, blocksize)


def _check_flat(name: str, tensor: Tensor, dtype: torch.dtype, length: int) -> None:
    if tensor.dtype != dtype or tensor.dim() != 1 or tensor.numel() != length:
        raise ArgumentError(
            f"{name} must be {str(dtype).removeprefix('torch.')} [{length}]; "
            f"got {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
        )
