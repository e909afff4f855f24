# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""RMSNorm in one pass: a program has whole rows, one if they are long, several if they are short.

With `OVERLAP` a program has read the weight, and computed nothing of x, when it waits for the kernel in front.
"""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from onegpu.kernels.launch import NO_CONTRACTION, on_device_of
from onegpu.kernels.overlap import overlaps

__all__ = ["rms_norm"]

# Elements of short rows that one program takes.
TILE: Final = 1024
# A longer row does not fit the registers of a program, and is read twice.
MAX_WHOLE: Final = 32768


@triton.jit(do_not_specialize=["M"])
def rms_norm_kernel(
    x_ptr,  # [M, K]
    stride_xm,
    weight_ptr,  # [K]
    y_ptr,  # [M, K]
    M,
    K,
    eps,
    offset,
    HAS_OFFSET: tl.constexpr,
    OVERLAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
    k = tl.arange(0, BLOCK_K)[None, :]
    weight = tl.load(weight_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    mask = (m < M) & (k < K)
    x = tl.load(x_ptr + m * stride_xm + k, mask=mask, other=0.0).to(tl.float32)
    y = x * tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / K + eps)
    if HAS_OFFSET:
        y *= weight + offset
    else:
        y = y.to(y_ptr.dtype.element_ty).to(tl.float32) * weight
    tl.store(y_ptr + m * K + k, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def long_rms_norm_kernel(
    x_ptr, stride_xm, weight_ptr, y_ptr, K, eps, offset, HAS_OFFSET: tl.constexpr, BLOCK_K: tl.constexpr
):
    """One row of any length, in two passes; the arguments are those of `rms_norm_kernel`."""
    m = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    squares = tl.zeros((BLOCK_K,), tl.float32)
    for start in range(0, K, BLOCK_K):
        x = tl.load(x_ptr + m * stride_xm + start + k, mask=k < K - start, other=0.0).to(tl.float32)
        squares = tl.fma(x, x, squares)
    scale = tl.rsqrt(tl.sum(squares, axis=0) / K + eps)
    for start in range(0, K, BLOCK_K):
        mask = k < K - start
        y = tl.load(x_ptr + m * stride_xm + start + k, mask=mask, other=0.0).to(tl.float32) * scale
        weight = tl.load(weight_ptr + start + k, mask=mask, other=0.0).to(tl.float32)
        if HAS_OFFSET:
            y *= weight + offset
        else:
            y = y.to(y_ptr.dtype.element_ty).to(tl.float32) * weight
        tl.store(y_ptr + m * K + start + k, y.to(y_ptr.dtype.element_ty), mask=mask)


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0, overlap: bool = False) -> Tensor:
    """Launcher of the operator `rms_norm`; its arguments have been checked."""
    K = x.shape[-1]
    rows = x.detach().reshape(-1, K)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    M = rows.shape[0]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if M == 0:
        return y
    weight = weight.detach().contiguous()
    if K > MAX_WHOLE:
        with on_device_of(x):
            long_rms_norm_kernel[(M,)](
                rows, rows.stride(0), weight, y, K, eps, offset, HAS_OFFSET=offset != 0, BLOCK_K=4096, num_warps=8,
                **NO_CONTRACTION,
            )  # fmt: skip
        return y
    BLOCK_K = triton.next_power_of_2(K)
    # Few rows get a program each: their number does not fill a GPU anyway.
    BLOCK_M = 1 if M <= 64 else max(1, TILE // BLOCK_K)
    overlap = overlaps(x.device, overlap)
    launch = {"launch_pdl": True} if overlap else {}
    with on_device_of(x):
        rms_norm_kernel[(triton.cdiv(M, BLOCK_M),)](
            rows,
            rows.stride(0),
            weight,
            y,
            M,
            K,
            eps,
            offset,
            HAS_OFFSET=offset != 0,
            OVERLAP=overlap,
            BLOCK_M=BLOCK_M,
            BLOCK_K=BLOCK_K,
            num_warps=min(16, max(1, BLOCK_M * BLOCK_K // 512)),
            **launch,
            **NO_CONTRACTION,
        )
    return y
