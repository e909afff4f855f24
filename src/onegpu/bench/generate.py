"""How fast each way of holding a model writes: batch 1, greedy, the same prompt and the same number of new tokens.

All contenders are in memory at once and take turns, run by run, so that a machine that slows down or warms up
slows or warms all of them; the first round is thrown away. A figure is the median over the rounds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from onegpu.bench.measure import Timing, TokenClock, synchronize
from onegpu.errors import ConfigError

__all__ = ["Speed", "measure_speed", "speed_prompt"]


@dataclass(frozen=True, slots=True)
class Speed:
    """Medians over `runs` rounds; `slowest` and `fastest` are the decode speeds of the worst and best round."""

    ttft_ms: float
    tpot_ms: float
    tokens_per_second: float
    slowest: float
    fastest: float
    prompt_tokens: int
    new_tokens: int
    runs: int


def speed_prompt(tokenizer: Any, text: str, num_tokens: int) -> torch.Tensor:
    """Int64 [1, num_tokens]: the first tokens of `text`.

    Raises:
        ConfigError: the text is shorter than that.
    """
    token_ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :num_tokens]
    if token_ids.shape[1] < num_tokens:
        raise ConfigError(f"the text has {token_ids.shape[1]} tokens, {num_tokens} are asked for", "ask for fewer")
    return torch.as_tensor(token_ids)


def measure_speed(
    models: Mapping[str, Any],
    prompt: torch.Tensor,
    *,
    max_new_tokens: int,
    runs: int,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Speed]:
    """Time `generate` of each model on prompt [1, S], in turns.

    Raises:
        ConfigError: fewer than one run or two new tokens (one token has no decode speed).
    """
    if runs < 1 or max_new_tokens < 2:
        raise ConfigError(
            f"at least 1 run of 2 new tokens is needed; got {runs} of {max_new_tokens}", "--runs 5 --max-new-tokens 64"
        )
    timings: dict[str, list[Timing]] = {label: [] for label in models}
    for turn in range(runs + 1):
        for label, model in models.items():
            timing = timed_generate(model, prompt, max_new_tokens)
            if turn > 0:
                timings[label].append(timing)
            progress(f"round {turn} of {runs}: {label} {timing.tokens_per_second or 0:.1f} tok/s")
    return {label: summary(rows) for label, rows in timings.items()}


def timed_generate(model: Any, prompt: torch.Tensor, max_new_tokens: int) -> Timing:
    """One greedy generation of exactly `max_new_tokens` tokens: the end token does not end it."""
    device = model.device
    inputs = prompt.to(device)
    plain = model.generation_config
    endless = type(plain)(max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=0)
    synchronize(device)
    clock = TokenClock(started=time.perf_counter())
    try:
        model.generation_config = endless
        model.generate(inputs, attention_mask=torch.ones_like(inputs), streamer=clock)
    finally:
        model.generation_config = plain
    return clock.timing()


def summary(timings: Sequence[Timing]) -> Speed:
    """The medians of several rounds."""
    speeds = [timing.tokens_per_second or 0.0 for timing in timings]
    return Speed(
        ttft_ms=statistics.median(timing.ttft_ms for timing in timings),
        tpot_ms=statistics.median(timing.tpot_ms or 0.0 for timing in timings),
        tokens_per_second=statistics.median(speeds),
        slowest=min(speeds),
        fastest=max(speeds),
        prompt_tokens=timings[0].prompt_tokens,
        new_tokens=timings[0].new_tokens,
        runs=len(timings),
    )
