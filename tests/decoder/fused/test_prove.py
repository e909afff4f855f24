"""The proof lets what is right pass, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from decoder.fused.models import FORMATS, TINY, build, plan_of, quantize
from decoder.fused.test_recognise import REFUSED
from onegpu.decoder.fused import FusedPlan, FusedPrompt, FusedStep, prove
from onegpu.decoder.fused.plan import Norm
from onegpu.decoder.fused.prove import proof_tolerance


@pytest.mark.parametrize("name", sorted(set(TINY) - set(REFUSED)))
def test_what_is_recognised_is_proved(name: str) -> None:
    plan = plan_of(build(name, torch.bfloat16))
    assert prove(plan) is None
    assert plan.is_current()
    assert plan.layers[0].products is not None


@pytest.mark.parametrize("config", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_quantized_too(config: Any, dtype: torch.dtype) -> None:
    model = quantize(build("gemma2-capped", dtype), config)
    thresholds = [getattr(module, "threshold", None) for module in model.modules()]
    assert prove(plan_of(model)) is None
    assert thresholds == [getattr(module, "threshold", None) for module in model.modules()]


def eps_of(norm: Norm | None, eps: float) -> Norm:
    assert norm is not None
    return Norm(norm.module, eps, norm.offset)


WRONG: dict[str, tuple[str, Callable[[FusedPlan], None]]] = {
    "scale": ("llama", lambda plan: setattr(plan.layers[1], "scale", plan.layers[1].scale * 1.3)),
    "window": ("llama", lambda plan: setattr(plan.layers[1], "window", 3)),
    "no window": ("gemma3-both", lambda plan: setattr(plan.layers[0], "window", None)),
    "rotation": ("llama", lambda plan: setattr(plan.layers[1], "rotary", None)),
    "other rotation": ("gemma3-both", lambda plan: setattr(plan.layers[1], "rotary", 0)),
    "softcap": ("gemma2-capped", lambda plan: setattr(plan.layers[1], "softcap", None)),
    "activation": ("llama", lambda plan: setattr(plan.layers[1], "activation", "relu")),
    "gate and up": ("llama", lambda plan: setattr(plan.layers[1], "gate_up", plan.layers[1].gate_up[::-1])),
    "q and k": ("mha", lambda plan: setattr(plan.layers[1], "qkv", plan.layers[1].qkv[::-1])),
    "norm": ("qwen3", lambda plan: setattr(plan.layers[1], "q_norm", plan.layers[1].k_norm)),
    "epsilon": ("llama", lambda plan: setattr(plan.layers[1], "mlp_norm", eps_of(plan.layers[1].mlp_norm, 1.0))),
    "multiplier": ("granite-numbers", lambda plan: setattr(plan.layers[1], "residual_multiplier", 0.4)),
    "post norm": ("gemma2", lambda plan: setattr(plan.layers[1], "post_mlp_norm", None)),
    "sinks": ("gpt-oss", lambda plan: setattr(plan.layers[1], "sinks", None)),
}


# In bfloat16 a wrong scale or softcap of these tiny models is within its roundings: there the reading must be right.
COARSE = ["rotation", "no window", "activation", "gate and up", "q and k", "post norm", "multiplier", "norm"]


@pytest.mark.parametrize(
    ("what", "dtype"), [*((what, torch.float32) for what in WRONG), *((what, torch.bfloat16) for what in COARSE)]
)
def test_a_wrong_layer_is_found_and_named(what: str, dtype: torch.dtype) -> None:
    name, spoil = WRONG[what]
    model = build(name, dtype)
    plan = plan_of(model)
    spoil(plan)
    reason = prove(plan)
    layer = 0 if what == "no window" else 1
    assert reason is not None
    half = "the MLP" if what in ("activation", "gate and up", "epsilon", "post norm") else "attention"
    assert reason.startswith(f"{half} of model.layers.{layer} differs from the plain model by")
    # The weights are as they were.
    assert plan.layers[0].products is None
    for parameter in model.parameters():
        assert parameter.untyped_storage().nbytes() == parameter.nbytes


@pytest.mark.parametrize(
    ("what", "value", "reason"),
    [
        ("logits_divisor", 4.0, "its head differs"),
        ("logits_softcap", 1.0, "its head differs"),
        ("embedding_multiplier", 2.0, "the whole step differs"),
    ],
)
def test_wrong_ends_are_found(what: str, value: float, reason: str) -> None:
    plan = plan_of(build("granite-numbers"))
    setattr(plan, what, value)
    assert (prove(plan) or "").startswith(reason)


def test_not_a_number_never_passes() -> None:
    model = build("llama")
    plan = plan_of(model)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    assert "the MLP of model.layers.1 differs" in (prove(plan) or "")


def test_tolerances() -> None:
    assert proof_tolerance(torch.float32) == 1e-4
    assert proof_tolerance(torch.bfloat16) == pytest.approx(6 * 2**-8)
    assert proof_tolerance(torch.float16, 4) == pytest.approx(12 * 2**-11)


def test_steps_are_right_where_a_prompt_leaves_something_else_in_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(build("llama"))
    right = FusedPrompt.append

    def wrong(self: Any, layer: Any, cache: Any, *rest: Any) -> None:
        right(self, layer, cache, *rest)
        cache.k.mul_(-3.0)

    monkeypatch.setattr(FusedPrompt, "append", wrong)
    assert prove(plan) is None
    assert plan.why_not_prompts is not None
    assert plan.why_not_prompts.startswith("attention of model.layers.0 differs")


def test_a_step_that_is_wrong_behind_a_prompt_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(build("llama"))
    right = FusedStep.attention
    # What a step does that forgets its newest keys.
    monkeypatch.setattr(
        FusedStep, "attention", lambda self, i, h, positions, a: right(self, i, h, (positions - 1).clamp(0), a)
    )
    assert (prove(plan) or "").startswith("attention of model.layers.0 differs")
