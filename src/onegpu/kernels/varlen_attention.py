# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Attention over sequences that stand one behind another: any float dtype, a bias by distance, windows over holes.

Softmax is kept online (FlashAttention, arXiv 2205.14135): per query row the running maximum m, sum l and output o.

    s = scale * q k^T + bias[h, pos_k - pos_q];  p = exp(s - m);  o = sum p v / l

float32 takes three TF32 products, so about float32's own rounding. Distances are measured in columns of the padded row.
One program computes block_m queries of one head of one sequence. Which ones, a list says that is made once for all
layers (`attention_blocks`): the longest sequences first, so that none of them begins when all others are done, and
no program for blocks that are not there. Heads are innermost: neighbours read neighbouring columns of the same rows.
"""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from onegpu.kernels.launch import on_device_of
from onegpu.kernels.varlen_config import Tiles, tiles_for

__all__ = ["attention_blocks", "varlen_attention"]

NO_WINDOW: Final = -1
LOG2_E: Final = tl.constexpr(1.4426950408889634)


@triton.jit
def attention_blocks_kernel(
    cu_seqlens_ptr,  # int32 [N + 1]
    blocks_ptr,  # int32 [3, P]: first token, length and first query of each block
    N,
    P,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    sequence = tl.program_id(0)
    at = tl.arange(0, BLOCK_S)
    starts = tl.load(cu_seqlens_ptr + at, mask=at < N, other=0)
    lengths = tl.load(cu_seqlens_ptr + at + 1, mask=at < N, other=0) - starts
    counts = (lengths + BLOCK_M - 1) // BLOCK_M
    steps = tl.arange(0, 32)
    if sequence < N:
        start = tl.load(cu_seqlens_ptr + sequence)
        length = tl.load(cu_seqlens_ptr + sequence + 1) - start
        ahead = (lengths > length) | ((lengths == length) & (at < sequence))
        place = tl.sum(tl.where(ahead, counts, 0), 0)
        count = (length + BLOCK_M - 1) // BLOCK_M
        for first in range(0, count, 32):
            blocks = first + steps
            out_ptrs = blocks_ptr + place + blocks
            tl.store(out_ptrs, tl.zeros([32], tl.int32) + start, mask=blocks < count)
            tl.store(out_ptrs + P, tl.zeros([32], tl.int32) + length, mask=blocks < count)
            tl.store(out_ptrs + 2 * P, blocks * BLOCK_M, mask=blocks < count)
    else:
        # Places that no block takes: a length of 0 sends their programs home.
        for first in range(tl.sum(counts, 0), P, 32):
            tl.store(blocks_ptr + P + first + steps, tl.zeros([32], tl.int32), mask=first + steps < P)
            tl.store(blocks_ptr + 2 * P + first + steps, tl.zeros([32], tl.int32), mask=first + steps < P)


@triton.jit
def attend_tile(
    q,
    m,
    total,
    acc,
    k_ptr,
    v_ptr,
    positions_ptr,
    bias_ptr,
    stride_kt,
    stride_vt,
    first,
    length,
    rows,
    row_mask,
    q_pos,
    window,
    scale,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    SCALE_LATE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of keys and values into (m, total, acc). Pointers stand at the sequence's first token and the head."""
    dims = tl.arange(0, BLOCK_D)
    cols = first + tl.arange(0, BLOCK_N)
    col_mask = cols < length
    k_ptrs = k_ptr + cols[:, None] * stride_kt + dims[None, :]
    v_ptrs = v_ptr + cols[:, None] * stride_vt + dims[None, :]
    inside = col_mask[:, None] & (dims < D)[None, :]
    k = tl.load(k_ptrs, mask=inside, other=0.0)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if not SCALE_LATE:
        scores *= scale
    if HAS_BIAS or HAS_WINDOW:
        k_pos = tl.load(positions_ptr + cols, mask=col_mask, other=0)
        distance = k_pos[None, :] - q_pos[:, None]
    if HAS_BIAS:
        scores += tl.load(bias_ptr + distance, mask=row_mask[:, None] & col_mask[None, :], other=0.0)
    if not SCALE_LATE:
        scores *= LOG2_E
    seen = col_mask[None, :]
    if CAUSAL:
        seen = seen & (cols[None, :] <= rows[:, None])
    if HAS_WINDOW:
        seen = seen & (distance <= window) & (distance >= -window)
    scores = tl.where(seen, scores, float("-inf"))
    if SCALE_LATE:
        # The maximum first, then product and difference in one instruction.
        factor = scale * LOG2_E
        m_new = tl.maximum(m, tl.max(scores, 1) * factor)
        p = tl.exp2(scores * factor - m_new[:, None])
    else:
        m_new = tl.maximum(m, tl.max(scores, 1))
        p = tl.exp2(scores - m_new[:, None])
    shrink = tl.exp2(m - m_new)
    total = total * shrink + tl.sum(p, 1)
    v = tl.load(v_ptrs, mask=inside, other=0.0)
    acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
    return m_new, total, acc


