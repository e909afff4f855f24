"""The stop rule against Transformers' criteria."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from transformers.generation import stopping_criteria as sc

from onegpu.decoder.stopping import StopRule, plan_stop


def letters() -> Any:
    """A tokenizer whose tokens are letters and a few pairs."""
    words = [*"abcdst ", "ab", "st", "op", "stop", "o", "p", "<pad>", "e", "f"]
    tokenizer = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, [("s", "t"), ("o", "p")]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")


def planned(found: list[Any]) -> StopRule:
    rule = plan_stop(sc.StoppingCriteriaList(found))
    assert isinstance(rule, StopRule), rule
    return rule


def rounds(rule: StopRule, criteria: list[Any], ids: Tensor, pads: Tensor, prompt: int, bare: bool) -> None:
    """Feed the columns from `prompt` on, one a step, to both; they must agree after each."""
    listed = sc.StoppingCriteriaList(criteria)
    rows, width = ids.shape
    tokens, shift = ids.clone(), torch.zeros_like(pads)
    if bare:
        shift = pads
        for row, pad in enumerate(pads.tolist()):
            tokens[row] = torch.cat([ids[row, pad:], torch.full((pad,), 3)])
    state = rule.state(rows, width, "cpu", width=prompt if bare else None, pad_token_id=13)
    ours = torch.zeros(rows, dtype=torch.bool)
    theirs = ours.clone()
    for length in range(prompt + 1, width + 1):
        lengths = (length - shift).int()
        ours = rule(ids[:, length - 1], tokens, lengths, (prompt - shift).int(), ours, state)
        theirs = theirs | listed(ids[:, :length], None)
        assert torch.equal(ours, theirs), (length, ids)


@given(seed=st.integers(0, 10**6), rows=st.integers(1, 4), prompt=st.integers(1, 5), bare=st.booleans())
@settings(max_examples=80, deadline=None)
def test_finished_when_transformers_says_so(seed: int, rows: int, prompt: int, bare: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 13, (rows, prompt + 8), generator=generator)
    pads = torch.randint(0, prompt, (rows,), generator=generator)
    ids[torch.arange(ids.shape[1])[None, :] < pads[:, None]] = 13
    strings = sc.StopStringCriteria(tokenizer=letters(), stop_strings=["stop", "ab", "st s"])
    for criteria in (
        [sc.EosTokenCriteria([4, 7])],
        [sc.MaxLengthCriteria(prompt + 4)],
        [strings],
        [sc.MaxLengthCriteria(prompt + 6), strings, sc.EosTokenCriteria(5)],
        [],
    ):
        rounds(planned(criteria), criteria, ids, pads, prompt, bare)


def test_stop_strings_that_were_met() -> None:
    """The sequences above would agree even if no string were ever met."""
    tokenizer = letters()
    strings = sc.StopStringCriteria(tokenizer=tokenizer, stop_strings=["stop"])
    rule = planned([strings])
    ids = torch.tensor([tokenizer.convert_tokens_to_ids(word) for word in (["a", "st", "op"], ["stop", "b", "a"])])
    lengths = torch.tensor([3, 3], dtype=torch.int32)
    nobody = torch.zeros(2, dtype=torch.bool)
    assert rule(ids[:, 2], ids, lengths, lengths - 1, nobody, rule.state(2, 3, "cpu")).tolist() == [True, False]


def test_finished_rows_are_filled_only_where_end_tokens_are_named() -> None:
    chosen, finished = torch.tensor([5, 6]), torch.tensor([True, False])
    with_eos, without = planned([sc.EosTokenCriteria(1)]), planned([sc.MaxLengthCriteria(9)])
    state = with_eos.state(2, 4, "cpu", pad_token_id=8)
    assert with_eos.filled(chosen, finished, state).tolist() == [8, 6]
    assert without.filled(chosen, finished, state).tolist() == [5, 6]


def test_lengths_by_row() -> None:
    rule = planned([sc.MaxLengthCriteria(100)])
    state = rule.state(3, 8, "cpu")
    state.max_length.copy_(torch.tensor([4, 5, 6]))
    tokens, lengths = torch.zeros(2, 8, dtype=torch.int64), torch.tensor([5, 4], dtype=torch.int32)
    nobody = torch.zeros(2, dtype=torch.bool)
    assert rule(tokens[:, 0], tokens, lengths, lengths, nobody, state).tolist() == [True, False]


def test_clocks_are_asked_by_the_host() -> None:
    assert planned([sc.MaxTimeCriteria(1e6)]).out_of_time() is False
    assert planned([sc.MaxTimeCriteria(5, initial_timestamp=1.0)]).out_of_time() is True
    assert planned([]).out_of_time() is False


def test_equal_rules_share_a_state() -> None:
    tokenizer = letters()

    def rule(length: int, words: list[str]) -> StopRule:
        return planned([sc.MaxLengthCriteria(length), sc.StopStringCriteria(tokenizer=tokenizer, stop_strings=words)])

    assert rule(3, ["ab"]) == rule(9, ["ab"])
    assert hash(rule(3, ["ab"])) == hash(rule(9, ["ab"]))
    assert rule(3, ["ab"]) != rule(3, ["stop"])
    assert planned([sc.EosTokenCriteria(1)]) != planned([sc.EosTokenCriteria(2)])
    state = rule(3, ["ab"]).state(2, 4, "cpu")
    rule(9, ["ab"]).load(state)
    assert state.max_length.tolist() == [9, 9]


class Mine(sc.EosTokenCriteria):
    """A user's own."""


def test_what_has_no_rule_says_why() -> None:
    expected = "Mine is not one of the stopping criteria that have a form for the device"
    assert plan_stop([Mine(1)]) == expected


@pytest.mark.gpu
def test_captured_stops_equal_eager_ones() -> None:
    strings = sc.StopStringCriteria(tokenizer=letters(), stop_strings=["stop", "ab"])
    rule = planned([strings, sc.EosTokenCriteria(torch.tensor([4], device="cuda")), sc.MaxLengthCriteria(9)])
    ids = torch.randint(0, 13, (5, 10), generator=torch.Generator().manual_seed(0)).cuda()
    state = rule.state(5, 10, "cuda")
    newest, lengths = ids[:, 3].clone(), torch.full((5,), 4, dtype=torch.int32, device="cuda")
    prompt, finished = lengths - 1, torch.zeros(5, dtype=torch.bool, device="cuda")

    def step() -> None:
        finished.copy_(rule(newest, ids, lengths, prompt, finished, state))

    def run(call: Any) -> Tensor:
        finished.zero_()
        found = []
        for length in range(4, 10):
            newest.copy_(ids[:, length - 1])
            lengths.fill_(length)
            call()
            found.append(finished.clone())
        return torch.stack(found)

    torch.cuda.set_sync_debug_mode("error")
    try:
        eager = run(step)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    assert torch.equal(run(graph.replay), eager)
