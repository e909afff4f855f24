from __future__ import annotations

import pytest
import torch

from onegpu.bench import kernel_experts
from onegpu.bench.kernel_experts import Experts, chosen, routings, tokens_by_expert
from onegpu.bench.kernel_time import Ceilings

CPU = torch.device("cpu")
SMALL = Experts(num_experts=8, top_k=2, N=48, K=64)


def test_each_token_chooses_different_experts() -> None:
    drawn = routings(SMALL, 5)
    assert len(drawn) == kernel_experts.ROUTINGS
    for ids in drawn:
        assert ids.shape == (5, 2)
        assert (ids[:, 0] != ids[:, 1]).all()
    assert len({tuple(ids.view(-1).tolist()) for ids in drawn}) > 1
    assert chosen([torch.tensor([[0, 1]]), torch.tensor([[0, 1], [2, 3]])]) == 3


def test_every_pair_is_in_one_part() -> None:
    x = torch.arange(12.0).view(6, 2)
    ids = torch.tensor([[0, 3], [3, 1], [0, 1], [5, 0], [1, 5], [3, 0]])
    parts = dict(tokens_by_expert(x, ids))
    assert list(parts) == [0, 1, 3, 5]
    for expert, rows in parts.items():
        tokens = [token for token in range(6) if expert in ids[token].tolist()]
        assert torch.equal(rows, x[tokens])


def test_contenders_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms over all outputs: the order of pairs differs between them."""
    norms: list[float] = []

    def median(calls) -> tuple[float, str]:
        out = calls[0]()
        parts = out if isinstance(out, list) else [out]
        norms.append(float(torch.cat([part.float().reshape(-1) for part in parts]).norm()))
        return 10.0, ""

    monkeypatch.setattr(kernel_experts, "median_of_calls", median)
    monkeypatch.setattr(kernel_experts, "warm_up", lambda calls: None)
    found = kernel_experts.measure_experts(Ceilings(1e12, 1e14), CPU, models={"m": SMALL}, tokens=(1, 9))
    operators = [row["operator"] for row in found if row["tokens"] == 9]
    assert {"bf16 loop", "onegpu nf4", "onegpu nf4+double", "onegpu int8"} <= set(operators)
    measured = [row for row in found if row["us"]]
    assert len(norms) == len(measured)
    for row, norm in zip(measured, norms, strict=True):
        base = norms[0] if row["tokens"] == 1 else norms[1]
        assert norm == pytest.approx(base, rel=0.05), row["operator"]
    int8 = next(row for row in measured if row["operator"] == "onegpu int8" and row["tokens"] == 9)
    size = chosen(routings(SMALL, 9)) * (48 * 64 + 4 * 48) + 2 * (9 * 64 + 18 * 48)
    assert int8["gb_s"] == pytest.approx(size / 10e-6 / 1e9)
    assert int8["times_bf16"] == 1.0


def test_one_that_is_not_there_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(experts: Experts, device: torch.device) -> None:
        raise AttributeError("no such product")

    monkeypatch.setattr(kernel_experts, "operators", lambda: iter([("bf16 grouped", absent)]))
    (row,) = kernel_experts.measure_experts(Ceilings(1, 1), CPU, models={"m": SMALL}, tokens=(1,))
    assert row["us"] is None
    assert row["tokens"] == 0
    assert row["note"] == "AttributeError: no such product"
