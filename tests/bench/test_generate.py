from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from onegpu.bench.contenders import Contender, parse_contender
from onegpu.bench.generate import (
    Entrant,
    GenerateRow,
    Speed,
    measure_entrants,
    measure_speed,
    parse_entrants,
    random_prompts,
    text_prompts,
)
from onegpu.bench.measure import Timing, TokenClock, dense_bytes, step_bytes, weight_bytes
from onegpu.errors import ConfigError
from tiny_checkpoint import byte_tokenizer, tiny_llama


class Paced:
    """A model whose `generate` takes no time of its own: the clock's hand is moved by a schedule."""

    device = torch.device("cpu")

    def __init__(self, calls: list[str], name: str, fails_at: int = 99) -> None:
        self.calls = calls
        self.name = name
        self.fails_at = fails_at
        self.generation_config = SimpleNamespace()

    def generate(self, inputs: torch.Tensor, attention_mask: torch.Tensor, streamer: TokenClock) -> None:
        assert attention_mask.shape == inputs.shape
        self.calls.append(self.name)
        if self.calls.count(self.name) == self.fails_at:
            raise RuntimeError("out of patience\nand more")
        streamer.put(inputs)
        for token in range(self.generation_config.max_new_tokens):
            streamer.put(torch.full((inputs.shape[0],), token))
        # 10 ms to the first token, 2 ms for each after it, a millisecond more with each round.
        late = len([call for call in self.calls if call == self.name]) * 1e-3
        first = streamer.started + 0.010
        streamer.times = [first + index // inputs.shape[0] * (0.002 + late) for index in range(len(streamer.times))]
        streamer.end()


@pytest.mark.parametrize("batch", [1, 3])
def test_models_take_turns_and_the_median_leaves_the_first_round_out(batch: int) -> None:
    calls: list[str] = []
    models = {name: Paced(calls, name) for name in ("a", "b")}
    speeds = measure_speed(models, torch.zeros(batch, 7, dtype=torch.int64), max_new_tokens=5, runs=3)
    assert calls == ["a", "b"] * 4
    # Rounds 2, 3 and 4 of each take 4, 5 and 6 ms a token.
    for speed in speeds.values():
        assert isinstance(speed, Speed)
        assert speed.tpot_ms == pytest.approx(5.0)
        assert speed.ttft_ms == pytest.approx(10.0)
        assert speed.tokens_per_second == pytest.approx(200.0 * batch)
        assert speed.slowest == pytest.approx(1000 / 6 * batch)
        assert speed.fastest == pytest.approx(250.0 * batch)
        assert (speed.prompt_tokens, speed.new_tokens, speed.runs, speed.batch) == (7, 5, 3, batch)
        assert speed.first_call_s > 0
        assert speed.first_token_s == pytest.approx(0.010)


@pytest.mark.parametrize("fails_at", [1, 3])
def test_one_that_fails_is_told_and_ends_no_other(fails_at: int) -> None:
    calls: list[str] = []
    models = {"a": Paced(calls, "a", fails_at), "b": Paced(calls, "b")}
    speeds = measure_speed(models, torch.zeros(1, 7, dtype=torch.int64), max_new_tokens=5, runs=3)
    assert speeds["a"] == "RuntimeError: out of patience"
    assert isinstance(speeds["b"], Speed)
    assert calls.count("a") == fails_at
    assert calls.count("b") == 4


def test_a_real_model_writes_exactly_so_many_tokens_and_keeps_its_settings() -> None:
    model = tiny_llama()
    before = model.generation_config
    prompt = text_prompts(byte_tokenizer(), "It was the best of times", 1, 16)
    # Whatever comes first ends a plain generation at once; it must not end a measured one.
    first = model.generate(prompt, max_new_tokens=1, do_sample=False)[0, -1].item()
    model.generation_config.eos_token_id = first
    speed = measure_speed({"plain": model}, prompt, max_new_tokens=9, runs=2)["plain"]
    assert isinstance(speed, Speed)
    assert speed.new_tokens == 9
    assert speed.prompt_tokens == 16
    assert 0 < speed.slowest <= speed.tokens_per_second <= speed.fastest
    assert model.generation_config is before
    assert before.eos_token_id == first
    assert model.generate(prompt, max_new_tokens=9, do_sample=False).shape[1] == 17


@pytest.mark.parametrize(("runs", "tokens"), [(0, 8), (3, 1)])
def test_what_cannot_be_measured_is_refused(runs: int, tokens: int) -> None:
    with pytest.raises(ConfigError, match="at least 1 run of 2 new tokens"):
        measure_speed({}, torch.zeros(1, 1, dtype=torch.int64), max_new_tokens=tokens, runs=runs)


def test_prompts_have_the_size_asked_for_and_differ_by_row() -> None:
    prompts = text_prompts(byte_tokenizer(), "It was the best of times, it was the worst of times", 3, 200)
    assert prompts.shape == (3, 200)
    assert not torch.equal(prompts[0], prompts[1])
    ids = byte_tokenizer()("It was the best")["input_ids"]
    assert prompts[0, : len(ids)].tolist() == ids
    with pytest.raises(ConfigError, match="no tokens"):
        text_prompts(byte_tokenizer(), "", 1, 5)
    drawn = random_prompts(100, 2, 50)
    assert drawn.shape == (2, 50)
    assert 10 <= drawn.min() <= drawn.max() < 100
    assert torch.equal(drawn, random_prompts(100, 2, 50))


def test_peers_are_those_of_the_formats() -> None:
    entrants = parse_entrants("nf4,16bit,nf4+double,int8,nf4+search", peers=True)
    assert [(entrant.label, entrant.system) for entrant in entrants] == [
        ("nf4", "onegpu"),
        ("16bit", "onegpu"),
        ("nf4+double", "onegpu"),
        ("int8", "onegpu"),
        ("nf4+search", "onegpu"),
        ("transformers", "transformers"),
        ("transformers+static", "transformers+static"),
        ("bitsandbytes:nf4", "bitsandbytes"),
        ("bitsandbytes:nf4+double", "bitsandbytes"),
        ("bitsandbytes:int8", "bitsandbytes"),
    ]
    assert [entrant.label for entrant in parse_entrants("transformers,fp32", peers=False)] == ["transformers", "fp32"]
    with pytest.raises(ConfigError, match="format must be one of"):
        parse_entrants("nf3", peers=False)


def entrant_rows(
    labels: str, load: Callable[[Contender], Any], batches: tuple[int, ...] = (1, 2), **options: Any
) -> list[GenerateRow]:
    return measure_entrants(
        parse_entrants(labels, peers=False),
        load,
        lambda batch: random_prompts(260, batch, 6),
        batches,
        **{"max_new_tokens": 3, "runs": 1, "in_turns": True} | options,
    )


def test_a_model_is_gone_before_the_next_is_loaded() -> None:
    """Else its bytes would be in the next one's peak."""
    made: list[weakref.ref[Any]] = []

    def load(_: Contender) -> Any:
        gc.collect()
        assert [model for model in made if model() is not None] == []
        model = tiny_llama()
        made.append(weakref.ref(model))
        return model

    rows = entrant_rows("16bit,transformers,fp32", load, in_turns=False)
    assert [row.error for row in rows] == [""] * len(rows)
    assert len(made) == 3


@pytest.mark.parametrize("in_turns", [True, False])
def test_rows_of_ours_and_of_transformers(in_turns: bool) -> None:
    def load(contender: Contender) -> Any:
        return tiny_llama(torch.float32)

    rows = entrant_rows("16bit,transformers,transformers+static", load, in_turns=in_turns, bandwidth=1e9)
    assert [(row.format, row.batch) for row in rows if row.batch == 1] == [
        ("16bit", 1),
        ("transformers", 1),
        ("transformers+static", 1),
    ]
    assert len(rows) == 6
    for row in rows:
        assert row.error == ""
        assert row.tokens_per_second is not None
        assert row.tokens_per_second > 0
        assert row.new_tokens == 3
        assert row.bytes_per_step is not None
        assert row.tpot_ms is not None
        assert row.bandwidth_percent == pytest.approx(100 * row.bytes_per_step / 1e9 / (row.tpot_ms / 1e3))
        assert row.peak_bytes is None
        assert ("generates" in row.path) == (row.system == "onegpu")


def test_ready_is_told_once_for_each_model_and_cold_for_the_first_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setenv("ONEGPU_CACHE", str(tmp_path / "own"))
    rows = entrant_rows("16bit,transformers", lambda _: tiny_llama(torch.float32))
    assert [(row.format, row.batch, row.cold) for row in rows if row.cold] == [("16bit", 1, True)]
    for row in rows:
        if row.batch > 1:
            assert (row.ready_s, row.prepare_s) == (None, None)
            continue
        assert row.ready_s is not None
        assert row.prepare_s is not None
        assert row.first_call_s is not None
        # Of the first call, which is part of neither the loading nor `optimize`, the first token comes before the end.
        assert 0 < row.ready_s - row.prepare_s < row.first_call_s
    ours, theirs = (row for row in rows if row.batch == 1)
    assert (ours.prepare_s or 0) > 10 * (theirs.prepare_s or 0)


def test_a_model_that_cannot_be_loaded_has_a_row_that_says_so() -> None:
    def load(contender: Contender) -> Any:
        if contender.label == "fp32":
            raise ConfigError("there is no such thing", "look elsewhere")
        return tiny_llama(torch.float32)

    bad, good = entrant_rows("fp32,16bit", load, batches=(2,))
    assert bad.error == "ConfigError: there is no such thing"
    assert bad.tokens_per_second is None
    assert good.error == ""


def test_eight_bit_keys_and_values_are_ours_alone() -> None:
    rows = entrant_rows("16bit,transformers", lambda _: tiny_llama(torch.float32), batches=(1,), kv="int8")
    assert [(row.kv, row.error) for row in rows] == [("int8", ""), ("16bit", "")]
    ours, theirs = (row.bytes_per_step for row in rows)
    # Two layers of 2 heads, keys and values of 16: a byte each and a scale in place of two bytes each, 7 tokens.
    assert ours is not None
    assert theirs is not None
    assert theirs - ours == 7 * 2 * 2 * 2 * (2 * 16 - (16 + 4))


def test_step_bytes_count_what_a_step_reads() -> None:
    tied, untied = tiny_llama(), tiny_llama(tie_word_embeddings=False)
    kv = 2 * 2 * 2 * 16 * 2  # layers, keys and values, heads, head dim, bytes
    assert step_bytes(tied, 1, 10) == weight_bytes(tied) + 10 * kv
    # A table that is no head is looked up: a row for each sequence.
    table = untied.get_input_embeddings().weight
    expected = weight_bytes(untied) - table.nbytes + 3 * table[0].nbytes + 3 * 10 * kv
    assert step_bytes(untied, 3, 10) == expected


def test_step_bytes_count_chosen_experts() -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = Qwen3MoeConfig(
        vocab_size=64, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=16, **sizes
    )
    model = Qwen3MoeForCausalLM(config)
    experts = sum(parameter.nbytes for name, parameter in model.named_parameters() if ".experts." in name)
    one, many = step_bytes(model, 1, 0), step_bytes(model, 8, 0)
    assert one is not None
    assert many is not None
    row = model.get_input_embeddings().weight[0].nbytes
    # One sequence reads 2 of 8 experts, eight sequences may read all.
    assert many - one == experts * 3 // 4 + 7 * row


def test_step_bytes_are_none_where_the_config_does_not_say() -> None:
    model = tiny_llama()
    model.config = SimpleNamespace(to_dict=lambda: {"model_type": "puzzle"})
    assert step_bytes(model, 1, 1) is None


def test_the_first_token_is_no_part_of_the_decode_speed() -> None:
    timing = Timing(prompt_tokens=3, new_tokens=5, ttft_ms=1000.0, decode_ms=40.0)
    assert timing.tpot_ms == 10.0
    assert timing.tokens_per_second == 100.0
    one = Timing(prompt_tokens=3, new_tokens=1, ttft_ms=1000.0, decode_ms=0.0)
    assert one.tokens_per_second is None
    assert one.as_row()["tpot_ms"] is None


def test_dense_bytes_count_tied_weights_once_and_allocate_nothing() -> None:
    model: Any = tiny_llama()
    assert dense_bytes(model.config) == 2 * sum(parameter.numel() for parameter in model.parameters())
    untied: Any = tiny_llama(tie_word_embeddings=False)
    assert dense_bytes(untied.config) - dense_bytes(model.config) == 2 * 260 * 64
    huge = type(model.config)(hidden_size=8192, num_hidden_layers=80, intermediate_size=28672, num_attention_heads=64)
    assert dense_bytes(huge) > 100 * 2**30


@pytest.mark.gpu
def test_peaks_are_each_entrants_own() -> None:
    def load(contender: Contender) -> Any:
        model = tiny_llama(torch.bfloat16, hidden_size=512, intermediate_size=2048, num_hidden_layers=8)
        return model.cuda() if contender.label == "16bit" else model.float().cuda()

    large, small = entrant_rows("fp32,16bit", load, batches=(1,), in_turns=False)
    assert not large.error
    assert not small.error
    assert large.peak_bytes is not None
    assert small.peak_bytes is not None
    assert large.weight_bytes is not None
    assert large.weight_bytes <= large.peak_bytes
    assert small.peak_bytes < large.peak_bytes


def test_an_entrant_names_its_contender() -> None:
    assert parse_entrants("nf4", peers=False) == [Entrant("nf4", "onegpu", parse_contender("nf4"))]
