# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""y = tail(x @ W.T + bias) for a tiled 4-bit W: three ways, by the number of rows of x.

few     `gemv_4bit`, which reads W once for every 32 rows
more    `gemm_4bit` on Hopper: W decoded on its way into the tensor cores
else    rows of W dequantized to scratch memory, then the vendor's library; also where neither can run (float32 x,
        AMD GPUs)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from onegpu.formats.tiling import TILE_COLUMNS, TILE_ROWS
from onegpu.kernels import tail
from onegpu.kernels.gemm_codes import gemm_4bit, why_not_gemm
from onegpu.kernels.gemm_codes_config import least_rows
from onegpu.kernels.gemv_4bit import gemv_4bit, why_not_gemv
from onegpu.kernels.gemv_4bit_config import MAX_ROWS
from onegpu.kernels.gemv_16bit import on_16_bytes
from onegpu.kernels.launch import NO_CONTRACTION, decode, nested_arguments, on_device_of
from onegpu.kernels.prompt_ops import gated_activation
from onegpu.kernels.slices import row_slices

__all__ = ["linear_4bit_tiled"]

# Reading 4-bit weights three times is quicker than once and writing them in 16 bit, where `gemm_4bit` does not run.
SPLIT_ROWS = 96
TILES = 8


@triton.jit(do_not_specialize=["first_row_tile", "row_tiles"])
def dequantize_tiled_kernel(
    out_ptr,  # [rows, K]: W from row 16 * first_row_tile on, whole row tiles
    tiled_ptr,  # uint8 [row tiles, K / 64, 512]
    absmax_ptr,
    nested_absmax_ptr,
    nested_code_ptr,
    nested_offset_ptr,
    first_row_tile,
    row_tiles,  # how many to write
    N,
    K,
    QUANT_TYPE: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,
    OFFSETS: tl.constexpr,  # 1 for an offset of each row tile, 0 for one of all
    TILES: tl.constexpr,
):
    """One float32 product per weight, rounded once; see `onegpu.formats.tiling` for the order of the bytes."""
    columns = K // 64
    blocks = K // BLOCKSIZE
    tile = tl.program_id(0).to(tl.int64) * TILES + tl.arange(0, TILES)
    inside = tile < row_tiles.to(tl.int64) * columns
    source = first_row_tile.to(tl.int64) * columns + tile
    byte = tl.load(tiled_ptr + source[:, None] * 512 + tl.arange(0, 512)[None, :], mask=inside[:, None], other=0)
    # [tile, g, t, b, h, a, r] to [tile, r, g, a, t, b, h]
    byte = tl.permute(tl.reshape(byte, (TILES, 8, 4, 2, 2, 2, 2)), (0, 6, 1, 5, 2, 3, 4))
    byte = tl.reshape(byte, (TILES, 16, 32)).to(tl.int32)
    value = tl.join(decode(byte >> 4, QUANT_TYPE), decode(byte & 15, QUANT_TYPE))
    PARTS: tl.constexpr = 2 if BLOCKSIZE == 32 else 1
    row = tl.arange(0, 16)
    part = tl.arange(0, PARTS)
    row_tile, column_tile = source // columns, source % columns
    block = column_tile[:, None] * 64 // BLOCKSIZE + part[None, :]
    place = (row_tile[:, None] * blocks + block)[:, None, :] * 16 + (row % 8 * 2 + row // 8)[None, :, None]
    n = row_tile[:, None] * 16 + row[None, :]
    mask = (inside[:, None] & (n < N))[:, :, None] & (part >= 0)[None, None, :]
    if NESTED:
        # Codes are in tile order, the float32 part in that of the rows.
        flat = n[:, :, None] * blocks + block[:, None, :]
        code = tl.load(absmax_ptr + place, mask=mask, other=0).to(tl.int32)
        scale = tl.load(nested_code_ptr + code) * tl.load(nested_absmax_ptr + flat // 256, mask=mask, other=0.0)
        scale += tl.load(nested_offset_ptr + (row_tile * OFFSETS)[:, None, None])
    else:
        scale = tl.load(absmax_ptr + place, mask=mask, other=0.0)
    value = tl.reshape(value, (TILES, 16, PARTS, 64 // PARTS)) * scale[:, :, :, None]
    value = tl.reshape(value, (TILES, 16, 64)).to(out_ptr.dtype.element_ty)
    local = tile // columns
    out = (local[:, None] * 16 + row[None, :])[:, :, None] * K + (column_tile * 64)[:, None, None]
    out += tl.arange(0, 64)[None, None, :]
    tl.store(out_ptr + out, value, mask=inside[:, None, None] & (tl.arange(0, 64) >= 0)[None, None, :])


def linear_4bit_tiled(
    x: Tensor,
    tiled: Tensor,
    absmax: Tensor,
    bias: Tensor | None,
    out_features: int,
    quant_type: str,
    blocksize: int,
    nested_absmax: Tensor | None = None,
    nested_code: Tensor | None = None,
    nested_offset: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    gated: bool = False,
    overlap: bool = False,
) -> Tensor:
    """Launcher of the operator `linear_4bit_tiled`; its arguments have been checked."""
    N, K = out_features, x.shape[-1]
    rows = x.detach().reshape(-1, K)
    M, width = rows.shape[0], tail.out_features(N, gated)
    bias = None if bias is None else bias.detach().contiguous()
    tiled, absmax = tiled.contiguous(), absmax.contiguous()
    nested = None
    if nested_absmax is not None and nested_code is not None and nested_offset is not None:
        nested = (nested_absmax.contiguous(), nested_code.contiguous(), nested_offset.contiguous())
    added = None if residual is None else residual.detach().reshape(M, width)
    way = way_of(M, least_rows(N, K, 4, nested=nested is not None), x.device, x.dtype)
    if M == 0 or way is dequantize_and_multiply:
        y = dequantize_and_multiply(rows, tiled, absmax, bias, N, quant_type, blocksize, nested)
        y = _followed(y, added, activation, gated)
        return y.view(*x.shape[:-1], width)
    at_once = M if way is gemm_4bit else MAX_ROWS
    y = torch.empty(M, width, dtype=x.dtype, device=x.device)
    rows = on_16_bytes(rows)
    added = None if added is None else added.contiguous()
    fused = not gated or N % (2 * TILE_ROWS) == 0
    for first in range(0, M, at_once):
        part = slice(first, min(first + at_once, M))
        more = None if added is None else added[part]
        if fused:
            way(
                y[part], rows[part], tiled, absmax, bias, quant_type, blocksize, nested,
                residual=more, activation=activation, gated=gated, overlap=overlap,
            )  # fmt: skip
            continue
        # Gate and up share a tile of 16 rows: they meet after the product.
        both = torch.empty(rows[part].shape[0], N, dtype=x.dtype, device=x.device)
        way(both, rows[part], tiled, absmax, bias, quant_type, blocksize, nested, overlap=overlap)
        y[part] = _followed(both, more, activation, gated)
    return y.view(*x.shape[:-1], width)


def way_of(M: int, least: int, device: torch.device, dtype: torch.dtype) -> Callable[..., Any]:
    """The function that multiplies M rows, one or more; `gemm_4bit` from `least` on, where it runs."""
    if device.type != "cuda":
        return dequantize_and_multiply
    if least <= M and why_not_gemm(device, dtype) is None:
        return gemm_4bit
    if M <= SPLIT_ROWS and why_not_gemv(device, dtype) is None:
        return gemv_4bit
    return dequantize_and_multiply


def _followed(y: Tensor, residual: Tensor | None, activation: str | None, gated: bool) -> Tensor:
    """The tail, where the product is rounded before it: as plain modules in a row do."""
    if activation is not None and gated and residual is None:
        return gated_activation(y, activation)
    if activation is not None:
        return tail.apply_tail(y.float(), residual, activation, gated, y.dtype)
    return y if residual is None else y.add_(residual)


def dequantize_and_multiply(
    rows: Tensor,
    tiled: Tensor,
    absmax: Tensor,
    bias: Tensor | None,
    N: int,
    quant_type: str,
    blocksize: int,
    nested: tuple[Tensor, Tensor, Tensor] | None,
) -> Tensor:
    K = rows.shape[1]
    y = torch.empty(rows.shape[0], N, dtype=rows.dtype, device=rows.device)
    scales = nested_arguments(absmax, *(nested or (None, None, None)))
    parts = row_slices(N, K)
    scratch = torch.empty(triton.cdiv(parts[0].stop, TILE_ROWS) * TILE_ROWS, K, dtype=rows.dtype, device=rows.device)
    for part in parts:
        count = triton.cdiv(part.stop - part.start, TILE_ROWS)
        with on_device_of(rows):
            dequantize_tiled_kernel[(triton.cdiv(count * (K // TILE_COLUMNS), TILES),)](
                scratch,
                tiled,
                *scales,
                part.start // TILE_ROWS,
                count,
                N,
                K,
                QUANT_TYPE=quant_type,
                BLOCKSIZE=blocksize,
                NESTED=nested is not None,
                OFFSETS=int(nested is not None and nested[2].dim() == 1),
                TILES=TILES,
                num_warps=4,
                **NO_CONTRACTION,
            )
        weight = scratch[: part.stop - part.start]
        if bias is None:
            torch.mm(rows, weight.t(), out=y[:, part])
        elif bias.dtype == y.dtype:
            torch.addmm(bias[part], rows, weight.t(), out=y[:, part])
        else:
            y[:, part] = torch.mm(rows, weight.t()).float() + bias[part].float()
    return y
