"""Tokens on their way to the host: copied when they are made, looked at one step late."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor

__all__ = ["Readback"]

DEPTH = 8


class Readback:
    """A ring of pinned copies of an outbox int64 [3, S]."""

    def __init__(self, outbox: Tensor) -> None:
        self.outbox = outbox
        self.waiting: deque[tuple[Tensor, Any, int]] = deque()
        self.count = 0
        self.is_cuda = outbox.is_cuda
        self.ring = [torch.empty_like(outbox, device="cpu", pin_memory=self.is_cuda) for _ in range(DEPTH)]

    def __len__(self) -> int:
        return len(self.waiting)

    def push(self, rows: int) -> None:
        """Send what the outbox holds for the first `rows` rows; the device is not waited for."""
        assert len(self.waiting) < DEPTH
        place = self.ring[self.count % DEPTH]
        self.count += 1
        place.copy_(self.outbox, non_blocking=True)
        event: Any = None
        if self.is_cuda:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        self.waiting.append((place, event, rows))

    def pop(self) -> Tensor:
        """The oldest one, int64 [3, rows]; waits until it has arrived."""
        place, event, rows = self.waiting.popleft()
        if event is not None:
            event.synchronize()
        return place[:, :rows].clone()

    def clear(self) -> None:
        """Forget what is on its way."""
        self.waiting.clear()
