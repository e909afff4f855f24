"""From the processors that Transformers' generate() has built to rules for the device, by exact class."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from transformers.generation import logits_process

from onegpu.decoder.rules import (
    DecayLength,
    Eta,
    ForceAt,
    NoRepeatNgram,
    Own,
    RepetitionPenalty,
    Rule,
    SequenceBias,
    Suppress,
    TopH,
)

__all__ = ["rule_for", "rules_for"]

# These look at the scores alone and at nothing on the host.
SCORES_ALONE = (
    "TemperatureLogitsWarper",
    "TopKLogitsWarper",
    "TopPLogitsWarper",
    "MinPLogitsWarper",
    "TypicalLogitsWarper",
    "EpsilonLogitsWarper",
    "InfNanRemoveLogitsProcessor",
    "LogitNormalization",
)


def rules_for(processors: Iterable[Any], vocab_size: int) -> tuple[Rule, ...] | str:
    """A rule for each processor, in order, or the sentence why one has none."""
    rules: list[Rule] = []
    for processor in processors:
        rule = rule_for(processor, vocab_size)
        if isinstance(rule, str):
            return rule
        rules.append(rule)
    return tuple(rules)


def rule_for(processor: Any, vocab_size: int) -> Rule | str:
    """The processor's meaning for the device, or the sentence why there is none.

    Reads small tensors (end tokens) from the device, once for each generate(). A processor that Transformers refuses
    when it is first called (a biased token outside the vocabulary) has no rule either, so that the refusal is heard.
    """
    name = type(processor).__name__
    if type(processor) is not getattr(logits_process, name, None):
        return f"{name} is not one of Transformers' own processors, and may look at anything"
    if name in SCORES_ALONE:
        return Own(type(processor), tuple(sorted(vars(processor).items())), processor)
    match name:
        case "RepetitionPenaltyLogitsProcessor":
            ignored = processor.prompt_ignore_length
            return RepetitionPenalty(processor.penalty, 0 if ignored is None else ignored)
        case "NoRepeatNGramLogitsProcessor":
            return NoRepeatNgram(processor.ngram_size)
        case "SequenceBiasLogitsProcessor" | "NoBadWordsLogitsProcessor":
            return sequence_bias(processor, vocab_size)
        case "MinLengthLogitsProcessor":
            return Suppress(token_ids(processor.eos_token_id), "below", processor.min_length)
        case "MinNewTokensLengthLogitsProcessor":
            length = processor.prompt_length_to_skip + processor.min_new_tokens
            return Suppress(token_ids(processor.eos_token_id), "below", length)
        case "SuppressTokensLogitsProcessor":
            return Suppress(token_ids(processor.suppress_tokens))
        case "SuppressTokensAtBeginLogitsProcessor":
            return Suppress(token_ids(processor.begin_suppress_tokens), "at", processor.begin_index)
        case "ForcedBOSTokenLogitsProcessor":
            return forced(name, (int(processor.bos_token_id),), 1, vocab_size)
        case "ForcedEOSTokenLogitsProcessor":
            return forced(name, token_ids(processor.eos_token_id), processor.max_length - 1, vocab_size)
        case "ExponentialDecayLengthPenalty":
            ids = token_ids(processor.eos_token_id)
            if outside := [token for token in ids if token >= vocab_size]:
                return f"{name} names tokens outside the vocabulary of {vocab_size}: {outside}"
            return DecayLength(ids, float(processor.regulation_factor), processor.regulation_start)
        case "EtaLogitsWarper":
            return Eta(float(processor.epsilon), processor.filter_value, processor.min_tokens_to_keep)
        case "TopHLogitsWarper":
            return TopH(processor.top_h, processor.top_n, processor.filter_value)
    return f"{name} has no form for the device"


def forced(name: str, tokens: tuple[int, ...], length: int, vocab_size: int) -> Rule | str:
    """The rule that forces `tokens` at `length`."""
    if outside := [token for token in tokens if not -vocab_size <= token < vocab_size]:
        return f"{name} names tokens outside the vocabulary of {vocab_size}: {outside}"
    return ForceAt(tuple(token % vocab_size for token in tokens), length)


def sequence_bias(processor: Any, vocab_size: int) -> Rule | str:
    """The rule of biased sequences; bad words are sequences of bias -inf."""
    sequences = tuple((tuple(map(int, tokens)), float(bias)) for tokens, bias in processor.sequence_bias.items())
    if outside := sorted({token for tokens, _ in sequences for token in tokens if token >= vocab_size}):
        return f"{type(processor).__name__} names tokens outside the vocabulary of {vocab_size}: {outside}"
    return SequenceBias(sequences, shortest=0 if hasattr(processor, "multi_token_biases") else 1)


def token_ids(tokens: torch.Tensor) -> tuple[int, ...]:
    """The ids as numbers."""
    return tuple(int(token) for token in tokens.reshape(-1).tolist())
