"""Quantized linear layers: the product of the dequantized weight, and a state that moves as bytes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from onegpu.config import QuantConfig
from onegpu.nn import QuantLinear4bit, QuantLinear8bit, WeightSpec, quantize_weight

CONFIGS = {
    "nf4": QuantConfig("nf4"),
    "nf4-double": QuantConfig("nf4", double_quant=True),
    "fp4-storage": QuantConfig("fp4", quant_storage="float16"),
    "int8": QuantConfig("int8"),
}


def layer_of(config: QuantConfig, weight: Tensor, bias: Tensor | None = None, **options: Any) -> Any:
    spec = WeightSpec.of(config, tuple(weight.shape), weight.dtype)
    kind = QuantLinear8bit if config.quant_type == "int8" else QuantLinear4bit
    return kind.from_state(quantize_weight(weight, spec), spec, bias, **options)


def raw(tensor: Tensor) -> Tensor:
    """The bytes: codes in a floating storage dtype hold NaN patterns, which equal nothing."""
    return tensor.detach().reshape(-1).view(torch.uint8)


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS)
def config(request: pytest.FixtureRequest) -> QuantConfig:
    return request.param


@pytest.mark.parametrize("shape", [(1, 96), (2, 3, 96), (0, 96), (96,)], ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_forward_is_the_dequantized_product(config: QuantConfig, shape: tuple[int, ...], with_bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 96, generator=generator)
    bias = torch.randn(40, generator=generator) if with_bias else None
    layer = layer_of(config, weight, bias)
    x = torch.randn(shape, generator=generator)
    got = layer(x)
    expected = torch.nn.functional.linear(x.double(), layer.dequantize(torch.float32).double(), None)
    expected = expected if bias is None else expected + bias
    assert got.shape == (*shape[:-1], 40)
    assert got.dtype == x.dtype
    if got.numel():
        # int8 rounds x to 127 steps of its row's maximum; 4 bit does not touch x.
        tolerance = 2e-2 if config.quant_type == "int8" else 1e-6
        assert (got - expected).norm() <= tolerance * expected.norm()


def test_computes_in_its_dtype_and_answers_in_that_of_x(config: QuantConfig) -> None:
    layer = layer_of(config, torch.randn(32, 64), compute_dtype=torch.bfloat16)
    x = torch.randn(4, 64)
    assert layer(x).dtype == torch.float32
    assert torch.equal(layer(x), layer(x.bfloat16()).float())


def test_casts_touch_the_bias_alone(config: QuantConfig) -> None:
    layer = layer_of(config, torch.randn(32, 64), torch.randn(32))
    before = {name: tensor.clone() for name, tensor in layer.state.items()}
    for cast in (lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.double(), lambda m: m.cpu()):
        moved = cast(copy.deepcopy(layer))
        for name, tensor in moved.state.items():
            assert tensor.dtype == before[name].dtype
            assert torch.equal(raw(tensor), raw(before[name]))
    assert copy.deepcopy(layer).half().bias.dtype == torch.float16


def test_the_spec_counts_what_is_stored(config: QuantConfig) -> None:
    layer = layer_of(config, torch.randn(48, 80))
    assert layer.spec.stored_bytes == sum(t.numel() * t.element_size() for t in layer.state.values())
    assert {n: (tuple(t.shape), t.dtype) for n, t in layer.state.items()} == layer.spec.tensors()
    assert f"quant_type={config.quant_type}" in repr(layer)


def test_the_weight_takes_no_gradient(config: QuantConfig) -> None:
    layer = layer_of(config, torch.randn(32, 64), torch.zeros(32))
    layer.bias.requires_grad_()
    x = torch.randn(3, 64, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, layer.dequantize(torch.float32).sum(0).expand(3, -1), atol=1e-5)
    assert torch.allclose(layer.bias.grad, torch.full((32,), 3.0))
    assert layer.weight.grad is None
