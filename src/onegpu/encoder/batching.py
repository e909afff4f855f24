"""Texts to batches of a token budget, tokenized one step ahead of the model.

    texts -> chunks -> a thread tokenizes the next chunk -> rows sorted by length -> batches of `budget` tokens

There is no batch size to choose: a batch is as many rows as the budget holds, padding not counted, since it costs next
to nothing. The first chunk is small, so that the model starts soon.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

__all__ = ["Rows", "Tokenize", "batches", "tokenized_chunks"]

FIRST_CHUNK: Final = 512
CHUNK: Final = 4096
# Padded positions still pass through embeddings: at most this many for each real token.
MAX_PADDED: Final = 2


@dataclass(frozen=True, slots=True)
class Rows:
    """Token ids of some texts, with the place of each text in the input."""

    places: list[int]
    ids: list[list[int]]


class Tokenize:
    """A tokenizer as a function from texts to ids: truncated, with special tokens, without padding."""

    def __init__(self, tokenizer: Any, max_length: int, prompt: str = "") -> None:
        self.prompt = prompt
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.fast = None
        if getattr(tokenizer, "is_fast", False):
            # A copy of our own: truncation is a setting of the tokenizer, and the caller's must not change.
            self.fast = copy.deepcopy(tokenizer.backend_tokenizer)
            self.fast.no_padding()
            self.fast.enable_truncation(max_length=max_length)

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text."""
        if self.prompt:
            texts = [self.prompt + text for text in texts]
        if self.fast is not None:
            encode = getattr(self.fast, "encode_batch_fast", self.fast.encode_batch)
            return [encoding.ids for encoding in encode(list(texts))]
        found = self.tokenizer(
            list(texts),
            truncation=True,
            max_length=self.max_length,
            return_attention_mask=False,
            return_token_type_ids=False,
        )
        ids: list[list[int]] = found["input_ids"]
        return ids


def tokenized_chunks(texts: Sequence[str], tokenize: Tokenize) -> Iterator[Rows]:
    """Chunks of `texts` in order, the next one being tokenized while the caller works on this one."""
    bounds = list(range(FIRST_CHUNK, len(texts), CHUNK))
    edges = [0, *bounds, len(texts)]
    spans = list(itertools.pairwise(edges))
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(tokenize, texts[: spans[0][1]])
        for number, (start, stop) in enumerate(spans):
            ids = ahead.result()
            if number + 1 < len(spans):
                first, last = spans[number + 1]
                ahead = pool.submit(tokenize, texts[first:last])
            yield Rows(list(range(start, stop)), ids)


def batches(rows: Rows, budget: int) -> Iterator[Rows]:
    """The rows that have tokens, longest first, in batches of at most `budget` tokens (or one row)."""
    order = sorted((n for n, ids in enumerate(rows.ids) if ids), key=lambda n: -len(rows.ids[n]))
    batch: list[int] = []
    tokens = longest = 0
    for number in order:
        length = len(rows.ids[number])
        full = tokens + length > budget or (len(batch) + 1) * longest > MAX_PADDED * budget
        if batch and full:
            yield Rows([rows.places[n] for n in batch], [rows.ids[n] for n in batch])
            batch, tokens, longest = [], 0, 0
        batch.append(number)
        tokens += length
        longest = max(longest, length)
    if batch:
        yield Rows([rows.places[n] for n in batch], [rows.ids[n] for n in batch])
