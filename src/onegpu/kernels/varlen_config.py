"""Tile sizes of `varlen_attention` by dtype, head dim and the longest sequence; needs no Triton to be asked.

Most sequences of an encoder are shorter than two tiles, so that a program's own latency counts more than the speed of
its loop: small tiles leave room for several programs on each multiprocessor.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["Tiles", "tiles_for"]


@dataclass(frozen=True, slots=True)
class Tiles:
    """One program's share: `block_m` queries against `block_n` keys at a time."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def tiles_for(dtype: torch.dtype, head_dim: int, max_seqlen: int) -> Tiles:
    """What `varlen_attention` runs with. Shared memory holds K and V tiles, `num_stages` of each."""
    if dtype == torch.float32:
        return Tiles(64, 32 if head_dim > 64 else 64, 4, 2)
    if head_dim > 64 or max_seqlen <= 512:
        return Tiles(64, 64, 4, 2)
    return Tiles(128, 64, 8, 2)
