# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Attention over sequences that stand one behind another, for what torch's own kernel does not take.

Softmax is kept online (FlashAttention, arXiv 2205.14135): per query row the running maximum m, sum l and output o.

    s = scale * q k^T + bias[h, pos_k - pos_q];  p = exp(s - m);  o = sum p v / l

torch's kernel has float16 and bfloat16, and no bias. This one adds float32 (three TF32 products, so about float32's
own rounding), a bias by distance (T5, MPNet) and a window measured in columns of the padded row, holes included.
One program computes BLOCK_M queries of one head of one sequence; programs past a sequence's end leave at once.
"""

from __future__ import annotations

from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from onegpu.kernels.launch import on_device_of

__all__ = ["varlen_attention"]

NO_WINDOW: Final = -1


@triton.jit
def varlen_attention_kernel(
    q_ptr,  # [T, H, D]
    k_ptr,  # [T, H, D]
    v_ptr,  # [T, H, D]
    out_ptr,  # [T, H, D]
    cu_seqlens_ptr,  # int32 [N + 1]
    positions_ptr,  # int32 [T]
    bias_ptr,  # float32 [H, 2 * S - 1], or unused
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_ot,
    stride_oh,
    stride_bh,
    bias_middle,  # S - 1: where distance 0 stands
    window,
    scale,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    block, head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start = tl.load(cu_seqlens_ptr + sequence)
    length = tl.load(cu_seqlens_ptr + sequence + 1) - start
    if block * BLOCK_M < length:
        rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
        dims = tl.arange(0, BLOCK_D)
        row_mask, dim_mask = rows < length, dims < D
        tokens = (start + rows).to(tl.int64)
        q = tl.load(
            q_ptr + tokens[:, None] * stride_qt + head * stride_qh + dims[None, :],
            mask=row_mask[:, None] & dim_mask[None, :],
            other=0.0,
        )
        if HAS_BIAS or HAS_WINDOW:
            q_pos = tl.load(positions_ptr + tokens, mask=row_mask, other=0)
        m = tl.full([BLOCK_M], -1e30, dtype=tl.float32)
        total = tl.zeros([BLOCK_M], dtype=tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
        last = length
        if CAUSAL:
            last = tl.minimum(length, (block + 1) * BLOCK_M)
        for first in range(0, last, BLOCK_N):
            cols = first + tl.arange(0, BLOCK_N)
            col_mask = cols < length
            keys = (start + cols).to(tl.int64)
            k = tl.load(
                k_ptr + keys[:, None] * stride_kt + head * stride_kh + dims[None, :],
                mask=col_mask[:, None] & dim_mask[None, :],
                other=0.0,
            )
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
            seen = col_mask[None, :]
            if CAUSAL:
                seen = seen & (cols[None, :] <= rows[:, None])
            if HAS_BIAS or HAS_WINDOW:
                k_pos = tl.load(positions_ptr + keys, mask=col_mask, other=0)
                distance = k_pos[None, :] - q_pos[:, None]
                if HAS_WINDOW:
                    seen = seen & (distance <= window) & (distance >= -window)
                if HAS_BIAS:
                    scores += tl.load(
                        bias_ptr + head * stride_bh + distance + bias_middle,
                        mask=row_mask[:, None] & col_mask[None, :],
                        other=0.0,
                    )
            scores = tl.where(seen, scores * 1.4426950408889634, float("-inf"))
            m_new = tl.maximum(m, tl.max(scores, 1))
            p = tl.exp2(scores - m_new[:, None])
            shrink = tl.exp2(m - m_new)
            total = total * shrink + tl.sum(p, 1)
            v = tl.load(
                v_ptr + keys[:, None] * stride_vt + head * stride_vh + dims[None, :],
                mask=col_mask[:, None] & dim_mask[None, :],
                other=0.0,
            )
            acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
            m = m_new
        acc = acc / total[:, None]
        tl.store(
            out_ptr + tokens[:, None] * stride_ot + head * stride_oh + dims[None, :],
            acc.to(out_ptr.dtype.element_ty),
            mask=row_mask[:, None] & dim_mask[None, :],
        )


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    positions: Tensor,
    max_seqlen: int,
    scale: float,
    causal: bool = False,
    window: int | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Launch the kernel; arguments as `onegpu.kernels.encoder_ops.varlen_attention`."""
    T, H, D = query.shape
    out = torch.empty((T, H, D), dtype=query.dtype, device=query.device)
    if T == 0 or max_seqlen == 0:
        return out
    rows = [t if t.stride(2) == 1 else t.contiguous() for t in (query, key, value)]
    q, k, v = rows
    float32 = query.dtype == torch.float32
    BLOCK_D = max(16, triton.next_power_of_2(D))
    # Shared memory: K and V tiles of BLOCK_N x BLOCK_D, two stages; float32 takes twice the room.
    BLOCK_M = 64 if float32 or BLOCK_D > 64 or max_seqlen <= 64 else 128
    BLOCK_N = 32 if float32 and BLOCK_D > 64 else 64
    options: dict[str, Any] = {"num_warps": 4 if BLOCK_M == 64 else 8, "num_stages": 2}
    with on_device_of(query):
        varlen_attention_kernel[(triton.cdiv(max_seqlen, BLOCK_M), H, cu_seqlens.numel() - 1)](
            q,
            k,
            v,
            out,
            cu_seqlens,
            positions,
            out if bias is None else bias,
            q.stride(0),
            q.stride(1),
            k.stride(0),
            k.stride(1),
            v.stride(0),
            v.stride(1),
            out.stride(0),
            out.stride(1),
            0 if bias is None else bias.stride(0),
            0 if bias is None else bias.shape[1] // 2,
            NO_WINDOW if window is None else window,
            scale,
            D=D,
            BLOCK_M=BLOCK_M,
            BLOCK_N=BLOCK_N,
            BLOCK_D=BLOCK_D,
            CAUSAL=causal,
            HAS_BIAS=bias is not None,
            HAS_WINDOW=window is not None,
            PRECISION="tf32x3" if float32 else "tf32",
            **options,
        )
    return out
