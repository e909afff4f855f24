"""The fused prompt says what the plain model says, and leaves in the slots what a step goes on with."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from decoder.fused.models import FORMATS, TINY, build, cache_for, plan_of, quantize, tokens_for
from decoder.fused.test_recognise import REFUSED
from decoder.fused.test_step import largest_difference, plain
from onegpu.decoder import DecoderOptions, optimize_decoder, restore_decoder
from onegpu.decoder.classes import driver_of
from onegpu.decoder.fused import FusedPlan, FusedPrompt, FusedStep
from onegpu.decoder.fused import prompt as prompt_module
from onegpu.decoder.fused.prove import exact_int8, proof_tolerance
from onegpu.decoder.prove import LOOSE_COSINE
from onegpu.decoder.universal import UniversalPrefill
from onegpu.decoder.views import Segment
from onegpu.decoder.ways import Way
from onegpu.errors import ArgumentError, UnsupportedError

FUSED = sorted(set(TINY) - set(REFUSED))
LENGTH = 14


def whole(length: int, slot: int = 0) -> tuple[Segment, ...]:
    return (Segment(slot, 0, length),)


def prompt_over(plan: FusedPlan, slots: int = 2, stored: str | None = None) -> FusedPrompt:
    return FusedPrompt(plan, cache_for(plan, slots, LENGTH + 2, stored), chunk=LENGTH)


@pytest.mark.parametrize("name", FUSED)
def test_float32_to_a_ten_thousandth(name: str) -> None:
    """All places of one prompt, and the step behind it."""
    model = build(name)
    tokens = tokens_for(1, LENGTH)[0]
    expected = plain(model, tokens[None])[0]
    plan = plan_of(model)
    prompt = prompt_over(plan)
    # As many logits as places, and only some of them.
    got = prompt(whole(LENGTH - 1), tokens[:-1], list(range(LENGTH - 1)))
    assert largest_difference(got, expected[:-1]) <= 1e-4
    few = prompt(whole(LENGTH - 1, 1), tokens[:-1], [2, LENGTH - 2])
    assert largest_difference(few, expected[[2, LENGTH - 2]]) <= 1e-4
    after = FusedStep(plan, prompt.kv)(tokens[-1:], torch.tensor([LENGTH - 1], dtype=torch.int32))
    assert largest_difference(after, expected[-1:]) <= 1e-4


@pytest.mark.parametrize("name", FUSED)
def test_the_slots_hold_what_the_universal_prompt_leaves(name: str) -> None:
    """Three prompts in one row, and a fourth in two chunks; beyond them the slots are untouched."""
    model = build(name)
    plan = plan_of(model)
    prompt = prompt_over(plan, 5)
    universal = UniversalPrefill(model, cache_for(plan, 5, LENGTH + 2))
    tokens = tokens_for(1, 25)[0]
    rows = [
        ((Segment(3, 0, 5), Segment(0, 0, 1), Segment(1, 0, 6)), tokens[:12], [4, 5, 11]),
        ((Segment(4, 0, 4),), tokens[12:16], [3]),
        ((Segment(4, 4, 9),), tokens[16:], [8]),
    ]
    for row in rows:
        with torch.no_grad():
            expected = universal(*row)
        assert largest_difference(prompt(*row), expected) <= 1e-4
    for mine, other in zip(prompt.kv.layers, universal.kv.layers, strict=True):
        torch.testing.assert_close(mine.k, other.k, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(mine.v, other.v, rtol=1e-4, atol=1e-4)


def test_several_prompts_that_go_on() -> None:
    """Chunks of two prompts in one row, each with keys from before."""
    model = build("gemma3-both")
    plan = plan_of(model)
    prompt = prompt_over(plan)
    tokens = tokens_for(2, LENGTH)
    expected = plain(model, tokens)
    prompt((Segment(0, 0, 3), Segment(1, 0, 7)), torch.cat((tokens[0, :3], tokens[1, :7])), [9])
    rest = torch.cat((tokens[0, 3:], tokens[1, 7:]))
    got = prompt((Segment(0, 3, 11), Segment(1, 7, 7)), rest, list(range(18)))
    assert largest_difference(got, torch.cat((expected[0, 3:], expected[1, 7:]))) <= 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["qwen2", "qwen3", "gemma2-capped", "granite-numbers"])
def test_16_bit_within_its_roundings(name: str, dtype: torch.dtype) -> None:
    model = build(name, dtype)
    tokens = tokens_for(1, LENGTH)[0]
    exact = plain(copy.deepcopy(model).float(), tokens[None])[0]
    expected = plain(model, tokens[None])[0]
    plan = plan_of(model)
    got = prompt_over(plan)(whole(LENGTH), tokens, list(range(LENGTH)))
    assert got.dtype == dtype
    assert largest_difference(got, expected) <= proof_tolerance(dtype, 2 * len(plan.layers) + 1)
    assert largest_difference(got, exact) <= 1.5 * largest_difference(expected, exact) + torch.finfo(dtype).eps


@pytest.mark.parametrize("name", ["qwen2", "gemma2", "phi3", "mixtral"])
@pytest.mark.parametrize(
    ("stored", "tile"),
    [("int8", False), ("nf4", False), ("nf4", True), ("nf4-double", True)],
)
def test_quantized_weights(name: str, stored: str, tile: bool) -> None:
    model = quantize(build(name), FORMATS[stored])
    tokens = tokens_for(1, LENGTH)[0]
    plan = plan_of(model)
    plan.join(tile)
    with exact_int8(plan):
        expected = plain(model, tokens[None])[0]
        got = prompt_over(plan)(whole(LENGTH), tokens, list(range(LENGTH)))
    assert largest_difference(got, expected) <= 1e-4


@pytest.mark.parametrize("stored", ["int8", "fp8"])
def test_an_8_bit_cache(stored: str) -> None:
    """A prompt from its beginning attends to its own keys as they are; only what goes on reads codes."""
    model = build("qwen3")
    plan = plan_of(model)
    tokens = tokens_for(1, LENGTH)[0]
    expected = plain(model, tokens[None])[0]
    prompt = prompt_over(plan, stored=stored)
    universal = UniversalPrefill(model, cache_for(plan, 2, LENGTH + 2, stored))
    assert largest_difference(prompt(whole(9), tokens[:9], list(range(9))), expected[:9]) <= 1e-4
    with torch.no_grad():
        universal(whole(9), tokens[:9], [8])
    for mine, other in zip(prompt.kv.layers, universal.kv.layers, strict=True):
        assert mine.k_scale is not None
        torch.testing.assert_close(mine.k_scale, other.k_scale, rtol=1e-5, atol=1e-6)
        step = 1.01 if stored == "int8" else 33.0
        assert float((mine.k.float() - other.k.float()).abs().max()) <= step
    got = prompt((Segment(0, 9, 5),), tokens[9:], [4])
    assert largest_difference(got, expected[-1:]) <= (0.03 if stored == "int8" else 0.15)


@pytest.mark.parametrize("name", ["llama", "gemma3-both", "mixtral", "olmo2", "gpt-oss"])
def test_long_prompts_in_pieces(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLPs by pieces, the last layer for the last token alone: the same, and nothing given is written to."""
    model = build(name)
    plan = plan_of(model)
    tokens = tokens_for(1, LENGTH)[0]
    expected = plain(model, tokens[None])[0]
    embeddings = plan.embed(tokens)
    kept = embeddings.clone()
    monkeypatch.setattr(prompt_module, "LONG", 4)
    monkeypatch.setattr(prompt_module, "MOST_ROWS", 4)
    monkeypatch.setattr(prompt_module, "ROWS_OF_TILES", 2)
    prompt = FusedPrompt(plan, cache_for(plan, 2, LENGTH), chunk=3)
    assert prompt.rows_at_once(LENGTH) == 4
    assert largest_difference(prompt(whole(LENGTH), tokens, [LENGTH - 1]), expected[-1:]) <= 1e-4
    for start, end in ((0, 8), (8, LENGTH)):
        got = prompt((Segment(1, start, end - start),), embeddings[start:end], [end - start - 1])
    assert largest_difference(got, expected[-1:]) <= 1e-4
    assert torch.equal(embeddings, kept)


