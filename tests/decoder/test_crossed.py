"""Models with an encoder: it runs once, its keys and values too, and the decoder goes on over slots."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from decoder.calls import BY_NAME, outcomes, ready
from onegpu.decoder import decoder_report, optimize_decoder, restore_decoder
from tiny_models import MODELS, TinyModel

CROSSED = [entry for entry in MODELS if entry.kind in ("encoder-decoder", "speech")]
# Their attention wants its masks in shapes of its own, or its keys time first.
NOT_OURS = {"fsmt", "prophetnet"}
NEW = {"max_new_tokens": 12, "do_sample": False, "num_beams": 1}


def heard(entry: TinyModel) -> dict[str, Any]:
    """What the encoder is given, the second text shorter than the first."""
    inputs = entry.inputs()
    del inputs["decoder_input_ids"]
    if "attention_mask" in inputs:
        inputs["attention_mask"][1, 6:] = 0
    return inputs


@pytest.mark.parametrize("entry", CROSSED, ids=lambda entry: entry.name)
def test_every_decoder_with_an_encoder(entry: TinyModel) -> None:
    model = ready(entry)
    inputs = heard(entry)
    alone = {name: value[:1] for name, value in inputs.items()}
    wanted = [model.generate(**each, **NEW) for each in (inputs, alone)]
    report = optimize_decoder(model)
    assert report.is_optimized == (entry.name not in NOT_OURS), report.lines()
    got = [model.generate(**each, **NEW) for each in (inputs, alone, inputs)]
    assert all(map(torch.equal, got, [*wanted, wanted[0]]))
    if report.is_optimized:
        assert outcomes(model) == {"fast": 3}
    restore_decoder(model)
    assert torch.equal(model.generate(**inputs, **NEW), wanted[0])


@pytest.mark.parametrize("name", ["bart", "t5", "whisper"])
def test_rows_end_one_by_one(name: str) -> None:
    model = ready(BY_NAME[name])
    inputs = heard(BY_NAME[name])
    free = model.generate(**inputs, **NEW)
    model.generation_config.eos_token_id = int(free[0, 5])
    wanted = model.generate(**inputs, **{**NEW, "max_new_tokens": 20})
    optimize_decoder(model)
    assert torch.equal(model.generate(**inputs, **{**NEW, "max_new_tokens": 20}), wanted)
    assert outcomes(model) == {"fast": 1}


def test_beams_and_prompts_for_the_decoder() -> None:
    model = ready(BY_NAME["bart"])
    inputs = heard(BY_NAME["bart"])
    prompt = torch.tensor([[1, 7, 9], [1, 5, 6]])
    calls: list[dict[str, Any]] = [{"num_beams": 3}, {"decoder_input_ids": prompt}]
    wanted = [model.generate(**inputs, **{**NEW, **each}) for each in calls]
    optimize_decoder(model)
    got = [model.generate(**inputs, **{**NEW, **each}) for each in calls]
    assert all(map(torch.equal, got, wanted))
    assert outcomes(model) == {"fast": 1}


def test_the_output_object() -> None:
    model = ready(BY_NAME["t5"])
    inputs = heard(BY_NAME["t5"])
    options = {**NEW, "return_dict_in_generate": True, "output_scores": True}
    wanted = model.generate(**inputs, **options)
    optimize_decoder(model)
    got = model.generate(**inputs, **options)
    assert outcomes(model) == {"fast": 1}
    assert type(got) is type(wanted)
    assert got.keys() == wanted.keys()
    assert torch.equal(got.sequences, wanted.sequences)
    torch.testing.assert_close(torch.stack(got.scores), torch.stack(wanted.scores), atol=2e-4, rtol=2e-4)
    for mine, theirs in zip(got.past_key_values, wanted.past_key_values, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            if a is not None:
                torch.testing.assert_close(a, b, atol=2e-4, rtol=2e-4)


def test_models_inside_a_model() -> None:
    entry = BY_NAME["blip-2"]
    model = ready(entry)
    inputs = entry.inputs()
    model.language_model.generation_config.eos_token_id = None
    wanted = model.generate(**inputs, **NEW)
    optimize_decoder(model)
    assert torch.equal(model.generate(**inputs, **NEW), wanted)
    report = decoder_report(model)
    assert report is not None
    parts = {part.name: part for part in report.parts}
    assert parts["language_model"].outcomes == {"fast": 1}
