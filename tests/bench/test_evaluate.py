from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from onegpu.bench.evaluate import default_text, evaluate, windows
from onegpu.bench.measure import weight_bytes
from onegpu.errors import ConfigError
from tiny_checkpoint import byte_tokenizer, tiny_llama


class Table(nn.Module):
    """A model whose next token depends on the last one alone, through a table of logits."""

    def __init__(self, seed: int, vocab: int = 11) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.logits = nn.Parameter(torch.randn(vocab, vocab, generator=generator))

    @property
    def device(self) -> torch.device:
        return self.logits.device

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        assert not use_cache
        return SimpleNamespace(logits=self.logits[input_ids])


TOKENS = torch.randint(0, 11, (101,), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(("window", "stride"), [(8, 3), (8, 7), (16, 1), (101, 50), (100, 50), (500, 10), (2, 1)])
def test_every_token_is_predicted_once(window: int, stride: int) -> None:
    seen: list[int] = []
    for part in windows(101, window, stride):
        assert 0 <= part.begin < part.end <= 101
        assert part.end - part.begin <= window
        seen += range(part.end - part.scored, part.end)
        if part.begin > 0:
            assert part.end - part.scored - part.begin >= window - stride
    assert seen == list(range(1, 101))


@pytest.mark.parametrize(("length", "window", "stride"), [(1, 8, 4), (0, 8, 4), (10, 8, 8), (10, 8, 0), (10, 8, 9)])
def test_windows_that_cannot_be(length: int, window: int, stride: int) -> None:
    with pytest.raises(ConfigError):
        list(windows(length, window, stride))


@pytest.mark.parametrize(("window", "stride"), [(8, 3), (101, 100), (33, 11)])
def test_the_figures_are_those_of_the_definition(window: int, stride: int) -> None:
    """A model that looks one token back has the same figures through any window: those of float64 over all pairs."""
    model, reference = Table(1), Table(2)
    quality = evaluate(model, TOKENS, reference=reference, window=window, stride=stride)
    log_q = torch.log_softmax(model.logits.detach().double(), -1)[TOKENS[:-1]]
    log_p = torch.log_softmax(reference.logits.detach().double(), -1)[TOKENS[:-1]]
    nll = -log_q[torch.arange(100), TOKENS[1:]].mean()
    assert quality.tokens == 100
    assert quality.perplexity == pytest.approx(math.exp(nll), rel=1e-6)
    assert quality.kl == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()), rel=1e-5)
    assert quality.top1 == float((log_p.argmax(-1) == log_q.argmax(-1)).double().mean())
    assert quality.weight_bytes == 11 * 11 * 4


def test_a_model_is_no_distance_from_itself() -> None:
    model = Table(1)
    quality = evaluate(model, TOKENS, reference=model, window=16, stride=8)
    assert quality.kl == 0.0
    assert quality.top1 == 1.0


def test_without_a_reference_there_is_perplexity_alone() -> None:
    quality = evaluate(Table(1), TOKENS, window=16, stride=8)
    assert quality.kl is None
    assert quality.top1 is None


def test_a_uniform_model_has_the_vocabulary_for_perplexity() -> None:
    model = Table(1)
    nn.init.zeros_(model.logits)
    assert evaluate(model, TOKENS, window=16, stride=8).perplexity == pytest.approx(11.0)


def test_one_window_is_the_models_own_loss() -> None:
    """A real model, one window: the loss that Transformers itself computes."""
    model = tiny_llama().float()
    ids = torch.tensor(byte_tokenizer()("It was the best of times, it was the worst of times.")["input_ids"])
    loss = model(input_ids=ids.unsqueeze(0), labels=ids.unsqueeze(0)).loss.item()
    assert evaluate(model, ids, window=64, stride=32).perplexity == pytest.approx(math.exp(loss), rel=1e-5)


def test_the_text_is_what_it_says() -> None:
    text = default_text()
    assert text.startswith("CHAPTER I. Down the Rabbit-Hole\n\nAlice was beginning to get very tired")
    assert 40_000 < len(text) < 60_000
    assert text.isascii()
    assert [line for line in text.splitlines() if line.startswith("CHAPTER")][-1].startswith("CHAPTER IV.")


def test_a_tied_weight_counts_once() -> None:
    model = tiny_llama()
    parameters = {id(parameter): parameter for parameter in model.parameters()}
    buffers = sum(buffer.untyped_storage().nbytes() for buffer in model.buffers())
    assert weight_bytes(model) == 2 * sum(parameter.numel() for parameter in parameters.values()) + buffers
