# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# mypy: disable-error-code="assignment"
"""Attention of one new token per sequence over the KV cache, split along the keys (Flash-Decoding), in one kernel.

    of a split:   m = max s,  l = sum exp(s - m),  o = sum exp(s - m) v        s = scale q k^T
    together:     sum_i exp(m_i - M) o_i / sum_i exp(m_i - M) l_i,  M = max m_i        (a sink adds exp(sink - M) below)

The query heads that share a key head are rows of one tile, so that keys and values are read once. The grid is
(heads, units). Which keys a unit takes follows from the lengths, which only the device knows: with T keys in all, B
sequences and U units, every sequence is cut in parts of

    max(min_keys, (T - B) // (U - B + 1) + 1) keys,   which makes U parts at most,

and unit u takes the u-th part. Units without one leave at once. Where a sequence has several parts, each writes
(m, l, o) to memory and draws a ticket; the last to come adds all of them up, in order, and puts the ticket back to 0.

With `ROTARY` q, k and v come as one row: each program norms and rotates the q it needs; the one that has the newest
key norms and rotates that too, appends it and its value to the cache, and begins its sum with them. Nobody reads them
back from the cache in the same kernel.

With `OVERLAP` (compute capability 9.0 and up) the kernel begins while the one before it still runs. `ROTARY` reads
positions before it waits and has its first keys and values brought to the second-level cache.
"""

from __future__ import annotations

import triton
import triton.language as tl

from onegpu.kernels.head_rotation import normed_and_rotated
from onegpu.kernels.kv_rows import store_row

__all__ = ["split_attention_kernel"]

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
# Below every score, yet finite: a difference of two of them is 0, not NaN.
LOWEST: tl.constexpr = tl.constexpr(-1e30)


