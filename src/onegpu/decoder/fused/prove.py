"""The fused step against the plain model on random tokens, before it is used: layer by layer, then from end to end.

Each layer is given the plain layer's own input, so that a difference is that layer's. The bound follows from what the
two ways can differ in: both round about 24 times in a layer (norms 2 each, products 4, rotation 3, attention 2, gate 2,
sums 2, ...), so 48 roundings of at most u, the unit roundoff, and u / sqrt(3) on average, which add up as their squares
do: 4 u. Three times that, for the largest element instead of the average one, is what is allowed: 12 u of the largest
change that the layer makes, and sqrt(layers + 1) times as much of the largest logit from end to end. Sums over
thousands of float32 products differ by more than 12 u, so in float32 it is 1e-4.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import torch
from torch import Tensor, nn

from onegpu.decoder.cache import KVCache, LayerShape
from onegpu.decoder.fused.plan import FusedPlan
from onegpu.decoder.fused.probe import ModuleCall, watched
from onegpu.decoder.fused.step import FusedStep
from onegpu.errors import OneGpuError
from onegpu.nn import QuantLinear8bit

__all__ = ["proof_tolerance", "prove"]

ROWS: Final = 2
STEPS: Final = 6
SEED: Final = 0
# So small that every column of x is an outlier, which LLM.int8() multiplies in 16 bit.
ALL_OUTLIERS: Final = 1e-30


def proof_tolerance(dtype: torch.dtype, layers: int = 1) -> float:
    """Largest difference allowed after so many layers, as a part of the largest value; see above."""
    return float(max(12 * torch.finfo(dtype).eps / 2, 1e-4) * (1 if layers == 1 else (layers + 1) ** 0.5))


def prove(plan: FusedPlan) -> str | None:
    """None where the fused step does what the plain model does, else what differs; the weights are then split again.

    The plan is joined afterwards. Waits for the device.
    """
    generator = torch.Generator().manual_seed(SEED)
    size = min(plan.vocab_size, int(plan.embed.num_embeddings))  # type: ignore[arg-type]
    tokens = torch.randint(0, size, (ROWS, STEPS), generator=generator).to(plan.device)
    try:
        logits, calls = plain_run(plan, tokens)
        reason = compare(plan, tokens, logits, calls)
    except OneGpuError as error:
        reason = error.message
    if reason is not None:
        plan.split()
    return reason


def plain_run(plan: FusedPlan, tokens: Tensor) -> tuple[Tensor, dict[nn.Module, ModuleCall]]:
    """Logits [ROWS, STEPS, V] of the plain model without a cache, and what its layers were given and gave."""
    modules = [plan.names[layer.name] for layer in plan.layers] + [layer.mlp for layer in plan.layers]
    calls: list[ModuleCall] = []
    with torch.no_grad(), exact_int8(plan), watched([*modules, plan.norm.module], calls):
        logits: Tensor = plan.model(input_ids=tokens, use_cache=False).logits
    return logits, {call.module: call for call in calls}


@contextmanager
def exact_int8(plan: FusedPlan) -> Iterator[None]:
    """Let 8-bit layers keep x in 16 bit, as the fused step does: their int8 rounding is no difference to be judged."""
    layers = [module for module in plan.model.modules() if isinstance(module, QuantLinear8bit)]
    before = [layer.threshold for layer in layers]
    try:
        for layer in layers:
            layer.threshold = ALL_OUTLIERS
        yield
    finally:
        for layer, threshold in zip(layers, before, strict=True):
            layer.threshold = threshold


def compare(plan: FusedPlan, tokens: Tensor, logits: Tensor, calls: dict[nn.Module, ModuleCall]) -> str | None:
    """What differs, or None."""
    kv = KVCache(
        [LayerShape(p.num_kv_heads, p.head_dim, p.head_dim, plan.dtype, plan.device, p.window) for p in plan.layers],
        ROWS,
        STEPS,
    )
    step = FusedStep(plan, kv)
    places = [torch.full((ROWS,), index, dtype=torch.int32, device=plan.device) for index in range(STEPS)]
    with torch.no_grad():
        for index in range(len(plan.layers)):
            reason = compare_layer(step, index, places, calls)
            if reason is not None:
                return reason
        last = calls[plan.norm.module].given
        reason = beyond(step.logits(last[:, -1]), logits[:, -1], plan, "its head")
        if reason is not None:
            return reason
        got = torch.stack([step(tokens[:, index], places[index]) for index in range(STEPS)], dim=1)
    if plan.experts_configs and plan.dtype is not torch.float32:
        # Where two experts are nearly as good, a rounding decides between them; each layer has been compared.
        return None
    return beyond(got, logits, plan, "the whole step", len(plan.layers))


def compare_layer(step: FusedStep, index: int, places: list[Tensor], calls: dict[nn.Module, ModuleCall]) -> str | None:
    """One layer on the plain layer's input; with an MLP of its own, what that is given."""
    plan, layer = step.plan, step.plan.layers[index]
    whole = calls[plan.names[layer.name]]
    got = []
    for position, place in enumerate(places):
        given, angles = whole.given[:, position], step.angles(place)
        if layer.down is None:
            got.append(step.normed(layer.mlp_norm, step.attention(index, given, place, angles)))
        else:
            got.append(step.layer(index, given, place, angles) - given)
    fused = torch.stack(got, dim=1)
    plain = calls[layer.mlp].given.view_as(fused) if layer.down is None else whole.output - whole.given
    # The sums round what the layer adds to, too.
    slack = 0.0 if layer.down is None else torch.finfo(plan.dtype).eps * float(whole.output.abs().max())
    return beyond(fused, plain, plan, layer.name, slack=slack)


def beyond(
    got: Tensor, expected: Tensor, plan: FusedPlan, what: str, layers: int = 1, slack: float = 0.0
) -> str | None:
    """The reason where two results differ by more than the roundings of so many layers. Never lets a NaN pass."""
    tolerance = proof_tolerance(plan.dtype, layers)
    largest = float(expected.double().abs().max())
    difference = float((got.double() - expected.double()).abs().max())
    if difference <= tolerance * largest + slack:
        return None
    return f"{what} differs from the plain model by {difference:.2g}, where {tolerance:.2g} of {largest:.2g} is allowed"
