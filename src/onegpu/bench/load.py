"""How long loading takes and how much memory it touches, for each way of holding a model.

Contenders take turns; the first round, which compiles kernels and fills the file cache, is thrown away. The peak is the
most that torch had allocated on the GPU during the load; on a CPU it is not counted here.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from onegpu.bench.measure import synchronize, weight_bytes
from onegpu.errors import ConfigError

__all__ = ["LoadTime", "measure_load"]


@dataclass(frozen=True, slots=True)
class LoadTime:
    """Median, best and worst seconds over `runs` loads; bytes of the loaded model and the peak while loading."""

    seconds: float
    fastest: float
    slowest: float
    weight_bytes: int
    peak_bytes: int | None
    runs: int


def measure_load(
    loaders: Mapping[str, Callable[[], Any]], *, runs: int, progress: Callable[[str], None] = lambda _: None
) -> dict[str, LoadTime]:
    """Time each loader, in turns; each model is deleted before the next is loaded.

    Raises:
        ConfigError: fewer than one run.
    """
    if runs < 1:
        raise ConfigError(f"at least 1 run is needed; got {runs}", "--runs 3")
    rows: dict[str, list[tuple[float, int, int | None]]] = {label: [] for label in loaders}
    for turn in range(runs + 1):
        for label, loader in loaders.items():
            row = timed_load(loader)
            if turn > 0:
                rows[label].append(row)
            progress(f"round {turn} of {runs}: {label} {row[0]:.2f} s")
    return {label: summary(found) for label, found in rows.items()}


def timed_load(loader: Callable[[], Any]) -> tuple[float, int, int | None]:
    """(seconds, bytes of the model, peak bytes on the GPU) of one load."""
    gc.collect()
    on_gpu = torch.cuda.is_available()
    before = torch.cuda.memory_allocated() if on_gpu else 0
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    model = loader()
    synchronize(model.device)
    seconds = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated() - before if on_gpu else None
    return seconds, weight_bytes(model), peak


def summary(rows: list[tuple[float, int, int | None]]) -> LoadTime:
    """The median of several loads of one contender."""
    seconds = [row[0] for row in rows]
    return LoadTime(statistics.median(seconds), min(seconds), max(seconds), rows[0][1], rows[0][2], len(rows))
