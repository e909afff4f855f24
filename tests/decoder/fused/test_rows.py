"""Steps of several rows: used where each row is what it is alone, else run one by one, with the same result."""

from __future__ import annotations

import pytest
import torch

from decoder.fused.models import build, cache_for, decode, plan_of, tokens_for
from onegpu.decoder.fused import CheckedStep, FusedStep, prove
from onegpu.decoder.fused import rows as page
from onegpu.decoder.fused.rehearse import one_of_each_kind, rehearse

ROWS, LENGTH = 3, 5


@pytest.mark.parametrize("name", ["llama", "gemma3-both", "qwen3", "mixtral"])
def test_rows_are_checked_once_and_then_run_together(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(build(name))
    assert prove(plan) is None
    asked: list[int] = []
    check = page.why_not_rows
    monkeypatch.setattr(page, "why_not_rows", lambda plan, rows: asked.append(rows) or check(plan, rows))
    known: dict[int, str | None] = {}
    tokens = tokens_for(ROWS, LENGTH)
    got = decode(CheckedStep(plan, cache_for(plan, ROWS, LENGTH), known), tokens)
    assert torch.equal(got, decode(FusedStep(plan, cache_for(plan, ROWS, LENGTH)), tokens))
    decode(CheckedStep(plan, cache_for(plan, 1, LENGTH), known), tokens[:1])
    assert asked == [ROWS]
    assert known == {ROWS: None}


def test_rows_that_disturb_each_other_are_run_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(build("llama"))
    assert prove(plan) is None
    tokens = tokens_for(ROWS, LENGTH)
    expected = decode(FusedStep(plan, cache_for(plan, ROWS, LENGTH)), tokens)
    right = FusedStep.logits
    # What a kernel that mixes rows up would do.
    monkeypatch.setattr(FusedStep, "logits", lambda self, hidden: right(self, hidden.roll(1, 0)))
    known: dict[int, str | None] = {}
    got = decode(CheckedStep(plan, cache_for(plan, ROWS, LENGTH), known), tokens)
    assert (known[ROWS] or "").startswith("row 0 of 3 differs from what it is alone by")
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_a_rehearsal_covers_each_kind_of_layer_and_leaves_no_trace() -> None:
    plan = plan_of(build("gemma3-both"))
    plan.join()
    assert one_of_each_kind(plan) == [0, 1]
    before = {name: tensor.clone() for name, tensor in plan.model.state_dict().items()}
    rehearse(plan, 2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in plan.model.state_dict().items())
