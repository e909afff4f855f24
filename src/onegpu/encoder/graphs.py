"""CUDA graphs of a stack's layers, one per bucket, captured the second time a bucket is seen.

A graph reads fixed addresses. Where the batch was written to the arena early, and the layers are given nothing else
that depends on it, a replay needs nothing but the bucket's sizes (`quick`). Else hidden states, the batch's arrays and
every other tensor have buffers, filled before each replay. All graphs of a stack share buffers, since they never run
side by side. Parameters are read where they are, so a change in place is seen; a parameter, buffer or module that was
exchanged is noticed, and all graphs are captured anew.
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
from onegpu.encoder.arena import Arena, Sizes, close_bounds
from onegpu.encoder.embeddings import LateEmbedding
from onegpu.encoder.program import Program, outside_tensors, run_program, substitute, with_batch

__all__ = ["GraphCache", "Snapshot", "capture_cuda", "record_on_host"]

# A text encoder's batches of one kind take about ten; each costs a megabyte or two.
MAX_GRAPHS = 192
MAX_TOKENS = 65536

Body = Callable[[], Tensor]
# What the layers begin with: embeddings [B, S, hidden], or the call that will make them.
Start = Tensor | LateEmbedding
# Runs the body once and gives what repeats it, and the tensor that holds its result after each repetition.
Capture = Callable[[Body], tuple[Callable[[], None], Tensor]]


@dataclass(frozen=True, slots=True)
class Captured:
    """One graph and the buffers it reads and writes; `batch` is None where it reads the arena or has no padding."""

    replay: Callable[[], None]
    hidden: Tensor | None  # None where the embeddings are computed inside
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
    captured: OrderedDict[int, Captured] = field(default_factory=OrderedDict)
    numbers: dict[tuple[Any, ...], int] = field(default_factory=dict)  # a short name for each key
    seen: set[int] = field(default_factory=set)
    quick: dict[tuple[int, Sizes], int] = field(default_factory=dict)
    snapshot: Snapshot | None = None
    refused: str = ""
    pool: Any = None
    arena: Arena | None = None
    buffers: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of the model begins without graphs: these read the original's weights."""
        return GraphCache, (self.capture, self.works_anywhere)

    def clear(self) -> None:
        """Forget every graph."""
        self.captured.clear()
        self.numbers.clear()
        self.seen.clear()
        self.quick.clear()
        self.buffers.clear()
        self.snapshot = None
        self.pool = None

    def arena_on(self, device: torch.device) -> Arena:
        """The arena, made when first asked for. A model that has moved gets another, and graphs anew."""
        if self.arena is None or self.arena.indices.device != device:
            self.clear()
            self.arena = Arena.on(device)
        return self.arena

    def refresh(self, layers: list[nn.Module]) -> None:
        """Forget every graph if anything they were captured from was exchanged since."""
        if self.snapshot is None or not self.snapshot.holds():
            self.clear()
            self.snapshot = Snapshot(layers)

    def number_of(self, key: tuple[Any, ...]) -> int:
        return self.numbers.setdefault(key, len(self.numbers))

    def replay_quickly(self, signature: int, sizes: Sizes, start: Start, batch: Callable[[], UnpaddedBatch]) -> Any:
        """(output, batch) of a graph that reads all but `start` from the arena; None where there is none yet."""
        entry = self.captured.get(self.quick.get((signature, sizes), -1))
        if entry is None:
            return None
        if entry.hidden is not None:
            assert isinstance(start, Tensor)
            assert self.arena is not None
            torch.index_select(start.flatten(0, 1), 0, self.arena.indices[: sizes.tokens], out=entry.hidden[0])
        entry.replay()
        return entry.output, batch()

    def run(
        self,
        program: Program,
        start: Start,
        batch: UnpaddedBatch | None,
        quick: tuple[int, Sizes] | None = None,
        in_arena: bool = False,
    ) -> Tensor:
        """Hidden states [B, S, hidden] through the layers: [1, T, hidden], or [B, S, hidden] without padding.

        The result is the caller's own until the next call where it is unpadded; where it is not, for good.

        Args:
            quick: under which signature and sizes `replay_quickly` finds the graph from now on.
            in_arena: the batch's arrays are the arena's, its bounds still open.
        """
        hidden = start.placeholder if isinstance(start, LateEmbedding) else start
        size = hidden.shape[0] * hidden.shape[1] if batch is None else batch.indices.numel()

        def run_now() -> Tensor:
            if batch is None or not in_arena:
                return run_program(program, enter(start, batch))
            closed = close_bounds(batch)
            return run_program(with_batch(program, closed), enter(start, closed))

        if self.refused or size > MAX_TOKENS:
            return run_now()
        tensors = outside_tensors(program)
        key = self.number_of(key_of(program, start, batch, tensors, in_arena))
        entry = self.captured.get(key)
        if entry is None:
            if key not in self.seen:
                self.seen.add(key)
                return run_now()
            entry = self.make(program, start, batch, tensors, in_arena)
            if entry is None:
                return run_now()
            self.captured[key] = entry
            if len(self.captured) > MAX_GRAPHS:
                self.captured.popitem(last=False)
                self.quick.clear()
        if quick is not None and not tensors:
            self.quick[quick] = key
        self.captured.move_to_end(key)
        fill(entry, hidden, batch, tensors)
        entry.replay()
        return entry.output if batch is not None else entry.output.clone()

    def make(
        self,
        program: Program,
        start: Start,
        batch: UnpaddedBatch | None,
        tensors: tuple[Tensor, ...],
        in_arena: bool,
    ) -> Captured | None:
        """Capture the program over buffers; None, with the reason in `refused`, where that can't be."""
        with torch.inference_mode(False), torch.no_grad():
            held = tuple(self.buffer(f"argument {place}", t.shape, t) for place, t in enumerate(tensors))
            kept = keep(batch) if batch is not None and not in_arena else None
            entrance = None
            if isinstance(start, Tensor):
                shape = start.shape if batch is None else torch.Size((1, batch.indices.numel(), start.shape[2]))
                entrance = self.buffer("entrance", shape, start)
            entry = Captured(lambda: None, entrance, kept, held, torch.empty(0))
            fill(entry, start if isinstance(start, Tensor) else start.placeholder, batch, tensors)
            fixed = substitute(program, dict(zip(map(id, tensors), held, strict=True)))

            def body() -> Tensor:
                used = close_bounds(batch) if in_arena and batch is not None else kept
                if used is not None:
                    used.listed.clear()
                first = entrance if entrance is not None else enter(start, used)
                out = run_program(with_batch(fixed, used, is_fixed=True), first)
                return self.buffer("exit", out.shape, out).copy_(out)

            capture = self.capture or (lambda body: capture_cuda(body, self.cuda_pool()))
            try:
                replay, output = capture(body)
            except Exception as error:  # a layer that waits for the host, an operator that can't be captured
                self.refused = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                return None
        return replace(entry, replay=replay, output=output)

    def buffer(self, name: str, shape: torch.Size, like: Tensor) -> Tensor:
        """Memory under a name, the first part of what all graphs share; more of it where it is too small.

        A graph captured over less keeps what it has. The body runs once before a capture, so that none is made in one.
        """
        key = (name, like.dtype, like.device)
        found = self.buffers.get(key)
        if found is None or found.numel() < shape.numel():
            found = self.buffers[key] = torch.empty(shape.numel() * 5 // 4, dtype=like.dtype, device=like.device)
        return found[: shape.numel()].view(shape)

    def cuda_pool(self) -> Any:
        """Memory that all graphs of this stack share, since they never run side by side."""
        if self.pool is None:
            self.pool = torch.cuda.graph_pool_handle()
        return self.pool


def enter(start: Start, batch: UnpaddedBatch | None) -> Tensor:
    """What goes into the first layer."""
    if isinstance(start, LateEmbedding):
        assert batch is not None
        return start.tokens(batch)
    return start if batch is None else unpad_input(start, batch)


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
    if entry.hidden is not None:
        if batch is None:
            entry.hidden.copy_(hidden)
        else:
            torch.index_select(hidden.flatten(0, 1), 0, batch.indices, out=entry.hidden[0])
    if entry.batch is not None and batch is not None:
        entry.batch.positions.copy_(batch.positions)
        entry.batch.cu_seqlens.copy_(batch.cu_seqlens)
    for buffer, value in zip(entry.tensors, tensors, strict=True):
        buffer.copy_(value)


def key_of(
    program: Program, start: Start, batch: UnpaddedBatch | None, tensors: tuple[Tensor, ...], in_arena: bool
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
    hidden = start.placeholder if isinstance(start, LateEmbedding) else start
    source = (in_arena, start.names if isinstance(start, LateEmbedding) else None)
    sizes: tuple[Any, ...] = (hidden.shape,)
    if batch is not None:
        # A bias made inside the layers depends on the columns of the padded rows.
        columns = (batch.seqlen + 63) // 64
        sizes = (batch.indices.numel(), batch.cu_seqlens.numel(), batch.max_seqlen, batch.has_holes, columns)
    flags = flash_allowed()
    return (sizes, source, hidden.shape[2], hidden.dtype, hidden.device, len(tensors), flags, given)
