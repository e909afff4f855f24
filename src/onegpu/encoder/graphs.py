"""CUDA graphs of a stack's layers, one per bucket, captured the second time a bucket is seen.

A graph reads fixed addresses: the hidden states, the batch's arrays and every other tensor the layers are given get
buffers of their own, filled before each replay. Parameters are read where they are, so a change in place is seen;
a parameter, buffer or module that was exchanged is noticed, and all graphs are captured anew.
"""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from onegpu.attention.unpadded import AttentionView, RelativeBias, UnpaddedBatch, unpad_input
from onegpu.attention.varlen import flash_allowed
from onegpu.encoder.run import Program, fixed_view, run_program

__all__ = ["GraphCache", "Snapshot", "capture_cuda", "record_on_host"]

MAX_GRAPHS = 48
MAX_TOKENS = 65536

Body = Callable[[], Tensor]
# Runs the body once and gives what repeats it, and the tensor that holds its result after each repetition.
Capture = Callable[[Body], tuple[Callable[[], None], Tensor]]


@dataclass(frozen=True, slots=True)
class Captured:
    """One graph and the buffers it reads and writes."""

    replay: Callable[[], None]
    hidden: Tensor
    batch: UnpaddedBatch | None
    tensors: tuple[Tensor, ...]
    output: Tensor


class Snapshot:
    """Which tensors and modules the layers were made of, to notice an exchange. Asked before every replay."""

    def __init__(self, layers: list[nn.Module]) -> None:
        modules = [m for layer in layers for m in layer.modules()]
        self.tables: list[Any] = [t for m in modules for t in (m._modules, m._parameters, m._buffers) if t]
        self.parts = self.current()
        self.tensors = [part for part in self.parts if isinstance(part, Tensor)]
        self.addresses = [t.data_ptr() for t in self.tensors]

    def current(self) -> list[Any]:
        return [part for table in self.tables for part in table.values()]

    def holds(self) -> bool:
        """Whether everything is still the same object at the same address."""
        now = self.current()
        if len(now) != len(self.parts) or not all(map(operator.is_, now, self.parts)):
            return False
        return [t.data_ptr() for t in self.tensors] == self.addresses


@dataclass(slots=True)
class GraphCache:
    """Graphs by what they were captured for; the least used goes first."""

    capture: Capture | None = None
    works_anywhere: bool = False  # for tests: note down and replay on any device
    captured: OrderedDict[tuple[Any, ...], Captured] = field(default_factory=OrderedDict)
    seen: set[tuple[Any, ...]] = field(default_factory=set)
    snapshot: Snapshot | None = None
    refused: str = ""
    pool: Any = None

    def clear(self) -> None:
        """Forget every graph."""
        self.captured.clear()
        self.seen.clear()
        self.snapshot = None
        self.pool = None

    def refresh(self, layers: list[nn.Module]) -> None:
        """Forget every graph if anything they were captured from was exchanged since."""
        if self.snapshot is None or not self.snapshot.holds():
            self.clear()
            self.snapshot = Snapshot(layers)

    def run(self, program: Program, hidden: Tensor, batch: UnpaddedBatch | None) -> Tensor:
        """Hidden states [B, S, hidden] through the layers: [1, T, hidden], or [B, S, hidden] without padding.

        The result is the caller's own until the next call where it is unpadded; where it is not, for good.
        """
        size = hidden.shape[0] * hidden.shape[1] if batch is None else batch.indices.numel()
        if self.refused or size > MAX_TOKENS:
            return run_program(program, enter(hidden, batch))
        tensors = outside_tensors(program)
        key = key_of(program, hidden, batch, tensors)
        entry = self.captured.get(key)
        if entry is None:
            if key not in self.seen:
                self.seen.add(key)
                return run_program(program, enter(hidden, batch))
            entry = self.make(program, hidden, batch, tensors)
            if entry is None:
                return run_program(program, enter(hidden, batch))
            self.captured[key] = entry
            if len(self.captured) > MAX_GRAPHS:
                self.captured.popitem(last=False)
        self.captured.move_to_end(key)
        fill(entry, hidden, batch, tensors)
        entry.replay()
        return entry.output if batch is not None else entry.output.clone()

    def make(
        self, program: Program, hidden: Tensor, batch: UnpaddedBatch | None, tensors: tuple[Tensor, ...]
    ) -> Captured | None:
        """Capture the program over buffers of its own; None, with the reason in `refused`, where that can't be."""
        with torch.inference_mode(False), torch.no_grad():
            held = tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors)
            kept = None if batch is None else keep(batch)
            shape = hidden.shape if batch is None else (1, batch.indices.numel(), hidden.shape[2])
            entrance = torch.empty(shape, dtype=hidden.dtype, device=hidden.device)
            entry = Captured(lambda: None, entrance, kept, held, entrance)
            fill(entry, hidden, batch, tensors)
            fixed = substitute(program, dict(zip(map(id, tensors), held, strict=True)), kept)
            capture = self.capture or (lambda body: capture_cuda(body, self.cuda_pool()))
            try:
                replay, output = capture(lambda: run_program(fixed, entrance))
            except Exception as error:  # a layer that waits for the host, an operator that can't be captured
                self.refused = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                return None
        return replace(entry, replay=replay, output=output)

    def cuda_pool(self) -> Any:
        """Memory that all graphs of this stack share, since they never run side by side."""
        if self.pool is None:
            self.pool = torch.cuda.graph_pool_handle()
        return self.pool


