"""What a logits processor does, as a function of buffers of fixed size with lengths on the device.

Each rule is the meaning of one of Transformers' processors (`transformers/generation/logits_process.py`), written
without a branch on the host: where a processor asks the length of `input_ids`, a rule asks each row's length. Rules
compare equal when a captured step of the one serves the other; what differs from call to call without changing the
step (lengths, rows to ignore) are its `numbers`, which live in buffers.
"""

# Every rule takes what any rule may need.
# ruff: noqa: ARG002

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from onegpu.decoder.history import History

__all__ = [
    "DecayLength",
    "Eta",
    "ForceAt",
    "NoRepeatNgram",
    "Own",
    "RepetitionPenalty",
    "Rule",
    "SequenceBias",
    "Suppress",
    "TopH",
    "entropy",
]

NEVER = float("-inf")


class Rule(ABC):
    """One step of the way from logits to the scores that are sampled from.

    `reads` says what of the history it needs: nothing, the lengths, or the tokens too.
    """

    reads: ClassVar[Literal["nothing", "lengths", "tokens"]] = "nothing"

    def constants(self, vocab_size: int, device: torch.device) -> tuple[Tensor, ...]:
        """Tensors that never change, made once for a device."""
        return ()

    def numbers(self) -> tuple[int | Tensor, ...]:
        """One value each, or one for each row (int64 [B]), of this call."""
        return ()

    @abstractmethod
    def __call__(
        self, scores: Tensor, history: History, constants: tuple[Tensor, ...], numbers: tuple[Tensor, ...]
    ) -> Tensor:
        """scores float32 [B, V] -> scores [B, V]; `constants` as made above, `numbers` as int64 [B] each."""


@dataclass(frozen=True)
class Own(Rule):
    """A processor of Transformers that looks at the scores alone and never at the host: called as it is."""

    kind: type
    parameters: tuple[tuple[str, float], ...]
    processor: Callable[[Tensor, Tensor], Tensor] = field(compare=False)

    def __call__(
        self, scores: Tensor, history: History, constants: tuple[Tensor, ...], numbers: tuple[Tensor, ...]
    ) -> Tensor:
        """As the processor does it."""
        return self.processor(history.tokens, scores)


@dataclass(frozen=True)
class Suppress(Rule):
    """`tokens` get -inf: always, while a row is shorter than `length`, or only where it has exactly `length`."""

    tokens: tuple[int, ...]
    when: Literal["always", "below", "at"] = "always"
    length: int = field(default=0, compare=False)
    reads: ClassVar[Literal["nothing", "lengths", "tokens"]] = "lengths"

    def constants(self, vocab_size: int, device: torch.device) -> tuple[Tensor, ...]:
        """bool [V]."""
        return (token_mask(self.tokens, vocab_size, device),)

    def numbers(self) -> tuple[int | Tensor, ...]:
        """The length."""
        return () if self.when == "always" else (self.length,)

    def __call__(
        self, scores: Tensor, history: History, constants: tuple[Tensor, ...], numbers: tuple[Tensor, ...]
    ) -> Tensor:
        """-inf where a row's time is."""
        (mask,) = constants
        if self.when == "always":
            return scores.masked_fill(mask, NEVER)
        now = history.lengths < numbers[0] if self.when == "below" else history.lengths == numbers[0]
        return scores.masked_fill(now[:, None] & mask, NEVER)


@dataclass(frozen=True)
class ForceAt(Rule):
    """Where a row has `length` tokens, only `tokens` can come: they get 0, all others -inf."""

    tokens: tuple[int, ...]
    length: int = field(default=0, compare=False)
    reads: ClassVar[Literal["nothing", "lengths", "tokens"]] = "lengths"

    def constants(self, vocab_size: int, device: torch.device) -> tuple[Tensor, ...]:
        """float32 [V]."""
        mask = token_mask(self.tokens, vocab_size, device)
        return (torch.full((vocab_size,), NEVER, device=device).masked_fill(mask, 0.0),)

    def numbers(self) -> tuple[int | Tensor, ...]:
        """The length."""
        return (self.length,)

    def __call__(
        self, scores: Tensor, history: History, constants: tuple[Tensor, ...], numbers: tuple[Tensor, ...]
    ) -> Tensor:
        """The forced row, or the scores."""
        return torch.where((history.lengths == numbers[0])[:, None], constants[0], scores)


