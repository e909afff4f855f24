"""A padded batch as one stream of tokens, and the way back.

    input_ids, mask [B, S]  --unpad-->  hidden [1, T, hidden] with cu_seqlens [N + 1]  --pad-->  [B, S, hidden]

On a CPU the sequences stand longest first, so that those of equal length lie side by side and a group of them is a
view; on a GPU they stand in the order of the rows, unless the host has sorted them beforehand. Every array has a size
that the host knows: `indices` may be longer than the `total` real tokens (see `bucket`), which lets a captured graph
serve batches of different sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from onegpu.errors import ArgumentError
from onegpu.kernels.encoder_ops import MAX_BLOCK_SEQUENCES, attention_blocks

__all__ = ["AttentionView", "PendingBatch", "RelativeBias", "UnpaddedBatch", "pad_input", "unpad_input"]


@dataclass(frozen=True, slots=True)
class UnpaddedBatch:
    """Where the real tokens of a batch [B, S] lie, once they stand one behind another.

    Entries from `total` on belong to one more sequence that nobody reads back: they fill up a bucket.
    """

    batch_size: int  # B
    seqlen: int  # S, padded
    total: int  # T, real tokens
    max_seqlen: int  # longest sequence, in tokens
    indices: Tensor  # int64 [T or bucket]: flat place of each token in [B * S]
    positions: Tensor  # int32 [T or bucket]: column of each token in its row
    cu_seqlens: Tensor  # int32 [N + 1]: where each sequence begins; the last entry ends the last one
    has_holes: bool  # whether padding stands between real tokens of one row
    has_first: bool  # whether every row begins with a real token
    lengths: tuple[int, ...] | None  # the N lengths, where the host has them without waiting
    # What the attention kernel's programs do, by the queries of each; made by the first layer, used by all.
    listed: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def from_mask(cls, mask: Tensor) -> UnpaddedBatch:
        """From a bool mask [B, S], True where a token is real. Waits once for the device."""
        return PendingBatch.of(mask).resolve()

    @classmethod
    def from_lengths(cls, lengths: Sequence[int], seqlen: int, device: torch.device | str = "cpu") -> UnpaddedBatch:
        """From the lengths of right-padded rows [B, S]; built on the host, copied without waiting.

        Raises:
            ArgumentError: a length below 0 or above `seqlen`, or no row at all.
        """
        if not lengths or min(lengths) < 0 or max(lengths) > seqlen:
            raise ArgumentError(f"lengths must be from 0 to seqlen {seqlen}, at least one of them; got {list(lengths)}")
        order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
        ordered = torch.tensor([lengths[row] for row in order])
        starts = torch.tensor(order) * seqlen
        ends = ordered.cumsum(0)
        first = torch.repeat_interleave(starts - (ends - ordered), ordered)
        indices = first + torch.arange(int(ends[-1]))

        def to_device(host: Tensor) -> Tensor:
            if torch.device(device).type != "cuda":
                return host
            return host.pin_memory().to(device, non_blocking=True)

        return cls(
            batch_size=len(lengths),
            seqlen=seqlen,
            total=int(ends[-1]),
            max_seqlen=max(lengths),
            indices=to_device(indices),
            positions=to_device((indices % seqlen).to(torch.int32)),
            cu_seqlens=to_device(torch.nn.functional.pad(ends, (1, 0)).to(torch.int32)),
            has_holes=False,
            has_first=min(lengths) > 0,
            lengths=tuple(ordered.tolist()) if torch.device(device).type == "cpu" else None,
        )

    def bucket(self, tokens: int, sequences: int, max_seqlen: int) -> UnpaddedBatch:
        """The same batch in arrays of `tokens` and `sequences` + 1 entries.

        The tokens added repeat the first one and form a sequence of their own behind the real ones; sequences added
        behind that are empty. `max_seqlen` is rounded up to what is given.

        Raises:
            ArgumentError: the bucket is smaller than the batch (one sequence more than the batch has is needed).
        """
        num_sequences, filler = self.cu_seqlens.numel() - 1, tokens - self.total
        if filler < 0 or sequences < num_sequences + 1 or max_seqlen < max(self.max_seqlen, filler):
            raise ArgumentError(
                f"a bucket of {tokens} tokens, {sequences} sequences, up to {max_seqlen} each, does not hold a batch "
                f"of {self.total} tokens, {num_sequences} sequences, up to {self.max_seqlen} each"
            )
        pad = torch.nn.functional.pad
        return UnpaddedBatch(
            batch_size=self.batch_size,
            seqlen=self.seqlen,
            total=self.total,
            max_seqlen=max_seqlen,
            indices=pad(self.indices, (0, filler)),
            positions=pad(self.positions, (0, filler)),
            cu_seqlens=pad(self.cu_seqlens, (0, sequences - num_sequences), value=tokens),
            has_holes=self.has_holes,
            has_first=self.has_first,
            lengths=None,
        )

    def blocks(self, block_m: int) -> Tensor | None:
        """`attention_blocks` of this batch; None where it has too many sequences for one."""
        if self.cu_seqlens.numel() > MAX_BLOCK_SEQUENCES + 1:
            return None
        if block_m not in self.listed:
            self.listed[block_m] = attention_blocks(self.cu_seqlens, self.indices.numel(), block_m)
        return self.listed[block_m]

    def groups(self) -> list[tuple[int, int, int]]:
        """`(first token, sequences, length)` of each run of equally long sequences; empty ones are left out.

        Raises:
            ArgumentError: the host does not know the lengths (a batch made on another device).
        """
        if self.lengths is None:
            raise ArgumentError(
                "the lengths of this batch are on the device only", "make it on the CPU, or from_lengths"
            )
        out, start = [], 0
        for length, run in groupby(self.lengths):
            count = len(list(run))
            if length:
                out.append((start, count, length))
            start += count * length
        return out


@dataclass(frozen=True, slots=True)
class PendingBatch:
    """A batch whose arrays are being made on the device, while the host goes on; `resolve` is where it waits.

    The arrays are as long as the padded batch, so that making them needs no number from the device.
    """

    batch_size: int
    seqlen: int
    indices: Tensor  # int64 [B * S], the real tokens first
    positions: Tensor  # int32 [B * S]
    cu_seqlens: Tensor  # int32 [B + 1]
    facts: Tensor  # int64, on the host once `ready`: tokens, longest, most runs in a row, rows begun, odd values
    lengths: Tensor | None  # [B], longest first, for a batch on the CPU
    ready: Any

    @classmethod
    def of(cls, mask: Tensor, odd: Tensor | None = None) -> PendingBatch:
        """Begin with a bool mask [B, S]; `odd` marks values of the caller's mask that mean neither real nor padding."""
        batch_size, seqlen = mask.shape
        device = mask.device
        lens = mask.sum(dim=1)
        runs = mask[:, 0] + (mask[:, 1:] & ~mask[:, :-1]).sum(dim=1)
        strange = lens.new_zeros(()) if odd is None else odd.sum()
        facts = torch.stack([lens.sum(), lens.max(), runs.max(), mask[:, 0].sum(), strange])
        facts, ready = facts.to("cpu", non_blocking=True), None
        if device.type == "cuda":
            ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            ready.record()
        if device.type == "cpu":
            ordered, order = torch.sort(lens, descending=True, stable=True)
            ends = ordered.cumsum(0)
            starts = torch.empty_like(ends).scatter_(0, order, ends - ordered)
        else:
            ordered, ends = lens, lens.cumsum(0)
            starts = ends - lens
        rank = mask.cumsum(1) - 1
        # Padding goes to one slot past the end, which is cut off: no boolean indexing, hence no wait.
        size = batch_size * seqlen
        target = torch.where(mask, rank + starts[:, None], size).flatten()
        flat = torch.arange(size, device=device)
        indices = torch.zeros(size + 1, dtype=torch.int64, device=device).scatter_(0, target, flat)[:size]
        return cls(
            batch_size=batch_size,
            seqlen=seqlen,
            indices=indices,
            positions=(indices % seqlen).to(torch.int32),
            cu_seqlens=torch.nn.functional.pad(ends, (1, 0)).to(torch.int32),
            facts=facts,
            lengths=ordered if device.type == "cpu" else None,
            ready=ready,
        )

    def has_odd_values(self) -> bool:
        """Whether the mask held values that mean neither real nor padding. Waits."""
        return self.wait()[4] > 0

    def wait(self) -> list[int]:
        """The facts, once the device has them."""
        if self.ready is not None:
            self.ready.synchronize()
        found: list[int] = self.facts.tolist()
        return found

    def resolve(self) -> UnpaddedBatch:
        """The batch, with arrays of the number of its real tokens. Waits."""
        total, longest, most_runs, begun, _ = self.wait()
        return UnpaddedBatch(
            batch_size=self.batch_size,
            seqlen=self.seqlen,
            total=total,
            max_seqlen=longest,
            indices=self.indices[:total],
            positions=self.positions[:total],
            cu_seqlens=self.cu_seqlens,
            has_holes=most_runs > 1,
            has_first=begun == self.batch_size,
            lengths=None if self.lengths is None else tuple(self.lengths.tolist()),
        )


