"""Short prompts from captured graphs: a prompt alone in its slot, its row filled up to one of a few lengths.

Before a prompt of a few hundred tokens the host takes longer to launch the layers than the device to run them. What
stands behind the prompt's own tokens changes nothing before it: attention is causal, and the places that its keys take
are written again before they are read. A length is captured when it comes for the second time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from onegpu.decoder.cache import KVCache
from onegpu.decoder.graphs import capture
from onegpu.decoder.views import Segment

__all__ = ["CapturablePrefill", "PrefillGraphs"]

LENGTHS = (32, 64, 128, 192, 256, 384, 512)
MAX_GRAPHS = 16


class CapturablePrefill(Protocol):
    """A `Prefill` in two parts: what the host prepares, with `wanted` among it, and what runs on the device alone."""

    @property
    def kv(self) -> KVCache:
        """Where it writes."""
        ...

    def __call__(self, segments: Sequence[Segment], tokens: Tensor, keep: Sequence[int]) -> Tensor:
        """Logits [len(keep), V]; see `UniversalPrefill`."""
        ...

    def inputs(self, segments: Sequence[Segment], keep: Sequence[int], device: torch.device) -> Any:
        """The device's side of a row."""
        ...

    def run(self, tokens: Tensor, inputs: Any) -> Tensor:
        """Logits from inputs on the device."""
        ...


@dataclass(slots=True)
class Captured:
    """The buffers of one graph, and what replays it."""

    tokens: Tensor
    inputs: Any
    logits: Tensor
    replay: Callable[[], None]


class PrefillGraphs:
    """A `Prefill` that replays graphs for short prompts and is `plain` for everything else.

    Args:
        plain: what runs the layers.
        pool: gives the memory pool of graphs that never run side by side.

    `refused` says why nothing is captured, once something could not be.
    """

    def __init__(self, plain: CapturablePrefill, pool: Callable[[], Any]) -> None:
        self.plain = plain
        self.pool = pool
        self.captured: dict[tuple[int, int], Captured] = {}
        self.seen: Counter[tuple[int, int]] = Counter()
        self.refused: str | None = None

    def __call__(self, segments: Sequence[Segment], tokens: Tensor, keep: Sequence[int]) -> Tensor:
        """Logits [len(keep), V]; see `UniversalPrefill`."""
        key = self.key_of(segments, tokens, keep)
        if key is None:
            return self.plain(segments, tokens, keep)
        self.seen[key] += 1
        found = self.captured.get(key)
        if found is None and self.seen[key] > 1 and len(self.captured) < MAX_GRAPHS:
            found = self.capture(*key)
        if found is None:
            return self.plain(segments, tokens, keep)
        found.tokens[: tokens.shape[0]].copy_(tokens)
        found.inputs.wanted.fill_(keep[0])
        found.replay()
        return found.logits.clone()

    def key_of(self, segments: Sequence[Segment], tokens: Tensor, keep: Sequence[int]) -> tuple[int, int] | None:
        """Slot and length of the graph for a row; None where there can be none."""
        if self.refused is not None or len(segments) != 1 or len(keep) != 1 or tokens.is_floating_point():
            return None
        segment = segments[0]
        length = next((size for size in LENGTHS if size >= segment.length), None)
        if segment.start or length is None or length > self.plain.kv.capacity:
            return None
        return segment.slot, length

    def capture(self, slot: int, length: int) -> Captured | None:
        """A graph for one slot and length; None, and `refused` set, where the layers can't be captured."""
        device = self.plain.kv.layers[0].k.device
        tokens = torch.zeros(length, dtype=torch.int64, device=device)
        inputs = self.plain.inputs((Segment(slot, 0, length),), (length - 1,), device)
        out: list[Tensor] = []

        def body() -> None:
            out[:] = [self.plain.run(tokens, inputs)]

        try:
            replay = capture(body, (), self.pool())
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a layer that waits for the host
            self.refused = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            return None
        found = self.captured[slot, length] = Captured(tokens, inputs, out[0], replay)
        return found