def enter(hidden: Tensor, batch: UnpaddedBatch | None) -> Tensor:
    return hidden if batch is None else unpad_input(hidden, batch)


def capture_cuda(body: Body, pool: Any) -> tuple[Callable[[], None], Tensor]:
    """Run the body once beside the current stream, then capture it."""
    side: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        body()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # Only this thread's calls are forbidden meanwhile: another may be tokenizing into pinned memory.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        output = body()
    return graph.replay, output


def record_on_host(body: Body) -> tuple[Callable[[], None], Tensor]:
    """The same contract without a GPU: each replay computes anew into the same tensor."""
    output = body()

    def replay() -> None:
        output.copy_(body())

    return replay, output


def keep(batch: UnpaddedBatch) -> UnpaddedBatch:
    """The batch with arrays of its own, which later batches of the same bucket are copied into."""
    return replace(
        batch, indices=batch.indices.clone(), positions=batch.positions.clone(), cu_seqlens=batch.cu_seqlens.clone()
    )


def fill(entry: Captured, hidden: Tensor, batch: UnpaddedBatch | None, tensors: tuple[Tensor, ...]) -> None:
    """Put this forward's values where the graph reads them."""
    if batch is None or entry.batch is None:
        entry.hidden.copy_(hidden)
    else:
        torch.index_select(hidden.flatten(0, 1), 0, batch.indices, out=entry.hidden[0])
        entry.batch.positions.copy_(batch.positions)
        entry.batch.cu_seqlens.copy_(batch.cu_seqlens)
    for buffer, value in zip(entry.tensors, tensors, strict=True):
        buffer.copy_(value)


def outside_tensors(program: Program) -> tuple[Tensor, ...]:
    """Every tensor the layers are given beside hidden states and batch, each once."""
    found: dict[int, Tensor] = {}

    def visit(value: Any) -> None:
        if isinstance(value, Tensor):
            found.setdefault(id(value), value)
        elif isinstance(value, RelativeBias):
            visit(value.table)
        elif isinstance(value, tuple):
            for part in value:
                visit(part)

    for _, rest in program:
        for value in rest.values():
            visit(value)
    return tuple(found.values())


def substitute(program: Program, buffers: dict[int, Tensor], batch: UnpaddedBatch | None) -> Program:
    """The same program over a graph's buffers."""

    def visit(value: Any) -> Any:
        if isinstance(value, Tensor):
            return buffers[id(value)]
        if isinstance(value, RelativeBias):
            return RelativeBias(buffers[id(value.table)], value.make_dense)
        if isinstance(value, AttentionView):
            assert batch is not None
            return fixed_view(value, batch)
        if isinstance(value, tuple):
            return tuple(visit(part) for part in value)
        return value

    return [(call, {name: visit(value) for name, value in rest.items()}) for call, rest in program]


def key_of(
    program: Program, hidden: Tensor, batch: UnpaddedBatch | None, tensors: tuple[Tensor, ...]
) -> tuple[Any, ...]:
    """All that a graph bakes in: sizes, dtypes, options, and what the layers are given that is no tensor."""

    def visit(value: Any) -> Any:
        if isinstance(value, Tensor):
            return (value.shape, value.dtype, value.device)
        if isinstance(value, AttentionView):
            return ("view", value.causal, value.window, value.backend)
        if isinstance(value, RelativeBias):
            return ("bias", value.table.shape)
        if isinstance(value, tuple):
            return tuple(visit(part) for part in value)
        return value

    given = tuple((id(call), *((name, visit(value)) for name, value in rest.items())) for call, rest in program)
    sizes: tuple[Any, ...] = (hidden.shape,)
    if batch is not None:
        # A bias made inside the layers depends on the columns of the padded rows.
        columns = (batch.seqlen + 63) // 64
        sizes = (batch.indices.numel(), batch.cu_seqlens.numel(), batch.max_seqlen, batch.has_holes, columns)
    flags = flash_allowed()
    return (sizes, hidden.shape[2], hidden.dtype, hidden.device, len(tensors), flags, given)
