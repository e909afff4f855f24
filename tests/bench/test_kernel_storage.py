from __future__ import annotations

import pytest
import torch

from onegpu.bench import kernel_storage
from onegpu.bench.kernel_time import Ceilings


def test_each_task_runs_and_counts_its_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_storage, "SHAPE", (64, 256))
    monkeypatch.setattr(kernel_storage, "warm_up", lambda calls: None)

    def median(calls) -> tuple[float, str]:
        assert len(calls) == kernel_storage.COPIES
        for call in calls:
            call()
        return 1.0, ""

    monkeypatch.setattr(kernel_storage, "median_of_calls", median)
    found = {row["task"]: row for row in kernel_storage.measure_storage(Ceilings(1e12, 1), torch.device("cpu"))}
    n = 64 * 256
    sizes = {
        "quantize nf4": 2 * n + n // 2 + n // 16,
        "dequantize nf4": 2 * n + n // 2 + n // 16,
        "dequantize fp4+double": 2 * n + n // 2 + n // 64 + 4 + 4 * 256 + 4,
        "quantize int8 rows": 2 * n + n + 4 * 64 + 256,
    }
    for task, size in sizes.items():
        assert found[task]["gb_s"] == pytest.approx(size / 1e-6 / 1e9), task
        assert found[task]["percent"] == pytest.approx(100 * size / 1e-6 / 1e12)
    assert len(found) == 8


def test_a_task_that_fails_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(weight: torch.Tensor) -> kernel_storage.Task:
        raise RuntimeError("no luck")

    monkeypatch.setattr(kernel_storage, "SHAPE", (2, 64))
    monkeypatch.setattr(kernel_storage, "tasks", lambda: iter([("t", broken)]))
    (row,) = kernel_storage.measure_storage(Ceilings(1e12, 1), torch.device("cpu"))
    assert row["us"] is None
    assert row["note"] == "RuntimeError: no luck"
