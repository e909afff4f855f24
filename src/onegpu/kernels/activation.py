# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""GELU on its own, in place, and as the end of a product: gelu(x W^T + b) without a pass over the result.

    gelu(z) = z / 2 * (1 + erf(z / sqrt(2)))        the exact form, which BERT was trained with

For BERT-base's first feed-forward product a separate pass reads and writes 12 KB a token, about a fifth of a layer's
memory traffic; in place it writes where it read, so that half of it stays in L2.
The product keeps GROUP_M row tiles together, so that the weight tiles they share stay in L2.
"""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from onegpu.kernels.launch import on_device_of

__all__ = ["gelu_", "linear_gelu"]

GROUP_M: Final = 8


@triton.jit
def gelu(z):
    return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))


@triton.jit
def gelu_kernel(x_ptr, numel, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < numel
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(x_ptr + offsets, gelu(x).to(x_ptr.dtype.element_ty), mask=mask)


@triton.jit
def linear_gelu_kernel(
    x_ptr,  # [M, K]
    weight_ptr,  # [N, K]
    bias_ptr,  # [N]
    out_ptr,  # [M, N]
    M,
    N,
    K,
    stride_xm,
    stride_wn,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    program = tl.program_id(0)
    row_tiles, col_tiles = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = program // (GROUP * col_tiles)
    first = group * GROUP
    size = tl.minimum(row_tiles - first, GROUP)
    row_tile = first + (program % (GROUP * col_tiles)) % size
    col_tile = (program % (GROUP * col_tiles)) // size
    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = col_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K)
    # Rows and columns past the end repeat earlier ones and are not stored: no mask in the loop.
    x_ptrs = x_ptr + (rows % M).to(tl.int64)[:, None] * stride_xm + ks[None, :]
    w_ptrs = weight_ptr + (cols % N).to(tl.int64)[None, :] * stride_wn + ks[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        if EVEN_K:
            x, w = tl.load(x_ptrs), tl.load(w_ptrs)
        else:
            x = tl.load(x_ptrs, mask=ks[None, :] + k < K, other=0.0)
            w = tl.load(w_ptrs, mask=ks[:, None] + k < K, other=0.0)
        acc = tl.dot(x, w, acc)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
    bias = tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
    y = gelu(acc + bias[None, :])
    out_ptrs = out_ptr + rows.to(tl.int64)[:, None] * N + cols[None, :]
    tl.store(out_ptrs, y.to(out_ptr.dtype.element_ty), mask=(rows[:, None] < M) & (cols[None, :] < N))


def gelu_(x: Tensor) -> Tensor:
    """Launch the kernel; arguments as `onegpu.kernels.encoder_ops.gelu_`."""
    numel, BLOCK = x.numel(), 2048
    if numel:
        with on_device_of(x):
            gelu_kernel[(triton.cdiv(numel, BLOCK),)](x, numel, BLOCK=BLOCK, num_warps=8)
    return x


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Launch the kernel; arguments as `onegpu.kernels.encoder_ops.linear_gelu`."""
    N, K = weight.shape
    rows = x.reshape(-1, K)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    M = rows.shape[0]
    out = torch.empty((*x.shape[:-1], N), dtype=x.dtype, device=x.device)
    if M == 0:
        return out
    # 128 x 256 fills a Hopper warp group pair; a small M takes smaller tiles, for enough programs.
    BLOCK_M, BLOCK_N, num_warps, num_stages = (128, 256, 8, 3) if M > 1024 else (64, 64, 4, 4)
    BLOCK_K = 64
    grid = (triton.cdiv(M, BLOCK_M) * triton.cdiv(N, BLOCK_N),)
    with on_device_of(x):
        linear_gelu_kernel[grid](
            rows,
            weight,
            bias,
            out,
            M,
            N,
            K,
            rows.stride(0),
            weight.stride(0),
            BLOCK_M=BLOCK_M,
            BLOCK_N=BLOCK_N,
            BLOCK_K=BLOCK_K,
            GROUP=GROUP_M,
            EVEN_K=K % BLOCK_K == 0,
            num_warps=num_warps,
            num_stages=num_stages,
        )
    return out
