# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""y = x @ W.T + bias with W in 4 bit: three ways, by the number of rows of x.

    few rows    `gemv_kernel`: weights decoded to float32, products and sums in float32, rounded once
    some        `gemm_kernel`: weights decoded and rounded to the dtype of x, as dequantizing gives them, then tensor
                cores with float32 sums; the weight never exists in memory
    many        a slice of the weight at a time, dequantized to scratch memory and multiplied by the vendor's library

The flat blocks of the format straddle rows when K is no multiple of the blocksize, and bytes do when K is odd.
`weight_tile` covers all three cases, chosen at compile time; `gemm_kernel` takes the aligned one only.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from onegpu.kernels.dequantize import dequantize_blocks
from onegpu.kernels.launch import NO_CONTRACTION, capability, decode, load_scale, nested_arguments, on_device_of
from onegpu.kernels.slices import row_slices

__all__ = ["linear_4bit"]

GEMV_ROWS = 4
GEMM_ROWS = 64
# Tensor cores are in reach of `tl.dot` from Ampere on; on Turing it falls back to single products.
DOT_CAPABILITY = (8, 0)
# From so many weights on, offsets need 64 bits.
WIDE_WEIGHT = 2**31


@triton.jit
def weight_tile(
    packed_ptr,
    absmax_ptr,
    nested_absmax_ptr,
    nested_code_ptr,
    nested_offset_ptr,
    n,  # [BLOCK_N] rows of the weight, int32 or, for 2**31 weights and more, int64
    start,  # first column, a multiple of BLOCK_K
    N,
    K,
    QUANT_TYPE: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,
    EVEN: tl.constexpr,  # K is even
    ALIGNED: tl.constexpr,  # K is a multiple of BLOCKSIZE
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Weights [BLOCK_N, BLOCK_K] in float32; zeros beyond the last row or column."""
    k = start + tl.arange(0, BLOCK_K)
    inside = (n < N)[:, None] & (k < K)[None, :]
    if EVEN:
        pair = start // 2 + tl.arange(0, BLOCK_K // 2)
        mask = (n < N)[:, None] & (pair * 2 < K)[None, :]
        byte = tl.load(packed_ptr + (n * (K // 2))[:, None] + pair[None, :], mask=mask, other=0).to(tl.int32)
        high = decode(byte >> 4, QUANT_TYPE)
        low = decode(byte & 15, QUANT_TYPE)
        value = tl.reshape(tl.join(high, low), (BLOCK_N, BLOCK_K))
    else:
        element = (n * K)[:, None] + k[None, :]
        byte = tl.load(packed_ptr + element // 2, mask=inside, other=0).to(tl.int32)
        shift = (4 - (element % 2) * 4).to(tl.int32)
        value = decode((byte >> shift) & 15, QUANT_TYPE)
    if ALIGNED:
        GROUP: tl.constexpr = BLOCKSIZE if BLOCKSIZE < BLOCK_K else BLOCK_K
        GROUPS: tl.constexpr = BLOCK_K // GROUP
        column = start + tl.arange(0, GROUPS) * GROUP
        mask = (n < N)[:, None] & (column < K)[None, :]
        block = (n * (K // BLOCKSIZE))[:, None] + (column // BLOCKSIZE)[None, :]
        scale = load_scale(absmax_ptr, nested_absmax_ptr, nested_code_ptr, nested_offset_ptr, block, mask, NESTED)
        value = tl.reshape(
            tl.reshape(value, (BLOCK_N, GROUPS, GROUP)) * tl.reshape(scale, (BLOCK_N, GROUPS, 1)), (BLOCK_N, BLOCK_K)
        )
    else:
        block = ((n * K)[:, None] + k[None, :]) // BLOCKSIZE
        value *= load_scale(absmax_ptr, nested_absmax_ptr, nested_code_ptr, nested_offset_ptr, block, inside, NESTED)
    return tl.where(inside, value, 0.0)


@triton.jit
def gemv_kernel(
    x_ptr,  # [M, K], M <= BLOCK_M
    stride_xm,
    packed_ptr,
    absmax_ptr,
    nested_absmax_ptr,
    nested_code_ptr,
    nested_offset_ptr,
    bias_ptr,  # [N], read if HAS_BIAS
    y_ptr,  # [M, N]
    M,
    N,
    K,
    QUANT_TYPE: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WIDE: tl.constexpr,
    EVEN: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    if WIDE:
        n = n.to(tl.int64)
    m = tl.arange(0, BLOCK_M)
    acc = tl.zeros((BLOCK_M, BLOCK_N, BLOCK_K), tl.float32)
    for start in range(0, K, BLOCK_K):
        weight = weight_tile(
            packed_ptr, absmax_ptr, nested_absmax_ptr, nested_code_ptr, nested_offset_ptr, n, start, N, K,
            QUANT_TYPE, BLOCKSIZE, NESTED, EVEN, ALIGNED, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + m[:, None] * stride_xm + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)
        acc = tl.fma(x.to(tl.float32)[:, None, :], weight[None, :, :], acc)
    y = tl.sum(acc, axis=2)
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    tl.store(
        y_ptr + m[:, None] * N + n[None, :], y.to(y_ptr.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :]
    )


@triton.jit
def gemm_kernel(
    x_ptr,  # [M, K]
    stride_xm,
    packed_ptr,
    absmax_ptr,
    nested_absmax_ptr,
    nested_code_ptr,
    nested_offset_ptr,
    bias_ptr,  # [N], read if HAS_BIAS
    y_ptr,  # [M, N]
    M,
    N,
    K,
    QUANT_TYPE: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    if WIDE:
        n = n.to(tl.int64)
    m = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    # Weights are the left operand, so that every warp decodes rows of its own.
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + m[None, :] * stride_xm + k[:, None], mask=(m < M)[None, :] & (k < K)[:, None], other=0.0)
        weight = weight_tile(
            packed_ptr, absmax_ptr, nested_absmax_ptr, nested_code_ptr, nested_offset_ptr, n, start, N, K,
            QUANT_TYPE, BLOCKSIZE, NESTED, True, True, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        acc = tl.dot(weight.to(x.dtype), x, acc)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    tl.store(
        y_ptr + m[None, :] * N + n[:, None], acc.to(y_ptr.dtype.element_ty), mask=(m < M)[None, :] & (n < N)[:, None]
    )


def linear_4bit(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    bias: Tensor | None,
    out_features: int,
    quant_type: str,
    blocksize: int,
    nested_absmax: Tensor | None = None,
    nested_code: Tensor | None = None,
    nested_offset: Tensor | None = None,
) -> Tensor:
    """Launcher of the operator `linear_4bit`; its arguments have been checked."""
    N, K = out_features, x.shape[-1]
    rows = x.detach().reshape(-1, K)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    M = rows.shape[0]
    y = torch.empty(M, N, dtype=x.dtype, device=x.device)
    if M == 0:
        return y.view(*x.shape[:-1], N)
    packed = packed.contiguous()
    bias = None if bias is None else bias.detach().contiguous()
    scales = nested_arguments(absmax, nested_absmax, nested_code, nested_offset)
    # float32 has no fast `tl.dot`, and neither has Turing; blocks that straddle rows spill registers in `gemm_kernel`.
    has_dot = x.dtype != torch.float32 and K % blocksize == 0 and capability(x.device) >= DOT_CAPABILITY
    if (GEMM_ROWS if has_dot else GEMV_ROWS) < M:
        _dequantize_and_multiply(y, rows, packed, scales, bias, quant_type, blocksize)
        return y.view(*x.shape[:-1], N)
    kernel, settings = _configure(M, N, K, blocksize)
    grid = (triton.cdiv(N, settings["BLOCK_N"]), triton.cdiv(M, settings["BLOCK_M"]))
    with on_device_of(x):
        kernel[grid](
            rows,
            rows.stride(0),
            packed,
            *scales,
            y if bias is None else bias,
            y,
            M,
            N,
            K,
            QUANT_TYPE=quant_type,
            BLOCKSIZE=blocksize,
            NESTED=scales[0].dtype == torch.uint8,
            HAS_BIAS=bias is not None,
            WIDE=N * K >= WIDE_WEIGHT,
            **settings,
            **NO_CONTRACTION,
        )
    return y.view(*x.shape[:-1], N)


def _configure(M: int, N: int, K: int, blocksize: int) -> tuple[triton.JITFunction, dict[str, int]]:
    """Kernel and tile sizes for M <= GEMM_ROWS rows."""
    if M <= GEMV_ROWS:
        # 2048 decoded weights per step over 128 threads; the sums of four rows then take 64 registers.
        depth = min(512, max(32, triton.next_power_of_2(K)))
        return gemv_kernel, {
            "EVEN": K % 2 == 0,
            "ALIGNED": K % blocksize == 0,
            "BLOCK_M": triton.next_power_of_2(M),
            "BLOCK_N": min(16, 2048 // depth),
            "BLOCK_K": depth,
            "num_warps": 4,
        }
    # Narrow weights take narrow tiles, so that more processors have one.
    wide = N >= 8192
    return gemm_kernel, {
        "BLOCK_M": max(16, triton.next_power_of_2(M)),
        "BLOCK_N": 128 if wide else 64,
        "BLOCK_K": 64,
        "num_warps": 8 if wide else 4,
        "num_stages": 3,
    }


def _dequantize_and_multiply(
    y: Tensor,
    rows: Tensor,
    packed: Tensor,
    scales: tuple[Tensor, Tensor, Tensor, Tensor],
    bias: Tensor | None,
    quant_type: str,
    blocksize: int,
) -> None:
    N, K = y.shape[1], rows.shape[1]
    # Slices begin on a block of the flat weight.
    parts = row_slices(N, K, blocksize // math.gcd(K, blocksize))
    scratch = torch.empty(parts[0].stop, K, dtype=rows.dtype, device=rows.device)
    for part in parts:
        weight = scratch[: part.stop - part.start]
        dequantize_blocks(
            weight,
            packed,
            scales,
            first=part.start * K // blocksize,
            n=weight.numel(),
            quant_type=quant_type,
            blocksize=blocksize,
        )
        if bias is None:
            torch.mm(rows, weight.t(), out=y[:, part])
        elif bias.dtype == y.dtype:
            torch.addmm(bias[part], rows, weight.t(), out=y[:, part])
        else:
            y[:, part] = torch.mm(rows, weight.t()).float() + bias[part].float()