@dataclass(slots=True)
class RelativeBias:
    """A bias on the scores that depends on `key position - query position` only (T5, MPNet).

    `table` [H, 2 * S - 1] holds the value for distance `d` at `d + S - 1`; `make_dense` gives what the model itself
    would have computed, for the way back to the padded form.
    """

    table: Tensor
    make_dense: Callable[[], Tensor]
    squares: dict[int, Tensor] = field(default_factory=dict)
    kept: Tensor | None = None

    def dense(self) -> Tensor:
        """What the model itself would have computed; kept, since every layer asks again."""
        if self.kept is None:
            self.kept = self.make_dense()
        return self.kept

    @property
    def span(self) -> int:
        """S: distances run from -(S - 1) to S - 1."""
        return (self.table.shape[1] + 1) // 2

    def square(self, length: int) -> Tensor:
        """[1, H, length, length] for a sequence without holes; kept, since every layer asks again."""
        if length not in self.squares:
            positions = torch.arange(length, device=self.table.device)
            self.squares[length] = self.at(positions)
        return self.squares[length]

    def at(self, positions: Tensor) -> Tensor:
        """[1, H, L, L] for tokens at `positions` [L]."""
        distance = positions[None, :] - positions[:, None] + self.span - 1
        return self.table[:, distance][None]