@dataclass(frozen=True)
class DecayLength(Rule):
    """From `start` tokens on, `tokens` gain |score| * (factor^(length - start) - 1).

    A token that is at -inf stays there (Transformers before 5.18 made it NaN).
    """

    tokens: tuple[int, ...]
    factor: float
    start: int = field(default=0, compare=False)
    reads: ClassVar[Literal["nothing", "lengths", "tokens"]] = "lengths"

    def constants(self, vocab_size: int, device: torch.device) -> tuple[Tensor, ...]:
        """bool [V]; the factor, float64 [1]."""
        factor = torch.tensor([self.factor], dtype=torch.float64, device=device)
        return token_mask(self.tokens, vocab_size, device), factor

    def numbers(self) -> tuple[int | Tensor, ...]:
        """The start."""
        return (self.start,)

    def __call__(
        self, scores: Tensor, history: History, constants: tuple[Tensor, ...], numbers: tuple[Tensor, ...]
    ) -> Tensor:
        """The scores with the gain."""
        mask, factor = constants
        over = (history.lengths - numbers[0]).clamp(min=0)
        gain = (factor**over - 1).to(scores.dtype)[:, None]
        concerned = mask & torch.isfinite(scores) & (over > 0)[:, None]
        return torch.where(concerned, scores + scores.abs() * gain, scores)


@dataclass(frozen=True)
class RepetitionPenalty(Rule):
    """Tokens seen before are divided by `penalty` where positive, multiplied by it where negative.

    `ignored`: leading columns that do not count as seen, for all rows or for each.
    """

    penalty: float
    ignored: int | Tensor = field(default=0, compare=False)
    reads: ClassVar[Literal["nothing", "lengths", "tokens"]] = "tokens"

    def numbers(self) -> tuple[int | Tensor, ...]:
        """Columns to ignore."""
        return (self.ignored,)

    def __call__(
        self, scores: Tensor, history: History, constants: tuple[Tensor, ...], numbers: tuple[Tensor, ...]
    ) -> Tensor:
        """The scores with the penalty."""
        columns = torch.arange(history.tokens.shape[1], device=scores.device)
        counts = history.inside & (columns[None, :] >= numbers[0][:, None])
        seen = marked(history.tokens, counts, scores.shape[1])
        return torch.where(seen, torch.where(scores < 0, scores * self.penalty, scores / self.penalty), scores)


@dataclass(frozen=True)
class NoRepeatNgram(Rule):
    """A token that would complete an n-gram of `size` tokens for the second time gets -inf."""

    size: int
    reads: ClassVar[Literal["nothing", "lengths", "tokens"]] = "tokens"

    def __call__(
        self, scores: Tensor, history: History, constants: tuple[Tensor, ...], numbers: tuple[Tensor, ...]
    ) -> Tensor:
        """The scores without those tokens."""
        windows = history.tokens.shape[1] - self.size + 1
        if windows <= 0:
            return scores
        prefix = history.recent(self.size - 1)
        repeats = history.inside[:, self.size - 1 :]
        for offset in range(self.size - 1):
            repeats = repeats & (history.tokens[:, offset : offset + windows] == prefix[:, offset, None])
        banned = marked(history.tokens[:, self.size - 1 :], repeats, scores.shape[1])
        return scores.masked_fill(banned, NEVER)


