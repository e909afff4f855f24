"""A probe's rows are the token alone at its position; what is noted of a larger run is what a run of it gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from decoder.fused.models import TINY, build, plan_of, quantize
from decoder.fused.test_recognise import REFUSED
from onegpu.config import QuantConfig
from onegpu.decoder.fused.probe import inner_modules, watch
from onegpu.decoder.fused.prove import compared, is_enough, prove
from onegpu.decoder.prove import make_trial

CPU = torch.device("cpu")
NAMES = sorted(set(TINY) - set(REFUSED))


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_what_each_position_gives_alone(name: str) -> None:
    model = build(name)
    modules = inner_modules(model)
    both = watch(model, modules, 1, (0, 9), CPU)
    alone = [watch(model, modules, 1, (position,), CPU) for position in (0, 9)]
    for row, one in enumerate(alone):
        torch.testing.assert_close(both.logits[row], one.logits[0], rtol=1e-4, atol=1e-5)
        for call, expected in zip(both.attention, one.attention, strict=True):
            torch.testing.assert_close(call.query[row], expected.query[0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(call.key[row], expected.key[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_what_a_trial_saw_is_what_the_plain_model_does_with_these_tokens(name: str) -> None:
    model = build(name)
    plan = plan_of(model)
    trial, _ = make_trial(model, plan.vocab_size, CPU)
    assert trial.seen is not None
    assert is_enough(plan, trial.seen)
    again: dict[Any, Any] = {}
    handles = [
        module.register_forward_hook(lambda m, a, k, out: again.update({m: out}), with_kwargs=True)
        for module in compared(plan)
    ]
    logits = model(input_ids=trial.seen.tokens, use_cache=False).logits
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(trial.seen.logits, logits, rtol=1e-3, atol=1e-4)
    for module, out in again.items():
        out = out[0] if isinstance(out, tuple) else out
        seen = trial.seen.calls[module].output
        torch.testing.assert_close(seen, out.view_as(seen), rtol=1e-3, atol=1e-4)


def test_a_run_that_lacks_a_layer_or_rounded_to_int8_is_not_enough() -> None:
    model = build("llama")
    plan = plan_of(model)
    seen = make_trial(model, plan.vocab_size, CPU)[0].seen
    assert seen is not None
    seen.calls.pop(plan.layers[1].mlp if plan.layers[1].mlp_norm is None else plan.layers[1].mlp_norm.module)
    assert not is_enough(plan, seen)
    assert prove(plan, seen) is None
    quantized = build("llama")
    quantize(quantized, QuantConfig("int8"))
    plan = plan_of(quantized)
    seen = make_trial(quantized, plan.vocab_size, CPU)[0].seen
    assert seen is not None
    assert not is_enough(plan, seen)


def test_a_wrong_layer_is_found_in_what_a_trial_saw() -> None:
    model = build("llama")
    plan = plan_of(model)
    seen = make_trial(model, plan.vocab_size, CPU)[0].seen
    plan.layers[1].scale *= 1.3
    reason = prove(plan, seen)
    assert reason is not None
    assert reason.startswith("attention of model.layers.1 differs from the plain model by")
