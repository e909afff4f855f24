"""Timing loads: turns, the thrown-away first round, and deletion in between."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch

from onegpu.bench.load import measure_load
from onegpu.errors import ConfigError


class Tiny(torch.nn.Linear):
    device = torch.device("cpu")


def test_takes_turns_and_keeps_no_model() -> None:
    calls: list[str] = []
    alive: list[weakref.ref[Any]] = []

    def loader(label: str) -> Any:
        def load() -> Any:
            assert all(reference() is None for reference in alive), "an earlier model is still held"
            calls.append(label)
            model = Tiny(8, 4)
            alive.append(weakref.ref(model))
            return model

        return load

    times = measure_load({"a": loader("a"), "b": loader("b")}, runs=2)
    assert calls == ["a", "b"] * 3
    assert list(times) == ["a", "b"]
    for row in times.values():
        assert row.runs == 2
        assert row.weight_bytes == (8 * 4 + 4) * 4
        assert 0 <= row.fastest <= row.seconds <= row.slowest


def test_at_least_one_run() -> None:
    with pytest.raises(ConfigError, match="at least 1 run is needed; got 0"):
        measure_load({}, runs=0)
