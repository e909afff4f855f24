from __future__ import annotations

import pytest
import torch

from onegpu.bench import kernel_errors
from onegpu.bench.kernel_errors import ALLOWED, measure_errors, worst

CPU = torch.device("cpu")
SHAPES = {"even": (96, 128), "odd": (31, 67)}


def test_ours_are_not_above_what_is_allowed() -> None:
    found = measure_errors(SHAPES, [1, 7], CPU)
    assert len(found) == (1 + 2) * 2 * 6 * 2, "float16 at odd shapes alone"
    assert not [row for row in found if row["error"] is None]
    assert {row["operator"] for row in found} == {name for name, _ in kernel_errors.operators()}
    # One result of few rounded the other way counts for more than it does at the shapes of models.
    assert not [row for row in found if not row["ratio"] <= 1.03]
    exact = [row for row in found if row["operator"] in ("onegpu nf4", "onegpu fp4")]
    assert not [row for row in exact if not row["ratio"] <= ALLOWED]


def test_a_wrong_product_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(weight: torch.Tensor):
        return lambda x: x @ weight.t() * 1.05, weight, None

    monkeypatch.setattr(kernel_errors, "operators", lambda: iter([("wrong", wrong)]))
    found = measure_errors({"s": (32, 64)}, [3], CPU)
    assert min(row["ratio"] for row in found) > 5 * ALLOWED


def test_one_that_fails_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(weight: torch.Tensor):
        raise RuntimeError("no luck")

    monkeypatch.setattr(kernel_errors, "operators", lambda: iter([("broken", broken)]))
    found = measure_errors({"s": (32, 64)}, [3], CPU)
    assert len(found) == 2
    assert found[0]["note"] == "RuntimeError: no luck"


def test_all_kernels_are_compiled_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: list[tuple[object, torch.Tensor, torch.Tensor]] = []
    monkeypatch.setattr(kernel_errors, "warm_up_products", jobs.extend)
    kernel_errors.compile_kernels(SHAPES, [1, 7], CPU)
    assert len(jobs) == (1 + 2) * 6 * 2, "float16 at odd shapes alone"
    assert {kind for kind, _, _ in jobs} == {
        (name.partition(",")[0], dtype) for name, _ in kernel_errors.operators() for dtype in kernel_errors.DTYPES
    }
    assert {(multiply(x).shape[1], len(x)) for _, multiply, x in jobs} == {(96, 1), (96, 7), (31, 1), (31, 7)}


def test_progress_has_every_operator_of_a_shape() -> None:
    said: list[str] = []
    measure_errors(SHAPES, [1, 7], CPU, said.append)
    assert [line.partition(": ")[2].partition(": ")[0] for line in said] == [
        f"{shape}, {kind}, {dtype}"
        for shape, dtypes in (("even 96x128", ["bfloat16"]), ("odd 31x67", ["bfloat16", "float16"]))
        for kind in ("normal", "heavy-tailed")
        for dtype in dtypes
    ]
    assert all(f"{name} " in line for line in said for name, _ in kernel_errors.operators())


def test_the_worst_of_each_operator_and_rows() -> None:
    rows = [
        {"operator": "a", "M": 1, "error": 1.0, "ratio": 0.9},
        {"operator": "a", "M": 1, "error": 1.0, "ratio": 1.2},
        {"operator": "a", "M": 2, "error": 1.0, "ratio": 0.5},
        {"operator": "a", "M": 2, "error": 1.0, "ratio": float("nan")},
        {"operator": "a", "M": 2, "error": 1.0, "ratio": 0.7},
        {"operator": "b", "M": 0, "error": None},
    ]
    assert worst(rows) == [rows[1], rows[3], rows[5]]
