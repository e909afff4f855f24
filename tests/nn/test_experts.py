"""Stacked experts in 4 and 8 bit: the chosen ones gathered, or all of them for the module's own forward."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from onegpu.config import QuantConfig
from onegpu.nn import QuantExperts, WeightSpec, plain_experts_class, quantize_weight
from onegpu.nn.experts import expert_parameters, quantize_experts_module

CONFIGS = {"nf4": QuantConfig("nf4"), "nf4-double": QuantConfig("nf4", double_quant=True), "int8": QuantConfig("int8")}


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS)
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """Experts in 4 or 8 bit, and plain ones with their dequantized weights."""
    torch.manual_seed(0)
    config = MixtralConfig(hidden_size=64, intermediate_size=128, num_local_experts=8)
    plain = MixtralExperts(config)
    weights = {name: torch.randn_like(value) / 8 for name, value in expert_parameters(plain).items()}
    quantized = copy.deepcopy(plain)
    specs = {name: WeightSpec.of(request.param, tuple(w.shape), w.dtype) for name, w in weights.items()}
    quantize_experts_module(quantized, specs, torch.float32, packed=True)
    for name, weight in weights.items():
        quantized.set_expert_state(name, quantize_weight(weight, specs[name]))
        setattr(plain, name, nn.Parameter(quantized.dequantize_experts(name)))
    return quantized, plain


def routing(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    scores = torch.rand(tokens, 8, generator=generator)
    weights, index = scores.topk(2, dim=-1)
    return torch.randn(tokens, 64, generator=generator), index, weights


@pytest.mark.parametrize("tokens", [1, 3, 4, 20])
def test_answers_as_the_plain_module(pair: tuple[Any, Any], tokens: int) -> None:
    quantized, plain = pair
    x, index, weights = routing(tokens)
    with torch.no_grad():
        got, expected = quantized(x, index, weights), plain(x, index, weights)
    assert torch.allclose(got, expected, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("tokens", [1, 20])
def test_in_place_as_the_plain_module(pair: tuple[Any, Any], tokens: int) -> None:
    """The way of GPUs, with the operators' reference here; a token's expert may be on another device."""
    quantized, plain = pair
    x, index, weights = routing(tokens)
    elsewhere, without = index.clone(), weights.clone()
    elsewhere[0, 0], without[0, 0] = 8, 0.0
    with torch.no_grad():
        got = quantized.forward_in_place(x, elsewhere, weights, torch.float32)
        expected = plain(x, index, without)
    assert torch.allclose(got, expected, atol=1e-5 * float(expected.abs().max()))


def test_in_place_is_proved_before_it_is_used(pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    quantized, cpu = pair[0], torch.device("cpu")
    assert quantized.in_place_is_proved(cpu, torch.float32)
    monkeypatch.setattr(type(quantized), "in_place_agrees", lambda *_: pytest.fail("asked twice"))
    assert quantized.in_place_is_proved(cpu, torch.float32)


@pytest.mark.parametrize("wrong_from", [1, 100])
def test_a_wrong_result_in_place_is_seen(
    pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, wrong_from: int
) -> None:
    """Wrong for few tokens, or for many only."""
    quantized = pair[0]
    right = type(quantized).forward_in_place

    def wrong(self: Any, x: torch.Tensor, *args: Any) -> torch.Tensor:
        return right(self, x, *args) * (1.1 if len(x) >= wrong_from else 1.0)

    monkeypatch.setattr(type(quantized), "forward_in_place", wrong)
    assert not quantized.in_place_is_proved(torch.device("cpu"), torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 5, 300])
def test_captured(pair: tuple[Any, Any], tokens: int) -> None:
    """One graph serves every routing, and its results are the plain module's."""
    from kernels.cases import run_captured

    quantized, plain = (module.cuda() for module in pair)
    quantized.compute_dtype = torch.bfloat16
    x, index, weights = (tensor.cuda() for tensor in routing(tokens))
    others = routing(tokens + 1)[1][:tokens].cuda()
    with torch.no_grad():
        got = run_captured(lambda: quantized(x, index, weights), lambda: index.copy_(others))
        expected = plain(x, others, weights)
    assert torch.allclose(got, expected, atol=0.03 * float(expected.abs().max()))


@pytest.mark.gpu
def test_gradients_pass_on_a_gpu(pair: tuple[Any, Any]) -> None:
    quantized, plain = (module.cuda() for module in pair)
    x, index, weights = (tensor.cuda() for tensor in routing(20))
    grads = []
    for module in (quantized, plain):
        rows = x.clone().requires_grad_()
        module(rows, index, weights).square().sum().backward()
        grads.append(rows.grad)
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-4)


def test_few_tokens_are_gathered(pair: tuple[Any, Any]) -> None:
    quantized, _ = pair
    index = torch.tensor([5, 0, 5])
    for name in quantized.expert_specs:
        assert torch.equal(
            quantized.gather_experts(name, index, torch.float32), quantized.dequantize_experts(name)[index]
        )


def test_blocks_never_straddle_experts(pair: tuple[Any, Any]) -> None:
    quantized, _ = pair
    for name, spec in quantized.expert_specs.items():
        whole = quantized.dequantize_experts(name)
        one = WeightSpec(spec.quant_type, spec.shape[1:], spec.dtype, spec.blocksize)
        if not spec.nested:
            alone = quantize_weight(whole[3], one)
            again = quantize_weight(whole, WeightSpec(spec.quant_type, spec.shape, spec.dtype, spec.blocksize))
            per_expert = again["weight"].reshape(spec.num_experts, -1)[3]
            assert torch.equal(alone["weight"].reshape(-1), per_expert)


def test_it_is_still_its_class_and_copies_and_saves(pair: tuple[Any, Any]) -> None:
    quantized, plain = pair
    assert isinstance(quantized, (QuantExperts, MixtralExperts))
    assert plain_experts_class(type(quantized)) is MixtralExperts
    x, index, weights = routing(2)
    buffer = io.BytesIO()
    torch.save(quantized, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(quantized), torch.load(buffer, weights_only=False), copy.deepcopy(quantized).half()):
        assert type(other) is type(quantized)
        assert torch.equal(other(x, index, weights), quantized(x, index, weights))
    assert not expert_parameters(nn.Linear(3, 3))
    assert set(expert_parameters(plain)) == {"gate_up_proj", "down_proj"}
