"""Choosing the next token on the device: Transformers' processors, then argmax or one draw, without the host."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from onegpu.decoder.history import History
from onegpu.decoder.processors import rules_for
from onegpu.decoder.rules import Rule
from onegpu.errors import ArgumentError

__all__ = ["Selection", "SelectionState", "draw", "plan_selection"]


@dataclass
class SelectionState:
    """The buffers of a `Selection` for B rows on one device. A captured step reads and writes exactly these.

    `scores`, `logits` float32 [B, V] hold the last step's where the selection keeps them, else None; a step of fewer
    rows writes the first ones.
    """

    capacity: int
    constants: list[tuple[Tensor, ...]]
    numbers: list[tuple[Tensor, ...]]
    width: Tensor | None
    pad_token: Tensor
    generator: torch.Generator | None
    scores: Tensor | None
    logits: Tensor | None


@dataclass(frozen=True)
class Selection:
    """How the next token follows from the logits. Two that compare equal are served by the same captured step,
    after `load` has put the one's numbers into the other's state.
    """

    rules: tuple[Rule, ...]
    do_sample: bool
    vocab_size: int
    keep_scores: bool = False
    keep_logits: bool = False

    def state(
        self,
        rows: int,
        capacity: int,
        device: torch.device | str,
        *,
        width: int | None = None,
        pad_token_id: int | None = None,
        generator: torch.Generator | None = None,
    ) -> SelectionState:
        """Buffers for up to `rows` rows whose histories have up to `capacity` tokens, padding included.

        `width` is how many columns Transformers' padded prompt has; None where the histories given later are just what
        Transformers would hold (no padding, or kept in place). With it, histories are taken as bare and the padding of
        `pad_token_id` is put back, so that lengths and n-grams count as Transformers counts them. `generator`: where
        the noise comes from, None for the device's default; in a captured step it must be registered with the graph.
        """
        device = torch.device(device)
        kept = (rows, self.vocab_size)
        state = SelectionState(
            capacity=capacity,
            constants=[rule.constants(self.vocab_size, device) for rule in self.rules],
            numbers=[
                tuple(torch.zeros(rows, dtype=torch.int64, device=device) for _ in rule.numbers())
                for rule in self.rules
            ],
            width=None if width is None else torch.zeros(rows, dtype=torch.int64, device=device),
            pad_token=torch.zeros(1, dtype=torch.int64, device=device),
            generator=generator,
            scores=torch.empty(kept, device=device) if self.keep_scores else None,
            logits=torch.empty(kept, device=device) if self.keep_logits else None,
        )
        self.load(state, width=width, pad_token_id=pad_token_id)
        return state

    def load(self, state: SelectionState, *, width: int | None = None, pad_token_id: int | None = None) -> None:
        """Put this selection's numbers into a state made by an equal one; addresses stay.

        Raises:
            ArgumentError: the state was made with a width and now has none, or the other way round.
        """
        if (width is None) != (state.width is None):
            raise ArgumentError(f"the state was made with width={state.width}, and is now loaded with width={width}")
        for rule, buffers in zip(self.rules, state.numbers, strict=True):
            for buffer, number in zip(buffers, rule.numbers(), strict=True):
                fill(buffer, number)
        if state.width is not None and width is not None:
            state.width.fill_(width)
            state.pad_token.fill_(0 if pad_token_id is None else pad_token_id)

    def __call__(
        self, logits: Tensor, tokens: Tensor, lengths: Tensor, prompt_lengths: Tensor, state: SelectionState
    ) -> Tensor:
        """The next tokens, int64 [B].

        Args:
            logits: float32 [B, V].
            tokens: int64 [B, C], prompt and what was generated, left-aligned.
            lengths: int [B], tokens in each history.
            prompt_lengths: int [B], those of them that are prompt.
            state: of this selection or an equal one, loaded, for B rows or more.

        Raises:
            ArgumentError: logits of another vocabulary.
        """
        scores = self.processed(logits, tokens, lengths, prompt_lengths, state)
        if state.logits is not None:
            state.logits[: logits.shape[0]].copy_(logits)
        if state.scores is not None:
            state.scores[: logits.shape[0]].copy_(scores)
        if not self.do_sample:
            return torch.argmax(scores, dim=-1)
        return draw(torch.softmax(scores, dim=-1), state.generator)

    def processed(
        self, logits: Tensor, tokens: Tensor, lengths: Tensor, prompt_lengths: Tensor, state: SelectionState
    ) -> Tensor:
        """The scores [B, V] that are chosen from; arguments and errors as in a call."""
        if logits.shape[-1] != self.vocab_size:
            raise ArgumentError(f"expected logits of {self.vocab_size} tokens; got shape {tuple(logits.shape)}")
        rows = logits.shape[0]
        reads = {rule.reads for rule in self.rules}
        if reads <= {"nothing"}:
            history = History(tokens, lengths)
        else:
            width = None if state.width is None else state.width[:rows]
            history = History.of(
                tokens, lengths, prompt_lengths, width, state.pad_token, state.capacity, "tokens" in reads
            )
        scores = logits
        for rule, constants, buffers in zip(self.rules, state.constants, state.numbers, strict=True):
            scores = rule(scores, history, constants, tuple(buffer[:rows] for buffer in buffers))
        return scores


def plan_selection(logits_processor: Iterable[Any], generation_config: Any, vocab_size: int) -> Selection | str:
    """The selection that does what `logits_processor` and `generation_config` say, or the sentence why none can.

    Args:
        logits_processor: the `LogitsProcessorList` that generate() has built.
        generation_config: its `do_sample`, `return_dict_in_generate`, `output_scores` and `output_logits` are read.
        vocab_size: columns of the model's logits.
    """
    rules = rules_for(logits_processor, vocab_size)
    if isinstance(rules, str):
        return rules
    returned = bool(generation_config.return_dict_in_generate)
    return Selection(
        rules=rules,
        do_sample=bool(generation_config.do_sample),
        vocab_size=vocab_size,
        keep_scores=returned and bool(generation_config.output_scores),
        keep_logits=returned and bool(generation_config.output_logits),
    )


def draw(probabilities: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One column of each row [B, V] by its probability, int64 [B].

    The race of exponentials: argmax of p / q with q ~ Exp(1). `torch.multinomial` does the same for one draw, so the
    same generator gives the same tokens; but it also checks the probabilities, which stops the host.
    """
    noise = torch.empty_like(probabilities).exponential_(1, generator=generator)
    return torch.argmax(probabilities / noise, dim=-1)


def fill(buffer: Tensor, number: int | Tensor) -> None:
    """Write a number, or one for each of the first rows, into int64 [B]; further rows get 0."""
    if isinstance(number, Tensor):
        buffer.zero_()
        buffer[: number.shape[0]].copy_(number)
    else:
        buffer.fill_(number)
