"""The proof: prompts of several lengths and a few steps, the engine's way against the plain model's."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from onegpu.decoder.cache import LayerShape
from onegpu.decoder.fused.probe import PlainRun, noted
from onegpu.decoder.fused.prove import STEPS as NOTED
from onegpu.decoder.step import StepForward
from onegpu.decoder.views import Segment
from onegpu.decoder.workspace import Prefill
from onegpu.nn.definition import by_definition

__all__ = ["Trial", "layer_shapes", "make_trial", "why_not_equal"]

# Largest difference allowed, of the plain result's largest magnitude; in 16 bit, where roundings of each layer add up
# as their squares do, at least so many unit roundoffs times the root of the number of half layers (see fused/prove).
TOLERANCE = {torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}
ROUNDOFFS = 6
# Where a rounding can send a token to another expert, or into int8's other columns, directions are compared.
LOOSE_COSINE = 0.98
# Of the prompts: the first two and half of the last one go through the layers as one row.
LENGTHS = (5, 1, 8)
# On a GPU, where a row of a user's prompt takes other kernels than a few tokens: both rows have 128.
GPU_LENGTHS = (15, 1, 240)
FEW_POSITIONS = 1024
STEPS = 3


@dataclass(frozen=True, slots=True)
class Trial:
    """Prompts, the tokens fed after them, and the plain model's logits [rows, 1 + STEPS, V].

    `capacity` is the size of a slot that has room for each. `seen`: the first tokens of the first prompt on their way
    through the layers.
    """

    prompts: list[Tensor]
    fed: Tensor
    logits: Tensor
    dtype: torch.dtype
    is_loose: bool
    layers: int
    seen: PlainRun | None = None

    @property
    def capacity(self) -> int:
        """See above; whole tiles of keys."""
        return -(-(max(prompt.shape[0] for prompt in self.prompts) + STEPS) // 16) * 16

    @property
    def tolerance(self) -> float:
        """Of the largest logit."""
        if self.dtype not in (torch.float16, torch.bfloat16):
            return TOLERANCE[torch.float32]
        grown = ROUNDOFFS * torch.finfo(self.dtype).eps / 2 * (2 * self.layers + 1) ** 0.5
        return float(max(TOLERANCE[self.dtype], grown))

    def why_not(self, got: Tensor, want: Tensor | None = None) -> str | None:
        """None where logits are the plain model's, else how they differ; what is no number must be none in both."""
        want = self.logits if want is None else want
        if got.shape != want.shape:
            return f"its logits are {list(got.shape)}, the plain model's {list(want.shape)}"
        if bool(want.isnan().any()):
            same = bool((got.isnan().any(-1) == want.isnan().any(-1)).all())
            return None if same else "its logits are no numbers elsewhere than the plain model's"
        if self.is_loose:
            cosine = float(torch.cosine_similarity(got, want, dim=-1).min())
            if cosine >= LOOSE_COSINE:
                return None
            return f"its logits differ from the plain model's: their cosine is {cosine:.3f}, {LOOSE_COSINE} is needed"
        largest = max(float(want.abs().max()), 1e-6)
        difference = float((got - want).abs().max())
        if difference <= self.tolerance * largest:
            return None
        allowed = f"{self.tolerance:.2g} of {largest:.2g}"
        return f"its logits differ from the plain model's by {difference:.2g}, where {allowed} is allowed"


def prompt_lengths(model: nn.Module, device: torch.device) -> tuple[int, ...]:
    """How long the prompts of a trial are: short on a CPU, and where a model has few positions."""
    config: Any = model.config
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    few = isinstance(positions, int) and positions < FEW_POSITIONS
    return LENGTHS if few or device.type != "cuda" else GPU_LENGTHS


