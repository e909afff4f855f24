"""What `generate` refuses, in words, before anything runs; and what it says when the numbers break."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from decoder.calls import build, outcomes, prompts
from onegpu.decoder import DecoderOptions, optimize_decoder
from onegpu.decoder import generate as generate_module
from onegpu.errors import ArgumentError, ConfigError, DoesNotFitError, NumericError

NEW = {"max_new_tokens": 4, "do_sample": False}
IDS = torch.arange(4, 10)[None]
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "empty": ({"input_ids": IDS[:, :0]}, "the prompt is empty"),
    "too large an id": ({"input_ids": IDS + 90}, "input_ids must be from 0 to 95.*got 99"),
    "a negative id": ({"input_ids": IDS - 6}, "got -2"),
    "another mask": (
        {"input_ids": IDS, "attention_mask": torch.ones(1, 5, dtype=torch.long)},
        r"attention_mask must have the shape of input_ids, \[1, 6\]; got \[1, 5\]",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_arguments(name: str) -> None:
    inputs, words = BAD[name]
    model = build("llama")
    optimize_decoder(model)
    with pytest.raises(ArgumentError, match=words):
        model.generate(**inputs, **NEW)
    model.generate(IDS, **NEW)
    assert outcomes(model) == {"fast": 1}


def test_longer_than_the_table_of_positions() -> None:
    model = build("gpt2")
    optimize_decoder(model)
    with pytest.raises(ArgumentError, match="the prompt has 65 tokens; the model has positions for 64"):
        model.generate(torch.full((1, 65), 5), **NEW)
    with pytest.raises(ArgumentError, match="positions for 64 tokens, and a prompt of 60 with 5 new ones has no end"):
        model.generate(torch.full((1, 60), 5), max_new_tokens=8, do_sample=False)
    assert model.generate(torch.full((1, 60), 5), max_new_tokens=5, do_sample=False).shape == (1, 65)


def test_no_new_tokens_is_transformers_answer() -> None:
    model = build("llama")
    with pytest.raises(ValueError, match="max_new_tokens") as plain:
        model.generate(IDS, max_new_tokens=0)
    optimize_decoder(model)
    with pytest.raises(ValueError, match="max_new_tokens") as mine:
        model.generate(IDS, max_new_tokens=0)
    assert str(mine.value) == str(plain.value)


def test_more_tokens_than_memory() -> None:
    model = build("llama")
    optimize_decoder(model)
    with pytest.raises(DoesNotFitError, match=r"keys and values of 3 sequences of .* tokens take .* GiB"):
        model.generate(**prompts(), max_new_tokens=2**36, do_sample=False)
    model.generate(**prompts(), **NEW)


def test_nan_names_its_layer() -> None:
    model = build("llama")
    optimize_decoder(model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
    with pytest.raises(NumericError, match=r"NaN after 0 new tokens; .* is model\.layers\.1\.mlp\.up_proj"):
        model.generate(**prompts(), **NEW)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = 0.0
    out = model.generate(**prompts(), **NEW)
    assert out.shape == (3, 16)


def test_nan_that_was_there_before() -> None:
    model = build("llama")
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    optimize_decoder(model)
    with pytest.raises(NumericError, match=r"is model\.norm"):
        model.generate(**prompts(), **NEW)


def test_out_of_memory_in_the_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    optimize_decoder(model)
    wanted = model.generate(**prompts(), **NEW)

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    with monkeypatch.context() as patch:
        patch.setattr(generate_module, "check_numbers", fail)
        with pytest.raises(DoesNotFitError, match="Tried to allocate") as caught:
            model.generate(**prompts(), **NEW)
    assert caught.value.__context__ is None
    assert not model.__dict__["_onegpu_decoder"].workspaces
    assert torch.equal(model.generate(**prompts(), **NEW), wanted)


def test_options() -> None:
    with pytest.raises(ConfigError, match="kv_cache_dtype must be one of"):
        DecoderOptions(kv_cache_dtype="int4")
    with pytest.raises(ConfigError, match="max_batch must be a whole number of at least 1; got 0"):
        DecoderOptions(max_batch=0)


def test_larger_batches_go_to_transformers() -> None:
    model = build("llama")
    optimize_decoder(model, DecoderOptions(max_batch=2))
    model.generate(**prompts(), **NEW)
    assert outcomes(model) == {"Transformers' loop: the batch is larger than max_batch=2": 1}
