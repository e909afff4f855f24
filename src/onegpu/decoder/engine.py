"""The engine: sequences come in, steps are taken, tokens come out one step late.

    add(prompt) -> slot      step()      take() -> what was chosen      remove(slot)

Between steps sequences may come and go. Where nobody is running, the first tokens are chosen from the prompts' own
logits; a prompt that joins others is taken up but for its last token, which the next step feeds with theirs.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from onegpu.decoder.readback import Readback
from onegpu.decoder.sampling import Selection
from onegpu.decoder.state import BAD, FINISHED, TOKEN
from onegpu.decoder.step import Choice, DecodeStep
from onegpu.decoder.stopping import StopRule
from onegpu.decoder.views import Segment
from onegpu.decoder.workspace import Workspace
from onegpu.errors import ArgumentError, DoesNotFitError

__all__ = ["Chosen", "Engine", "Sequence"]


MOST_PIECES = 4


@dataclass(frozen=True, slots=True)
class Sequence:
    """A prompt to take up.

    `tokens`: ids int64 [n] or embeddings [n, hidden] on the device, without padding. `history`: int64 [L], what logits
    processors see of it, the ids by default.
    """

    slot: int
    tokens: Tensor
    history: Tensor


@dataclass(frozen=True, slots=True)
class Chosen:
    """What one step chose, on the host: `tokens` int64, `finished` and `bad` bool, each [rows]."""

    tokens: Tensor
    finished: Tensor
    bad: Tensor


class Engine:
    """Runs the sequences of one workspace under one way of choosing.

    The workspace is its own until `close`, or until nobody holds the engine.

    Args:
        pad: the token that rows go on with when they are finished.
        chunk: tokens that one forward of a prefill takes.
    """

    def __init__(self, workspace: Workspace, selection: Selection, stop: StopRule, pad: int, chunk: int) -> None:
        self.workspace = workspace
        self.selection = selection
        self.stop = stop
        self.pad = pad
        self.chunk = chunk
        self.choices: dict[int, Choice] = {}
        self.waiting: list[Sequence] = []
        self.running: dict[int, int] = {}
        self.readback = Readback(workspace.state.outbox)
        self.last: DecodeStep | None = None
        assert workspace.user() is None
        workspace.user = weakref.ref(self)
        workspace.state.clear()

    def close(self) -> None:
        """Leave the slots to others."""
        self.workspace.user = lambda: None

    def add(self, tokens: Tensor, history: Tensor | None = None) -> int:
        """Put a prompt in line; gives its slot.

        Raises:
            ArgumentError: an empty prompt, or one longer than a slot.
            DoesNotFitError: every slot is taken.
        """
        taken = {*self.running, *(sequence.slot for sequence in self.waiting)}
        slot = next((slot for slot in range(self.workspace.kv.slots) if slot not in taken), None)
        if slot is None:
            raise DoesNotFitError(
                f"all {self.workspace.kv.slots} slots are taken",
                "remove a sequence, or ask for more slots",
            )
        history = tokens if history is None else history
        longest = max(tokens.shape[0], history.shape[0])
        if tokens.shape[0] == 0 or longest >= self.workspace.kv.capacity:
            raise ArgumentError(
                f"a prompt has 1 to {self.workspace.kv.capacity - 1} tokens, one less than its slot; got {longest}"
            )
        self.waiting.append(Sequence(slot, tokens, history))
        return slot

    def remove(self, slot: int) -> None:
        """Let a sequence go; its slot is free at once."""
        self.running.pop(slot, None)
        self.waiting = [sequence for sequence in self.waiting if sequence.slot != slot]
        self.workspace.state.finished[slot] = True

    @torch.no_grad()
    def step(self) -> None:
        """Choose one token for every sequence; its place in line comes with `take`."""
        if self.waiting and not self.running:
            self.begin()
            return
        if self.waiting:
            self.join()
        step = self.make_step(max(self.running, default=0) + 1)
        self.last, run = self.workspace.runner(step)
        run()
        self.readback.push(step.rows)

    @property
    def pending(self) -> int:
        """Steps whose choice was not taken yet."""
        return len(self.readback)

    def take(self) -> Chosen:
        """What the oldest pending step chose; waits for it."""
        outbox = self.readback.pop()
        return Chosen(outbox[TOKEN], outbox[FINISHED].bool(), outbox[BAD].bool())

    def make_step(self, rows: int) -> DecodeStep:
        """The step of the first `rows` rows."""
        workspace, rows = self.workspace, self.workspace.rows_for(rows)
        if rows not in self.choices:
            self.choices[rows] = workspace.choice(self.selection, self.stop, rows, self.pad)
        return DecodeStep(workspace.forward, workspace.state, rows, self.choices[rows])

    def begin(self) -> None:
        """Take up all prompts and choose their first tokens."""
        sequences, self.waiting = self.waiting, []
        logits = self.prefill(sequences)
        self.admit(sequences)
        step = self.last = self.make_step(len(sequences))
        step.advance(torch.nn.functional.pad(logits, (0, 0, 0, step.rows - len(sequences))))
        self.readback.push(step.rows)

    def join(self) -> None:
        """Take up all prompts but for their last tokens."""
        sequences, self.waiting = self.waiting, []
        short = [Sequence(s.slot, s.tokens[:-1], s.history) for s in sequences if s.tokens.shape[0] > 1]
        if short:
            self.prefill(short)
        self.admit(sequences)

    def admit(self, sequences: list[Sequence]) -> None:
        """Write the books of prompts that are in their slots."""
        device = self.workspace.state.device
        by_length: dict[int, list[Sequence]] = {}
        for sequence in sequences:
            by_length.setdefault(sequence.history.shape[0], []).append(sequence)
        for group in by_length.values():
            slots = torch.tensor([s.slot for s in group]).to(device, non_blocking=True)
            kept = torch.tensor([s.tokens.shape[0] for s in group]).to(device, non_blocking=True)
            self.workspace.state.admit(slots, torch.stack([s.history for s in group]), kept)
        for sequence in sequences:
            self.running[sequence.slot] = sequence.tokens.shape[0]

    def prefill(self, sequences: list[Sequence]) -> Tensor:
        """Run prompts through the layers: logits [n, V] of their last tokens."""
        logits: list[Tensor] = []
        for pieces in self.rows_of(sequences):
            keep, end = [], 0
            for sequence, segment in pieces:
                end += segment.length
                if segment.end == sequence.tokens.shape[0]:
                    keep.append(end - 1)
            parts = [sequence.tokens[segment.start : segment.end] for sequence, segment in pieces]
            tokens = parts[0] if len(parts) == 1 else torch.cat(parts)
            # A row that ends no prompt has no logits that anyone wants, and a head wants one row at least.
            out = self.workspace.prefill([segment for _, segment in pieces], tokens, keep or [end - 1])
            logits += [out] if keep else []
        return torch.cat(logits)

    def rows_of(self, sequences: list[Sequence]) -> Iterator[list[tuple[Sequence, Segment]]]:
        """Prompts joined in rows of at most `chunk` tokens; a longer one is whole, or cut in at most `MOST_PIECES`."""
        row: list[tuple[Sequence, Segment]] = []
        size = 0
        for sequence in sequences:
            length = sequence.tokens.shape[0]
            if row and size + length > self.chunk:
                yield row
                row, size = [], 0
            # Each piece reads, and in 4 bit decodes, all weights once: a long prompt pays for more memory with speed.
            pieces = 1 if self.workspace.takes_long_prompts else MOST_PIECES
            piece = max(self.chunk, -(-length // pieces))
            for start in range(0, length, piece):
                segment = Segment(sequence.slot, start, min(piece, length - start))
                if length > self.chunk:
                    yield [(sequence, segment)]
                else:
                    row.append((sequence, segment))
                    size += length
        if row:
            yield row