def test_how_a_row_is_cut() -> None:
    prompt = prompt_over(plan_of(build("llama")))
    prompt.chunk = 2048
    cut = {tokens: prompt.rows_at_once(tokens) for tokens in (1, 2048, 2049, 4000, 20000, 32768, 131072)}
    assert cut == {1: 1, 2048: 2048, 2049: 1280, 4000: 2048, 20000: 5120, 32768: 8192, 131072: 8192}
    prompt.chunk = 16384
    assert prompt.rows_at_once(32768) == 16384
    assert prompt.rows_at_once(16000) == 16000


def test_bad_caches() -> None:
    plan = plan_of(build("llama"))
    kv = cache_for(plan, 2, 4)
    kv.layers = kv.layers[:1]
    with pytest.raises(ArgumentError, match="the model has 2 layers, the cache 1"):
        FusedPrompt(plan, kv, 8)
    model = build("llama")
    model.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    plan = plan_of(model)
    FusedPrompt(plan, cache_for(plan, 1, 64), 8)
    with pytest.raises(UnsupportedError, match=r"beyond 64 positions .* room for 65"):
        FusedPrompt(plan, cache_for(plan, 1, 65), 8)


def on_gpu(name: str, config: Any) -> tuple[Any, FusedPlan]:
    model = quantize(build(name, torch.bfloat16), config).cuda()
    return model, plan_of(model)


