"""Turns without a device: who is timed when, and what the times say."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from onegpu.bench import kernel_turns
from onegpu.bench.kernel_time import FEWEST_ROUNDS, ROUNDS
from onegpu.bench.kernel_turns import Turn, take_turns, turn_of


def turn(rounds: int = ROUNDS) -> Turn:
    return Turn(lambda: None, 4, rounds)


def test_everyone_once_in_a_round() -> None:
    turns = [turn() for _ in range(5)]
    order: list[int] = []

    def measure(one: Turn) -> float:
        order.append(next(i for i, other in enumerate(turns) if other is one))
        return float(len(order))

    take_turns(turns, measure)
    rounds = [order[i : i + 5] for i in range(0, len(order), 5)]
    assert len(rounds) == ROUNDS
    assert all(sorted(each) == [0, 1, 2, 3, 4] for each in rounds)
    assert len({tuple(each) for each in rounds}) > 1, "not in the same order"
    before = {(first, second) for each in rounds for first, second in pairwise(each)}
    assert all(len({first for first, second in before if second == i}) > 1 for i in range(5)), "after different others"
    for i, each in enumerate(turns):
        assert [int(us - 1) // 5 for us in each.times] == list(range(ROUNDS))
        assert order[int(each.times[0]) - 1] == i


def test_slow_ones_take_part_in_the_first_rounds() -> None:
    slow, quick = turn(2), turn(5)
    clock = iter(range(99))
    take_turns([slow, quick], lambda one: float(next(clock)))
    assert len(slow.times) == 2
    assert len(quick.times) == 5
    assert max(slow.times) < 4


def test_quotients_are_those_within_a_round() -> None:
    """The card halves its speed in the third round: medians of times would compare different rounds."""
    base, ours = turn(), turn(4)
    base.times, ours.times = [3.0, 3.0, 6.0, 6.0, 6.0], [1.0, 1.0, 2.0, 2.0]
    assert ours.us == 1.5
    assert base.us == 6.0
    assert ours.times_as_fast_as(base) == 3.0
    assert base.times_as_fast_as(base) == 1.0
    assert ours.times_as_fast_as(turn()) is None


def test_one_that_fails_leaves_the_others_their_turns() -> None:
    good, bad = turn(), turn()

    def measure(one: Turn) -> float:
        if one is bad and len(bad.times) == 2:
            raise RuntimeError("gone")
        return 1.0

    take_turns([good, bad], measure)
    assert bad.error == "RuntimeError: gone"
    assert len(bad.times) == 2
    assert len(good.times) == ROUNDS
    assert not good.error


def test_nobody() -> None:
    take_turns([])


def test_what_a_turn_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Quick ones run twice in their turn, slow ones once and less often; what cannot be captured runs as it is."""
    ran: list[int] = []
    calls = [lambda i=i: ran.append(i) for i in range(3)]
    alone = 100.0
    monkeypatch.setattr(kernel_turns, "first_times", lambda different, patience: alone)
    monkeypatch.setattr(kernel_turns, "captured", kernel_turns.all_of)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    quick = turn_of(calls)
    assert (quick.count, quick.rounds, quick.twice, quick.note) == (24, ROUNDS, True, "")
    quick.run()
    assert ran == [0, 1, 2] * 8
    alone = 32_000.0
    slow = turn_of(calls)
    assert (slow.count, slow.rounds, slow.twice) == (4, FEWEST_ROUNDS, False)
    waiting = turn_of(calls, capture=False)
    assert (waiting.rounds, waiting.twice, waiting.note) == (
        FEWEST_ROUNDS,
        False,
        "not captured: it waits for the host",
    )

    def refuse(calls) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(kernel_turns, "captured", refuse)
    assert turn_of(calls).note == "not captured: RuntimeError: operation not permitted when stream is capturing"


@pytest.mark.gpu
def test_turns_on_a_device() -> None:
    x = torch.ones(512, 512, device="cuda", dtype=torch.bfloat16)
    wide = torch.ones(4096, 4096, device="cuda", dtype=torch.bfloat16)
    turns = [turn_of([lambda: x @ x] * 2), turn_of([lambda: wide @ wide] * 2)]
    take_turns([*turns, turn_of([lambda: x.sum().item()], capture=False)])
    assert not [each for each in turns if each.error or len(each.times) != ROUNDS]
    quotient = turns[1].times_as_fast_as(turns[0])
    assert quotient is not None
    assert quotient < 0.5, "512 times the operations"
