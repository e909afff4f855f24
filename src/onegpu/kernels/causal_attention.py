# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Causal attention of prompts that stand one behind another, for what torch's own kernel does not take.

Softmax is kept online (FlashAttention, arXiv 2205.14135). Queries may be fewer than keys: the last query of a sequence
sees its last key. Query heads share key heads; scores may be capped, seen through a window, and joined by a sink. One
program computes BLOCK_M queries of one head of one sequence; those with the most keys come first.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from onegpu.kernels.launch import on_device_of
from onegpu.kernels.split_attention import LOWEST, shaped, with_sink
from onegpu.kernels.split_launch import precision_of

__all__ = ["causal_attention", "causal_attention_kernel", "constants"]


@triton.jit
def causal_attention_kernel(
    q_ptr,  # [Tq, Hq, D]
    k_ptr,  # [Tk, Hkv, D]
    v_ptr,  # [Tk, Hkv, DV]
    sinks_ptr,  # [Hq], read if HAS_SINKS
    out_ptr,  # [Tq, Hq, DV]
    cu_q_ptr,  # int32 [N + 1]
    cu_k_ptr,  # int32 [N + 1]
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    window,
    scale,
    softcap,
    G: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    head, sequence = tl.program_id(1), tl.program_id(2)
    start_q = tl.load(cu_q_ptr + sequence)
    start_k = tl.load(cu_k_ptr + sequence)
    length_q = tl.load(cu_q_ptr + sequence + 1) - start_q
    length_k = tl.load(cu_k_ptr + sequence + 1) - start_k
    first_row = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    if first_row < length_q:
        rows = first_row + tl.arange(0, BLOCK_M)
        dims = tl.arange(0, BLOCK_D)
        value_dims = tl.arange(0, BLOCK_DV)
        row_mask = rows < length_q
        tokens = (start_q + rows).to(tl.int64)
        q_at = q_ptr + tokens[:, None] * stride_qt + head * stride_qh + dims[None, :]
        q = tl.load(q_at, mask=row_mask[:, None] & (dims < D)[None, :], other=0.0)
        places = rows + (length_k - length_q)
        last = tl.minimum(length_k, first_row + BLOCK_M + length_k - length_q)
        first = 0
        if HAS_WINDOW:
            first = tl.maximum(0, first_row + length_k - length_q - window + 1) // BLOCK_N * BLOCK_N
        k_base = k_ptr + start_k.to(tl.int64) * stride_kt + (head // G) * stride_kh
        v_base = v_ptr + start_k.to(tl.int64) * stride_vt + (head // G) * stride_vh
        m = tl.full([BLOCK_M], LOWEST, dtype=tl.float32)
        total = tl.zeros([BLOCK_M], dtype=tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32)
        for base in range(first, last, BLOCK_N):
            keys = base + tl.arange(0, BLOCK_N)
            inside = keys < length_k
            at = keys.to(tl.int64)[:, None]
            k = tl.load(k_base + at * stride_kt + dims[None, :], mask=inside[:, None] & (dims < D)[None, :], other=0.0)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
            seen = inside[None, :] & (keys[None, :] <= places[:, None])
            if HAS_WINDOW:
                seen = seen & (keys[None, :] > places[:, None] - window)
            scores = tl.where(seen, shaped(scores, softcap, HAS_SOFTCAP), float("-inf"))
            m_new = tl.maximum(m, tl.max(scores, 1))
            p = tl.exp2(scores - m_new[:, None])
            shrink = tl.exp2(m - m_new)
            total = total * shrink + tl.sum(p, 1)
            mask = inside[:, None] & (value_dims < DV)[None, :]
            v = tl.load(v_base + at * stride_vt + value_dims[None, :], mask=mask, other=0.0)
            acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
            m = m_new
        shrink, total = with_sink(m, total, sinks_ptr, rows * 0 + head, row_mask, HAS_SINKS)
        # A query before the first key sees none, and gets 0.
        acc = acc * (shrink / tl.where(total > 0, total, 1.0))[:, None]
        heads = tl.num_programs(1)
        tl.store(
            out_ptr + (tokens[:, None] * heads + head) * DV + value_dims[None, :],
            acc.to(out_ptr.dtype.element_ty),
            mask=row_mask[:, None] & (value_dims < DV)[None, :],
        )


def constants(G: int, D: int, DV: int, itemsize: int, *, precision: str, **flags: bool) -> dict[str, Any]:
    """Compile-time arguments of the kernel, and `num_warps` and `num_stages` beside them.

    Smaller tiles for longer rows, so that a tile of q and the sums stay in registers and k and v in shared memory.
    """
    block_d, block_dv = (max(16, triton.next_power_of_2(size)) for size in (D, DV))
    row_bytes = max(block_d, block_dv) * itemsize
    block = 64 if row_bytes <= 256 else 32 if row_bytes <= 512 else 16
    return {
        "G": G,
        "D": D,
        "DV": DV,
        "BLOCK_M": block,
        "BLOCK_N": 32 if row_bytes == 256 else block,
        "BLOCK_D": block_d,
        "BLOCK_DV": block_dv,
        "PRECISION": precision,
        "num_warps": 4 if row_bytes <= 256 else 8,
        "num_stages": 2,
        **flags,
    }


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Launch the kernel; arguments as `onegpu.kernels.prefill_ops.causal_attention`."""
    (Tq, Hq, D), (_, Hkv, DV) = q.shape, v.shape
    out = torch.empty((Tq, Hq, DV), dtype=q.dtype, device=q.device)
    if Tq == 0 or max_q == 0:
        return out
    q, k, v = (t if t.stride(2) == 1 else t.contiguous() for t in (q, k, v))
    settings = constants(
        Hq // Hkv,
        D,
        DV,
        q.element_size(),
        precision=precision_of(q.dtype),
        HAS_WINDOW=window is not None,
        HAS_SOFTCAP=softcap is not None,
        HAS_SINKS=sinks is not None,
    )
    with on_device_of(q):
        causal_attention_kernel[(triton.cdiv(max_q, settings["BLOCK_M"]), Hq, cu_q.numel() - 1)](
            q,
            k,
            v,
            q if sinks is None else sinks.contiguous(),
            out,
            cu_q,
            cu_k,
            *q.stride()[:2],
            *k.stride()[:2],
            *v.stride()[:2],
            0 if window is None else window,
            scale,
            1.0 if softcap is None else softcap,
            **settings,
        )
    return out
