"""The proof: prompts of several lengths and a few steps, the engine's way against the plain model's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from onegpu.decoder.cache import LayerShape
from onegpu.decoder.step import StepForward
from onegpu.decoder.views import Segment
from onegpu.decoder.workspace import Prefill

__all__ = ["Trial", "layer_shapes", "make_trial", "why_not_equal"]

# Largest difference allowed, of the plain result's largest magnitude; in 16 bit, where roundings of each layer add up
# as their squares do, at least so many unit roundoffs times the root of the number of half layers (see fused/prove).
TOLERANCE = {torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}
ROUNDOFFS = 6
# Where a rounding can send a token to another expert, or into int8's other columns, directions are compared.
LOOSE_COSINE = 0.98
LENGTHS = (5, 1, 9)
STEPS = 3
CAPACITY = 16


@dataclass(frozen=True, slots=True)
class Trial:
    """Prompts, the tokens fed after them, and the plain model's logits [rows, 1 + STEPS, V]."""

    prompts: list[Tensor]
    fed: Tensor
    logits: Tensor
    dtype: torch.dtype
    is_loose: bool
    layers: int

    @property
    def tolerance(self) -> float:
        """Of the largest logit."""
        if self.dtype not in (torch.float16, torch.bfloat16):
            return TOLERANCE[torch.float32]
        grown = ROUNDOFFS * torch.finfo(self.dtype).eps / 2 * (2 * self.layers + 1) ** 0.5
        return float(max(TOLERANCE[self.dtype], grown))

    def why_not(self, got: Tensor) -> str | None:
        """None where logits are the plain model's, else how they differ; what is no number must be none in both."""
        want = self.logits
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


def plain_logits(model: nn.Module, prompt: Tensor, fed: Tensor) -> tuple[Tensor, Any]:
    """Logits [1 + STEPS, V] after one prompt and each of the tokens behind it, and Transformers' own cache of them."""
    cache: Any = DynamicCache(config=model.config)
    tokens = torch.cat([prompt, fed])[None]
    output = model(input_ids=tokens, past_key_values=cache, use_cache=True, return_dict=True)
    return output.logits[0, -1 - STEPS :].float(), cache


def make_trial(model: nn.Module, vocab_size: int, device: torch.device) -> tuple[Trial, Cache]:
    """Random prompts with the plain model's answers, and a cache to read the layers' shapes from."""
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, vocab_size, (n,), generator=generator).to(device) for n in LENGTHS]
    fed = torch.randint(0, vocab_size, (len(LENGTHS), STEPS), generator=generator).to(device)
    found = [plain_logits(model, prompt, row) for prompt, row in zip(prompts, fed, strict=True)]
    logits = torch.stack([logits for logits, _ in found])
    cache = found[0][1]
    return Trial(prompts, fed, logits, dtype_of(model), is_loose(model), len(cache.layers)), cache


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


def why_not_equal(trial: Trial, prefill: Prefill, step: StepForward, chunks: bool) -> str | None:
    """Run the trial through prompts and steps; None where every logit agrees, else the sentence why not."""
    try:
        got = engine_logits(trial, prefill, step, chunks)
    except Exception as error:
        message = str(error).splitlines()[0] if str(error) else ""
        return f"it failed: {type(error).__name__}: {message}"
    return trial.why_not(got)


def engine_logits(trial: Trial, prefill: Prefill, step: StepForward, chunks: bool) -> Tensor:
    """Logits [rows, 1 + STEPS, V]: all prompts but the last in one row, the last in two chunks where that is known."""
    *joined, last = range(len(trial.prompts))
    cut = trial.prompts[last].shape[0] // 2 if chunks else 0
    found = [prefill(*row_of(trial, joined))]
    if cut:
        prefill([Segment(last, 0, cut)], trial.prompts[last][:cut], [cut - 1])
        rest = trial.prompts[last][cut:]
        found.append(prefill([Segment(last, cut, rest.shape[0])], rest, [rest.shape[0] - 1]))
    else:
        found.append(prefill(*row_of(trial, [last])))
    columns = [torch.cat(found).float()]
    lengths = [prompt.shape[0] for prompt in trial.prompts]
    positions = torch.tensor(lengths, dtype=torch.int32, device=trial.fed.device)
    for number in range(STEPS):
        columns.append(step(trial.fed[:, number].contiguous(), positions + number).float())
    return torch.stack(columns, 1)


def row_of(trial: Trial, slots: Sequence[int]) -> tuple[list[Segment], Tensor, list[int]]:
    """Prompts joined in one row, and where they end."""
    prompts = [trial.prompts[slot] for slot in slots]
    segments = [Segment(slot, 0, prompt.shape[0]) for slot, prompt in zip(slots, prompts, strict=True)]
    ends = [sum(prompt.shape[0] for prompt in prompts[: i + 1]) - 1 for i in range(len(prompts))]
    return segments, torch.cat(prompts), ends
