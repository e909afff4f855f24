"""Rules against Transformers' processors, row by row; draws against torch.multinomial."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.generation import logits_process as lp

from onegpu.decoder.sampling import Selection, draw, plan_selection
from onegpu.errors import ArgumentError

VOCAB = 23
GREEDY = GenerationConfig(do_sample=False)
SAMPLED = GenerationConfig(do_sample=True)

# What generate() can build, each with its parameters; "S" stands for the width of the padded prompt.
MAKERS: dict[str, Any] = {
    "temperature": lambda S: lp.TemperatureLogitsWarper(0.7),
    "top_k": lambda S: lp.TopKLogitsWarper(5),
    "top_k beyond the vocabulary": lambda S: lp.TopKLogitsWarper(500),
    "top_p": lambda S: lp.TopPLogitsWarper(0.8),
    "top_p keeps three": lambda S: lp.TopPLogitsWarper(0.1, min_tokens_to_keep=3),
    "top_h": lambda S: lp.TopHLogitsWarper(0.4),
    "min_p": lambda S: lp.MinPLogitsWarper(0.1),
    "typical": lambda S: lp.TypicalLogitsWarper(0.6),
    "epsilon": lambda S: lp.EpsilonLogitsWarper(0.03),
    "eta": lambda S: lp.EtaLogitsWarper(0.04),
    "eta keeps four": lambda S: lp.EtaLogitsWarper(0.4, min_tokens_to_keep=4),
    "repetition": lambda S: lp.RepetitionPenaltyLogitsProcessor(1.3),
    "repetition of the answer": lambda S: lp.RepetitionPenaltyLogitsProcessor(1.3, prompt_ignore_length=S),
    "no 1-gram": lambda S: lp.NoRepeatNGramLogitsProcessor(1),
    "no 2-gram": lambda S: lp.NoRepeatNGramLogitsProcessor(2),
    "no 3-gram": lambda S: lp.NoRepeatNGramLogitsProcessor(3),
    "bad words": lambda S: lp.NoBadWordsLogitsProcessor([[1], [2, 3], [4, 2, 3], [7, 3]], eos_token_id=0),
    "sequence bias": lambda S: lp.SequenceBiasLogitsProcessor({(1,): -3.0, (2, 3): 4.0, (5, 3): 1.5, (4, 2, 3): 9.0}),
    "long bias": lambda S: lp.SequenceBiasLogitsProcessor({tuple(range(1, 20)): 4.0}),
    "min length": lambda S: lp.MinLengthLogitsProcessor(S + 2, [0, 5]),
    "min new tokens": lambda S: lp.MinNewTokensLengthLogitsProcessor(S, 2, [0, 99]),
    "suppress": lambda S: lp.SuppressTokensLogitsProcessor([3, 4]),
    "suppress at begin": lambda S: lp.SuppressTokensAtBeginLogitsProcessor([3, 4], S),
    "suppress one later": lambda S: lp.SuppressTokensAtBeginLogitsProcessor([3, 4], S + 1),
    "forced bos": lambda S: lp.ForcedBOSTokenLogitsProcessor(6),
    "forced eos": lambda S: lp.ForcedEOSTokenLogitsProcessor(S + 3, [0, 8]),
    "forced eos now": lambda S: lp.ForcedEOSTokenLogitsProcessor(S + 1, 8),
    "finite": lambda S: lp.InfNanRemoveLogitsProcessor(),
    "decay": lambda S: lp.ExponentialDecayLengthPenalty((1, 1.4), [0, 5], S),
    "decay to less": lambda S: lp.ExponentialDecayLengthPenalty((0, 0.7), 5, S),
    "normalize": lambda S: lp.LogitNormalization(),
}

# A gain on -inf was NaN in older Transformers; with other processors before it, ours keeps to the newer meaning.
OLD_DECAY = bool(MAKERS["decay"](0)(torch.zeros(1, 9), torch.full((1, VOCAB), -torch.inf)).isnan().any())


def histories(seed: int, rows: int, width: int, new: int, pad: int) -> tuple[Tensor, Tensor]:
    """Transformers' input_ids [rows, width + new], prompts padded on the left; how many pads each row has."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 6, (rows, width + new), generator=generator)
    pads = torch.randint(0, width, (rows,), generator=generator)
    ids[torch.arange(width + new)[None, :] < pads[:, None]] = pad
    return ids, pads


def bare(ids: Tensor, pads: Tensor, capacity: int) -> Tensor:
    """The same without padding, left-aligned in [rows, capacity]; tokens of nobody behind."""
    out = torch.full((ids.shape[0], capacity), 3)
    for row, pad in enumerate(pads.tolist()):
        out[row, : ids.shape[1] - pad] = ids[row, pad:]
    return out


