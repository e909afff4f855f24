"""Operators timed in turn, so that each is held against the others in the same state of the card.

At many rows a card runs at the limit of its power, and its clock follows: the same product may take a tenth longer ten
seconds later. So nobody is measured to the end before the next begins:

    a round     every operator once, in an order of this round's own, so that none always comes after the same other
    a turn      the calls of one operator, replayed from a graph: once not timed, so that the card works on nothing
                else and waits for no launch, then once timed
    slow ones   take part in the first rounds only, and their turn is the timed replay alone
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch

from onegpu.bench.kernel_time import (
    FEWEST_ROUNDS,
    ROUNDS,
    all_of,
    captured,
    first_line,
    first_times,
    number_of_calls,
    number_of_rounds,
    settle,
    timed,
)

__all__ = ["Turn", "take_turns", "turn_of"]


@dataclass(slots=True)
class Turn:
    """What one operator does in a round, and what came of it.

    Attributes:
        run: all calls, `count` of them.
        rounds: how many it takes part in, from the first on.
        twice: whether an untimed run comes before the timed one.
        note: why the calls are not captured.
        times: microseconds of one call, by round.
        error: why it stopped; empty where it did not.
        seconds: spent on all of its turns.
    """

    run: Callable[[], Any]
    count: int
    rounds: int
    twice: bool = True
    note: str = ""
    times: list[float] = field(default_factory=list)
    error: str = ""
    seconds: float = 0.0

    @property
    def us(self) -> float:
        """The median over rounds."""
        return statistics.median(self.times)

    def times_as_fast_as(self, other: Turn) -> float | None:
        """The median of quotients, each within a round; None where `other` has no time."""
        quotients = [theirs / mine for theirs, mine in zip(other.times, self.times, strict=False)]
        return statistics.median(quotients) if quotients else None


def turn_of(different: Sequence[Callable[[], Any]], *, capture: bool = True, patience: float | None = None) -> Turn:
    """The turn of calls that do the same on different weights.

    Args:
        capture: False for what is known to wait for the host, which breaks a capture.
        patience: seconds that the first calls may take to get ready.

    Raises:
        TimeoutError: they took longer.
    """
    alone = first_times(different, patience)
    count = number_of_calls(alone, len(different))
    calls = [different[i % len(different)] for i in range(count)]
    reason = "it waits for the host"
    if capture:
        rounds = number_of_rounds(alone * count)
        try:
            return Turn(captured(calls), count, rounds, twice=rounds == ROUNDS)
        except RuntimeError as error:
            torch.cuda.synchronize()
            reason = first_line(error)
    return Turn(all_of(calls), count, FEWEST_ROUNDS, twice=False, note=f"not captured: {reason}")


def timed_turn(turn: Turn) -> float:
    """Microseconds of one call in one turn."""
    return timed(turn.run, turn.count, 1, warm=int(turn.twice))[0]


def take_turns(turns: Sequence[Turn], measure: Callable[[Turn], float] = timed_turn) -> None:
    """All rounds; each turn's times, and the error that ended it, are written into it."""
    if turns and torch.cuda.is_available():
        with suppress(Exception):  # its own turn says so
            settle(turns[0].run)
    for number in range(max((turn.rounds for turn in turns), default=0)):
        for turn in random.Random(number).sample(turns, len(turns)):
            if turn.error or number >= turn.rounds:
                continue
            begun = time.monotonic()
            try:
                turn.times.append(measure(turn))
            except Exception as error:  # the others go on, if the device does
                turn.error = first_line(error)
            turn.seconds += time.monotonic() - begun
