"""The fused step against the plain model on random tokens, before it is used: half a layer at a time, then all of it.

Each half is given the plain model's own input, so that a difference is that half's. The bound follows from what the two
ways can differ in. Attention's half rounds at most 15 times (norm 2, qkv, heads' norm 2, rotation 3, scores,
probabilities, their sum, o, norm behind it 2, residual sum), in both ways 30 times, each by u / sqrt(3) on average with
u the unit roundoff; they add up as their squares do: 3.2 u. The MLP's half rounds less. Twice that, for the largest
element instead of the average one, is what is allowed: 6 u of the largest change that the half makes. From end to end
it is sqrt(2 * layers + 1) times as much of the largest logit. Sums over thousands of float32 products differ by more
than 6 u, so in float32 it is 1e-4.

A prompt of all tokens goes first. Steps read the keys and values that it wrote, and write their own over them.

One sequence, so that only the kernels of one row are needed before the first token; `onegpu.decoder.fused.rows` holds
more rows against one, when they first come. All that is compared is read by the host at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch
from torch import Tensor, nn

from onegpu.decoder.cache import KVCache
from onegpu.decoder.fused.plan import FusedPlan, LayerPlan
from onegpu.decoder.fused.probe import ModuleCall, PlainRun, watched
from onegpu.decoder.fused.prompt import Angles, FusedPrompt
from onegpu.decoder.fused.rehearse import layer_shapes, prompt_products, rehearse, rehearse_prompt
from onegpu.decoder.fused.step import FusedStep
from onegpu.decoder.views import Segment
from onegpu.errors import OneGpuError
from onegpu.kernels.compile_ahead import compile_ahead
from onegpu.nn import QuantLinear8bit
from onegpu.nn.definition import by_definition

__all__ = ["STEPS", "proof_tolerance", "prove"]

ROWS: Final = 1
STEPS: Final = 6
SEED: Final = 0
# A step with nothing before it, one with a token before it, and the last one; where a prompt wrote the keys between.
FEW: Final = (0, 1, STEPS - 1)
ALL: Final = tuple(range(STEPS))
# So small that every column of x is an outlier, which LLM.int8() multiplies in 16 bit.
ALL_OUTLIERS: Final = 1e-30


def proof_tolerance(dtype: torch.dtype, halves: int = 1) -> float:
    """Largest difference allowed after so many halves of a layer, as a part of the largest value; see above."""
    return float(max(6 * torch.finfo(dtype).eps / 2, 1e-4) * halves**0.5)


def prove(plan: FusedPlan, seen: PlainRun | None = None) -> str | None:
    """None where the fused step does what the plain model does, else what differs; the weights are then split again.

    The plan is joined afterwards. Waits for the device.

    Args:
        seen: a run of the plain model on `STEPS` tokens; without one, or where it lacks a layer, it is run here.
    """
    try:
        run = seen if seen is not None and is_enough(plan, seen) else plain_run(plan)
        plan.join()
        compile_ahead(partial(rehearse_all, plan), plan.device, prompt_products(plan))
        kv = KVCache(layer_shapes(plan), ROWS, STEPS)
        plan.why_not_prompts = compare_prompts(plan, kv, run.calls)
        reason = None
        if plan.why_not_prompts is None:
            reason = compare(plan, kv, FEW, run)
        if plan.why_not_prompts is not None or reason is not None:
            # Steps may be right where prompts are not.
            plan.why_not_prompts = plan.why_not_prompts or reason
            reason = compare(plan, KVCache(layer_shapes(plan), ROWS, STEPS), ALL, run)
    except OneGpuError as error:
        reason = error.message
    if reason is not None:
        plan.split()
    return reason


def is_enough(plan: FusedPlan, seen: PlainRun) -> bool:
    """Whether a run has every layer, and no 8-bit layer that rounded its input to int8."""
    if seen.tokens.shape != (ROWS, STEPS) or not all(module in seen.calls for module in compared(plan)):
        return False
    return plan.device.type != "cpu" or not any(isinstance(m, QuantLinear8bit) for m in plan.model.modules())


def compared(plan: FusedPlan) -> list[nn.Module]:
    """The modules that halves are compared with, and the last norm."""
    modules: list[nn.Module] = [plan.norm.module]
    for layer in plan.layers:
        modules += [plan.names[layer.name], middle_of(layer)]
    return modules


def plain_run(plan: FusedPlan) -> PlainRun:
    """The plain model without a cache on random tokens [ROWS, STEPS], and what its layers were given and gave."""
    generator = torch.Generator().manual_seed(SEED)
    size = min(plan.vocab_size, int(plan.embed.num_embeddings))  # type: ignore[arg-type]
    tokens = torch.randint(0, size, (ROWS, STEPS), generator=generator).to(plan.device)
    calls: list[ModuleCall] = []
    with torch.no_grad(), exact_int8(plan), by_definition(plan.model), watched(compared(plan), calls):
        logits: Tensor = plan.model(input_ids=tokens, use_cache=False).logits
    return PlainRun(tokens, logits, {call.module: call for call in calls})


def rehearse_all(plan: FusedPlan) -> None:
    """What a step of one row launches, and a prompt."""
    rehearse(plan, ROWS)
    rehearse_prompt(plan)


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


@dataclass(frozen=True, slots=True)
class Difference:
    """How far two results are apart, the largest value of the plain one, and what is allowed beside its share."""

    what: str
    tolerance: float
    difference: Tensor
    largest: Tensor
    slack: Tensor


def compare(plan: FusedPlan, kv: KVCache, positions: tuple[int, ...], run: PlainRun) -> str | None:
    """What differs at some positions of a step over a cache that holds the others before them, or None."""
    tokens, logits, calls = run.tokens, run.logits, run.calls
    step = FusedStep(plan, kv)
    places = [torch.full((ROWS,), index, dtype=torch.int32, device=plan.device) for index in range(STEPS)]
    with torch.no_grad():
        chosen = [(position, places[position], step.angles(places[position])) for position in positions]
        halves = (compare_halves(step, index, chosen, calls) for index in range(len(plan.layers)))
        found = [part for both in halves for part in both]
        last = calls[plan.norm.module].given
        found.append(apart(step.logits(last[:, -1]), logits[:, -1], plan, "its head"))
        # Where two experts are nearly as good, a rounding decides between them; each layer is compared.
        if not plan.experts_configs or plan.dtype is torch.float32:
            # The keys and values of the tokens before are those of the halves.
            got = step(tokens[:, -1], places[-1])
            found.append(apart(got, logits[:, -1], plan, "the whole step", 2 * len(plan.layers) + 1))
    return first_beyond(found)


def compare_prompts(plan: FusedPlan, kv: KVCache, calls: dict[nn.Module, ModuleCall]) -> str | None:
    """What differs in the attention of a prompt, all tokens at once; what else it does, a step does row by row.

    Its keys and values are in the cache afterwards.
    """
    prompt = FusedPrompt(plan, kv, STEPS)
    with torch.no_grad():
        inputs = prompt.inputs((Segment(0, 0, STEPS),), (STEPS - 1,), plan.device)
        angles = prompt.angles(inputs)
        found = []
        for index, layer in enumerate(plan.layers):
            given = calls[plan.names[layer.name]].given[:1]
            middle = calls[middle_of(layer)].given.view(-1, *given.shape[1:])[:1]
            got = prompt.attention(index, given[0], inputs, angles)[None]
            found.append(change_apart(plan, given, middle, got, f"attention of a prompt of {layer.name}"))
    return first_beyond(found)


def middle_of(layer: LayerPlan) -> nn.Module:
    """The module that is given the hidden states between the halves."""
    return layer.mlp if layer.mlp_norm is None else layer.mlp_norm.module


def compare_halves(
    step: FusedStep, index: int, chosen: list[tuple[int, Tensor, Angles]], calls: dict[nn.Module, ModuleCall]
) -> list[Difference]:
    """Both halves of a layer on what the plain layer's are given; an MLP run by its own forward is not compared.

    `chosen`: positions in order, as numbers and as a step takes them, with their angles. The MLP, to which positions
    are nothing, is compared at the first and the last.
    """
    plan, layer = step.plan, step.plan.layers[index]
    whole = calls[plan.names[layer.name]]
    middle = calls[middle_of(layer)].given.view_as(whole.given)
    attended = [step.attention(index, whole.given[:, position], place, angles) for position, place, angles in chosen]
    numbers = [position for position, _, _ in chosen]
    before, plain = take(whole.given, numbers), take(middle, numbers)
    found = [change_apart(plan, before, plain, torch.stack(attended, dim=1), f"attention of {layer.name}")]
    if layer.down is not None:
        ends = [numbers[0], numbers[-1]]
        last = [step.mlp(layer, middle[:, position]) for position in ends]
        before, plain = take(middle, ends), take(whole.output, ends)
        found.append(change_apart(plan, before, plain, torch.stack(last, dim=1), f"the MLP of {layer.name}"))
    return found


def take(states: Tensor, positions: list[int]) -> Tensor:
    """[ROWS, len(positions), hidden] of [ROWS, STEPS, hidden]."""
    return torch.stack([states[:, position] for position in positions], dim=1)


def change_apart(plan: FusedPlan, before: Tensor, plain: Tensor, fused: Tensor, what: str) -> Difference:
    """What a half adds to the hidden states; their sum is rounded too."""
    slack = plain.abs().max().double() * torch.finfo(plan.dtype).eps
    return apart(fused.double() - before, plain.double() - before, plan, what, slack=slack)


def apart(
    got: Tensor, expected: Tensor, plan: FusedPlan, what: str, halves: int = 1, slack: Tensor | None = None
) -> Difference:
    """Two results that may differ by the roundings of so many halves."""
    largest = expected.double().abs().max()
    return Difference(
        what,
        proof_tolerance(plan.dtype, halves),
        (got.double() - expected.double()).abs().max(),
        largest,
        torch.zeros_like(largest) if slack is None else slack,
    )


def first_beyond(found: list[Difference], other: str = "the plain model") -> str | None:
    """The first that differs by more than is allowed, in a sentence. Never lets a NaN pass. Waits for the device."""
    numbers = torch.stack([torch.stack((each.difference, each.largest, each.slack)) for each in found]).tolist()
    for each, (difference, largest, slack) in zip(found, numbers, strict=True):
        if not difference <= each.tolerance * largest + slack:
            allowed = f"{each.tolerance:.2g} of {largest:.2g} is allowed"
            return f"{each.what} differs from {other} by {difference:.2g}, where {allowed}"
    return None
