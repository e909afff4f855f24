"""The tokens that came before, read as Transformers' processors and criteria would read them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["History"]


class History(NamedTuple):
    """What `input_ids` holds in Transformers' loop, in a buffer of fixed size.

    `tokens` int64 [B, W]: row b holds its sequence in columns 0..lengths[b]-1, what lies behind is undefined.
    `lengths` int64 [B]. In Transformers all rows are equally long because the prompts are padded on the left; where
    the buffer holds the bare sequences, `padded` puts the padding back.
    """

    tokens: Tensor
    lengths: Tensor

    @classmethod
    def of(
        cls,
        tokens: Tensor,
        lengths: Tensor,
        prompt_lengths: Tensor,
        width: Tensor | None,
        pad_token: Tensor | None,
        capacity: int,
        with_tokens: bool,
    ) -> History:
        """The history of bare sequences: tokens [B, C], lengths and prompt_lengths [B].

        `width` int64 [B] is how wide the prompt was with its padding, None if there was none; `pad_token` int64 [1];
        the result then has `capacity` columns. Without `with_tokens` only the lengths are right.
        """
        if width is None:
            return cls(tokens, lengths.long())
        padding = width - prompt_lengths
        if not with_tokens:
            return cls(tokens, lengths + padding)
        columns = torch.arange(capacity, device=tokens.device)
        source = columns[None, :] - padding[:, None]
        moved = tokens.gather(1, source.clamp(0, tokens.shape[1] - 1))
        return cls(torch.where(source < 0, pad_token, moved), lengths + padding)  # type: ignore[arg-type]

    @property
    def inside(self) -> Tensor:
        """bool [B, W]: the columns that hold a token."""
        return torch.arange(self.tokens.shape[1], device=self.tokens.device)[None, :] < self.lengths[:, None]

    def recent(self, count: int, missing: int = -1) -> Tensor:
        """int64 [B, count]: each row's last tokens, oldest first; `missing` where a row has fewer."""
        columns = self.lengths[:, None] - count + torch.arange(count, device=self.tokens.device)[None, :]
        found = self.tokens.gather(1, columns.clamp(0, self.tokens.shape[1] - 1))
        return torch.where(columns < 0, missing, found)
