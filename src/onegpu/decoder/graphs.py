"""A step captured in a CUDA graph: everything it reads and writes stays where it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["capture"]


def capture(body: Callable[[], None], writes: Sequence[Tensor], pool: Any) -> Callable[[], None]:
    """Run `body` once beside the current stream, undo what it wrote, and capture it; gives what replays it.

    Args:
        writes: buffers that the body changes and that must be as before the first replay. What it writes into the
            cache the first replay writes again.
        pool: a graph memory pool to share with other graphs that never run at the same time.

    Raises:
        Exception: whatever the body raises while it is captured, such as one that waits for the host.
    """
    saved = [buffer.clone() for buffer in writes]
    random = torch.cuda.get_rng_state()
    side: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.stream(side):
            body()
        torch.cuda.current_stream().wait_stream(side)
        restore(writes, saved)
        torch.cuda.set_rng_state(random)
        # Only this thread's calls are forbidden meanwhile: another may be tokenizing into pinned memory.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            body()
    except BaseException:
        torch.cuda.current_stream().wait_stream(side)
        restore(writes, saved)
        torch.cuda.set_rng_state(random)
        raise
    return graph.replay


def restore(buffers: Sequence[Tensor], saved: Sequence[Tensor]) -> None:
    """Put saved contents back."""
    for buffer, old in zip(buffers, saved, strict=True):
        buffer.copy_(old)
