# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""RMSNorm over a head and rotary embedding, on tiles of rows, with the roundings of `decode_reference`.

A rotated element needs its partner, half R away or next door. Both are loaded and normed apart: the second load finds
its bytes in the first-level cache, and no value has to change threads.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["normed_and_rotated"]


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    return x.to(DTYPE).to(tl.float32)


@triton.jit
def scaled_by_weight(x, rstd, weight, offset, DTYPE: tl.constexpr, HAS_OFFSET: tl.constexpr):
    if HAS_OFFSET:
        x = rounded(x * rstd * (offset + weight), DTYPE)
    else:
        x = rounded(weight * rounded(x * rstd, DTYPE), DTYPE)
    return x


@triton.jit
def normed_and_rotated(
    x_ptr,  # the first of the rows, D apart
    rows,  # [M]
    wanted,  # bool [M]
    weight_ptr,  # [D], read if HAS_NORM
    cos_ptr,  # [R] of this sequence, read if R; so is the next
    sin_ptr,
    eps,
    offset,
    D: tl.constexpr,
    R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Rows [M, BLOCK_D] in the dtype they have in memory; 0 where not wanted."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    # Of the wider dtype of x and cos.
    TURNED: tl.constexpr = cos_ptr.dtype.element_ty
    dims = tl.arange(0, BLOCK_D)
    at = x_ptr + rows[:, None] * D
    mask = wanted[:, None] & (dims < D)[None, :]
    x = tl.load(at + dims[None, :], mask=mask, other=0.0).to(tl.float32)
    rstd = tl.zeros_like(x)
    if HAS_NORM:
        rstd = tl.rsqrt(tl.sum(x * x, 1, keep_dims=True) / D + eps)
        weight = tl.load(weight_ptr + dims, mask=dims < D, other=0.0).to(tl.float32)[None, :]
        y = scaled_by_weight(x, rstd, weight, offset, DTYPE, HAS_OFFSET)
    else:
        y = x
    if R > 0:
        turning = dims < R
        if INTERLEAVED:
            partner = dims ^ 1
            negative = dims % 2 == 0
        else:
            partner = tl.where(dims < R // 2, dims + R // 2, dims - R // 2)
            negative = dims < R // 2
        other = tl.load(at + partner[None, :], mask=wanted[:, None] & turning[None, :], other=0.0).to(tl.float32)
        if HAS_NORM:
            weight = tl.load(weight_ptr + partner, mask=turning, other=0.0).to(tl.float32)[None, :]
            other = scaled_by_weight(other, rstd, weight, offset, DTYPE, HAS_OFFSET)
        other = tl.where(negative[None, :], -other, other)
        cos = tl.load(cos_ptr + dims, mask=turning, other=1.0).to(tl.float32)[None, :]
        sin = tl.load(sin_ptr + dims, mask=turning, other=0.0).to(tl.float32)[None, :]
        turned = rounded(y * cos, TURNED) + rounded(other * sin, TURNED)
        y = tl.where(turning[None, :], turned, y)
    return y.to(DTYPE)
