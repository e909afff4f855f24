from __future__ import annotations

import pytest
import torch
from torch import nn

from onegpu.bench.evaluate_encoder import compare_embeddings, nearest, split_texts
from onegpu.errors import ConfigError

VECTORS = torch.randn(9, 16, generator=torch.Generator().manual_seed(1))


class Weights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, 5))


def test_the_figures_are_those_of_the_definition() -> None:
    noisy = VECTORS + 0.5 * torch.randn(VECTORS.shape, generator=torch.Generator().manual_seed(2))
    found = compare_embeddings(Weights(), noisy, VECTORS)
    a, b = noisy.double().numpy(), VECTORS.double().numpy()
    cosines = [float(x @ y / ((x @ x) * (y @ y)) ** 0.5) for x, y in zip(a, b, strict=True)]
    assert found.mean_cosine == pytest.approx(sum(cosines) / 9)
    assert found.smallest_cosine == pytest.approx(min(cosines))
    assert (found.weight_bytes, found.texts) == (60, 9)

    def best(vectors: object, row: int) -> int:
        others = [(float(x @ vectors[row] / (x @ x) ** 0.5), other) for other, x in enumerate(vectors) if other != row]
        return max(others)[1]

    assert found.same_nearest == sum(best(a, row) == best(b, row) for row in range(9)) / 9
    assert 0 < found.same_nearest < 1, "a case in which both happen"


def test_the_16_bit_model_has_nothing_to_be_held_against() -> None:
    found = compare_embeddings(Weights(), VECTORS, None)
    assert (found.mean_cosine, found.smallest_cosine, found.same_nearest) == (None, None, None)


def test_length_does_not_count() -> None:
    found = compare_embeddings(Weights(), 3 * VECTORS, VECTORS)
    assert found.smallest_cosine == pytest.approx(1.0)
    assert found.same_nearest == 1.0
    assert torch.equal(nearest(3 * VECTORS), nearest(VECTORS))


def test_lines_are_texts() -> None:
    assert split_texts("one\n\n  two \n") == ["one", "two"]
    with pytest.raises(ConfigError, match="at least 2 lines of text are needed to compare embeddings; got 1"):
        split_texts("one\n\n")
