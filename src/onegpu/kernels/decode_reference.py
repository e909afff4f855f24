"""What the operators of a decode step mean, in plain torch: one token of each running sequence against its keys.

    append_kv                 writes the keys and values of one token into the cache
    decode_attention          softmax(scale q k^T) v over the keys up to and with that token
    rotary_decode_attention   norm and rotation of q and k, then the two above

Scores, softmax and sums are float32, the result is rounded once. Lengths are read on the device alone: on a GPU
whole slots are multiplied and masked, so nothing waits; on a CPU the longest sequence bounds the work.

A cache in int8 or float8_e4m3fn holds code * scale with one float32 scale for each token and head:

    scale = max |x| / largest code (127, 448);   code = round(x / scale), half to even;   0 where max |x| is 0
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

__all__ = [
    "LARGEST_CODE",
    "append_kv",
    "decode_attention",
    "decode_attention_on_cpu",
    "dequantize_kv",
    "head_norm",
    "quantize_kv",
    "rotary_decode_attention",
    "rotate",
]

LARGEST_CODE: Final = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def quantize_kv(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes [..., D] in `dtype` (int8 or float8_e4m3fn) and float32 scales [...] of x [..., D]."""
    wide = x.float()
    scale = wide.abs().amax(-1) / LARGEST_CODE[dtype]
    codes = torch.where(scale[..., None] > 0, wide / scale[..., None], 0.0)
    return (codes.round() if dtype == torch.int8 else codes).to(dtype), scale


def dequantize_kv(codes: Tensor, scale: Tensor | None) -> Tensor:
    """The float32 numbers that a cache [..., D] stands for; scale [...], None for one that is not quantized."""
    return codes.float() if scale is None else codes.float() * scale[..., None]


def append_kv(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    capacity = k_cache.shape[2]
    rows = torch.arange(k.shape[0], device=k.device)
    at = positions.long().clamp(0, capacity - 1)
    fits = (positions >= 0) & (positions < capacity)
    for new, cache, scales in ((k, k_cache, k_scale), (v, v_cache, v_scale)):
        codes = new.to(cache.dtype)
        if scales is not None:
            codes, scale = quantize_kv(new, cache.dtype)
            scales[rows, :, at] = torch.where(fits[:, None], scale, scales[rows, :, at])
        # torch.where has no float8: choose among bytes.
        old = cache[rows, :, at]
        kept = torch.where(fits[:, None, None], _as_bits(codes), _as_bits(old))
        _as_bits(cache)[rows, :, at] = kept


def _as_bits(t: Tensor) -> Tensor:
    return t.view(torch.uint8) if t.element_size() == 1 else t


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    overlap: bool = False,  # noqa: ARG001
) -> Tensor:
    B, Hq, D = q.shape
    Hkv, capacity = k_cache.shape[1:3]
    at = positions.long().clamp(0, capacity - 1)
    longest = int(at.max()) + 1 if B and at.device.type == "cpu" else capacity
    keys = torch.arange(longest, device=q.device)
    seen = keys[None, :] <= at[:, None]
    if window is not None:
        seen = seen & (keys[None, :] > at[:, None] - window)
    k = dequantize_kv(k_cache[:B, :, :longest], None if k_scale is None else k_scale[:B, :, :longest])
    v = dequantize_kv(v_cache[:B, :, :longest], None if v_scale is None else v_scale[:B, :, :longest])
    # Whatever stands beyond a sequence's end, NaN too, must not reach the sum.
    v = v.masked_fill(~seen[:, None, :, None], 0.0)
    scores = q.float().view(B, Hkv, Hq // Hkv, D) @ k.transpose(2, 3) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen[:, None, None, :], -torch.inf)
    if sinks is not None:
        column = sinks.float().view(1, Hkv, Hq // Hkv, 1).expand(B, -1, -1, -1)
        weights = torch.cat((scores, column), -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    return (weights @ v).reshape(B, Hq, v.shape[-1]).to(q.dtype)


def decode_attention_on_cpu(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    overlap: bool = False,
) -> Tensor:
    """torch's own attention where it can, a sequence at a time, on views of the cache; else the definition."""
    plain = softcap is None and sinks is None and k_scale is None
    if not plain or k_cache.dtype != q.dtype or k_cache.shape[3] != v_cache.shape[3]:
        return decode_attention(
            q, k_cache, v_cache, positions, scale, window, softcap, sinks, k_scale, v_scale, overlap
        )
    B, Hq, _ = q.shape
    capacity = k_cache.shape[2]
    out = q.new_empty((B, Hq, v_cache.shape[3]))
    for row, position in enumerate(positions.tolist()):
        end = min(max(position, 0), capacity - 1) + 1
        start = 0 if window is None else max(0, end - window)
        k, v = (cache[row : row + 1, :, start:end] for cache in (k_cache, v_cache))
        out[row] = scaled_dot_product_attention(
            q[row : row + 1, :, None], k, v, scale=scale, enable_gqa=Hq != k.shape[1]
        )[0, :, 0]
    return out


def head_norm(x: Tensor, weight: Tensor | None, eps: float, offset: float) -> Tensor:
    """RMSNorm of each head, x [..., D] and weight [D], rounded as Llama's (offset 0) or as Gemma's (else)."""
    if weight is None:
        return x
    wide = x.float()
    normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if offset:
        return (normal * (offset + weight.float())).to(x.dtype)
    return (weight.float() * normal.to(x.dtype).float()).to(x.dtype)


def rotate(x: Tensor, cos: Tensor | None, sin: Tensor | None, interleaved: bool) -> Tensor:
    """Rotary embedding (arXiv 2104.09864) of the first R of D: x [B, H, D]; cos, sin [B, R].

    Rounded after each product and the sum, in the wider dtype of x and cos, as Transformers' code does.
    """
    if cos is None or sin is None or not cos.shape[-1]:
        return x
    R = cos.shape[-1]
    turned, rest = x[..., :R], x[..., R:]
    if interleaved:
        other = torch.stack((-turned[..., 1::2], turned[..., ::2]), -1).flatten(-2)
    else:
        other = torch.cat((-turned[..., R // 2 :], turned[..., : R // 2]), -1)
    turned = (turned * cos[:, None] + other * sin[:, None]).to(x.dtype)
    return torch.cat((turned, rest), -1)


def rotary_decode_attention(
    qkv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    num_heads: int,
    scale: float,
    interleaved: bool = False,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    norm_eps: float = 1e-6,
    norm_offset: float = 0.0,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    overlap: bool = False,  # noqa: ARG001
) -> Tensor:
    Hkv, D = k_cache.shape[1], k_cache.shape[3]
    q, k, v = torch.split(qkv.view(qkv.shape[0], num_heads + 2 * Hkv, D), [num_heads, Hkv, Hkv], 1)
    q = rotate(head_norm(q, q_norm, norm_eps, norm_offset), cos, sin, interleaved)
    k = rotate(head_norm(k, k_norm, norm_eps, norm_offset), cos, sin, interleaved)
    append_kv(k, v, k_cache, v_cache, positions, k_scale, v_scale)
    attend = decode_attention_on_cpu if qkv.device.type == "cpu" else decode_attention
    out = attend(q, k_cache, v_cache, positions, scale, window, softcap, sinks, k_scale, v_scale)
    return out.flatten(1)
