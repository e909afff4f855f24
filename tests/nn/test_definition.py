"""For a while quantized layers on a GPU multiply with dequantized weights; afterwards they are as they were."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from onegpu.config import QuantConfig
from onegpu.nn import QuantLinear, QuantLinear4bit, QuantLinear8bit, WeightSpec, quantize_weight
from onegpu.nn.definition import by_definition, product

N, K = 48, 128


def layer_of(quant_type: str, dtype: torch.dtype, *, bias: bool, device: str = "cpu") -> QuantLinear:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(N, K, generator=generator, dtype=torch.float32).to(device, dtype)
    spec = WeightSpec.of(QuantConfig(quant_type), (N, K), dtype)
    kind = QuantLinear8bit if quant_type == "int8" else QuantLinear4bit
    return kind.from_state(quantize_weight(weight, spec), spec, torch.ones(N, dtype=dtype).to(device) if bias else None)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [(1,), (0,), (2, 7)])
def test_the_product_is_the_definition(quant_type: str, bias: bool, rows: tuple[int, ...]) -> None:
    layer = layer_of(quant_type, torch.float32, bias=bias)
    x = torch.randn(*rows, K, generator=torch.Generator().manual_seed(1))
    expected = x.double() @ layer.dequantize().double().T + (1 if bias else 0)
    got = product(layer, x)
    assert got.shape == (*rows, N)
    assert torch.allclose(got.double(), expected, rtol=0, atol=1e-5 * K**0.5)


def test_on_a_cpu_nothing_changes() -> None:
    model = nn.Sequential(layer_of("nf4", torch.float32, bias=False))
    with by_definition(model):
        assert "forward" not in model[0].__dict__


@pytest.mark.gpu
@pytest.mark.parametrize("quant_type", ["nf4", "int8"])
def test_on_a_gpu_layers_take_it_and_give_it_back(quant_type: str) -> None:
    layer = layer_of(quant_type, torch.bfloat16, bias=True, device="cuda")
    model = nn.Sequential(layer)
    x = torch.randn(3, K, dtype=torch.bfloat16, device="cuda")
    with pytest.raises(RuntimeError, match="stop"), by_definition(model):
        assert torch.equal(model(x), product(layer, x))
        raise RuntimeError("stop")
    assert "forward" not in layer.__dict__
    assert (model(x).float() - product(layer, x).float()).abs().max() < 0.5
