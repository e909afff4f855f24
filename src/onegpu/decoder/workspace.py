"""Slots, step buffers, and the graphs over them: what one size of batch needs, kept from call to call."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from onegpu.decoder.cache import KVCache
from onegpu.decoder.fused import FusedPrompt
from onegpu.decoder.graphs import capture
from onegpu.decoder.prefill_graphs import PrefillGraphs
from onegpu.decoder.sampling import Selection
from onegpu.decoder.state import StepState
from onegpu.decoder.step import Choice, DecodeStep, StepForward
from onegpu.decoder.stopping import StopRule
from onegpu.decoder.universal import UniversalPrefill

__all__ = ["Prefill", "Workspace", "bucket", "capacity_bucket"]

BUCKETS = (1, 2, 4, 8, 16, 32, 64)
SMALLEST_CAPACITY = 256
LARGE_CAPACITY = 4096
MAX_GRAPHS = 16


class Prefill(Protocol):
    """Puts prompts into slots: segments, ids [T] or embeddings [T, hidden], places to keep -> logits [kept, V]."""

    def __call__(self, segments: Any, tokens: Tensor, keep: Any) -> Tensor:
        """Logits [len(keep), V]."""
        ...


def bucket(rows: int) -> int:
    """The number of rows a step is captured for."""
    for size in BUCKETS:
        if rows <= size:
            return size
    return -(-rows // BUCKETS[-1]) * BUCKETS[-1]


def capacity_bucket(tokens: int) -> int:
    """The size of a slot that holds `tokens`: a power of two, from 4,096 on a multiple of it."""
    if tokens > LARGE_CAPACITY:
        return -(-tokens // LARGE_CAPACITY) * LARGE_CAPACITY
    return max(SMALLEST_CAPACITY, 1 << (tokens - 1).bit_length())


@dataclass(slots=True, eq=False)
class Workspace:
    """Memory of `kv.slots` sequences and all that is baked into graphs over it."""

    kv: KVCache
    state: StepState
    prefill: Prefill
    forward: StepForward
    use_graphs: bool
    captured: dict[Hashable, tuple[DecodeStep, Callable[[], None]]] = field(default_factory=dict)
    refused: str | None = None  # why steps run eagerly though graphs were asked for
    pool: Any = None
    user: Callable[[], Any] = lambda: None  # gives the engine that runs over it, as long as there is one
    choices: dict[Hashable, Choice] = field(default_factory=dict)  # with the buffers that graphs hold
    takes_long_prompts: bool = False  # whether a prompt of any length is one row, cut inside where that saves memory

    def __post_init__(self) -> None:
        self.takes_long_prompts = isinstance(self.prefill, FusedPrompt)
        if self.use_graphs and isinstance(self.prefill, (UniversalPrefill, FusedPrompt)):
            self.prefill = PrefillGraphs(self.prefill, self.shared_pool)

    def rows_for(self, rows: int) -> int:
        """The number of rows a step runs for: a bucket where it is captured."""
        return min(bucket(rows), self.kv.slots) if self.use_graphs else rows

    def choice(self, selection: Selection, stop: StopRule, rows: int, pad: int) -> Choice:
        """The buffers of a way of choosing, loaded with its numbers."""
        key = (selection, stop, rows)
        found = self.choices.get(key)
        if found is None:
            if len(self.choices) >= MAX_GRAPHS:
                self.captured.clear()
                self.choices.clear()
            device, width = self.state.device, self.state.history.shape[1]
            states = selection.state(rows, width, device), stop.state(rows, width, device, pad_token_id=pad)
            found = self.choices[key] = Choice(selection, stop, *states)
        selection.load(found.selection_state)
        stop.load(found.stop_state, pad_token_id=pad)
        # What an equal selection does not compare (the host's clocks) is the new one's.
        return Choice(selection, stop, found.selection_state, found.stop_state)

    def runner(self, step: DecodeStep) -> tuple[DecodeStep, Callable[[], None]]:
        """The step to look at and what runs it: a graph where there is one or can be one, else the step itself."""
        if not self.use_graphs or self.refused is not None:
            return step, step
        key = (step.choice.selection, step.choice.stop, step.rows)
        found = self.captured.get(key)
        if found is None:
            try:
                found = step, capture(step, self.state.buffers(), self.shared_pool())
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # a layer that waits for the host
                self.refused = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                return step, step
            if len(self.captured) >= MAX_GRAPHS:
                self.captured.pop(next(iter(self.captured)))
            self.captured[key] = found
        return found

    def shared_pool(self) -> Any:
        """Memory that all graphs here share, since they never run side by side."""
        if self.pool is None:
            self.pool = torch.cuda.graph_pool_handle()
        return self.pool