def planned(processors: list[Any], config: GenerationConfig = GREEDY) -> Selection:
    selection = plan_selection(lp.LogitsProcessorList(processors), config, VOCAB)
    assert isinstance(selection, Selection), selection
    return selection


def logits_of(seed: int, rows: int) -> Tensor:
    logits = torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3
    logits[:, 11] = logits[:, 12]  # a tie
    return logits


@pytest.mark.parametrize("name", MAKERS)
@given(seed=st.integers(0, 10**6), rows=st.integers(1, 4), width=st.integers(1, 9), new=st.integers(0, 5))
@settings(max_examples=15, deadline=None)
def test_scores_equal_transformers(name: str, seed: int, rows: int, width: int, new: int) -> None:
    processor = MAKERS[name](width)
    ids, pads = histories(seed, rows, width, new, pad=2)
    logits = logits_of(seed, rows)
    expected = processor(ids, logits.clone())
    selection = planned([processor])
    lengths = torch.full((rows,), ids.shape[1], dtype=torch.int32)

    # The history as Transformers holds it, with room behind.
    state = selection.state(rows, 20, "cpu")
    room = torch.cat([ids, torch.full((rows, 20 - ids.shape[1]), 3)], 1)
    got = selection.processed(logits, room, lengths, torch.full_like(lengths, width), state)
    torch.testing.assert_close(got, expected, rtol=1e-6 if "decay" in name else 0, atol=0, equal_nan=True)

    # Bare sequences: the padding is put back.
    state = selection.state(rows, 20, "cpu", width=width, pad_token_id=2)
    got = selection.processed(logits, bare(ids, pads, 16), (lengths - pads).int(), (width - pads).int(), state)
    torch.testing.assert_close(got, expected, rtol=1e-6 if "decay" in name else 0, atol=0, equal_nan=True)


@given(
    names=st.lists(st.sampled_from(sorted(MAKERS)), min_size=2, max_size=6, unique=True),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=60, deadline=None)
def test_processors_in_a_row_choose_what_transformers_chooses(names: list[str], seed: int) -> None:
    if OLD_DECAY:
        names = [name for name in names if "decay" not in name]
    processors = lp.LogitsProcessorList([MAKERS[name](5) for name in names])
    ids, _ = histories(seed, 3, 5, 2, pad=0)
    logits = logits_of(seed, 3)
    expected = processors(ids, logits.clone())
    # Nothing is left to choose from.
    assume(not expected.isnan().any())
    selection = planned(processors)
    full = torch.full((3,), 7, dtype=torch.int32)
    state = selection.state(3, 7, "cpu")
    torch.testing.assert_close(
        selection.processed(logits, ids, full, full - 2, state), expected, rtol=1e-5, atol=1e-6, equal_nan=True
    )
    torch.testing.assert_close(selection(logits, ids, full, full - 2, state), expected.argmax(-1))


def test_ragged_rows_equal_each_row_alone() -> None:
    names = ["repetition", "no 2-gram", "bad words", "sequence bias"]
    rows = [[1, 2, 1], [4, 2], [5, 2, 3, 5, 2, 3, 5], [2]]
    tokens = torch.full((4, 9), 2)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = torch.tensor(row)
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.int32)
    logits = logits_of(1, 4)
    for name in names:
        processor = MAKERS[name](1)
        selection = planned([processor])
        got = selection.processed(logits, tokens, lengths, lengths, selection.state(4, 9, "cpu"))
        expected = torch.cat([processor(torch.tensor([row]), logits[i : i + 1]) for i, row in enumerate(rows)])
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_repetition_ignores_what_each_row_ignores() -> None:
    ids, pads = histories(3, 4, 6, 2, pad=2)
    try:
        processor = lp.RepetitionPenaltyLogitsProcessor(1.7, prompt_ignore_length=pads)
    except ValueError:
        pytest.skip("this Transformers knows one number for all rows only")
    logits = logits_of(3, 4)
    selection = planned([processor])
    lengths = torch.full((4,), 8, dtype=torch.int32)
    expected = processor(ids, logits.clone())
    # A state for more rows than there are: a larger bucket.
    got = selection.processed(logits, ids, lengths, lengths - 2, selection.state(6, 8, "cpu"))
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_greedy_without_processors_is_argmax_with_its_ties() -> None:
    logits = torch.zeros(3, VOCAB)
    logits[1, 4:6] = 2.0
    selection = planned([])
    empty = torch.zeros(3, dtype=torch.int32)
    chosen = selection(logits, torch.zeros(3, 4, dtype=torch.int64), empty, empty, selection.state(3, 4, "cpu"))
    assert torch.equal(chosen, logits.argmax(-1))


