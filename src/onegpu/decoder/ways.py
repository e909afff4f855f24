"""The ways through a model, tried in order, each against the plain model.

slots     Transformers' layers, attention over our slots      fused     recognised layers as a few kernels
masked    layers that compute attention themselves            crossed   decoders that look at an encoder's states
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from onegpu.decoder.arguments import vocabulary_of
from onegpu.decoder.cache import KVCache, LayerShape
from onegpu.decoder.crossed import CrossedCache, CrossedPrefill, CrossedStep
from onegpu.decoder.crossed_proof import CrossedTrial, make_crossed_trial, why_not_crossed
from onegpu.decoder.fused import CheckedStep, FusedPlan, FusedPrompt, prove, recognise
from onegpu.decoder.masked import MaskedPrefill, MaskedStep
from onegpu.decoder.options import DecoderOptions
from onegpu.decoder.prove import Trial, layer_shapes, make_trial, why_not_equal
from onegpu.decoder.step import StepForward
from onegpu.decoder.universal import UniversalPrefill, UniversalStep
from onegpu.decoder.views import SlotView
from onegpu.errors import UnsupportedError

__all__ = ["Way", "find_way"]

UNLIMITED = 2**62
# Places for an encoder's states are made in steps of so many, where a mask can hide the rest.
SOURCE_STEP = 64


@dataclass(frozen=True, slots=True)
class Way:
    """How a model is run: `name` of the way, its layers' shapes, and what makes prefill and step over a cache.

    `chunk` is how many tokens of prompts one forward takes, `limit` the largest slot that the layers can take whole.
    `cross_shapes` and `width` are the encoder's side of decoders that have one; `masks_source`: its states may be
    followed by places that a mask hides.
    """

    name: str
    shapes: list[LayerShape]
    vocab_size: int
    prefill: Callable[[nn.Module, Any], Any]
    step: Callable[[nn.Module, Any], StepForward]
    chunk: int = UNLIMITED
    kv_cache_dtype: str | None = None
    limit: int = UNLIMITED
    cross_shapes: tuple[LayerShape, ...] = ()
    width: int = 0
    masks_source: bool = False
    plan: FusedPlan | None = None
    notes: tuple[str, ...] = ()

    def memory(self, slots: int, capacity: int, source: int = 0) -> KVCache:
        """Slots of `capacity` tokens, with `source` places of an encoder's states each where there is one."""
        if self.cross_shapes:
            return CrossedCache(self.shapes, self.cross_shapes, slots, capacity, source, self.width)
        return KVCache(self.shapes, slots, capacity, self.kv_cache_dtype)

    def source_places(self, length: int) -> int:
        """Places to make for an encoder's states of some length."""
        return -(-length // SOURCE_STEP) * SOURCE_STEP if self.masks_source else length


def find_way(model: nn.Module, options: DecoderOptions, device: torch.device) -> Way | str:
    """The best way that is proved; a str is the reason for Transformers' own loop. Weights may come to lie joined."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        vocabulary = vocabulary_of(model)
        if vocabulary is None:
            return "its input embeddings are no table of tokens"
        config: Any = model.config
        if getattr(config, "is_encoder_decoder", False):
            return find_crossed(model, vocabulary, device)
        return find_decoder(model, options, vocabulary, device)
    finally:
        for module in training:
            module.training = True


def find_decoder(model: nn.Module, options: DecoderOptions, vocabulary: int, device: torch.device) -> Way | str:
    """The way through a model that is a decoder alone."""
    try:
        trial, cache = make_trial(model, vocabulary, device)
    except Exception as error:
        return f"it does not run on token ids alone ({type(error).__name__})"
    shapes = layer_shapes(cache)
    if isinstance(shapes, str):
        return shapes
    columns = trial.logits.shape[-1]
    slots = Way(
        "slots", shapes, columns, UniversalPrefill, UniversalStep, options.prefill_chunk, options.kv_cache_dtype
    )
    fused = fuse(model, slots, trial) if (device.type != "cpu" if options.fused is None else options.fused) else None
    if isinstance(fused, Way) and not may_leave(fused):
        return fused
    reason = why_not(model, slots, trial)
    if reason is None:
        return fused if isinstance(fused, Way) else replace(slots, notes=() if fused is None else (fused,))
    if isinstance(fused, Way) and fused.plan is not None:
        fused.plan.split()
    masked = Way(
        "masked", shapes, columns, MaskedPrefill, MaskedStep, limit=positions_of(model), notes=(f"over slots {reason}",)
    )
    second = why_not(model, masked, trial)
    return masked if second is None else f"over slots {reason}; with a mask over whole slots {second}"


def fuse(model: nn.Module, slots: Way, trial: Trial) -> Way | str:
    """The same way with a fused step, where the structure is known and proved; else the sentence why not."""
    plan = recognise(model)
    if isinstance(plan, str):
        return f"its layers are not fused: {plan}"
    reason = prove(plan, trial.seen)
    whole = FusedPrompts(plan, slots.chunk)
    # A plan is kept by its model, which it must not keep alive.
    plan.model = weakref.proxy(model)  # type: ignore[assignment]
    if reason is None:
        notes = tuple(plan.report()[1:])
        way = replace(slots, name="fused", prefill=whole, step=FusedSteps(plan), plan=plan, notes=notes)
        why_not_prompts = plan.why_not_prompts or why_not(model, way, trial)
        if why_not_prompts is None:
            return way
        notes += (f"prompts go through its own layers: {why_not_prompts}",)
        way = replace(way, prefill=UniversalPrefill, notes=notes)
        reason = why_not(model, way, trial)
        if reason is None:
            return way
        plan.split()
    return f"its layers are not fused: {reason}"


def may_leave(way: Way) -> bool:
    """Whether a fused way takes the universal step for some caches, which then must be proved as well."""
    return way.plan is None or any(rotary.max_positions is not None for rotary in way.plan.rotaries)


def why_not(model: nn.Module, way: Way, trial: Trial) -> str | None:
    """Prove a way on small slots, in the model's own dtype."""
    # Keys and values in 8 bit are less exact by choice: what is proved is the way.
    kv = replace(way, kv_cache_dtype=None).memory(len(trial.prompts), trial.capacity)
    prefill, step = way.prefill(model, kv), way.step(model, kv)
    chunks = way.chunk != UNLIMITED
    if way.name == "fused" and not isinstance(step, UniversalStep):
        # More rows of a fused step are held against one when they first come. Steps are proved by `prove`: here they
        # read what a prompt, and a step behind it, has written.
        reason = why_not_equal(trial, prefill, step, chunks, rows=1, steps=2)
    else:
        reason = why_not_equal(trial, prefill, step, chunks)
    asked = windows_asked(way, prefill, step)
    if way.name != "masked" and (asked is None or len(asked) < len(way.shapes)):
        return "its layers compute attention themselves"
    windows = {index: shape.window for index, shape in enumerate(way.shapes)}
    if reason is None and asked is not None and asked != windows:
        return "its layers' sliding windows are not those of its cache"
    return reason


def windows_asked(way: Way, prefill: Any, step: StepForward) -> dict[int, int | None] | None:
    """The window that each layer's attention asked for in the last forward; None where there was none of ours."""
    view: SlotView | None = None
    if isinstance(step, UniversalStep):
        view = step.view
    elif isinstance(prefill, UniversalPrefill):
        view = prefill.view
    elif way.plan is not None:
        return dict(enumerate(way.plan.windows))
    return None if view is None else view.windows


def find_crossed(model: nn.Module, vocabulary: int, device: torch.device) -> Way | str:
    """The way through the decoder of a model with an encoder: with masked places behind its states, or without."""
    try:
        trial = make_crossed_trial(model, vocabulary, device)
    except Exception as error:
        return f"its decoder does not run on an encoder's states alone ({type(error).__name__})"
    if isinstance(trial, str):
        return trial
    first = crossed_way(model, trial, masks_source=True)
    reason = why_not_crossed(trial, model, first)
    if reason is None:
        return first
    second = replace(first, masks_source=False)
    return second if why_not_crossed(trial, model, second) is None else f"over whole slots {reason}"


def crossed_way(model: nn.Module, trial: CrossedTrial, masks_source: bool) -> Way:
    """The way as far as a trial tells it."""
    return Way(
        "crossed",
        trial.shapes,
        trial.logits.shape[-1],
        CrossedPrefill,
        CrossedStep,
        limit=positions_of(model),
        cross_shapes=tuple(trial.cross_shapes),
        width=trial.hidden.shape[-1],
        masks_source=masks_source,
    )


class FusedPrompts:
    """Makes the fused prompt over a cache, or the universal one where the cache is too long for it."""

    def __init__(self, plan: FusedPlan, chunk: int) -> None:
        self.plan, self.chunk = plan, chunk

    def __call__(self, model: nn.Module, kv: KVCache) -> FusedPrompt | UniversalPrefill:
        try:
            return FusedPrompt(self.plan, kv, self.chunk)
        except UnsupportedError:
            return UniversalPrefill(model, kv)


class FusedSteps:
    """Makes the fused step over a cache, or the universal one where the cache is too long for it."""

    def __init__(self, plan: FusedPlan) -> None:
        self.plan = plan
        self.known: dict[int, str | None] = {}

    def __call__(self, model: nn.Module, kv: KVCache) -> StepForward:
        try:
            return CheckedStep(self.plan, kv, self.known)
        except UnsupportedError:
            return UniversalStep(model, kv)


def positions_of(model: nn.Module) -> int:
    """How many positions a model was made for; a table of them, or of who sees whom, ends there."""
    config: Any = model.config
    for name in ("max_target_positions", "max_position_embeddings", "block_size"):
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    return UNLIMITED