@dataclass(frozen=True)
class SequenceBias(Rule):
    """Each sequence's last token gains its bias where the tokens before it have just come.

    `shortest` is how many more tokens than its beginning a row must hold for a sequence to count: none since
    Transformers 5.19, one before.
    """

    sequences: tuple[tuple[tuple[int, ...], float], ...]
    shortest: int = 0
    reads: ClassVar[Literal["nothing", "lengths", "tokens"]] = "tokens"

    def constants(self, vocab_size: int, device: torch.device) -> tuple[Tensor, ...]:
        """float32 [V] of the single tokens; then prefixes [G, P], last tokens [G], biases [G] for each length."""
        single = torch.zeros(vocab_size)
        for tokens, bias in self.sequences:
            if len(tokens) == 1:
                single[tokens[0]] = bias
        found = [single]
        for length in sorted({len(tokens) for tokens, _ in self.sequences} - {1}):
            group = [(tokens, bias) for tokens, bias in self.sequences if len(tokens) == length]
            found.append(torch.tensor([tokens[:-1] for tokens, _ in group]))
            found.append(torch.tensor([tokens[-1] for tokens, _ in group]))
            found.append(torch.tensor([bias for _, bias in group], dtype=torch.float32))
        return tuple(tensor.to(device) for tensor in found)

    def __call__(
        self, scores: Tensor, history: History, constants: tuple[Tensor, ...], numbers: tuple[Tensor, ...]
    ) -> Tensor:
        """The scores with the biases."""
        single, *groups = constants
        bias = torch.zeros_like(scores) + single
        for prefixes, last, biases in zip(groups[::3], groups[1::3], groups[2::3], strict=True):
            count = prefixes.shape[1]
            complete = (history.recent(count)[:, None, :] == prefixes).all(-1)
            complete &= (history.lengths >= count + self.shortest)[:, None]
            bias.index_add_(1, last, torch.where(complete, biases, 0.0))
        return scores + bias


@dataclass(frozen=True)
class Eta(Rule):
    """Tokens less likely than min(epsilon, sqrt(epsilon) * exp(-entropy)) get `filter_value` (arXiv 2210.15191)."""

    epsilon: float
    filter_value: float
    keep: int

    def constants(self, vocab_size: int, device: torch.device) -> tuple[Tensor, ...]:
        """epsilon, float32 []."""
        return (torch.tensor(self.epsilon, device=device),)

    def __call__(
        self, scores: Tensor, history: History, constants: tuple[Tensor, ...], numbers: tuple[Tensor, ...]
    ) -> Tensor:
        """The scores without the unlikely."""
        (epsilon,) = constants
        threshold = torch.min(epsilon, torch.sqrt(epsilon) * torch.exp(-entropy(scores)))[:, None]
        keep = torch.topk(scores, min(self.keep, scores.shape[1]))[0][:, -1, None]
        return scores.masked_fill((scores.softmax(-1) < threshold) & (scores < keep), self.filter_value)


@dataclass(frozen=True)
class TopH(Rule):
    """Of the `top` most likely, those whose entropy adds up to `share` of it (arXiv 2509.02510)."""

    share: float
    top: int
    filter_value: float

    def __call__(
        self, scores: Tensor, history: History, constants: tuple[Tensor, ...], numbers: tuple[Tensor, ...]
    ) -> Tensor:
        """The scores without the others."""
        best, where = torch.topk(scores, min(self.top, scores.shape[1]))
        likely = (best - best.logsumexp(-1, keepdim=True)).softmax(-1)
        inside = torch.cumsum(-likely * torch.log(likely), -1) <= (entropy(best) * self.share)[:, None]
        inside[:, 0] = True
        kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, where, inside)
        return scores.masked_fill(~kept, self.filter_value)


def entropy(scores: Tensor) -> Tensor:
    """float32 [B], in nats, of softmax(scores); in the order of `torch.distributions.Categorical`, bit for bit."""
    logits = scores - scores.logsumexp(-1, keepdim=True)
    weighted = logits.clamp(min=torch.finfo(logits.dtype).min) * logits.softmax(-1)
    return -weighted.sum(-1)


def token_mask(tokens: tuple[int, ...], vocab_size: int, device: torch.device) -> Tensor:
    """bool [V]: true at `tokens`. One outside the vocabulary is nowhere."""
    mask = torch.zeros(vocab_size, dtype=torch.bool)
    mask[[token for token in tokens if 0 <= token < vocab_size]] = True
    return mask.to(device)


def marked(tokens: Tensor, counts: Tensor, vocab_size: int) -> Tensor:
    """bool [B, V]: the tokens [B, W] whose `counts` [B, W] is true. One outside the vocabulary is nowhere."""
    inside = counts & (tokens >= 0) & (tokens < vocab_size)
    columns = torch.where(inside, tokens, vocab_size)
    found = torch.zeros(tokens.shape[0], vocab_size + 1, dtype=torch.bool, device=tokens.device)
    return found.scatter_(1, columns, True)[:, :vocab_size]