@given(seed=st.integers(0, 2**40), rows=st.integers(1, 5), spread=st.floats(0.1, 20))
@settings(max_examples=50, deadline=None)
def test_a_draw_is_multinomials(seed: int, rows: int, spread: float) -> None:
    scores = torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed % 977)) * spread
    scores[:, ::3] = float("-inf")
    probabilities = scores.softmax(-1)
    ours = draw(probabilities, torch.Generator().manual_seed(seed))
    theirs = torch.multinomial(probabilities, 1, generator=torch.Generator().manual_seed(seed))[:, 0]
    assert torch.equal(ours, theirs)


def test_sampling_follows_the_default_seed_as_transformers_does() -> None:
    processors = lp.LogitsProcessorList([MAKERS["temperature"](4), MAKERS["top_k"](4)])
    selection = planned(processors, SAMPLED)
    ids, _ = histories(5, 2, 4, 0, pad=0)
    full = torch.full((2,), 4, dtype=torch.int32)
    state = selection.state(2, 4, "cpu")
    torch.manual_seed(11)
    ours = [selection(logits_of(step, 2), ids, full, full, state) for step in range(20)]
    torch.manual_seed(11)
    theirs = [
        torch.multinomial(processors(ids, logits_of(step, 2)).softmax(-1), num_samples=1).squeeze(1)
        for step in range(20)
    ]
    assert torch.equal(torch.stack(ours), torch.stack(theirs))


def test_draws_have_the_distribution() -> None:
    probabilities = torch.tensor([[0.5, 0.3, 0.15, 0.05, 0.0]]).expand(20000, 5)
    counts = torch.bincount(draw(probabilities, torch.Generator().manual_seed(0)), minlength=5) / 20000
    # Five standard deviations of a count of 20,000 draws at p = 0.5.
    assert (counts - probabilities[0]).abs().max() < 5 * (0.25 / 20000) ** 0.5
    assert counts[4] == 0


def test_scores_and_logits_are_kept_where_asked_for() -> None:
    config = GenerationConfig(return_dict_in_generate=True, output_scores=True, output_logits=True)
    processor = MAKERS["repetition"](4)
    selection = planned([processor], config)
    ids, _ = histories(5, 2, 4, 0, pad=0)
    full = torch.full((2,), 4, dtype=torch.int32)
    state = selection.state(2, 4, "cpu")
    logits = logits_of(0, 2)
    selection(logits, ids, full, full, state)
    assert state.scores is not None
    assert state.logits is not None
    torch.testing.assert_close(state.scores, processor(ids, logits.clone()), rtol=0, atol=0)
    assert torch.equal(state.logits, logits)
    assert planned([], GREEDY).state(1, 1, "cpu").scores is None


def test_equal_selections_share_a_state() -> None:
    first = planned([MAKERS["min length"](4), MAKERS["repetition"](4)])
    later = planned([MAKERS["min length"](9), MAKERS["repetition"](9)])
    other = planned([MAKERS["min length"](4), lp.RepetitionPenaltyLogitsProcessor(1.1)])
    assert first == later
    assert hash(first) == hash(later)
    assert first != other
    assert planned([MAKERS["top_k"](1)]) != planned([lp.TopKLogitsWarper(6)])
    state = first.state(1, 16, "cpu")
    addresses = [buffer.data_ptr() for buffers in state.numbers for buffer in buffers]
    later.load(state)
    assert addresses == [buffer.data_ptr() for buffers in state.numbers for buffer in buffers]
    ids, _ = histories(0, 1, 8, 0, pad=0)
    length = torch.tensor([8], dtype=torch.int32)
    # Eight tokens are enough for the first (6) and too few for the later (11): its end tokens stay away.
    got = later.processed(torch.zeros(1, VOCAB), ids, length, length, state)
    assert got[0, 0] == float("-inf")


class Mine(lp.TemperatureLogitsWarper):
    """A user's own, which inherits a known one."""


def test_what_has_no_rule_says_why() -> None:
    assert plan_selection([Mine(0.5)], GREEDY, VOCAB) == (
        "Mine is not one of Transformers' own processors, and may look at anything"
    )
    constrained = lp.PrefixConstrainedLogitsProcessor(lambda batch, ids: [1], 1)
    assert plan_selection([constrained], GREEDY, VOCAB) == (
        "PrefixConstrainedLogitsProcessor has no form for the device"
    )
    outside = plan_selection([lp.SequenceBiasLogitsProcessor({(99,): 1.0})], GREEDY, VOCAB)
    assert outside == "SequenceBiasLogitsProcessor names tokens outside the vocabulary of 23: [99]"
    outside = plan_selection([lp.ForcedEOSTokenLogitsProcessor(5, 40)], GREEDY, VOCAB)
    assert outside == "ForcedEOSTokenLogitsProcessor names tokens outside the vocabulary of 23: [40]"


