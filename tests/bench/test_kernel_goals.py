from __future__ import annotations

from typing import Any

import pytest

from onegpu.bench.kernel_goals import FP4, INT8, NF4, goal_table, goals_of, roofline_goal, speed_goal


def row(operator: str, M: int, us: float | None, shape: str = "gate_up", **more: Any) -> dict[str, Any]:
    found = {"shape": shape, "N": 28672, "K": 4096, "M": M, "operator": operator, "us": us}
    return found | {"roofline_percent": 85.0, "times_bf16": us and 31.0 / us} | more


def test_the_goals() -> None:
    assert roofline_goal(row(NF4, 1, 1.0)) == 82
    assert roofline_goal(row(FP4, 1, 1.0, shape="o")) == 48
    assert roofline_goal(row(NF4, 8, 1.0)) is None
    assert speed_goal(row(NF4, 8, 1.0)) == 3.0
    assert speed_goal(row(NF4, 8, 1.0, shape="o")) == 2.5
    assert speed_goal(row(FP4, 8, 1.0)) is None
    assert speed_goal(row(INT8, 16, 1.0)) == 1.5
    assert speed_goal(row(INT8, 32, 1.0)) == 1.0
    assert speed_goal(row(INT8, 4096, 1.0)) == 1.2
    assert speed_goal(row(INT8, 4096, 1.0, shape="down")) == 1.0


def test_held_against_the_best_of_the_same_width() -> None:
    rows = [
        row("bf16 cuBLAS", 8, 31.0),
        row(NF4, 8, 10.0),
        row("onegpu int8", 8, 20.0),
        row(INT8, 8, 20.0),
        row("gemlite int4", 8, 12.0),
        row("tinygemm int4", 8, 11.0),
        row("bitsandbytes nf4", 8, None),
        row("bitsandbytes int8, outliers", 8, 15.0),
        row("gemlite int4", 16, 1.0),
    ]
    nf4, int8 = goals_of(rows)
    assert (nf4["best_peer"], nf4["times_best_peer"], nf4["met"]) == ("tinygemm int4", pytest.approx(1.1), True)
    assert int8["best_peer"] == "bitsandbytes int8, outliers"
    assert (int8["times_best_peer"], int8["met"]) == (pytest.approx(0.75), False)


def test_held_against_another_by_rounds_that_both_had() -> None:
    """Of medians, 10.0 and 9.9 us, the library's clock was another's."""
    (found,) = goals_of([row(NF4, 8, 10.0, times_bf16=3.1), row("gemlite int4", 8, 9.9, times_bf16=2.9)])
    assert found["times_best_peer"] == 3.1 / 2.9
    (found,) = goals_of([row(NF4, 8, 10.0, times_bf16=None), row("gemlite int4", 8, 11.0, times_bf16=None)])
    assert found["times_best_peer"] == 1.1


def test_a_goal_that_is_missed() -> None:
    (alone,) = goals_of([row(NF4, 8, 10.0, times_bf16=2.9)])
    assert alone["best_peer"] is None
    assert not alone["met"]
    (alone,) = goals_of([row(NF4, 1, 10.0, roofline_percent=81.9)])
    assert not alone["met"]


def test_the_table() -> None:
    chain = [
        {"operator": name, "overlap": overlap, "us": us, "roofline_percent": 81.0}
        for name, us in (("onegpu nf4, tiled", 1500.0), ("onegpu nf4+double, tiled", 1530.0))
        for overlap in (False, True)
    ]
    storage = [
        {"task": "quantize nf4", "us": 1.0, "percent": 69.0},
        {"task": "quantize nf4, scale search", "us": 1.0, "percent": 5.0},
    ]
    found = {"rows": [row(NF4, 8, 10.0)], "chain": chain, "storage": storage}
    text = "\n".join(goal_table(found))
    assert "| gate_up 28672x4096 | 8 | onegpu nf4, tiled | 10.00 | 85 |  | 3.10 | 3.00 |  |  | yes |" in text
    assert "| chain onegpu nf4, tiled | 81.0 % of the roofline | 80 % | yes |" in text
    assert "| chain, double / plain time | 1.020 | 1.0 | NO |" in text
    assert "| quantize nf4 | 69 % of the read bandwidth | 70 % | NO |" in text
    assert "scale search" not in text
    assert list(goal_table({"rows": []})) == []
