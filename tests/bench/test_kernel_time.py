from __future__ import annotations

import math
import threading
import time

import pytest
import torch

from onegpu.bench import kernel_time
from onegpu.bench.kernel_time import Ceilings, copies_of, normals, number_of_calls, time_limit


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


def test_weights_are_copied_until_the_rotation_is_reached() -> None:
    tensors = [torch.zeros(600, dtype=torch.uint8), torch.zeros(100, dtype=torch.float32)]
    copies = copies_of(tensors, 4500)
    assert len(copies) == math.ceil(4500 / 1000)
    assert len({copy[0].data_ptr() for copy in copies}) == len(copies)
    assert len(copies_of(tensors, 1)) == 2


@pytest.mark.parametrize("freedom", [None, 3.0])
def test_normals(freedom: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
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


@pytest.mark.gpu
def test_what_cannot_be_captured_is_timed_all_the_same() -> None:
    x = torch.ones(64, 64, device="cuda")
    us, note = kernel_time.median_of_calls([lambda: x @ x, lambda: x + x])
    assert us > 0
    assert note == ""
    us, note = kernel_time.median_of_calls([lambda: x.sum().item()], capture=False)
    assert us > 0
    assert note == "not captured: it waits for the host"
