# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Where the real tokens of a padded batch stand, in two small kernels: lengths of the rows, then places of the tokens.

As torch operators it takes twenty launches, through which the GPU stands still while the host waits for the lengths.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from onegpu.kernels.launch import on_device_of

__all__ = ["place_tokens"]


@triton.jit
def count_rows_kernel(
    mask_ptr,  # uint8 [B, S]
    counts_ptr,  # int32 [3, B]: tokens, runs of tokens, whether the first is one
    B,
    S,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    mask_ptr += row.to(tl.int64) * S
    tokens, runs = 0, 0
    for first in range(0, S, BLOCK):
        cols = first + tl.arange(0, BLOCK)
        real = tl.load(mask_ptr + cols, mask=cols < S, other=0) != 0
        before = tl.load(mask_ptr + cols - 1, mask=(cols > 0) & (cols < S), other=0) != 0
        tokens += tl.sum(real.to(tl.int32), 0)
        runs += tl.sum((real & ~before).to(tl.int32), 0)
    tl.store(counts_ptr + row, tokens)
    tl.store(counts_ptr + B + row, runs)
    tl.store(counts_ptr + 2 * B + row, (tl.load(mask_ptr) != 0).to(tl.int32))


@triton.jit
def place_tokens_kernel(
    mask_ptr,  # uint8 [B, S]
    counts_ptr,  # int32 [3, B]
    indices_ptr,  # int64 [capacity]
    positions_ptr,  # int32 [capacity]
    cu_seqlens_ptr,  # int32 [bounds]
    facts_ptr,  # int32 [4]
    B,
    S,
    capacity,
    num_bounds,
    filler,
    BLOCK: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    row = tl.program_id(0)
    rows = tl.arange(0, BLOCK_B)
    lengths = tl.load(counts_ptr + rows, mask=rows < B, other=0)
    if row < B:
        place = tl.sum(tl.where(rows < row, lengths, 0), 0)
        mask_ptr += row.to(tl.int64) * S
        for first in range(0, S, BLOCK):
            cols = first + tl.arange(0, BLOCK)
            real = tl.load(mask_ptr + cols, mask=cols < S, other=0) != 0
            count = real.to(tl.int32)
            places = place + tl.cumsum(count, 0) - count
            keep = real & (places < capacity)
            tl.store(indices_ptr + places, row.to(tl.int64) * S + cols, mask=keep)
            tl.store(positions_ptr + places, cols, mask=keep)
            place += tl.sum(count, 0)
    else:
        total = tl.sum(lengths, 0)
        ends = tl.cumsum(lengths, 0)
        tl.store(cu_seqlens_ptr, 0)
        tl.store(cu_seqlens_ptr + 1 + rows, ends, mask=rows < B)
        for first in range(B + 1, num_bounds, BLOCK):
            at = first + tl.arange(0, BLOCK)
            tl.store(cu_seqlens_ptr + at, tl.full([BLOCK], 2147483647, tl.int32), mask=at < num_bounds)
        for first in range(0, filler, BLOCK):
            at = first + tl.arange(0, BLOCK)
            keep = (at < filler) & (total + at < capacity)
            tl.store(indices_ptr + total + at, tl.zeros([BLOCK], tl.int64), mask=keep)
            tl.store(positions_ptr + total + at, tl.zeros([BLOCK], tl.int32), mask=keep)
        runs = tl.load(counts_ptr + B + rows, mask=rows < B, other=0)
        begun = tl.load(counts_ptr + 2 * B + rows, mask=rows < B, other=0)
        tl.store(facts_ptr, total)
        tl.store(facts_ptr + 1, tl.max(lengths, 0))
        tl.store(facts_ptr + 2, tl.max(runs, 0))
        tl.store(facts_ptr + 3, tl.sum(begun, 0))


def place_tokens(
    mask: Tensor, indices: Tensor, positions: Tensor, cu_seqlens: Tensor, facts: Tensor, filler: int
) -> None:
    """Launch the kernels; arguments as `onegpu.kernels.encoder_ops.place_tokens`."""
    B, S = mask.shape
    bits = mask.contiguous().view(torch.uint8)
    counts = torch.empty((3, B), dtype=torch.int32, device=mask.device)
    BLOCK = min(1024, triton.next_power_of_2(S))
    with on_device_of(mask):
        count_rows_kernel[(B,)](bits, counts, B, S, BLOCK=BLOCK, num_warps=4)
        place_tokens_kernel[(B + 1,)](
            bits,
            counts,
            indices,
            positions,
            cu_seqlens,
            facts,
            B,
            S,
            indices.numel(),
            cu_seqlens.numel(),
            filler,
            BLOCK=BLOCK,
            BLOCK_B=triton.next_power_of_2(B),
            num_warps=4,
        )
