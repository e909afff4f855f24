"""When a row is finished, decided on the device: end tokens, lengths, stop strings."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.generation import stopping_criteria as criteria

from onegpu.decoder.history import History

__all__ = ["StopRule", "StopState", "StopStrings", "plan_stop"]

# Beyond any vocabulary: stands where a row has no token yet.
NO_TOKEN = 2**31 - 1


@dataclass(frozen=True, eq=False)
class StopStrings:
    """Transformers' own criterion. It sees the last tokens alone and works by tables, so it needs no host."""

    criterion: Any

    def __eq__(self, other: object) -> bool:
        """Equal where the strings are, and the tables made from the tokenizer's vocabulary."""
        return (
            isinstance(other, StopStrings)
            and self.criterion.stop_strings == other.criterion.stop_strings
            and torch.equal(self.criterion.embedding_vec, other.criterion.embedding_vec)
        )

    def __hash__(self) -> int:
        """By the strings."""
        return hash(tuple(self.criterion.stop_strings))

    def on(self, device: torch.device) -> StopStrings:
        """A copy with its tables on `device`."""
        moved = copy.copy(self.criterion)
        moved.embedding_vec = moved.embedding_vec.to(device)
        moved.target_lens = moved.target_lens.to(device)
        return StopStrings(moved)

    def matched(self, history: History) -> Tensor:
        """bool [B]: the newest token completes a stop string."""
        return self.criterion(history.recent(self.criterion.maximum_token_len, missing=NO_TOKEN), None)


@dataclass
class StopState:
    """The buffers of a `StopRule` for B rows on one device."""

    capacity: int
    eos: Tensor
    max_length: Tensor
    width: Tensor | None
    pad_token: Tensor
    strings: list[StopStrings]


@dataclass(frozen=True)
class StopRule:
    """When rows end. Two that compare equal are served by the same captured step, after `load`.

    `max_length` counts as Transformers counts: padding, prompt and new tokens. `has_eos` says whether finished rows are
    filled with the padding token, which Transformers does only where a criterion names end tokens. `clocks` are kept
    out of the step: the host asks `out_of_time` between steps.
    """

    eos: tuple[int, ...]
    has_eos: bool
    bounded: bool
    strings: tuple[StopStrings, ...] = ()
    max_length: int = field(default=0, compare=False)
    clocks: tuple[Any, ...] = field(default=(), compare=False)

    def state(
        self,
        rows: int,
        capacity: int,
        device: torch.device | str,
        *,
        width: int | None = None,
        pad_token_id: int | None = None,
    ) -> StopState:
        """Buffers for up to `rows` rows; `capacity`, `width` and `pad_token_id` as in `Selection.state`."""
        device = torch.device(device)
        state = StopState(
            capacity=capacity,
            eos=torch.tensor(self.eos, dtype=torch.int64, device=device),
            max_length=torch.zeros(rows, dtype=torch.int64, device=device),
            width=None if width is None else torch.zeros(rows, dtype=torch.int64, device=device),
            pad_token=torch.zeros(1, dtype=torch.int64, device=device),
            strings=[strings.on(device) for strings in self.strings],
        )
        self.load(state, width=width, pad_token_id=pad_token_id)
        return state

    def load(self, state: StopState, *, width: int | None = None, pad_token_id: int | None = None) -> None:
        """Put this rule's numbers into a state made by an equal one. `state.max_length` may then be set by row."""
        state.max_length.fill_(self.max_length)
        state.pad_token.fill_(0 if pad_token_id is None else pad_token_id)
        if state.width is not None and width is not None:
            state.width.fill_(width)

    def filled(self, next_tokens: Tensor, finished: Tensor, state: StopState) -> Tensor:
        """int64 [B]: the padding token for rows already finished, the chosen one for the others."""
        return torch.where(finished, state.pad_token, next_tokens) if self.has_eos else next_tokens

    def __call__(
        self,
        next_tokens: Tensor,
        tokens: Tensor,
        lengths: Tensor,
        prompt_lengths: Tensor,
        finished: Tensor,
        state: StopState,
    ) -> Tensor:
        """Which rows are finished now, bool [B].

        Args:
            next_tokens: int64 [B], just chosen.
            tokens: int64 [B, C], with them written in.
            lengths: int [B], with them counted.
            prompt_lengths: int [B].
            finished: bool [B], before this step.
            state: of this rule or an equal one, loaded.
        """
        if self.eos:
            finished = finished | (next_tokens[:, None] == state.eos).any(-1)
        if not self.bounded and not state.strings:
            return finished
        rows = next_tokens.shape[0]
        width = None if state.width is None else state.width[:rows]
        history = History.of(
            tokens, lengths, prompt_lengths, width, state.pad_token, state.capacity, bool(state.strings)
        )
        if self.bounded:
            finished = finished | (history.lengths >= state.max_length[:rows])
        for strings in state.strings:
            finished = finished | strings.matched(history)
        return finished

    def out_of_time(self) -> bool:
        """Whether a time limit is over, by the host's clock; then all rows are finished."""
        nothing = torch.empty(1, 0, dtype=torch.int64)
        return any(bool(clock(nothing, None).item()) for clock in self.clocks)


def plan_stop(stopping_criteria: Iterable[Any]) -> StopRule | str:
    """The rule that does what the `StoppingCriteriaList` of generate() says, or the sentence why none can."""
    eos: list[int] = []
    has_eos = False
    lengths: list[int] = []
    strings: list[StopStrings] = []
    clocks: list[Any] = []
    for criterion in stopping_criteria:
        kind = type(criterion)
        if kind is criteria.EosTokenCriteria:
            has_eos = True
            eos += criterion.eos_token_id.reshape(-1).tolist()
        elif kind is criteria.MaxLengthCriteria:
            lengths.append(criterion.max_length)
        elif kind is criteria.StopStringCriteria:
            strings.append(StopStrings(criterion))
        elif kind is criteria.MaxTimeCriteria:
            clocks.append(criterion)
        else:
            return f"{kind.__name__} is not one of the stopping criteria that have a form for the device"
    return StopRule(
        eos=tuple(dict.fromkeys(eos)),
        has_eos=has_eos,
        bounded=bool(lengths),
        strings=tuple(strings),
        max_length=min(lengths, default=0),
        clocks=tuple(clocks),
    )
