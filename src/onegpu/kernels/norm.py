# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Residual add and LayerNorm in one pass over the rows.

    y = (x + r - mean) / sqrt(var + eps) * weight + bias,   mean and variance over the K columns

Apart they read x, r and their sum and write twice: 5 K elements a row; together 3 K. Statistics are float32 over the
sum before it is rounded to the dtype of x. One program has one row whole, so K is at most 16384.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from onegpu.kernels.launch import on_device_of

__all__ = ["add_layer_norm"]


@triton.jit
def add_layer_norm_kernel(
    x_ptr,  # [M, K]
    residual_ptr,  # [M, K]
    weight_ptr,  # [K]
    bias_ptr,  # [K]
    out_ptr,  # [M, K]
    stride_xm,
    stride_rm,
    K,
    eps,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_K)
    mask = cols < K
    x = tl.load(x_ptr + row * stride_xm + cols, mask=mask, other=0.0).to(tl.float32)
    x += tl.load(residual_ptr + row * stride_rm + cols, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(x, 0) / K
    centered = tl.where(mask, x - mean, 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(centered * centered, 0) / K + eps)
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    y = centered * inverse * weight + bias
    tl.store(out_ptr + row * K + cols, y.to(out_ptr.dtype.element_ty), mask=mask)


def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Launch the kernel; arguments as `onegpu.kernels.encoder_ops.add_layer_norm`."""
    K = x.shape[-1]
    rows, others = x.reshape(-1, K), residual.reshape(-1, K)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if rows.shape[0] == 0:
        return out
    BLOCK_K = triton.next_power_of_2(K)
    with on_device_of(x):
        add_layer_norm_kernel[(rows.shape[0],)](
            rows,
            others,
            weight,
            bias,
            out,
            rows.stride(0),
            others.stride(0),
            K,
            eps,
            BLOCK_K=BLOCK_K,
            num_warps=min(8, max(1, BLOCK_K // 512)),
        )
    return out
