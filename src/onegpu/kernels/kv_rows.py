# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Rows of the KV cache: rounding one to int8 or float8_e4m3fn codes, and appending a token's to every sequence.

The rule of rounding is `decode_reference`'s; the append inside `split_attention` uses it too. One program appends one
head of one sequence. Where a row goes is read on the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from onegpu.errors import UnsupportedError
from onegpu.kernels.decode_ops import why_not_kv_dtype
from onegpu.kernels.launch import NO_CONTRACTION, on_device_of, round_half_even

__all__ = ["append_kv", "quantize_row", "require_kv_dtype", "store_row"]


def require_kv_dtype(cache: Tensor) -> None:
    """Refuse a cache that kernels on its device can't read.

    Raises:
        UnsupportedError: float8 on a card without it.
    """
    reason = why_not_kv_dtype(cache.device, cache.dtype)
    if reason is not None:
        raise UnsupportedError(reason)


@triton.jit
def quantize_row(x, LARGEST: tl.constexpr, WHOLE: tl.constexpr):
    """float32 rows [M, D] to codes in float32 and their scales [M, 1]; whole numbers if `WHOLE`."""
    scale = tl.math.div_rn(tl.max(tl.abs(x), 1, keep_dims=True), LARGEST)
    codes = tl.where(scale > 0, tl.math.div_rn(x, tl.where(scale > 0, scale, 1.0)), 0.0)
    if WHOLE:
        codes = round_half_even(codes)
    return codes, scale


@triton.jit
def store_row(x, cache_ptr, scale_ptr, dims, limit, QUANTIZED: tl.constexpr):
    """Write the first `limit` of one row x [1, BLOCK_D]; returns the float32 numbers that it stands for there."""
    value = x.to(tl.float32)
    if QUANTIZED:
        INT8: tl.constexpr = cache_ptr.dtype.element_ty == tl.int8
        codes, scale = quantize_row(value, 127.0 if INT8 else 448.0, INT8)
        codes = codes.to(cache_ptr.dtype.element_ty)
        place = tl.zeros_like(scale).to(tl.int32)
        tl.store(scale_ptr + place, scale, mask=place < limit)
        tl.store(cache_ptr + dims, codes, mask=dims < limit)
        value = codes.to(tl.float32) * scale
    else:
        tl.store(cache_ptr + dims, x, mask=dims < limit)
    return value


@triton.jit
def append_kv_kernel(
    k_ptr,  # [B, Hkv, D]
    v_ptr,  # [B, Hkv, DV]
    k_cache_ptr,  # [slots, Hkv, capacity, D]
    v_cache_ptr,  # [slots, Hkv, capacity, DV]
    k_scale_ptr,  # float32 [slots, Hkv, capacity], read if QUANTIZED; so is the next
    v_scale_ptr,
    positions_ptr,  # int32 [B]
    stride_kb,
    stride_kh,
    stride_vb,
    stride_vh,
    stride_kcb,
    stride_kch,
    stride_kcn,
    stride_vcb,
    stride_vch,
    stride_vcn,
    stride_ksb,
    stride_ksh,
    stride_ksn,
    stride_vsb,
    stride_vsh,
    stride_vsn,
    capacity,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    QUANTIZED: tl.constexpr,
):
    head, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    position = tl.load(positions_ptr + row)
    fits = (position >= 0) & (position < capacity)
    dims = tl.arange(0, BLOCK_D)[None, :]
    k = tl.load(k_ptr + row * stride_kb + head * stride_kh + dims, mask=dims < D, other=0.0)
    store_row(
        k,
        k_cache_ptr + row * stride_kcb + head * stride_kch + position * stride_kcn,
        k_scale_ptr + row * stride_ksb + head * stride_ksh + position * stride_ksn,
        dims,
        tl.where(fits, D, 0),
        QUANTIZED,
    )
    dims = tl.arange(0, BLOCK_DV)[None, :]
    v = tl.load(v_ptr + row * stride_vb + head * stride_vh + dims, mask=dims < DV, other=0.0)
    store_row(
        v,
        v_cache_ptr + row * stride_vcb + head * stride_vch + position * stride_vcn,
        v_scale_ptr + row * stride_vsb + head * stride_vsh + position * stride_vsn,
        dims,
        tl.where(fits, DV, 0),
        QUANTIZED,
    )


def append_kv(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Launch the kernel; arguments as `onegpu.kernels.decode_ops.append_kv`."""
    require_kv_dtype(k_cache)
    B, Hkv, D = k.shape
    if B == 0:
        return
    k, v = (t if t.stride(2) == 1 else t.contiguous() for t in (k, v))
    scales = (positions, positions) if k_scale is None or v_scale is None else (k_scale, v_scale)
    strides = [s for t in scales for s in (t.stride() if t.dim() == 3 else (0, 0, 0))]
    DV = v.shape[2]
    with on_device_of(k):
        append_kv_kernel[(Hkv, B)](
            k,
            v,
            k_cache,
            v_cache,
            *scales,
            positions,
            *k.stride()[:2],
            *v.stride()[:2],
            *k_cache.stride()[:3],
            *v_cache.stride()[:3],
            *strides,
            k_cache.shape[2],
            D=D,
            DV=DV,
            BLOCK_D=triton.next_power_of_2(D),
            BLOCK_DV=triton.next_power_of_2(DV),
            QUANTIZED=k_cache.dtype in (torch.int8, torch.float8_e4m3fn),
            num_warps=1,
            **NO_CONTRACTION,
        )
