"""What an optimized decoder carries: how it is run, the slots it has, and how each generation went.

prepare     what the model is now -> the way through it, proved, or the reason for Transformers' own loop
workspace   slots for a batch of this size, those there are if they do
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from onegpu.decoder.arguments import vocabulary_of
from onegpu.decoder.cache import KVCache, LayerShape
from onegpu.decoder.condition import Condition, condition_of
from onegpu.decoder.fused import FusedPlan, FusedStep, prove, recognise
from onegpu.decoder.masked import MaskedPrefill, MaskedStep
from onegpu.decoder.options import DecoderOptions
from onegpu.decoder.prove import CAPACITY, LENGTHS, Trial, layer_shapes, make_trial, why_not_equal
from onegpu.decoder.room import check_fits
from onegpu.decoder.state import StepState
from onegpu.decoder.step import StepForward
from onegpu.decoder.universal import UniversalPrefill, UniversalStep
from onegpu.decoder.workspace import Workspace, bucket, capacity_bucket
from onegpu.errors import UnsupportedError

__all__ = ["Driver", "Way"]

UNLIMITED = 2**62
# Slots of other sizes are kept beside those in use as long as all together are no more than this.
MAX_WORKSPACES = 4
KEPT_BYTES = 2**30


@dataclass(frozen=True, slots=True)
class Way:
    """How a model is run: `name` of the way, its layers' shapes, and what makes prefill and step over a cache.

    `limit` is the largest slot that its layers can take whole.
    """

    name: str
    shapes: list[LayerShape]
    vocab_size: int
    prefill: Callable[[nn.Module, KVCache], Any]
    step: Callable[[nn.Module, KVCache], StepForward]
    chunk: int
    kv_cache_dtype: str | None
    limit: int = UNLIMITED
    notes: tuple[str, ...] = ()


class Driver:
    """The generation of one model, which it does not keep alive."""

    def __init__(self, model: nn.Module, options: DecoderOptions) -> None:
        self.reference = weakref.ref(model)
        self.options = options
        self.outcomes: Counter[str] = Counter()
        self.workspaces: list[tuple[Workspace, int]] = []
        self.condition: Condition | None = None
        self.way: Way | str = "not looked at yet"
        self.plan: FusedPlan | None = None
        self.lock = threading.RLock()
        self.bypass: str | None = None  # a reason against the call under way, known where it began

    def __deepcopy__(self, memo: dict[int, Any]) -> Driver:
        """A copied model gets a driver of its own, which looks at it when it first generates."""
        return Driver.forgotten(self.options)

    def __reduce__(self) -> tuple[Any, ...]:
        return Driver.forgotten, (self.options,)

    @classmethod
    def forgotten(cls, options: DecoderOptions) -> Driver:
        """A driver whose model is not known yet."""
        return cls(nn.Module(), options)

    def attach(self, model: nn.Module) -> None:
        """Make sure that `model` is the one driven."""
        if self.reference() is not model:
            self.reference = weakref.ref(model)
            self.condition = None

    @property
    def model(self) -> nn.Module:
        """The model.

        Raises:
            UnsupportedError: it was deleted.
        """
        model = self.reference()
        if model is None:
            raise UnsupportedError("the model of this generation was deleted")
        return model

    @property
    def device(self) -> torch.device:
        """Where it lives."""
        return self.condition.device if self.condition is not None else torch.device("cpu")

    def prepare(self) -> Way | str:
        """The way through the model as it is now; a str is the reason for Transformers' own loop."""
        with self.lock, torch.inference_mode(False), torch.no_grad():
            return self.look()

    def look(self) -> Way | str:
        """See `prepare`."""
        now = condition_of(self.model)
        if self.condition is None or now.fingerprint != self.condition.fingerprint:
            self.undo()
            self.condition = now
            self.way = now.reason or self.find_way()
            # Joining weights moved them.
            self.condition = condition_of(self.model)
        return self.way

    def undo(self) -> None:
        """Give back slots and graphs, and the weights the memory they had."""
        self.release()
        plan, self.plan = self.plan, None
        if plan is not None:
            plan.split()

    def find_way(self) -> Way | str:
        """Try the ways in order, each against the plain model."""
        model = self.model
        if getattr(model.config, "is_encoder_decoder", False):
            return "it has an encoder, whose decoder has no fast way yet"
        training = [module for module in model.modules() if module.training]
        try:
            for module in training:
                module.training = False
            return self.try_ways()
        finally:
            for module in training:
                module.training = True

    def try_ways(self) -> Way | str:
        """See `find_way`."""
        model = self.model
        vocabulary = vocabulary_of(model)
        if vocabulary is None:
            return "its input embeddings are no table of tokens"
        try:
            trial, cache = make_trial(model, vocabulary, self.device)
        except Exception as error:
            return f"it does not run on token ids alone ({type(error).__name__})"
        shapes = layer_shapes(cache)
        if isinstance(shapes, str):
            return shapes
        columns = trial.logits.shape[-1]
        options = self.options
        slots = Way(
            "slots", shapes, columns, UniversalPrefill, UniversalStep, options.prefill_chunk, options.kv_cache_dtype
        )
        reason = self.why_not(slots, trial)
        if reason is None:
            return self.fused(slots, trial) if options.fused else slots
        masked = Way(
            "masked", shapes, columns, MaskedPrefill, MaskedStep, UNLIMITED, None, positions_of(model), (reason,)
        )
        second = self.why_not(masked, trial)
        if second is None:
            return masked
        return f"over slots {reason}; with a mask over whole slots {second}"

    def fused(self, slots: Way, trial: Trial) -> Way:
        """The same way with a fused step, where the structure is known and proved; else as it was, with the reason."""
        plan = recognise(self.model)
        if isinstance(plan, str):
            return replace(slots, notes=(f"its layers are not fused: {plan}",))
        reason = prove(plan)
        # A plan is kept by its model, which it must not keep alive.
        plan.model = weakref.proxy(self.model)  # type: ignore[assignment]
        if reason is None:
            way = replace(slots, name="fused", step=FusedSteps(plan), notes=tuple(plan.report()[1:]))
            reason = self.why_not(way, trial)
            if reason is None:
                self.plan = plan
                return way
            plan.split()
        return replace(slots, notes=(f"its layers are not fused: {reason}",))

    def why_not(self, way: Way, trial: Trial) -> str | None:
        """Prove a way on small slots, in the model's own dtype."""
        model = self.model
        kv = KVCache(way.shapes, len(LENGTHS), CAPACITY)
        prefill, step = way.prefill(model, kv), way.step(model, kv)
        reason = why_not_equal(trial, prefill, step, way.chunk != UNLIMITED)
        view = step.view if isinstance(step, UniversalStep) else prefill.view if way.name == "fused" else None
        if way.name != "masked" and (view is None or len(view.windows) < len(way.shapes)):
            return "its layers compute attention themselves"
        if reason is None and view is not None and view.windows != windows_of(way.shapes):
            return "its layers' sliding windows are not those of its cache"
        return reason

    def workspace(self, rows: int, tokens: int) -> Workspace:
        """Slots for `rows` sequences of `tokens` tokens that no engine runs over.

        Raises:
            DoesNotFitError: there is no room for them.
        """
        way = self.way
        assert isinstance(way, Way)
        for number, (found, _) in enumerate(self.workspaces):
            if found.user() is None and found.kv.slots >= rows and found.kv.capacity >= tokens:
                self.workspaces.append(self.workspaces.pop(number))
                return found
        graphs = self.options.graphs and self.device.type == "cuda"
        slots, capacity = bucket(rows) if graphs else rows, min(capacity_bucket(tokens), way.limit)
        if sum(size for _, size in self.workspaces) > KEPT_BYTES or len(self.workspaces) >= MAX_WORKSPACES:
            self.release()
        try:
            size = check_fits(way.shapes, slots, capacity, way.kv_cache_dtype, self.device)
        except MemoryError:
            self.release()
            size = check_fits(way.shapes, slots, capacity, way.kv_cache_dtype, self.device)
        kv = KVCache(way.shapes, slots, capacity, way.kv_cache_dtype)
        made = Workspace(
            kv=kv,
            state=StepState(slots, capacity, self.device),
            prefill=way.prefill(self.model, kv),
            forward=way.step(self.model, kv),
            use_graphs=graphs,
        )
        self.workspaces.append((made, size))
        return made

    def release(self) -> None:
        """Give all slots and graphs back."""
        self.workspaces.clear()


class FusedSteps:
    """Makes the fused step over a cache, or the universal one where the cache is too long for it."""

    def __init__(self, plan: FusedPlan) -> None:
        self.plan = plan

    def __call__(self, model: nn.Module, kv: KVCache) -> StepForward:
        try:
            return FusedStep(self.plan, kv)
        except UnsupportedError:
            return UniversalStep(model, kv)


def windows_of(shapes: list[LayerShape]) -> dict[int, int | None]:
    """The sliding window of each layer."""
    return {index: shape.window for index, shape in enumerate(shapes)}


def positions_of(model: nn.Module) -> int:
    """How many positions a model was made for; a table of them, or of who sees whom, ends there."""
    config: Any = model.config
    for name in ("max_position_embeddings", "block_size"):
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    return UNLIMITED
