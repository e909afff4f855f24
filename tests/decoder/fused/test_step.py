"""The fused step says what the plain model says, step by step."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from decoder.fused.models import FORMATS, TINY, build, cache_for, decode, plan_of, quantize, tokens_for
from decoder.fused.test_recognise import REFUSED
from onegpu.decoder.fused import FusedStep
from onegpu.decoder.fused.prove import exact_int8, proof_tolerance
from onegpu.errors import ArgumentError, UnsupportedError

FUSED = sorted(set(TINY) - set(REFUSED))
ROWS, LENGTH = 3, 10


def plain(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(tokens, use_cache=False).logits


def largest_difference(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).abs().max() / expected.double().abs().max())


@pytest.mark.parametrize("name", FUSED)
def test_float32_to_a_ten_thousandth(name: str) -> None:
    model = build(name)
    tokens = tokens_for(ROWS, LENGTH)
    expected = plain(model, tokens)
    plan = plan_of(model)
    got = decode(FusedStep(plan, cache_for(plan, 4, LENGTH)), tokens)
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    assert largest_difference(got, expected) <= 1e-4
    # A joined model still is the plain model.
    assert largest_difference(plain(model, tokens), expected) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["qwen2", "qwen3", "gemma2-capped", "granite-numbers"])
def test_16_bit_within_its_roundings(name: str, dtype: torch.dtype) -> None:
    model = build(name, dtype)
    tokens = tokens_for(ROWS, LENGTH)
    exact = plain(copy.deepcopy(model).float(), tokens)
    expected = plain(model, tokens)
    plan = plan_of(model)
    got = decode(FusedStep(plan, cache_for(plan, 4, LENGTH)), tokens)
    assert got.dtype == dtype
    assert largest_difference(got, expected) <= proof_tolerance(dtype, 2 * len(plan.layers) + 1)
    # It rounds less often than the plain model, or as often: no farther from the truth but for chance.
    assert largest_difference(got, exact) <= 1.5 * largest_difference(expected, exact) + torch.finfo(dtype).eps


@pytest.mark.parametrize("name", ["qwen2", "gemma2", "phi3", "mixtral"])
@pytest.mark.parametrize(
    ("stored", "tile"),
    [("plain", False), ("int8", False), ("nf4", False), ("nf4", True), ("nf4-double", True)],
)
def test_quantized_weights(name: str, stored: str, tile: bool) -> None:
    model = quantize(build(name), FORMATS[stored])
    tokens = tokens_for(ROWS, LENGTH)
    plan = plan_of(model)
    with exact_int8(plan):
        expected = plain(model, tokens)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    plan.join(tile)
    got = decode(FusedStep(plan, cache_for(plan, 4, LENGTH)), tokens)
    assert largest_difference(got, expected) <= 1e-4
    assert plan.is_current()
    for _ in range(2):
        state = model.state_dict()
        assert state.keys() == before.keys()
        assert all(torch.equal(state[key], before[key]) for key in before)
        plan.split()


def test_computing_in_another_dtype_goes_layer_by_layer() -> None:
    model = quantize(build("llama"), FORMATS["nf4"], compute_dtype=torch.bfloat16)
    tokens = tokens_for(2, 4)
    expected = plain(model, tokens)
    plan = plan_of(model)
    got = decode(FusedStep(plan, cache_for(plan, 2, 4)), tokens)
    assert largest_difference(got, expected) <= proof_tolerance(torch.bfloat16, 5)
    [whole, *rest] = plan.report()
    assert whole == "2 layers fused"
    assert (
        "2 × q_proj, k_proj, v_proj one by one: computes in torch.bfloat16, the activations are torch.float32" in rest
    )


def test_rows_at_different_places() -> None:
    """Each row of a step has its own length, and slots beyond the rows are not touched."""
    model = build("gemma3-both")
    plan = plan_of(model)
    kv = cache_for(plan, 4, LENGTH)
    step = FusedStep(plan, kv)
    tokens = tokens_for(2, LENGTH)
    expected = plain(model, tokens)
    decode(step, tokens[:, :7])
    row = step(torch.stack([tokens[0, 7], tokens[1, 3]]), torch.tensor([7, 3], dtype=torch.int32))
    assert largest_difference(row[0], expected[0, 7]) <= 1e-4
    assert largest_difference(row[1], expected[1, 3]) <= 1e-4
    assert all(not layer.k[2:].any() for layer in kv.layers)


@pytest.mark.parametrize("stored", ["int8", "fp8"])
def test_an_8_bit_cache(stored: str) -> None:
    model = build("llama")
    plan = plan_of(model)
    tokens = tokens_for(2, LENGTH)
    expected = plain(model, tokens)
    got = decode(FusedStep(plan, cache_for(plan, 2, LENGTH, stored)), tokens)
    # Keys and values to 127 steps, or to four bits of significand.
    assert largest_difference(got, expected) <= (0.03 if stored == "int8" else 0.15)


def test_a_row_beyond_its_slot_harms_nobody() -> None:
    plan = plan_of(build("llama"))
    kv = cache_for(plan, 2, 4)
    step = FusedStep(plan, kv)
    tokens = tokens_for(2, 4)
    decode(step, tokens)
    before = [layer.k.clone() for layer in kv.layers]
    step(tokens[:, 0], torch.tensor([4, 9], dtype=torch.int32))
    assert all(torch.equal(layer.k, kept) for layer, kept in zip(kv.layers, before, strict=True))


def test_weights_loaded_in_place_are_used() -> None:
    model, other = build("qwen2"), build("qwen2")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.9)
    plan = plan_of(model)
    step = FusedStep(plan, cache_for(plan, 2, 4))
    model.load_state_dict(other.state_dict())
    assert plan.is_current()
    tokens = tokens_for(2, 4)
    assert largest_difference(decode(step, tokens), plain(other, tokens)) <= 1e-4


def test_what_changes_afterwards_is_noticed() -> None:
    model = build("llama")
    plan = plan_of(model)
    FusedStep(plan, cache_for(plan, 2, 4))
    assert plan.is_current()
    model.train()
    assert not plan.is_current()
    model.eval()
    handle = model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    assert not plan.is_current()
    handle.remove()
    assert plan.is_current()
    mlp = model.model.layers[0].mlp
    mlp.up_proj = copy.deepcopy(mlp.up_proj)
    assert not plan.is_current()
    model = build("llama")
    plan = plan_of(model)
    plan.join()
    model.to(torch.bfloat16)
    assert not plan.is_current()


def test_bad_caches() -> None:
    plan = plan_of(build("llama"))
    kv = cache_for(plan, 2, 4)
    kv.layers = kv.layers[:1]
    with pytest.raises(ArgumentError, match="the model has 2 layers, the cache 1"):
        FusedStep(plan, kv)


def test_frequencies_that_depend_on_the_length() -> None:
    model = build("llama")
    model.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    plan = plan_of(model)
    assert plan.rotaries[0].max_positions == 64
    FusedStep(plan, cache_for(plan, 1, 64))
    with pytest.raises(UnsupportedError, match=r"beyond 64 positions .* room for 65"):
        FusedStep(plan, cache_for(plan, 1, 65))


@pytest.mark.gpu
@pytest.mark.parametrize("config", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("name", ["llama-tied", "qwen3", "gemma3-both", "phi3", "mixtral", "granite-numbers"])
def test_on_a_gpu_captured(name: str, config: Any) -> None:
    model = quantize(build(name, torch.bfloat16), config).cuda()
    tokens = tokens_for(ROWS, LENGTH, "cuda")
    plan = plan_of(model)
    with exact_int8(plan):
        expected = plain(model, tokens)
    step = FusedStep(plan, cache_for(plan, ROWS, LENGTH))
    eager = decode(step, tokens)
    if name != "mixtral":  # near ties between experts
        assert largest_difference(eager, expected) <= proof_tolerance(torch.bfloat16, 2 * len(plan.layers) + 1)
    token, place = tokens[:, 0].clone(), torch.zeros(ROWS, dtype=torch.int32, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # it made token and place
    with torch.cuda.stream(stream):
        step(token, place)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = step(token, place)
    for index in range(LENGTH):
        token.copy_(tokens[:, index])
        place.fill_(index)
        graph.replay()
        assert largest_difference(logits, eager[:, index]) <= 1e-2