@dataclass(frozen=True, slots=True)
class AttentionView:
    """What a layer gets in place of its mask: the batch, and which keys each token may see.

    `window` is the largest distance, in columns of the padded row, at which a key is seen; None for no limit.
    `backend` names the way to compute it, None for the first that can; `fixed` allows only those whose work does not
    depend on numbers that the host reads from the batch, so that a captured graph serves the next one too.
    """

    batch: UnpaddedBatch
    causal: bool = False
    window: int | None = None
    backend: str | None = None
    fixed: bool = False


def unpad_input(hidden: Tensor, batch: UnpaddedBatch) -> Tensor:
    """[B, S, ...] to [1, T, ...] (or the bucket's size).

    Raises:
        ArgumentError: `hidden` is not of the batch's shape.
    """
    if hidden.shape[:2] != (batch.batch_size, batch.seqlen):
        raise ArgumentError(
            f"expected [{batch.batch_size}, {batch.seqlen}, ...], the shape of the batch; got {list(hidden.shape)}"
        )
    return hidden.flatten(0, 1).index_select(0, batch.indices)[None]


def pad_input(tokens: Tensor, batch: UnpaddedBatch) -> Tensor:
    """[1, T, ...] (or the bucket's size) to [B, S, ...], zeros where there is padding.

    Raises:
        ArgumentError: `tokens` is not one row of the batch's tokens.
    """
    if tokens.shape[:2] != (1, batch.indices.numel()):
        raise ArgumentError(f"expected [1, {batch.indices.numel()}, ...], the batch's tokens; got {list(tokens.shape)}")
    flat = tokens.new_zeros((batch.batch_size * batch.seqlen, *tokens.shape[2:]))
    flat.index_copy_(0, batch.indices[: batch.total], tokens[0, : batch.total])
    return flat.view(batch.batch_size, batch.seqlen, *tokens.shape[2:])
