from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from onegpu.bench.generate import measure_speed, speed_prompt
from onegpu.bench.measure import Timing, TokenClock, dense_bytes
from onegpu.errors import ConfigError
from tiny_checkpoint import byte_tokenizer, tiny_llama


class Paced:
    """A model whose `generate` takes no time of its own: the clock's hand is moved by a schedule."""

    device = torch.device("cpu")

    def __init__(self, calls: list[str], name: str) -> None:
        self.calls = calls
        self.name = name
        self.generation_config = SimpleNamespace()

    def generate(self, inputs: torch.Tensor, attention_mask: torch.Tensor, streamer: TokenClock) -> None:
        assert attention_mask.shape == inputs.shape
        self.calls.append(self.name)
        streamer.put(inputs)
        for token in range(self.generation_config.max_new_tokens):
            streamer.put(torch.tensor([token]))
        # 10 ms to the first token, 2 ms for each after it, a millisecond more with each round.
        late = len([call for call in self.calls if call == self.name]) * 1e-3
        first = streamer.started + 0.010
        streamer.times = [first + index * (0.002 + late) for index in range(len(streamer.times))]
        streamer.end()


def test_models_take_turns_and_the_median_leaves_the_first_round_out() -> None:
    calls: list[str] = []
    models = {name: Paced(calls, name) for name in ("a", "b")}
    speeds = measure_speed(models, torch.zeros(1, 7, dtype=torch.int64), max_new_tokens=5, runs=3)
    assert calls == ["a", "b"] * 4
    # Rounds 2, 3 and 4 of each take 4, 5 and 6 ms a token.
    for speed in speeds.values():
        assert speed.tpot_ms == pytest.approx(5.0)
        assert speed.ttft_ms == pytest.approx(10.0)
        assert speed.tokens_per_second == pytest.approx(200.0)
        assert speed.slowest == pytest.approx(1000 / 6)
        assert speed.fastest == pytest.approx(250.0)
        assert (speed.prompt_tokens, speed.new_tokens, speed.runs) == (7, 5, 3)


def test_a_real_model_writes_exactly_so_many_tokens_and_keeps_its_settings() -> None:
    model = tiny_llama()
    before = model.generation_config
    prompt = speed_prompt(byte_tokenizer(), "It was the best of times", 16)
    # Whatever comes first ends a plain generation at once; it must not end a measured one.
    first = model.generate(prompt, max_new_tokens=1, do_sample=False)[0, -1].item()
    model.generation_config.eos_token_id = first
    speed = measure_speed({"plain": model}, prompt, max_new_tokens=9, runs=2)["plain"]
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


def test_a_prompt_longer_than_its_text_is_refused() -> None:
    with pytest.raises(ConfigError, match="the text has 5 tokens, 6 are asked for"):
        speed_prompt(byte_tokenizer(), "hello", 6)
    assert speed_prompt(byte_tokenizer(), "hello", 3).shape == (1, 3)


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