@triton.jit
def varlen_attention_kernel(
    q_ptr,  # [T, H, D]
    k_ptr,  # [T, H, D]
    v_ptr,  # [T, H, D]
    out_ptr,  # [T, H, D]
    cu_seqlens_ptr,  # int32 [N + 1]
    blocks_ptr,  # int32 [3, P], or unused
    positions_ptr,  # int32 [T]
    bias_ptr,  # float32 [H, 2 * S - 1], or unused
    P,
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
    HAS_BLOCKS: tl.constexpr,
    SCALE_LATE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    head = tl.program_id(0)
    if HAS_BLOCKS:
        block = tl.program_id(1)
        start = tl.load(blocks_ptr + block)
        length = tl.load(blocks_ptr + P + block)
        first_row = tl.load(blocks_ptr + 2 * P + block)
    else:
        first_row = tl.program_id(1) * BLOCK_M
        start = tl.load(cu_seqlens_ptr + tl.program_id(2))
        length = tl.load(cu_seqlens_ptr + tl.program_id(2) + 1) - start
    if first_row < length:
        rows = first_row + tl.arange(0, BLOCK_M)
        dims = tl.arange(0, BLOCK_D)
        row_mask = rows < length
        q_mask = row_mask[:, None] & (dims < D)[None, :]
        here = start.to(tl.int64)
        q_ptr += here * stride_qt + head * stride_qh
        k_ptr += here * stride_kt + head * stride_kh
        v_ptr += here * stride_vt + head * stride_vh
        out_ptr += here * stride_ot + head * stride_oh
        positions_ptr += here
        bias_ptr += head * stride_bh + bias_middle
        q = tl.load(q_ptr + rows[:, None] * stride_qt + dims[None, :], mask=q_mask, other=0.0)
        q_pos = rows
        if HAS_BIAS or HAS_WINDOW:
            q_pos = tl.load(positions_ptr + rows, mask=row_mask, other=0)
        m = tl.full([BLOCK_M], -1e30, dtype=tl.float32)
        total = tl.zeros([BLOCK_M], dtype=tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
        last = length
        if CAUSAL:
            last = tl.minimum(length, first_row + BLOCK_M)
        for first in range(0, last, BLOCK_N):
            m, total, acc = attend_tile(
                q,
                m,
                total,
                acc,
                k_ptr,
                v_ptr,
                positions_ptr,
                bias_ptr,
                stride_kt,
                stride_vt,
                first,
                length,
                rows,
                row_mask,
                q_pos,
                window,
                scale,
                D=D,
                BLOCK_N=BLOCK_N,
                BLOCK_D=BLOCK_D,
                CAUSAL=CAUSAL,
                HAS_BIAS=HAS_BIAS,
                HAS_WINDOW=HAS_WINDOW,
                SCALE_LATE=SCALE_LATE,
                PRECISION=PRECISION,
            )
        acc = acc / total[:, None]
        out_ptrs = out_ptr + rows[:, None] * stride_ot + dims[None, :]
        tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=q_mask)


def attention_blocks(cu_seqlens: Tensor, tokens: int, block_m: int) -> Tensor:
    """Launch the kernel; arguments as `onegpu.kernels.encoder_ops.attention_blocks`."""
    N = cu_seqlens.numel() - 1
    P = triton.cdiv(tokens, block_m) + N
    blocks = torch.empty((3, P), dtype=torch.int32, device=cu_seqlens.device)
    if P:
        with on_device_of(cu_seqlens):
            attention_blocks_kernel[(N + 1,)](
                cu_seqlens, blocks, N, P, BLOCK_M=block_m, BLOCK_S=triton.next_power_of_2(max(N, 1)), num_warps=4
            )
    return blocks


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
    blocks: Tensor | None = None,
    tiles: Tiles | None = None,
) -> Tensor:
    """Launch the kernel; arguments as `onegpu.kernels.encoder_ops.varlen_attention`, `tiles` for tuning only."""
    T, H, D = query.shape
    out = torch.empty((T, H, D), dtype=query.dtype, device=query.device)
    if T == 0 or max_seqlen == 0:
        return out
    q, k, v = (t if t.stride(2) == 1 else t.contiguous() for t in (query, key, value))
    tiles = tiles or tiles_for(query.dtype, D, max_seqlen)
    if blocks is None:
        grid: tuple[int, ...] = (H, triton.cdiv(max_seqlen, tiles.block_m), cu_seqlens.numel() - 1)
    else:
        grid = (H, blocks.shape[1])
    with on_device_of(query):
        varlen_attention_kernel[grid](
            q,
            k,
            v,
            out,
            cu_seqlens,
            cu_seqlens if blocks is None else blocks,
            positions,
            out if bias is None else bias,
            0 if blocks is None else blocks.shape[1],
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
            BLOCK_M=tiles.block_m,
            BLOCK_N=tiles.block_n,
            BLOCK_D=max(16, triton.next_power_of_2(D)),
            CAUSAL=causal,
            HAS_BIAS=bias is not None,
            HAS_WINDOW=window is not None,
            HAS_BLOCKS=blocks is not None,
            SCALE_LATE=bias is None and scale > 0,
            PRECISION="tf32x3" if query.dtype == torch.float32 else "tf32",
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
        )
    return out