def test_wrong_vocabulary_is_an_error() -> None:
    selection = planned([])
    length = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ArgumentError, match=r"expected logits of 23 tokens; got shape \(1, 7\)"):
        selection(torch.zeros(1, 7), torch.zeros(1, 1, dtype=torch.int64), length, length, selection.state(1, 1, "cpu"))
    with pytest.raises(ArgumentError, match="made with width=None"):
        selection.load(selection.state(1, 1, "cpu"), width=3)


def test_every_option_of_generate_has_a_rule_or_a_reason() -> None:
    """What generate() itself builds from a config with everything on."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, **sizes)).eval()
    config = GenerationConfig(
        do_sample=True, temperature=0.8, top_k=4, top_p=0.9, min_p=0.05, typical_p=0.9, epsilon_cutoff=0.01,
        eta_cutoff=0.01, repetition_penalty=1.2, no_repeat_ngram_size=3, bad_words_ids=[[3], [4, 5]], min_length=3,
        min_new_tokens=2, forced_eos_token_id=1, remove_invalid_values=True, suppress_tokens=[7],
        begin_suppress_tokens=[8], renormalize_logits=True, exponential_decay_length_penalty=(2, 1.1),
        sequence_bias={(9,): 1.0}, eos_token_id=1, pad_token_id=0, max_new_tokens=6,
    )  # fmt: skip
    seen: list[Any] = []

    original = type(model)._get_logits_processor

    def record(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(original(self, *args, **kwargs))
        return seen[-1]

    model.__dict__["_get_logits_processor"] = record.__get__(model)
    torch.manual_seed(0)
    expected = model.generate(torch.tensor([[2, 3, 4]]), generation_config=config)
    (processors,) = seen
    assert len(processors) >= 18
    selection = plan_selection(processors, config, model.config.vocab_size)
    assert isinstance(selection, Selection), selection
    # The loop by hand, with our choosing.
    torch.manual_seed(0)
    tokens = torch.zeros(1, 16, dtype=torch.int64)
    tokens[:, :3] = torch.tensor([[2, 3, 4]])
    lengths = torch.tensor([3], dtype=torch.int32)
    prompt = lengths.clone()
    state = selection.state(1, 16, "cpu")
    with torch.no_grad():
        while lengths[0] < expected.shape[1]:
            logits = model(tokens[:, : lengths[0]]).logits[:, -1].float()
            chosen = selection(logits, tokens, lengths, prompt, state)
            tokens[0, lengths[0]] = chosen[0]
            lengths += 1
    assert torch.equal(tokens[:, : expected.shape[1]], expected)


@pytest.mark.gpu
@pytest.mark.parametrize("sampled", [False, True])
def test_a_captured_step_chooses_as_an_eager_one(sampled: bool) -> None:
    S, B, V = 6, 3, 4096
    processors = [maker(S) for name, maker in MAKERS.items() if "finite" not in name]
    for processor in processors:
        for key, value in vars(processor).items():
            if isinstance(value, Tensor):
                setattr(processor, key, value.cuda())
    selection = plan_selection(processors, SAMPLED if sampled else GREEDY, V)
    assert isinstance(selection, Selection), selection
    state = selection.state(B, 32, "cuda", width=S, pad_token_id=2)
    ids, pads = histories(0, B, S, 0, pad=2)
    start = bare(ids, pads, 32).cuda()
    steps = torch.randn(8, B, V, generator=torch.Generator().manual_seed(0)).cuda() * 3
    tokens, lengths, logits = start.clone(), (S - pads).int().cuda(), steps[0].clone()
    prompt = lengths.clone()
    chosen = torch.zeros(B, dtype=torch.int64, device="cuda")

    def step() -> None:
        chosen.copy_(selection(logits, tokens, lengths, prompt, state))
        tokens.scatter_(1, lengths[:, None].long(), chosen[:, None])
        lengths.add_(1)

    def run(call: Any) -> Tensor:
        tokens.copy_(start)
        lengths.copy_(prompt)
        torch.cuda.manual_seed(5)
        found = []
        for index in range(8):
            logits.copy_(steps[index])
            call()
            found.append(chosen.clone())
        return torch.stack(found)

    torch.cuda.set_sync_debug_mode("error")
    try:
        eager = run(step)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        step()
    assert torch.equal(run(graph.replay), eager)
    if sampled:
        probabilities = steps[0].softmax(-1)
        torch.cuda.manual_seed(9)
        ours = draw(probabilities)
        torch.cuda.manual_seed(9)
        assert torch.equal(ours, torch.multinomial(probabilities, 1)[:, 0])
