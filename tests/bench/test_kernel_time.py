from __future__ import annotations

import math
import threading
import time

import pytest
import torch

from onegpu.bench import kernel_time
from onegpu.bench.kernel_time import Ceilings, copies_of, normals, number_of_calls, number_of_rounds, time_limit


def test_the_roofline_is_the_slower_of_reading_and_multiplying() -> None:
    ceilings = Ceilings(read_bandwidth=1e12, flops=1e14)
    assert ceilings.seconds(2e12, 1e14) == 2.0
    assert ceilings.seconds(1e12, 3e14) == 3.0


@pytest.mark.parametrize(
    ("us", "copies", "expected"),
    [(7, 85, 85), (7, 2, 24), (100, 85, 85), (200, 85, 50), (1200, 85, 9), (50_000, 85, 4)],
)
def test_slow_calls_are_repeated_less(us: float, copies: int, expected: int) -> None:
    assert number_of_calls(us, copies) == expected


@pytest.mark.parametrize(("us", "expected"), [(100, 7), (12_500, 7), (20_000, 5), (128_000, 3)])
def test_and_in_fewer_rounds(us: float, expected: int) -> None:
    assert number_of_rounds(us) == expected


def test_weights_are_copied_until_the_rotation_is_reached() -> None:
    tensors = [torch.zeros(600, dtype=torch.uint8), torch.zeros(100, dtype=torch.float32)]
    copies = copies_of(tensors, 4500)
    assert len(copies) == math.ceil(4500 / 1000)
    assert len({copy[0].data_ptr() for copy in copies}) == len(copies)
    assert len(copies_of(tensors, 1)) == 2


@pytest.mark.parametrize("freedom", [None, 3])
def test_normals(freedom: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    x = normals(300, 301, torch.device("cpu"), seed=1, freedom=freedom)
    assert x.shape == (300, 301)
    assert torch.equal(x, normals(300, 301, torch.device("cpu"), seed=1, freedom=freedom))
    assert not torch.equal(x, normals(300, 301, torch.device("cpu"), seed=2, freedom=freedom))
    beyond = float((x.abs() > 5).float().mean())
    assert (beyond > 0.01) == (freedom is not None), "only the t distribution has so many far out"
    monkeypatch.setattr(kernel_time, "STRETCH", 97)
    repeated = normals(5, 60, torch.device("cpu"))
    assert torch.equal(repeated.view(-1)[97:194], repeated.view(-1)[:97])


def test_a_limit_ends_what_takes_too_long() -> None:
    started = time.monotonic()
    with pytest.raises(TimeoutError, match="not ready after 0 s"), time_limit(0.05):
        time.sleep(5)
    assert time.monotonic() - started < 2
    with time_limit(0.05):
        pass
    time.sleep(0.1)  # the clock was stopped


def test_no_limit_off_the_main_thread() -> None:
    done: list[bool] = []

    def run() -> None:
        with time_limit(0.01):
            time.sleep(0.05)
        done.append(True)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert done == [True]


def test_products_of_a_kind_are_not_compiled_twice_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    groups: list[list[tuple[str, int]]] = []
    done: list[tuple[str, int]] = []

    def side_by_side(calls) -> None:
        for call in calls:
            call()
            groups.append(done.copy())
            done.clear()

    def product(kind: str):
        def run(x: torch.Tensor) -> None:
            done.append((kind, len(x)))
            if len(x) == 8:
                raise RuntimeError("no luck")

        return run

    monkeypatch.setattr(kernel_time, "warm_up", side_by_side)
    rows = [torch.empty(M, 2) for M in (1, 8, 16, 17, 64)]
    kernel_time.warm_up_products((kind, product(kind), x) for kind in "ab" for x in rows)
    assert groups == [[(kind, M) for M in part] for kind in "ab" for part in ((1, 8, 16), (17, 64))]


@pytest.mark.gpu
def test_what_cannot_be_captured_is_timed_all_the_same() -> None:
    x = torch.ones(64, 64, device="cuda")
    us, note = kernel_time.median_of_calls([lambda: x @ x, lambda: x + x])
    assert us > 0
    assert note == ""
    us, note = kernel_time.median_of_calls([lambda: x.sum().item()])
    assert us > 0
    assert note.startswith("not captured: ")
