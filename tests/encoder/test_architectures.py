"""Every encoder architecture, tiny and random: without padding it answers as plain Transformers does.

Tolerance: 2e-5 of the largest value, float32. Between the ways only the order of sums differs (softmax over the real
keys, not over all), which is some ten roundings of 6e-8 over a few layers; a wrong mask or position moves values by
their own size.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from encoder.zoo import CASES, Case, padded_mask, speech, text, vilt
from onegpu.encoder.graphs import record_on_host
from onegpu.encoder.optimize import encoder_report, optimize_encoder, restore_encoder

RELATIVE = 2e-5
TEXT_CASES = [case for case in CASES if case.inputs is text]


def holes() -> Tensor:
    mask = padded_mask()
    mask[1, 2], mask[1, 5:7], mask[0, 3] = 0, 0, 0
    return mask


def empty_row() -> Tensor:
    mask = padded_mask()
    mask[2] = 0
    return mask


MASKS = {
    "right": padded_mask(),
    "left": padded_mask().flip(1),
    "holes": holes(),
    "empty row": empty_row(),
    "length one": padded_mask((1, 1, 1, 1)),
    "full": padded_mask((10, 10, 10, 10)),
    "one row": padded_mask((7,), 7),
}


def run(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    torch.manual_seed(5)  # ViLT and ViT-MAE draw patches
    with torch.no_grad():
        output = model(**{name: value.clone() for name, value in inputs.items()})
    return {k: v for k, v in output.items() if isinstance(v, Tensor) and v.is_floating_point()}


def assert_equal(case: Case, mask: Tensor, got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    rows = mask.bool().any(1)
    for name, expected in want.items():
        actual = got[name]
        assert actual.shape == expected.shape, name
        if expected.dim() == 3 and expected.shape[0] == len(mask) and expected.shape[1] >= mask.shape[1]:
            valid = case.valid(mask, expected.shape[1]) & rows[:, None]
            expected, actual = expected[valid], actual[valid]
        elif expected.dim() >= 2 and expected.shape[0] == len(mask):
            expected, actual = expected[rows], actual[rows]
        limit = RELATIVE * float(expected.abs().max())
        assert float((actual - expected).abs().max()) <= limit, name


def outcomes(model: Any) -> dict[str, int]:
    report = encoder_report(model)
    assert report is not None
    return {key: n for line in report.stacks for key, n in line.outcomes.items()}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equal_to_plain(case: Case) -> None:
    mask = padded_mask((6, 10, 3, 2)) if case.inputs is speech else padded_mask()
    model, inputs = case.build(), case.inputs(mask)
    want = run(model, inputs)
    report = optimize_encoder(model)
    assert_equal(case, mask, run(model, inputs), want)
    if case.reason is not None:
        assert not report.is_optimized
        assert case.reason in str(report.stacks[0].reason)
    else:
        assert report.is_optimized, report.lines()
        ways = outcomes(model)
        has_padding = "attention_mask" in inputs
        assert any(key == "direct" for key in ways) == has_padding, ways


@pytest.mark.parametrize("case", TEXT_CASES, ids=lambda case: case.name)
def test_every_kind_of_padding(case: Case) -> None:
    model = case.build()
    wanted = {kind: run(model, case.inputs(mask)) for kind, mask in MASKS.items()}
    bare = {"input_ids": case.inputs(MASKS["full"])["input_ids"]}
    wanted_bare = run(model, bare)
    stack = optimize_encoder(model).stacks[0].stack
    assert stack is not None
    for kind, mask in MASKS.items():
        stack.outcomes.clear()
        got = run(model, case.inputs(mask))
        assert_equal(case, mask, got, wanted[kind])
        if bool(mask.all()):
            assert stack.outcomes["direct, no padding"] == 1
        elif stack.outcomes["direct"]:
            padding = got["last_hidden_state"][~mask.bool()]
            assert padding.numel() == 0 or float(padding.abs().max()) == 0.0
        else:
            assert kind in ("left", "empty row"), dict(stack.outcomes)
            assert stack.first_token_matters
    assert_equal(case, MASKS["full"], run(model, bare), wanted_bare)


@pytest.mark.parametrize("case", [c for c in CASES if c.reason is None], ids=lambda case: case.name)
def test_noted_down_and_replayed(case: Case) -> None:
    """What CUDA graphs capture, without a GPU: one list of calls over fixed buffers serves every batch of a bucket."""
    model = case.build()
    masks = [
        padded_mask((5, 10, 4, 2)),
        padded_mask((9, 2, 3, 6)),
        padded_mask((4, 4, 2, 10)),
        padded_mask((6, 10, 3, 2)),
    ]
    batches = [case.inputs(mask) for mask in masks]
    wanted = [run(model, inputs) for inputs in batches]
    report = optimize_encoder(model)
    for line in report.stacks:
        if line.stack is not None:
            line.stack.graphs.works_anywhere = True
            line.stack.graphs.capture = record_on_host
    for _ in range(2):
        for mask, inputs, want in zip(masks, batches, wanted, strict=True):
            assert_equal(case, mask, run(model, inputs), want)
    ways = outcomes(model)
    if case.name == "yolos":  # its loop adds positions between layers
        assert "direct, no padding" in ways
        return
    assert any(key.startswith("deferred") for key in ways), ways
    for line in report.stacks:
        if line.stack is not None and any(key.startswith("deferred") for key in line.outcomes):
            assert not line.stack.graphs.refused
            assert line.stack.graphs.captured


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_restore_is_exact(case: Case) -> None:
    mask = padded_mask((6, 10, 3, 2))
    model, inputs = case.build(), case.inputs(mask)
    want = run(model, inputs)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attributes = {name: set(module.__dict__) for name, module in model.named_modules()}
    hooks = {name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in model.named_modules()}
    config = model.config.to_dict()
    optimize_encoder(model)
    run(model, inputs)
    assert model.config.to_dict() == config
    assert restore_encoder(model) is model
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == attributes
    assert {name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in model.named_modules()} == hooks
    after = model.state_dict()
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[name], weights[name]) for name in weights)
    got = run(model, inputs)
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_the_check_can_fail() -> None:
    """A wrong answer is far outside the tolerance: attention across sequences changes values by their own size."""
    case = next(case for case in CASES if case.name == "bert")
    model, mask = case.build(), padded_mask()
    inputs = case.inputs(mask)
    want = run(model, inputs)
    wrong = run(model, {**inputs, "attention_mask": torch.ones_like(mask)})
    with pytest.raises(AssertionError):
        assert_equal(case, mask, wrong, want)


def test_vilt_counts_patches_as_real() -> None:
    case = next(case for case in CASES if case.inputs is vilt)
    assert case.valid(padded_mask(), 27).sum() == padded_mask().sum() + 4 * 17