@pytest.mark.gpu
@pytest.mark.parametrize("config", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("name", ["llama-tied", "qwen3", "gemma3-both", "phi3", "olmo2", "granite-numbers", "gpt-oss"])
def test_on_a_gpu(name: str, config: Any) -> None:
    """Few rows and many, alone and together with others."""
    model, plan = on_gpu(name, config)
    bound = proof_tolerance(torch.bfloat16, 2 * len(plan.layers) + 1)

    def assert_same(got: Tensor, expected: Tensor) -> None:
        if name == "gpt-oss":  # A rounding sends some token to another expert: rows keep their directions.
            assert float(torch.cosine_similarity(got.float(), expected.float(), dim=-1).min()) >= LOOSE_COSINE
        else:
            assert largest_difference(got, expected) <= bound

    for length in (7, 60):
        tokens = tokens_for(3, length, "cuda")
        with exact_int8(plan):
            expected = plain(model, tokens)
            prompt = FusedPrompt(plan, cache_for(plan, 3, 64), 2048)
            row = tuple(Segment(slot, 0, length) for slot in (2, 0, 1))
            got = prompt(row, tokens.flatten(), list(range(3 * length)))
            half = prompt(whole(length // 2), tokens[0, : length // 2], [length // 2 - 1])
            rest = prompt(
                (Segment(0, length // 2, length - length // 2),), tokens[0, length // 2 :], [length - length // 2 - 1]
            )
        assert_same(got, expected.flatten(0, 1))
        assert_same(half, expected[0, length // 2 - 1][None])
        assert_same(rest, expected[0, -1:])


@pytest.mark.gpu
def test_nothing_waits_for_the_host() -> None:
    _, plan = on_gpu("llama", None)
    prompt = FusedPrompt(plan, cache_for(plan, 2, 64), 2048)
    tokens = tokens_for(1, 60, "cuda")[0]
    prompt(whole(60), tokens, [59])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        prompt(whole(60), tokens, [59])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_embeddings_are_ids() -> None:
    for name in ("granite-numbers", "gemma2", "llama"):
        model = build(name)
        plan = plan_of(model)
        tokens = tokens_for(1, LENGTH)[0]
        embeddings: Tensor = model.get_input_embeddings()(tokens)
        with torch.no_grad():
            expected = model(inputs_embeds=embeddings[None], use_cache=False).logits[0]
        got = prompt_over(plan)(whole(LENGTH), embeddings, list(range(LENGTH)))
        assert largest_difference(got, expected) <= 1e-4


def spoiled(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if how == "turned":
        given = FusedPrompt.angles
        monkeypatch.setattr(FusedPrompt, "angles", lambda *a: [(sin, cos) for cos, sin in given(*a)])
    else:  # only the last layer, which no proof of single layers sees
        monkeypatch.setattr(FusedPrompt, "last_layer", lambda self, hidden, inputs, *_: hidden[inputs.wanted])


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("turned", "attention of a prompt of model.layers.0 differs from the plain model by"),
        ("cut", "its logits differ from the plain model's by"),
    ],
)
def test_where_a_prompt_differs_it_keeps_its_own_layers(how: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps stay fused, the report says why prompts are not, and answers are right."""
    model = build("llama")
    ids = tokens_for(2, 9)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 5, "do_sample": False}
    wanted = model.generate(ids, **options)
    spoiled(how, monkeypatch)
    report = optimize_decoder(model, DecoderOptions(fused=True))
    assert any(f"prompts go through its own layers: {reason}" in line for line in report.lines()), report.lines()
    driver = driver_of(model)
    assert driver is not None
    assert isinstance(driver.way, Way)
    assert (driver.way.name, driver.way.prefill) == ("fused", UniversalPrefill)
    assert torch.equal(model.generate(ids, **options), wanted)


def test_a_model_generates_through_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long prompts come as one row, short ones packed."""
    model = build("gemma3-both")
    ids = tokens_for(2, 40)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 5, "do_sample": False}
    wanted = model.generate(ids, **options)
    seen: list[list[int]] = []
    plain_call = FusedPrompt.__call__

    def watched(self: FusedPrompt, segments: Any, *rest: Any) -> Tensor:
        seen.append([segment.length for segment in segments])
        return plain_call(self, segments, *rest)

    monkeypatch.setattr(FusedPrompt, "__call__", watched)
    for chunk, lengths in ((16, [[40], [40]]), (100, [[40, 40]])):
        restore_decoder(model)
        optimize_decoder(model, DecoderOptions(fused=True, prefill_chunk=chunk))
        seen.clear()
        assert torch.equal(model.generate(ids, **options), wanted)
        assert seen == lengths
