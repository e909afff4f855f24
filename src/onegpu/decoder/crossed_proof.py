"""The proof for decoders that look at an encoder's states: random states, prompts, a few steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from onegpu.decoder.cache import LayerShape
from onegpu.decoder.prove import STEPS, Trial, dtype_of, is_loose, layer_shapes
from onegpu.decoder.views import Segment

__all__ = ["CrossedTrial", "make_crossed_trial", "why_not_crossed"]

ROWS, PROMPT, SOURCE = 2, 2, 6
# Places made where a mask hides the rest, and tokens of a slot.
PLACES, CAPACITY = 8, 16


@dataclass(frozen=True, slots=True)
class CrossedTrial:
    """States [rows, SOURCE, width] with their mask, tokens [rows, PROMPT + STEPS], the plain model's logits."""

    hidden: Tensor
    mask: Tensor
    tokens: Tensor
    logits: Tensor
    shapes: list[LayerShape]
    cross_shapes: list[LayerShape]


def make_crossed_trial(model: nn.Module, vocab_size: int, device: torch.device) -> CrossedTrial | str:
    """Random states and tokens with the plain model's answers; a str is the reason why there is no way."""
    config: Any = model.config
    width = getattr(config, "d_model", None) or config.hidden_size
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, SOURCE, width, generator=generator).to(device, dtype_of(model))
    mask = torch.ones(ROWS, SOURCE, dtype=torch.int64, device=device)
    mask[1, SOURCE - 2 :] = 0
    tokens = torch.randint(0, vocab_size, (ROWS, PROMPT + STEPS), generator=generator).to(device)
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    output = model(
        encoder_outputs=BaseModelOutput(last_hidden_state=hidden),
        attention_mask=mask,
        decoder_input_ids=tokens,
        past_key_values=cache,
        use_cache=True,
        return_dict=True,
    )
    own, cross = layer_shapes(cache.self_attention_cache), layer_shapes(cache.cross_attention_cache)
    if isinstance(own, str):
        return own
    if isinstance(cross, str):
        return f"across to its encoder {cross}"
    return CrossedTrial(hidden, mask, tokens, output.logits[:, PROMPT - 1 :].float(), own, cross)


def why_not_crossed(trial: CrossedTrial, model: nn.Module, way: Any) -> str | None:
    """Run the trial through prompt and steps; None where every logit agrees, else the sentence why not."""
    kv = way.memory(ROWS, min(CAPACITY, way.limit), PLACES if way.masks_source else SOURCE)
    prefill, step = way.prefill(model, kv), way.step(model, kv)
    segments = [Segment(row, 0, PROMPT) for row in range(ROWS)]
    try:
        kv.load(trial.hidden, trial.mask)
        prompts = trial.tokens[:, :PROMPT].flatten()
        found = [prefill(segments, prompts, [PROMPT * (row + 1) - 1 for row in range(ROWS)]).float()]
        positions = torch.full((ROWS,), PROMPT, dtype=torch.int32, device=trial.tokens.device)
        for number in range(STEPS):
            found.append(step(trial.tokens[:, PROMPT + number].contiguous(), positions + number).float())
    except Exception as error:
        message = str(error).splitlines()[0] if str(error) else ""
        return f"it failed: {type(error).__name__}: {message}"
    judge = Trial([], trial.tokens, trial.logits, dtype_of(model), is_loose(model), len(trial.shapes))
    return judge.why_not(torch.stack(found, 1))
