"""Fixed memory that the graphs of a stack read their batch from, written before the host knows any length.

mask -> place_tokens -> indices, positions, cu_seqlens here; four numbers to the host, which it waits for
     -> a graph of the bucket reads the first entries of each array: nothing is left to be copied or launched
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch
from torch import Tensor

from onegpu.attention.unpadded import UnpaddedBatch
from onegpu.encoder.buckets import LARGEST_STEP, length_bucket, sequence_bucket, token_bucket
from onegpu.kernels.encoder_ops import MAX_BLOCK_SEQUENCES, place_tokens

__all__ = ["MAX_POSITIONS", "Arena", "EarlyBatch", "Sizes", "close_bounds"]

# Padded positions of a batch; beyond it, a batch takes the way of arrays of its own.
MAX_POSITIONS: Final = 65536
CAPACITY: Final = MAX_POSITIONS + LARGEST_STEP


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a graph over the arena is captured for."""

    tokens: int
    sequences: int
    max_seqlen: int
    has_holes: bool
    columns: int  # of the padded rows, in steps of 64: a bias made inside the layers depends on them


@dataclass(slots=True)
class EarlyBatch:
    """A batch whose places are being written to the arena. `facts` hold on the host once `ready`."""

    mask: Tensor
    facts: Tensor
    ready: Any
    found: tuple[int, ...] = ()

    def wait(self) -> tuple[int, ...]:
        """Tokens, longest row, most runs of tokens in a row, rows that begin with one."""
        if not self.found:
            if self.ready is not None:
                self.ready.synchronize()
            self.found = tuple(self.facts.tolist())
        return self.found

    def sizes(self) -> Sizes:
        """The bucket. Waits."""
        total, longest, runs, _ = self.wait()
        tokens = token_bucket(total)
        B, S = self.mask.shape
        return Sizes(tokens, sequence_bucket(B), length_bucket(max(longest, tokens - total)), runs > 1, (S + 63) // 64)


@dataclass(slots=True)
class Arena:
    """The arrays, and one for each kind of token input (ids, types, positions) under its name."""

    indices: Tensor  # int64 [CAPACITY]
    positions: Tensor  # int32 [CAPACITY]
    cu_seqlens: Tensor  # int32
    facts: Tensor  # int32 [4]
    host: Tensor  # int32 [4], pinned
    inputs: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def on(cls, device: torch.device) -> Arena:
        """Make one."""
        with torch.inference_mode(False):
            return cls(
                indices=torch.zeros(CAPACITY, dtype=torch.int64, device=device),
                positions=torch.zeros(CAPACITY, dtype=torch.int32, device=device),
                cu_seqlens=torch.zeros(MAX_BLOCK_SEQUENCES + 32, dtype=torch.int32, device=device),
                facts=torch.zeros(4, dtype=torch.int32, device=device),
                host=torch.zeros(4, dtype=torch.int32, pin_memory=device.type == "cuda"),
            )

    @staticmethod
    def fits(mask: Tensor) -> bool:
        """Whether a batch with this mask [B, S] has room."""
        return 0 < mask.numel() <= MAX_POSITIONS and mask.shape[0] <= MAX_BLOCK_SEQUENCES - 16

    def begin(self, mask: Tensor) -> EarlyBatch:
        """Write the places of a bool mask [B, S] down, and send the facts to the host, without waiting."""
        place_tokens(
            mask,
            self.indices,
            self.positions,
            self.cu_seqlens[: sequence_bucket(mask.shape[0]) + 1],
            self.facts,
            LARGEST_STEP,
        )
        self.host.copy_(self.facts, non_blocking=True)
        ready = None
        if mask.device.type == "cuda":
            ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            ready.record()
        return EarlyBatch(mask, self.host, ready)

    def hold(self, name: str, values: Tensor, shape: torch.Size) -> None:
        """Keep an input [B, S] (or what expands to it) of the tokens under its name."""
        kept = self.inputs.get(name)
        if kept is None:
            with torch.inference_mode(False):
                kept = self.inputs[name] = torch.zeros(MAX_POSITIONS, dtype=torch.int64, device=self.indices.device)
        kept[: shape.numel()].view(shape).copy_(values)

    def batch(self, early: EarlyBatch, sizes: Sizes) -> UnpaddedBatch:
        """The batch in its bucket: views of the arrays. Before use its bounds need `close_bounds`."""
        total, _, _, begun = early.wait()
        B, S = early.mask.shape
        return UnpaddedBatch(
            batch_size=B,
            seqlen=S,
            total=total,
            max_seqlen=sizes.max_seqlen,
            indices=self.indices[: sizes.tokens],
            positions=self.positions[: sizes.tokens],
            cu_seqlens=self.cu_seqlens[: sizes.sequences + 1],
            has_holes=sizes.has_holes,
            has_first=begun == B,
            lengths=None,
        )


def close_bounds(batch: UnpaddedBatch) -> UnpaddedBatch:
    """The batch with the open bounds behind its rows set to the bucket's size, so that the filling is a sequence."""
    return replace(batch, cu_seqlens=batch.cu_seqlens.clamp(max=batch.indices.numel()))