@triton.jit
def part_of(
    positions_ptr,
    unit,
    units,
    B,
    capacity,
    window,
    min_keys,
    BLOCK_B: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    """Of a unit: its sequence, that one's position and keys, which part of it, and of how many (0 if there is none)."""
    if BLOCK_B == 1:
        row = 0
        position = tl.load(positions_ptr)
        count = keys_seen(position, capacity, window, HAS_WINDOW)
        length = tl.maximum(min_keys, (count - 1) // units + 1)
        part = unit
        parts = (count + length - 1) // length
    else:
        rows = tl.arange(0, BLOCK_B)
        positions = tl.load(positions_ptr + rows, mask=rows < B, other=0)
        counts = tl.where(rows < B, keys_seen(positions, capacity, window, HAS_WINDOW), 0)
        length = tl.maximum(min_keys, (tl.sum(counts, 0) - B) // (units - B + 1) + 1)
        cut = (counts + length - 1) // length
        before = tl.cumsum(cut, 0) <= unit
        row = tl.sum(before.to(tl.int32), 0)
        mine = rows == row
        position = tl.sum(tl.where(mine, positions, 0), 0)
        count = tl.sum(tl.where(mine, counts, 0), 0)
        part = unit - tl.sum(tl.where(before, cut, 0), 0)
        parts = tl.sum(tl.where(mine, cut, 0), 0)
    return row, position, count, part, parts


@triton.jit
def keys_seen(position, capacity, window, HAS_WINDOW: tl.constexpr):
    count = tl.minimum(tl.maximum(position, 0), capacity - 1) + 1
    if HAS_WINDOW:
        count = tl.minimum(count, window)
    return count


@triton.jit
def shaped(scores, softcap, HAS_SOFTCAP: tl.constexpr):
    """Scores times log2 e, after the soft cap."""
    if HAS_SOFTCAP:
        # tanh x = 1 - 2 / (exp(2 x) + 1), right at both ends too
        scores = softcap - 2.0 * softcap / (tl.exp2(scores * (2.0 * LOG2_E / softcap)) + 1.0)
    return scores * LOG2_E


@triton.jit
def with_sink(m, total, sinks_ptr, heads, wanted, HAS_SINKS: tl.constexpr):
    """What the sums so far shrink by, and their total, once the sink has joined them."""
    shrink = tl.full(m.shape, 1.0, dtype=tl.float32)
    if HAS_SINKS:
        sink = tl.load(sinks_ptr + heads, mask=wanted, other=LOWEST).to(tl.float32) * LOG2_E
        top = tl.maximum(m, sink)
        shrink = tl.exp2(m - top)
        total = total * shrink + tl.exp2(sink - top)
    return shrink, total


@triton.jit
def fetch_ahead(ptr, first, last, stride, D: tl.constexpr, KEYS: tl.constexpr):
    """Bring up to KEYS rows from `first` on, `last` at most, to the second-level cache."""
    SIZE: tl.constexpr = ptr.dtype.element_ty.primitive_bitwidth // 8
    LINES: tl.constexpr = triton.next_power_of_2((D * SIZE + 127) // 128)
    keys = tl.minimum(first + tl.arange(0, KEYS), last)
    at = tl.minimum(tl.arange(0, LINES) * (128 // SIZE), D - 1)
    address = (ptr + keys[:, None] * stride + at[None, :]).to(tl.int64)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", (address,), dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def combine(
    partial_ptr,  # float32 [units, heads, ROWS, DV], at part 0 of this sequence and head
    stats_ptr,  # float32 [units, heads, 2, ROWS]
    out_ptr,  # [ROWS, DV] of this sequence and head
    sinks_ptr,  # [ROWS]
    parts,
    heads,
    num_rows,
    ROWS: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    """Add the parts up and write the result; they come from other processors, so past the first-level cache."""
    rows = tl.arange(0, BLOCK_G)
    dims = tl.arange(0, BLOCK_DV)
    wanted = rows < num_rows
    top = tl.full([BLOCK_G], LOWEST, dtype=tl.float32)
    total = tl.zeros([BLOCK_G], dtype=tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_DV], dtype=tl.float32)
    for first in range(0, parts, CHUNK):
        some = first + tl.arange(0, CHUNK)
        mask = (some < parts)[:, None] & wanted[None, :]
        stat_ptr = stats_ptr + some[:, None] * (heads * 2 * ROWS) + rows[None, :]
        m = tl.load(stat_ptr, mask=mask, other=LOWEST, cache_modifier=".cg")
        l = tl.load(stat_ptr + ROWS, mask=mask, other=1.0, cache_modifier=".cg")  # noqa: E741
        o_ptr = partial_ptr + some[:, None, None] * (heads * ROWS * DV) + rows[None, :, None] * DV + dims[None, None, :]
        o = tl.load(o_ptr, mask=mask[:, :, None] & (dims < DV)[None, None, :], other=0.0, cache_modifier=".cg")
        new_top = tl.maximum(top, tl.max(m, 0))
        weight = tl.exp2(m - new_top[None, :])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(l * weight, 0)
        acc = acc * shrink[:, None] + tl.sum(o * weight[:, :, None], 0)
        top = new_top
    shrink, total = with_sink(top, total, sinks_ptr, rows, wanted, HAS_SINKS)
    write(acc, shrink, total, out_ptr, rows, wanted, DV, BLOCK_DV)


@triton.jit
def write(acc, shrink, total, out_ptr, rows, wanted, DV: tl.constexpr, BLOCK_DV: tl.constexpr):
    dims = tl.arange(0, BLOCK_DV)
    out = acc * (shrink / total)[:, None]
    mask = wanted[:, None] & (dims < DV)[None, :]
    tl.store(out_ptr + rows[:, None] * DV + dims[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["B", "units", "capacity", "window", "min_keys"])
def split_attention_kernel(
    q_ptr,  # [B, Hq, D], or qkv [B, (Hq + 2 Hkv) * D] if ROTARY
    k_cache_ptr,  # [slots, Hkv, capacity, D]
    v_cache_ptr,  # [slots, Hkv, capacity, DV]
    k_scale_ptr,  # float32 [slots, Hkv, capacity], read if QUANTIZED; so is the next
    v_scale_ptr,
    positions_ptr,  # int32 [B]
    sinks_ptr,  # [Hq], read if HAS_SINKS
    cos_ptr,  # [B, R], read if R; so is the next
    sin_ptr,
    q_norm_ptr,  # [D], read if HAS_Q_NORM
    k_norm_ptr,  # [D], read if HAS_K_NORM
    out_ptr,  # [B, Hq, DV]
    partial_ptr,  # float32 [units, heads, ROWS, DV]
    stats_ptr,  # float32 [units, heads, 2, ROWS]
    tickets_ptr,  # int32 [B, heads], all 0
    stride_qb,
    stride_qh,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_sb,  # of both scales
    stride_sh,
    stride_sn,
    stride_cb,  # of cos and sin
    B,
    units,
    capacity,
    window,
    min_keys,  # of a part
    scale,
    softcap,
    eps,
    offset,
    HKV: tl.constexpr,
    G: tl.constexpr,  # query heads for each key head
    D: tl.constexpr,
    DV: tl.constexpr,
    R: tl.constexpr,
    BLOCK_B: tl.constexpr,  # at least B
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_G: tl.constexpr,  # at least min(G, BLOCK_M)
    CHUNK: tl.constexpr,  # parts that are added up at a time
    STAGES: tl.constexpr,
    ROTARY: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HAS_Q_NORM: tl.constexpr,
    HAS_K_NORM: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    QUANTIZED: tl.constexpr,
    OVERLAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    TILES: tl.constexpr = (G + BLOCK_M - 1) // BLOCK_M
    ROWS: tl.constexpr = G if TILES == 1 else BLOCK_M
    DTYPE: tl.constexpr = q_ptr.dtype.element_ty
    lane, unit = tl.program_id(0), tl.program_id(1)
    head, tile = lane // TILES, lane % TILES
    heads = HKV * TILES
    if OVERLAP and not ROTARY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row, place, count, part, parts = part_of(
        positions_ptr, unit, units, B, capacity, window, min_keys, BLOCK_B, HAS_WINDOW
    )
    if part < parts:
        position = tl.minimum(tl.maximum(place, 0), capacity - 1)
        length = (count + parts - 1) // parts
        start = position + 1 - count + part * length
        stop = tl.minimum(start + length, position + 1)
        slot = tl.zeros([], tl.int64) + row
        k_base = k_cache_ptr + slot * stride_kb + head * stride_kh
        v_base = v_cache_ptr + slot * stride_vb + head * stride_vh
        k_scale_base = k_scale_ptr + slot * stride_sb + head * stride_sh
        v_scale_base = v_scale_ptr + slot * stride_sb + head * stride_sh
        if OVERLAP and ROTARY:
            fetch_ahead(k_base, start, stop - 1, stride_kn, D, BLOCK_N)
            fetch_ahead(v_base, start, stop - 1, stride_vn, DV, BLOCK_N)
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        rows = tl.arange(0, BLOCK_M)
        dims = tl.arange(0, BLOCK_D)
        value_dims = tl.arange(0, BLOCK_DV)
        cols = tl.arange(0, BLOCK_N)
        query_head = head * G + tile * BLOCK_M
        num_rows = tl.minimum(G - tile * BLOCK_M, BLOCK_M)
        wanted = rows < num_rows
        q_base = q_ptr + slot * stride_qb
        m = tl.full([BLOCK_M], LOWEST, dtype=tl.float32)
        total = tl.zeros([BLOCK_M], dtype=tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32)
        if ROTARY:
            cos_base = cos_ptr + slot * stride_cb
            sin_base = sin_ptr + slot * stride_cb
            q = normed_and_rotated(
                q_base + query_head * D, rows, wanted, q_norm_ptr, cos_base, sin_base, eps, offset,
                D, R, BLOCK_D, HAS_Q_NORM, HAS_OFFSET, INTERLEAVED,
            )  # fmt: skip
            stop = tl.minimum(stop, position)
            if part == parts - 1:
                one = tl.arange(0, 1)
                k = normed_and_rotated(
                    q_base + (HKV * G + head) * D, one, one == 0, k_norm_ptr, cos_base, sin_base, eps, offset,
                    D, R, BLOCK_D, HAS_K_NORM, HAS_OFFSET, INTERLEAVED,
                )  # fmt: skip
                v = tl.load(q_base + (HKV * (G + 1) + head) * D + dims, mask=dims < D, other=0.0)[None, :]
                limit = tl.where((place == position) & (tile == 0), D, 0)
                k = store_row(
                    k, k_base + position * stride_kn, k_scale_base + position * stride_sn,
                    dims[None, :], limit, QUANTIZED,
                )  # fmt: skip
                v = store_row(
                    v, v_base + position * stride_vn, v_scale_base + position * stride_sn,
                    dims[None, :], limit, QUANTIZED,
                )  # fmt: skip
                m = shaped(tl.sum(q.to(tl.float32) * k, 1) * scale, softcap, HAS_SOFTCAP)
                total = tl.full([BLOCK_M], 1.0, dtype=tl.float32)
                acc = tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32) + v
        else:
            q = tl.load(
                q_base + (query_head + rows)[:, None] * stride_qh + dims[None, :],
                mask=wanted[:, None] & (dims < D)[None, :],
                other=0.0,
            )
        for base in tl.range(start, stop, BLOCK_N, num_stages=STAGES):
            keys = base + cols
            seen = keys < stop
            mask = seen[:, None]
            if D < BLOCK_D:
                mask = mask & (dims < D)[None, :]
            k = tl.load(k_base + keys[:, None] * stride_kn + dims[None, :], mask=mask, other=0.0)
            scores = tl.dot(q, tl.trans(k.to(DTYPE)), input_precision=PRECISION) * scale
            if QUANTIZED:
                scores *= tl.load(k_scale_base + keys * stride_sn, mask=seen, other=0.0)[None, :]
            scores = tl.where(seen[None, :], shaped(scores, softcap, HAS_SOFTCAP), float("-inf"))
            m_new = tl.maximum(m, tl.max(scores, 1))
            p = tl.exp2(scores - m_new[:, None])
            shrink = tl.exp2(m - m_new)
            total = total * shrink + tl.sum(p, 1)
            if QUANTIZED:
                p *= tl.load(v_scale_base + keys * stride_sn, mask=seen, other=0.0)[None, :]
            mask = seen[:, None]
            if DV < BLOCK_DV:
                mask = mask & (value_dims < DV)[None, :]
            v = tl.load(v_base + keys[:, None] * stride_vn + value_dims[None, :], mask=mask, other=0.0)
            acc = acc * shrink[:, None]
            acc = tl.dot(p.to(DTYPE), v.to(DTYPE), acc, input_precision=PRECISION)
            m = m_new
        out_base = out_ptr + (slot * (HKV * G) + query_head) * DV
        if parts == 1:
            shrink, total = with_sink(m, total, sinks_ptr + query_head, rows, wanted, HAS_SINKS)
            write(acc, shrink, total, out_base, rows, wanted, DV, BLOCK_DV)
        else:
            at = (unit * heads + lane).to(tl.int64) * ROWS
            tl.store(
                partial_ptr + at * DV + rows[:, None] * DV + value_dims[None, :],
                acc,
                mask=wanted[:, None] & (value_dims < DV)[None, :],
            )
            tl.store(stats_ptr + at * 2 + rows, m, mask=wanted)
            tl.store(stats_ptr + at * 2 + ROWS + rows, total, mask=wanted)
            # Every thread's part must be written before the one that draws the ticket does so.
            tl.debug_barrier()
            ticket_ptr = tickets_ptr + row * heads + lane
            if tl.atomic_add(ticket_ptr, 1, sem="acq_rel", scope="gpu") == parts - 1:
                tl.store(ticket_ptr, 0)
                at = ((unit - part) * heads + lane).to(tl.int64) * ROWS
                combine(
                    partial_ptr + at * DV, stats_ptr + at * 2, out_base, sinks_ptr + query_head, parts, heads, num_rows,
                    ROWS, DV, BLOCK_G, BLOCK_DV, CHUNK, HAS_SINKS,
                )  # fmt: skip
