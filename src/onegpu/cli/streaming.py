"""Tokens to text while they come, cut only where the text is final."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from onegpu.bench.measure import Timing, TokenClock

if TYPE_CHECKING:
    import torch

__all__ = ["TextStream"]

UNFINISHED = "\ufffd"  # what a decoder writes for a character whose last bytes are still to come


class TextStream:
    """A streamer for `generate`: times each token and hands each finished piece of text to `write`.

    A byte-level or SentencePiece token can change how the one before it is written, so each piece is the
    difference of two decodings of a short tail: with the new tokens and without them.
    """

    def __init__(self, tokenizer: Any, write: Callable[[str], None]) -> None:
        self.tokenizer = tokenizer
        self.write = write
        self.clock = TokenClock(started=time.perf_counter())
        self.pieces: list[str] = []
        self.tail = 0  # decoding starts here
        self.done = 0  # text of tokens before this is written

    @property
    def text(self) -> str:
        """Everything written so far."""
        return "".join(self.pieces)

    @property
    def token_ids(self) -> list[int]:
        """The new tokens so far."""
        return self.clock.token_ids

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt (first call) or new tokens."""
        known = len(self.token_ids)
        self.clock.put(value)
        if len(self.token_ids) > known:
            self.advance(final=False)

    def end(self) -> None:
        """Write what was held back."""
        self.advance(final=True)

    def timing(self) -> Timing:
        """Token times so far."""
        return self.clock.timing()

    def advance(self, final: bool) -> None:
        """Write the text that is new and will not change."""
        before = self.decode(self.tail, self.done)
        now = self.decode(self.tail, len(self.token_ids))
        if len(now) <= len(before) or (now.endswith(UNFINISHED) and not final):
            return
        piece = now[len(before) :]
        self.tail, self.done = self.done, len(self.token_ids)
        self.pieces.append(piece)
        self.write(piece)

    def decode(self, begin: int, end: int) -> str:
        return str(self.tokenizer.decode(self.token_ids[begin:end], skip_special_tokens=True))
