# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Norm and rotation of q and k where they lie, k and v to the KV cache: each element of qkv is read once.

A program takes BLOCK_T tokens of a few heads of one kind, for which it holds the angles in registers. The two elements
that turn each other are loaded, and stored, by the same thread, so that rows can change in place.
"""

from __future__ import annotations

import math
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from onegpu.kernels.head_rotation import rounded, scaled_by_weight
from onegpu.kernels.kv_rows import require_kv_dtype
from onegpu.kernels.launch import NO_CONTRACTION, on_device_of, round_half_even

__all__ = ["constants", "rotate_and_append", "rotate_and_append_kernel"]

# Elements of a head's tile, and heads that share a program's angles at most.
TILE: Final = 2048
MOST_HEADS: Final = 4


@triton.jit
def turned_parts(
    at,  # pointers to the heads, [BLOCK_T, 1]
    wanted,  # bool [BLOCK_T, 1]
    weight_ptr,  # [D], read if HAS_NORM
    cos_low,  # float32 [BLOCK_T, BLOCK_HALF], of the first elements of pairs; so the next three
    sin_low,
    cos_high,
    sin_high,
    eps,
    offset,
    DTYPE: tl.constexpr,
    TURNED: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """First and second elements of the pairs, and what does not turn; float32, rounded to DTYPE."""
    pair = tl.arange(0, BLOCK_HALF)[None, :]
    low_at = pair * 2 if INTERLEAVED else pair
    high_at = low_at + (1 if INTERLEAVED else R // 2)
    rest_at = R + tl.arange(0, BLOCK_REST)[None, :]
    low = tl.load(at + low_at, mask=wanted & (pair < R // 2), other=0.0).to(tl.float32)
    high = tl.load(at + high_at, mask=wanted & (pair < R // 2), other=0.0).to(tl.float32)
    rest = tl.load(at + rest_at, mask=wanted & (rest_at < D), other=0.0).to(tl.float32)
    if HAS_NORM:
        squares = tl.sum(low * low, 1) + tl.sum(high * high, 1) + tl.sum(rest * rest, 1)
        rstd = tl.rsqrt(squares / D + eps)[:, None]
        low_weight = tl.load(weight_ptr + low_at, mask=pair < R // 2, other=0.0).to(tl.float32)
        high_weight = tl.load(weight_ptr + high_at, mask=pair < R // 2, other=0.0).to(tl.float32)
        rest_weight = tl.load(weight_ptr + rest_at, mask=rest_at < D, other=0.0).to(tl.float32)
        low = scaled_by_weight(low, rstd, low_weight, offset, DTYPE, HAS_OFFSET)
        high = scaled_by_weight(high, rstd, high_weight, offset, DTYPE, HAS_OFFSET)
        rest = scaled_by_weight(rest, rstd, rest_weight, offset, DTYPE, HAS_OFFSET)
    turned_low = rounded(low * cos_low, TURNED) + rounded(-high * sin_low, TURNED)
    turned_high = rounded(high * cos_high, TURNED) + rounded(low * sin_high, TURNED)
    return rounded(turned_low, DTYPE), rounded(turned_high, DTYPE), rest


@triton.jit
def largest_of(x):
    return tl.max(tl.abs(x), 1, keep_dims=True)


@triton.jit
def scale_for(largest, INT8: tl.constexpr):
    """float32 scales of rows whose largest magnitudes are [BLOCK_T, 1]; see `decode_reference`."""
    return tl.math.div_rn(largest, 127.0 if INT8 else 448.0)


@triton.jit
def stored(x, scale, CODE: tl.constexpr, INT8: tl.constexpr, QUANTIZED: tl.constexpr):
    """What the cache holds for x."""
    if QUANTIZED:
        x = tl.where(scale > 0, tl.math.div_rn(x, tl.where(scale > 0, scale, 1.0)), 0.0)
        if INT8:
            x = round_half_even(x)
    return x.to(CODE)


@triton.jit(do_not_specialize=["T"])
def rotate_and_append_kernel(
    qkv_ptr,  # [T, (HQ + 2 HKV) * D]
    stride_t,
    cos_ptr,  # [T, R], read if R; so is the next
    sin_ptr,
    q_norm_ptr,  # [D], read if HAS_Q_NORM
    k_norm_ptr,  # [D], read if HAS_K_NORM
    k_cache_ptr,  # [slots, HKV, capacity, D]
    v_cache_ptr,
    k_scale_ptr,  # float32 [slots, HKV, capacity], written if QUANTIZED; so is the next
    v_scale_ptr,
    slots_ptr,  # int32 [T]
    places_ptr,  # int32 [T]
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_sb,
    stride_sh,
    stride_sn,
    T,
    eps,
    offset,
    HQ: tl.constexpr,
    HKV: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    HEADS: tl.constexpr,  # of one program; divides HQ and HKV
    BLOCK_T: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_Q_NORM: tl.constexpr,
    HAS_K_NORM: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    QUANTIZED: tl.constexpr,
):
    DTYPE: tl.constexpr = qkv_ptr.dtype.element_ty
    TURNED: tl.constexpr = cos_ptr.dtype.element_ty
    CODE: tl.constexpr = k_cache_ptr.dtype.element_ty
    INT8: tl.constexpr = k_cache_ptr.dtype.element_ty == tl.int8
    first = tl.program_id(0) * HEADS
    token = (tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T))[:, None]
    wanted = token < T
    row_at = qkv_ptr + token.to(tl.int64) * stride_t
    pair = tl.arange(0, BLOCK_HALF)[None, :]
    low_at = pair * 2 if INTERLEAVED else pair
    high_at = low_at + (1 if INTERLEAVED else R // 2)
    rest_at = R + tl.arange(0, BLOCK_REST)[None, :]
    pairs = wanted & (pair < R // 2)
    rest_mask = wanted & (rest_at < D)
    slot = tl.load(slots_ptr + token, mask=wanted, other=0).to(tl.int64)
    place = tl.load(places_ptr + token, mask=wanted, other=0).to(tl.int64)
    if first < HQ + HKV:
        angle = token.to(tl.int64) * R
        cos_low = tl.load(cos_ptr + angle + low_at, mask=pairs, other=1.0).to(tl.float32)
        sin_low = tl.load(sin_ptr + angle + low_at, mask=pairs, other=0.0).to(tl.float32)
        cos_high = tl.load(cos_ptr + angle + high_at, mask=pairs, other=1.0).to(tl.float32)
        sin_high = tl.load(sin_ptr + angle + high_at, mask=pairs, other=0.0).to(tl.float32)
        if first < HQ:
            for i in tl.static_range(HEADS):
                at = row_at + (first + i) * D
                low, high, rest = turned_parts(
                    at, wanted, q_norm_ptr, cos_low, sin_low, cos_high, sin_high, eps, offset,
                    DTYPE, TURNED, D, R, BLOCK_HALF, BLOCK_REST, HAS_Q_NORM, HAS_OFFSET, INTERLEAVED,
                )  # fmt: skip
                tl.store(at + low_at, low.to(DTYPE), mask=pairs)
                tl.store(at + high_at, high.to(DTYPE), mask=pairs)
                if HAS_Q_NORM:
                    tl.store(at + rest_at, rest.to(DTYPE), mask=rest_mask)
        else:
            for i in tl.static_range(HEADS):
                at = row_at + (first + i) * D
                low, high, rest = turned_parts(
                    at, wanted, k_norm_ptr, cos_low, sin_low, cos_high, sin_high, eps, offset,
                    DTYPE, TURNED, D, R, BLOCK_HALF, BLOCK_REST, HAS_K_NORM, HAS_OFFSET, INTERLEAVED,
                )  # fmt: skip
                tl.store(at + low_at, low.to(DTYPE), mask=pairs)
                tl.store(at + high_at, high.to(DTYPE), mask=pairs)
                if HAS_K_NORM:
                    tl.store(at + rest_at, rest.to(DTYPE), mask=rest_mask)
                head = first - HQ + i
                scale = tl.zeros((BLOCK_T, 1), tl.float32)
                if QUANTIZED:
                    largest = tl.maximum(tl.maximum(largest_of(low), largest_of(high)), largest_of(rest))
                    scale = scale_for(largest, INT8)
                    tl.store(k_scale_ptr + slot * stride_sb + head * stride_sh + place * stride_sn, scale, mask=wanted)
                to = k_cache_ptr + slot * stride_kb + head * stride_kh + place * stride_kn
                tl.store(to + low_at, stored(low, scale, CODE, INT8, QUANTIZED), mask=pairs)
                tl.store(to + high_at, stored(high, scale, CODE, INT8, QUANTIZED), mask=pairs)
                tl.store(to + rest_at, stored(rest, scale, CODE, INT8, QUANTIZED), mask=rest_mask)
    else:
        dims = tl.arange(0, BLOCK_D)[None, :]
        mask = wanted & (dims < D)
        for i in tl.static_range(HEADS):
            v = tl.load(row_at + (first + i) * D + dims, mask=mask, other=0.0).to(tl.float32)
            head = first - HQ - HKV + i
            scale = tl.zeros((BLOCK_T, 1), tl.float32)
            if QUANTIZED:
                scale = scale_for(largest_of(v), INT8)
                tl.store(v_scale_ptr + slot * stride_sb + head * stride_sh + place * stride_sn, scale, mask=wanted)
            to = v_cache_ptr + slot * stride_vb + head * stride_vh + place * stride_vn
            tl.store(to + dims, stored(v, scale, CODE, INT8, QUANTIZED), mask=mask)


def constants(Hq: int, Hkv: int, D: int, R: int, **flags: bool) -> dict[str, Any]:
    """Compile-time arguments of the kernel, and `num_warps` beside them."""
    block_d = triton.next_power_of_2(D)
    return {
        "HQ": Hq,
        "HKV": Hkv,
        "D": D,
        "R": R,
        "HEADS": math.gcd(math.gcd(Hq, Hkv), MOST_HEADS),
        "BLOCK_T": max(1, TILE // block_d),
        "BLOCK_HALF": triton.next_power_of_2(max(1, R // 2)),
        "BLOCK_REST": triton.next_power_of_2(max(1, D - R)),
        "BLOCK_D": block_d,
        "num_warps": 4,
        **flags,
    }


def rotate_and_append(
    qkv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    places: Tensor,
    num_heads: int,
    interleaved: bool = False,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    norm_eps: float = 1e-6,
    norm_offset: float = 0.0,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Launch the kernel; arguments as `onegpu.kernels.prompt_ops.rotate_and_append`."""
    require_kv_dtype(k_cache)
    T, Hkv, D = qkv.shape[0], k_cache.shape[1], k_cache.shape[3]
    if T == 0:
        return
    R = 0 if cos is None else cos.shape[1]
    angles = (qkv, qkv) if cos is None or sin is None or R == 0 else (cos.contiguous(), sin.contiguous())
    scales = (places, places) if k_scale is None or v_scale is None else (k_scale, v_scale)
    settings = constants(
        num_heads,
        Hkv,
        D,
        R,
        HAS_Q_NORM=q_norm is not None,
        HAS_K_NORM=k_norm is not None,
        HAS_OFFSET=norm_offset != 0,
        INTERLEAVED=interleaved,
        QUANTIZED=k_cache.dtype in (torch.int8, torch.float8_e4m3fn),
    )
    grid = ((num_heads + 2 * Hkv) // settings["HEADS"], triton.cdiv(T, settings["BLOCK_T"]))
    with on_device_of(qkv):
        rotate_and_append_kernel[grid](
            qkv,
            qkv.stride(0),
            *angles,
            qkv if q_norm is None else q_norm.contiguous(),
            qkv if k_norm is None else k_norm.contiguous(),
            k_cache,
            v_cache,
            *scales,
            slots,
            places,
            *k_cache.stride()[:3],
            *v_cache.stride()[:3],
            *(scales[0].stride() if scales[0].dim() == 3 else (0, 0, 0)),
            T,
            norm_eps,
            norm_offset,
            **settings,
            **NO_CONTRACTION,
        )