def make_trial(model: nn.Module, vocab_size: int, device: torch.device) -> tuple[Trial, Cache]:
    """Random prompts with the plain model's answers, and a cache to read the layers' shapes from.

    The plain model runs once, over rows of one length: what comes after a token changes nothing of its logits, and
    where it does, no way is proved.
    """
    generator = torch.Generator().manual_seed(0)
    lengths = prompt_lengths(model, device)
    width = max(lengths) + STEPS
    tokens = torch.randint(0, vocab_size, (len(lengths), width), generator=generator).to(device)
    cache: Any = DynamicCache(config=model.config)
    looked_at = sorted(
        {*range(NOTED), *(place for n in lengths for place in range(n - 1, n + STEPS))} & set(range(width))
    )
    few = {"logits_to_keep": torch.tensor(looked_at, device=device)} if keeps_logits(model) else {}
    with by_definition(model), noted(model, (len(lengths), width), NOTED) as calls:
        output = model(input_ids=tokens, past_key_values=cache, use_cache=True, return_dict=True, **few)
    place_of = {place: index for index, place in enumerate(looked_at if few else range(width))}
    rows = [
        row[[place_of[place] for place in range(n - 1, n + STEPS)]]
        for row, n in zip(output.logits, lengths, strict=True)
    ]
    logits = torch.stack(rows).float()
    prompts = [row[:n] for row, n in zip(tokens, lengths, strict=True)]
    fed = torch.stack([row[n : n + STEPS] for row, n in zip(tokens, lengths, strict=True)])
    # The first of all positions are looked at, so they come first in either case.
    seen = PlainRun(tokens[:1, :NOTED], output.logits[:1, :NOTED].clone(), calls)
    return Trial(prompts, fed, logits, dtype_of(model), is_loose(model), len(cache.layers), seen), cache


def keeps_logits(model: nn.Module) -> bool:
    """Whether the model gives the logits of chosen positions alone; of all they take memory."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype the layers compute in."""
    dtype = getattr(model, "dtype", torch.float32)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def is_loose(model: nn.Module) -> bool:
    """Whether the model has experts or int8 weights."""
    config: Any = getattr(model, "config", None)
    experts = any("expert" in name for name, _ in model.named_modules()) or hasattr(config, "num_experts")
    return experts or any(t.dtype == torch.int8 for t in (*model.parameters(), *model.buffers()))


def layer_shapes(cache: Cache) -> list[LayerShape] | str:
    """What each layer keeps; a str where it keeps something else than keys and values."""
    shapes = []
    for layer in cache.layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            return f"its layers keep what is no plain keys and values ({type(layer).__name__})"
        if layer.keys is None or layer.keys.dim() != 4:
            return "some of its layers keep no keys of their own"
        k, v = layer.keys, layer.values
        window = int(layer.sliding_window) if isinstance(layer, DynamicSlidingWindowLayer) else None
        shapes.append(LayerShape(k.shape[1], k.shape[3], v.shape[3], k.dtype, k.device, window))
    return shapes or "it has no cache of keys and values"


def why_not_equal(
    trial: Trial, prefill: Prefill, step: StepForward, chunks: bool, rows: int | None = None, steps: int = STEPS
) -> str | None:
    """Run the trial through prompts and steps; None where every logit agrees, else the sentence why not.

    `chunks`: the last prompt is cut in two. `rows`: how many sequences the steps go on with, by default all.
    """
    rows = len(trial.prompts) if rows is None else rows
    try:
        first = prompt_logits(trial, prefill, chunks)
        followed = step_logits(trial, step, rows, steps)
    except Exception as error:
        message = str(error).splitlines()[0] if str(error) else ""
        return f"it failed: {type(error).__name__}: {message}"
    return trial.why_not(first, trial.logits[:, 0]) or trial.why_not(followed, trial.logits[:rows, 1 : 1 + steps])


def prompt_logits(trial: Trial, prefill: Prefill, chunks: bool) -> Tensor:
    """Logits [rows, V] after the prompts: all in one row, or half of the last one in a row of its own."""
    *joined, last = range(len(trial.prompts))
    length = trial.prompts[last].shape[0]
    cut = length // 2 if chunks else length
    found = prefill(*row_of(trial, joined, [Segment(last, 0, cut)])).float()
    if not chunks:
        return found
    rest = prefill([Segment(last, cut, length - cut)], trial.prompts[last][cut:], [length - cut - 1])
    return torch.cat([found[:-1], rest.float()])


def step_logits(trial: Trial, step: StepForward, rows: int, steps: int) -> Tensor:
    """Logits [rows, steps, V] of the first rows' steps."""
    lengths = [prompt.shape[0] for prompt in trial.prompts[:rows]]
    positions = torch.tensor(lengths, dtype=torch.int32, device=trial.fed.device)
    found = [step(trial.fed[:rows, number].contiguous(), positions + number).float() for number in range(steps)]
    return torch.stack(found, 1)


def row_of(trial: Trial, slots: Sequence[int], more: Sequence[Segment]) -> tuple[list[Segment], Tensor, list[int]]:
    """Whole prompts and segments of others joined in one row, and where they end."""
    segments = [Segment(slot, 0, trial.prompts[slot].shape[0]) for slot in slots] + list(more)
    tokens = torch.cat([trial.prompts[segment.slot][segment.start : segment.end] for segment in segments])
    ends = [sum(segment.length for segment in segments[: index + 1]) - 1 for index in range(len(segments))]
    return segments, tokens, ends
