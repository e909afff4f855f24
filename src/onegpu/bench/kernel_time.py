"""How the kernel benchmarks take their times: what the device can do, and the median of calls replayed from a graph.

    ceilings    read bandwidth and the speed of a large bfloat16 product
    a time      calls on weights that lie apart, one after another, captured in a CUDA graph; the median of its replays
    bounds      a replay has no more calls than take `REPLAY_US`, but four; slow ones are repeated less often

A call that takes long on its own is not repeated until all weights have been gone around: what it reads passes through
L2 many times in one call anyway.
"""

from __future__ import annotations

import math
import os
import signal
import statistics
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

__all__ = [
    "CALLS",
    "Ceilings",
    "all_of",
    "call_times",
    "captured",
    "copies_of",
    "first_line",
    "first_times",
    "measure_ceilings",
    "median_of_calls",
    "normals",
    "number_of_calls",
    "number_of_rounds",
    "replayed",
    "settle",
    "time_limit",
    "timed",
    "warm_up",
    "warm_up_products",
]

CALLS: Final = 24
FEWEST_CALLS: Final = 4
REPLAY_US: Final = 10_000
ROUNDS: Final = 7
FEWEST_ROUNDS: Final = 3
ROUNDS_US: Final = 100_000
SETTLE_SECONDS: Final = 0.02
# Above, other kernels multiply.
FEW_ROWS: Final = 16
# A prime, so that rows of a repeated stretch of random numbers are not alike.
STRETCH: Final = 4_194_301


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Of this device: bytes read per second; operations per second of a bfloat16 product of 8192 cubed."""

    read_bandwidth: float
    flops: float

    def seconds(self, num_bytes: float, operations: float) -> float:
        """The least time that reading and multiplying take, each alone."""
        return max(num_bytes / self.read_bandwidth, operations / self.flops)


def measure_ceilings(device: torch.device) -> Ceilings:
    """Read 2 GiB, and multiply 8192 x 8192 x 8192 in bfloat16; the best of several."""
    from onegpu.kernels.ceiling import BLOCK, read_once

    source = torch.zeros(2**29, dtype=torch.int32, device=device)
    out = torch.empty(source.numel() // BLOCK, dtype=torch.int32, device=device)
    bandwidth = source.nbytes / (min(call_times([partial(read_once, source, out)] * 4)) / 1e6)
    a, b = (torch.randn(8192, 8192, device=device).to(torch.bfloat16) for _ in range(2))
    flops = 2 * 8192**3 / (min(call_times([partial(torch.mm, a, b)] * 4)) / 1e6)
    return Ceilings(bandwidth, flops)


def call_times(calls: Sequence[Callable[[], Any]], rounds: int = ROUNDS) -> list[float]:
    """Microseconds of one call in each of several replays of all calls, captured in a graph."""
    for call in calls[:2]:
        call()
    replay = captured(calls)
    settle(replay)
    return timed(replay, len(calls), rounds)


def captured(calls: Sequence[Callable[[], Any]]) -> Callable[[], None]:
    """What replays all calls, one after another, from a CUDA graph.

    Raises:
        RuntimeError: one of them waits for the host.
    """
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def settle(run: Callable[[], Any]) -> None:
    """Keep the device busy for a while: its clocks fell while it had nothing to do, for example for a compiler."""
    begun = time.perf_counter()
    while time.perf_counter() - begun < SETTLE_SECONDS:
        run()
        torch.cuda.synchronize()


def timed(run: Callable[[], Any], count: int, rounds: int, warm: int = 2) -> list[float]:
    for _ in range(warm):
        run()
    times = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / count)
    return times


def median_of_calls(different: Sequence[Callable[[], Any]]) -> tuple[float, str]:
    """Median microseconds of a call, different ones in turn; and a note if they could not be captured."""
    alone = first_times(different)
    count = number_of_calls(alone, len(different))
    calls = [different[i % len(different)] for i in range(count)]
    try:
        return statistics.median(call_times(calls, number_of_rounds(alone * count))), ""
    except RuntimeError as error:
        torch.cuda.synchronize()
        reason = first_line(error)
    return statistics.median(timed(all_of(calls), count, FEWEST_ROUNDS, warm=1)), f"not captured: {reason}"


def first_times(different: Sequence[Callable[[], Any]], patience: float | None = None) -> float:
    """Microseconds of a call by itself, after two that may compile.

    Raises:
        TimeoutError: these two took longer than `patience`, in seconds.
    """
    with time_limit(patience):
        for call in different[:2]:
            call()
        torch.cuda.synchronize()
    return min(timed(different[0], 1, 2, warm=0))


def all_of(calls: Sequence[Callable[[], Any]]) -> Callable[[], None]:
    """All calls, one after another."""

    def run() -> None:
        for call in calls:
            call()

    return run


def number_of_calls(us: float, copies: int) -> int:
    """Calls of `us` microseconds in a replay, which goes around all copies unless that takes too long."""
    return max(FEWEST_CALLS, min(max(CALLS, copies), math.ceil(REPLAY_US / us)))


def number_of_rounds(us: float) -> int:
    """Replays of `us` microseconds that are timed."""
    return min(ROUNDS, max(FEWEST_ROUNDS, int(ROUNDS_US / us)))


def replayed(step: Callable[[], Tensor]) -> tuple[float, Tensor, bool]:
    """Median microseconds of a step captured in a graph, its result in float32, and whether replays repeat it."""
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    us = statistics.median(timed(graph.replay, 1, 9))
    first = out.float().clone()
    repeats = True
    for _ in range(5):
        out.zero_()
        graph.replay()
        repeats &= torch.equal(out.float(), first)
    return us, first, repeats


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """TimeoutError in what runs for longer; without effect off the main thread, and where there are no such signals."""
    if seconds is None or threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def expired(*_: object) -> None:
        raise TimeoutError(f"not ready after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, expired)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def warm_up(calls: Sequence[Callable[[], Any]]) -> None:
    """Each call once, in threads, so that kernels are compiled side by side. What fails here fails when it is timed."""

    def once(call: Callable[[], Any]) -> None:
        with torch.no_grad(), suppress(Exception):
            torch.zeros(1, device="cuda")  # makes the device's context that of this thread
            call()

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        list(pool.map(once, calls))
    torch.cuda.synchronize()


def warm_up_products(products: Iterable[tuple[Hashable, Callable[[Tensor], Any], Tensor]]) -> None:
    """As `warm_up`, for (kind, product, x): those of a kind one after another, few rows and many apart.

    Products of a kind share kernels: side by side, each would compile them.
    """
    groups: dict[Hashable, list[Callable[[], Any]]] = {}
    for kind, product, x in products:
        groups.setdefault((kind, len(x) > FEW_ROWS), []).append(partial(product, x))
    warm_up([partial(in_a_row, calls) for calls in groups.values()])


def in_a_row(calls: Sequence[Callable[[], Any]]) -> None:
    """Calls one after another, going on after one that fails."""
    for call in calls:
        with suppress(Exception):
            call()


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:160]


def copies_of(tensors: Sequence[Tensor], rotation: int) -> list[tuple[Tensor, ...]]:
    """Copies of a weight's tensors that take `rotation` bytes or more together."""
    size = sum(tensor.nbytes for tensor in tensors)
    return [tuple(tensor.clone() for tensor in tensors) for _ in range(max(2, math.ceil(rotation / size)))]


def normals(rows: int, columns: int, device: torch.device, seed: int = 0, freedom: int | None = None) -> Tensor:
    """float32 [rows, columns], normal, or Student's t with so many degrees of freedom.

    Drawn on the CPU and repeated: it is quick, the same everywhere, and a GPU's own random numbers may be unusable
    after another package broke a capture.
    """
    count = min(rows * columns, STRETCH)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(count, generator=generator)
    if freedom is not None:
        squares = torch.zeros(count)
        for _ in range(freedom):
            squares += torch.randn(count, generator=generator).square_()
        drawn /= (squares / freedom).sqrt_()
    stretch = drawn.to(device)
    return stretch.repeat(-(-rows * columns // count))[: rows * columns].view(rows, columns)
