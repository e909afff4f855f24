"""Steps of several rows: held against the proved step of one row when they first come.

Row b of a step must give what its sequence gives alone. Where it does not, rows are run one after another.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from onegpu.decoder.cache import KVCache, KVLayer
from onegpu.decoder.fused.plan import FusedPlan
from onegpu.decoder.fused.prove import Difference, apart, first_beyond
from onegpu.decoder.fused.rehearse import CAPACITY, layer_shapes, rehearse
from onegpu.decoder.fused.step import FusedStep
from onegpu.kernels.compile_ahead import compile_ahead

__all__ = ["CheckedStep", "why_not_rows"]

STEPS: Final = 2
SEED: Final = 1


class CheckedStep:
    """A `StepForward` over a proved plan.

    Args:
        known: for each number of rows None or why they are run one by one; filled here, shared by all steps of a plan.

    Raises:
        UnsupportedError: the cache is longer than the rotary frequencies are fixed for.
    """

    def __init__(self, plan: FusedPlan, kv: KVCache, known: dict[int, str | None]) -> None:
        self.plan, self.kv, self.known = plan, kv, known
        self.fused = FusedStep(plan, kv)
        self.alone: list[FusedStep] = []

    def __call__(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Logits [B, V]; see `FusedStep`. Waits for the device when a number of rows comes for the first time."""
        rows = tokens.shape[0]
        if rows > 1 and rows not in self.known:
            self.known[rows] = why_not_rows(self.plan, rows)
        if self.known.get(rows) is None:
            return self.fused(tokens, positions)
        self.alone = self.alone or [FusedStep(self.plan, slot_of(self.kv, slot)) for slot in range(self.kv.slots)]
        parts = [self.alone[row](tokens[row : row + 1], positions[row : row + 1]) for row in range(rows)]
        return torch.cat(parts)


def slot_of(kv: KVCache, slot: int) -> KVCache:
    """One slot of a cache as a cache."""
    part = slice(slot, slot + 1)
    one = KVCache([], 1, kv.capacity)
    one.layers = [
        KVLayer(
            layer.k[part],
            layer.v[part],
            None if layer.k_scale is None else layer.k_scale[part],
            None if layer.v_scale is None else layer.v_scale[part],
            layer.window,
            layer.dtype,
        )
        for layer in kv.layers
    ]
    return one


def why_not_rows(plan: FusedPlan, rows: int) -> str | None:
    """None where steps of so many rows give each row what it gets alone, else how they differ."""
    if plan.experts_configs and plan.dtype is not torch.float32:
        # Where two experts are nearly as good, a rounding decides between them.
        return None
    compile_ahead(lambda: rehearse(plan, rows), plan.device)
    generator = torch.Generator().manual_seed(SEED)
    size = min(plan.vocab_size, int(plan.embed.num_embeddings))  # type: ignore[arg-type]
    tokens = torch.randint(0, size, (rows, STEPS), generator=generator).to(plan.device)
    together = run(plan, tokens)
    found: list[Difference] = []
    for row in sorted({0, rows // 2, rows - 1}):
        got, expected = together[row], run(plan, tokens[row : row + 1])[0]
        found.append(apart(got, expected, plan, f"row {row} of {rows}", 2 * len(plan.layers) + 1))
    return first_beyond(found, "what it is alone")


def run(plan: FusedPlan, tokens: Tensor) -> Tensor:
    """Logits [rows, V] after the last of tokens [rows, STEPS], each row in a slot of its own."""
    rows = tokens.shape[0]
    step = FusedStep(plan, KVCache(layer_shapes(plan), rows, CAPACITY))
    for index in range(STEPS):
        places = torch.full((rows,), index, dtype=torch.int32, device=plan.device)
        logits = step(tokens[:, index].contiguous(), places)
    return logits
