# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""A kernel that only reads: what a benchmark holds the others against."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from onegpu.kernels.launch import on_device_of

__all__ = ["read_once"]

BLOCK = 16384


@triton.jit
def read_kernel(source_ptr, out_ptr, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    value = tl.load(source_ptr + start + tl.arange(0, BLOCK))
    # The sum is there so that nobody leaves the loads out; it is next to no work.
    tl.store(out_ptr + tl.program_id(0), tl.sum(value))


def read_once(source: Tensor, out: Tensor) -> None:
    """Read int32 [n], n a multiple of 16384, and write a sum for each 16384: int32 [n / 16384]."""
    assert source.dtype == out.dtype == torch.int32
    assert source.numel() == out.numel() * BLOCK
    with on_device_of(source):
        read_kernel[(out.numel(),)](source, out, BLOCK=BLOCK, num_warps=8)
