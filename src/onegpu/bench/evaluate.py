"""What a format costs in quality: perplexity, and distance to the 16-bit model, on a fixed text.

The text is tokenized once and read through windows of `window` tokens that move on by `stride`; each token but the
first is predicted exactly once, with at least `window - stride` tokens before it (fewer only in the first window).

    perplexity        exp of the mean negative log likelihood, natural logarithm
    KL                mean over tokens of KL(16-bit || format), in nats
    top-1 agreement   share of tokens for which both models put the same token first

`data/alice.txt` is Lewis Carroll, *Alice's Adventures in Wonderland* (1865), chapters I to IV, in the public domain;
paragraphs are joined to one line each, verse keeps its lines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import torch

from onegpu.bench.measure import weight_bytes
from onegpu.errors import ConfigError

__all__ = ["Quality", "Window", "default_text", "evaluate", "windows"]


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens begin..end of the text, of which the last `scored` are predicted."""

    begin: int
    end: int
    scored: int


@dataclass(frozen=True, slots=True)
class Quality:
    """One row of the table. `kl` and `top1` are None where there is no reference."""

    weight_bytes: int
    tokens: int
    perplexity: float
    kl: float | None
    top1: float | None


def default_text() -> str:
    """The text the README's table was made with."""
    return files("onegpu.bench").joinpath("data/alice.txt").read_text(encoding="utf-8")


def windows(length: int, window: int, stride: int) -> Iterator[Window]:
    """Cover tokens 1..length-1 exactly once.

    Raises:
        ConfigError: fewer than two tokens, or a stride that is not in 1..window-1.
    """
    if length < 2:
        raise ConfigError(f"the text must have at least 2 tokens; got {length}", "give a longer text")
    if not 1 <= stride < window:
        raise ConfigError(f"stride must be from 1 to window - 1 = {window - 1}; got {stride}", "window 512, stride 256")
    end = min(window, length)
    yield Window(0, end, end - 1)
    while end < length:
        scored = min(stride, length - end)
        end += scored
        yield Window(max(0, end - window), end, scored)


def evaluate(
    model: Any,
    token_ids: torch.Tensor,
    *,
    reference: Any = None,
    window: int,
    stride: int,
    progress: Callable[[int], object] = lambda _: None,
) -> Quality:
    """Score int64 [S] tokens. `reference` is the 16-bit model, on the same device, or None for perplexity alone.

    `progress` is called with the number of tokens scored after each window.

    Raises:
        ConfigError: see `windows`.
    """
    total = torch.zeros(3, dtype=torch.float64)
    tokens = 0
    for part in windows(token_ids.numel(), window, stride):
        ids = token_ids[part.begin : part.end].to(model.device).unsqueeze(0)
        targets = ids[0, -part.scored :]
        log_probs = predict(model, ids, part.scored)
        expected = None if reference is None else predict(reference, ids, part.scored)
        total += distances(log_probs, targets, expected)
        tokens += part.scored
        progress(part.scored)
    mean = (total / tokens).tolist()
    return Quality(
        weight_bytes=weight_bytes(model),
        tokens=tokens,
        perplexity=float(torch.tensor(mean[0], dtype=torch.float64).exp()),
        kl=None if reference is None else mean[1],
        top1=None if reference is None else mean[2],
    )


@torch.inference_mode()
def predict(model: Any, ids: torch.Tensor, scored: int) -> torch.Tensor:
    """Float32 log probabilities [scored, V] of the last `scored` tokens of ids [1, S], each from those before it."""
    logits = model(input_ids=ids, use_cache=False).logits[0, -scored - 1 : -1]
    return torch.log_softmax(logits.float(), dim=-1)


def distances(log_probs: torch.Tensor, targets: torch.Tensor, expected: torch.Tensor | None) -> torch.Tensor:
    """Sums over tokens, float64 [3] on the host: negative log likelihood, KL to `expected`, equal first choices."""
    sums = torch.zeros(3, dtype=torch.float64)
    sums[0] = -log_probs.gather(1, targets.unsqueeze(1)).double().sum().cpu()
    if expected is not None:
        per_token = (expected.exp() * (expected - log_probs)).sum(dim=-1)
        sums[1] = per_token.double().sum().cpu()
        sums[2] = (expected.argmax(dim=-1) == log_probs.argmax(dim=-1)).double().sum().cpu()
    return sums
