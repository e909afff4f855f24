"""What an optimized decoder carries: how it is run, the slots it has, and how each generation went.

prepare     what the model is now -> the way through it, proved, or the reason for Transformers' own loop
workspace   slots for a batch of this size, those there are if they do
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from typing import Any

import torch
from torch import nn

from onegpu.decoder.condition import Condition, condition_of
from onegpu.decoder.options import DecoderOptions
from onegpu.decoder.room import check_fits
from onegpu.decoder.state import StepState
from onegpu.decoder.ways import Way, find_way
from onegpu.decoder.workspace import Workspace, bucket, capacity_bucket
from onegpu.errors import UnsupportedError

__all__ = ["Driver", "Way"]

# Slots of other sizes are kept beside those in use as long as all together are no more than this.
MAX_WORKSPACES = 4
KEPT_BYTES = 2**30


class Driver:
    """The generation of one model, which it does not keep alive."""

    def __init__(self, model: nn.Module, options: DecoderOptions) -> None:
        self.reference = weakref.ref(model)
        self.options = options
        self.outcomes: Counter[str] = Counter()
        self.workspaces: list[tuple[Workspace, int]] = []
        self.condition: Condition | None = None
        self.way: Way | str = "not looked at yet"
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
            self.way = now.reason or find_way(self.model, self.options, now.device)
            # Joining weights moved them.
            self.condition = condition_of(self.model)
        return self.way

    def undo(self) -> None:
        """Give back slots and graphs, and the weights the memory they had."""
        self.release()
        if isinstance(self.way, Way) and self.way.plan is not None:
            self.way.plan.split()
        self.way = "not looked at yet"

    def workspace(self, rows: int, tokens: int, source: int = 0) -> Workspace:
        """Slots for `rows` sequences of `tokens` tokens that no engine runs over.

        Args:
            source: how many states of an encoder each looks at.

        Raises:
            DoesNotFitError: there is no room for them.
        """
        way = self.way
        assert isinstance(way, Way)
        places = way.source_places(source)
        for number, (found, _) in enumerate(self.workspaces):
            is_enough = found.kv.slots >= rows and found.kv.capacity >= tokens
            if found.user() is None and is_enough and getattr(found.kv, "source", 0) == places:
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
        kv = way.memory(slots, capacity, places)
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
