"""Counters on a device by which the programs of a kernel find out who comes last."""

from __future__ import annotations

import functools
import threading
from typing import Final

import torch
from torch import Tensor

__all__ = ["NUM_TICKETS", "Tickets", "tickets"]

NUM_TICKETS: Final = 1 << 18


class Tickets:
    """Counters that are 0 whenever no kernel uses them, handed out in turn.

    A captured launch keeps the ones it was given. Two launches meet in the same ones only if `NUM_TICKETS` others were
    handed out between them, and then only if they run at the same time.
    """

    def __init__(self, device: torch.device) -> None:
        self.counters = torch.zeros(NUM_TICKETS, dtype=torch.int32, device=device)
        if device.type == "cuda":
            # Once: other streams will count in them too.
            torch.cuda.current_stream(device).synchronize()
        self.next = 0
        self.lock = threading.Lock()

    def take(self, count: int) -> Tensor:
        """`count` counters in a row."""
        with self.lock:
            first = self.next if self.next + count <= NUM_TICKETS else 0
            # Whole cache lines, so that launches side by side do not share one.
            self.next = first + -(-count // 32) * 32
        return self.counters[first : first + count]


@functools.cache
def tickets_of(device: torch.device) -> Tickets:
    return Tickets(device)


def tickets(count: int, device: torch.device) -> Tensor:
    """`count` counters at 0."""
    if count > NUM_TICKETS or (is_capturing(device) and not tickets_of.cache_info().currsize):
        # Within a capture the lasting ones can't be made; these are put to 0 again by every replay.
        return torch.zeros(count, dtype=torch.int32, device=device)
    return tickets_of(device).take(count)


def is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
