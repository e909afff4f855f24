"""What a decode step changes beside the cache: one row of device memory per sequence, written in place."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["BAD", "FINISHED", "TOKEN", "StepState"]

# Rows of the outbox.
TOKEN, FINISHED, BAD = range(3)


class StepState:
    """Buffers of S slots.

    tokens int64 [S]            the token that the next step feeds
    positions int32 [S]         its place in the slot
    history int64 [S, width]    prompt and answer; `lengths` int32 [S] of them, the prompt's `prompt_lengths`
    finished bool [S]           a stop rule was met, or nobody is in the slot
    outbox int64 [3, S]         for the host: token chosen, finished, not a number
    """

    def __init__(self, slots: int, width: int, device: torch.device) -> None:
        """`width` is the size of a slot, and of a history."""

        def zeros(*size: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(*size, dtype=dtype, device=device)

        self.device = device
        self.last_place = width - 1
        self.tokens = zeros(slots, dtype=torch.int64)
        self.positions = zeros(slots, dtype=torch.int32)
        self.history = zeros(slots, width, dtype=torch.int64)
        self.lengths = zeros(slots, dtype=torch.int32)
        self.prompt_lengths = zeros(slots, dtype=torch.int32)
        self.finished = torch.ones(slots, dtype=torch.bool, device=device)
        self.outbox = zeros(3, slots, dtype=torch.int64)

    def admit(self, slots: Tensor, rows: Tensor, kept: Tensor) -> None:
        """Let sequences in before their first choice.

        Args:
            slots: int64 [n], where they go.
            rows: int64 [n, L], prompts as a logits processor is to see them, padding included.
            kept: int64 [n], how many tokens each has in the cache, its last one counted.
        """
        self.history[slots, : rows.shape[1]] = rows
        self.tokens[slots] = rows[:, -1] if rows.shape[1] else 0
        self.positions[slots] = (kept - 1).int()
        self.lengths[slots] = rows.shape[1]
        self.prompt_lengths[slots] = rows.shape[1]
        self.finished[slots] = False

    def clear(self) -> None:
        """Nobody is in any slot."""
        for buffer in (self.tokens, self.positions, self.lengths, self.prompt_lengths, self.outbox):
            buffer.zero_()
        self.finished.fill_(True)

    def buffers(self) -> tuple[Tensor, ...]:
        """All that a step writes."""
        return (self.tokens, self.positions, self.history, self.lengths, self.finished, self.outbox)
