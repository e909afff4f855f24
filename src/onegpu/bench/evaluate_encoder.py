"""What a format costs an encoder: how near its embeddings stay to those of the 16-bit model, on texts of one's own.

    cosine            between a text's embedding in the format and in 16 bit: mean, and the smallest of all texts
    same nearest      share of texts whose most similar other text is the same one in both

Embeddings are made as `onegpu.Encoder` makes them, with the pooling of the model's own files, for all formats alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from onegpu.bench.measure import weight_bytes
from onegpu.encoder import Encoder
from onegpu.encoder.recipe import Recipe
from onegpu.errors import ConfigError

__all__ = ["Likeness", "compare_embeddings", "embeddings", "split_texts"]


@dataclass(frozen=True, slots=True)
class Likeness:
    """One row of the table. The measures are None for the 16-bit model itself."""

    weight_bytes: int
    texts: int
    mean_cosine: float | None
    smallest_cosine: float | None
    same_nearest: float | None


def split_texts(text: str) -> list[str]:
    """The lines of a text that are not empty.

    Raises:
        ConfigError: fewer than two.
    """
    texts = [line.strip() for line in text.splitlines() if line.strip()]
    if len(texts) < 2:
        raise ConfigError(f"at least 2 lines of text are needed to compare embeddings; got {len(texts)}")
    return texts


def embeddings(model: Any, tokenizer: Any, recipe: Recipe, texts: Sequence[str]) -> Tensor:
    """Float32 [N, hidden] on the CPU; the model is optimized for it."""
    found: Tensor = Encoder(model, tokenizer, recipe=recipe).encode(texts, to="torch")
    return found


def compare_embeddings(model: Any, vectors: Tensor, expected: Tensor | None) -> Likeness:
    """Hold embeddings [N, hidden] of `model` against those of the 16-bit model; None for that model itself."""
    size, count = weight_bytes(model), len(vectors)
    if expected is None:
        return Likeness(size, count, None, None, None)
    cosines = torch.cosine_similarity(vectors.double(), expected.double(), dim=1)
    same = (nearest(vectors) == nearest(expected)).double().mean()
    return Likeness(size, count, float(cosines.mean()), float(cosines.min()), float(same))


def nearest(vectors: Tensor) -> Tensor:
    """Int64 [N]: for each row the most similar other one, by cosine."""
    unit = torch.nn.functional.normalize(vectors.double(), dim=1)
    return (unit @ unit.T).fill_diagonal_(-2.0).argmax(dim=1)
