"""Layers of one input as one product: the same result, one memory, and every layer still itself."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onegpu.config import QuantConfig
from onegpu.nn import Joined, QuantLinear4bit, QuantLinear8bit, WeightSpec, join, layout, quantize_weight
from onegpu.nn.joined import FEW_ROWS

K = 128
ROWS = (48, 16, 32)
CONFIGS = {
    "plain": None,
    "nf4": QuantConfig("nf4"),
    "fp4-storage": QuantConfig("fp4", quant_storage="float16", blocksize=32),
    "int8": QuantConfig("int8"),
}


def layer_of(
    config: QuantConfig | None, rows: int, bias: bool = False, dtype: torch.dtype = torch.float32, **options: Any
) -> Any:
    weight = torch.randn(rows, K) / K**0.5
    offset = torch.randn(rows).to(dtype) if bias else None
    if config is None:
        linear = nn.Linear(K, rows, bias=bias, dtype=dtype)
        linear.weight.data = weight.to(dtype)
        if offset is not None:
            linear.bias.data = offset
        return linear.requires_grad_(False)
    spec = WeightSpec.of(config, (rows, K), dtype)
    kind = QuantLinear8bit if config.quant_type == "int8" else QuantLinear4bit
    return kind.from_state(quantize_weight(weight.to(dtype), spec), spec, offset, **options)


def layers_of(config: QuantConfig | None, rows: tuple[int, ...] = ROWS, **options: Any) -> list[Any]:
    torch.manual_seed(0)
    return [layer_of(config, size, **options) for size in rows]


def raw(layers: list[Any]) -> list[Tensor]:
    return [
        tensor.detach().reshape(-1).view(torch.uint8).clone()
        for layer in layers
        for tensor in layer.state_dict().values()
    ]


def same(got: list[Tensor], expected: list[Tensor]) -> bool:
    return len(got) == len(expected) and all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def exact(layers: list[Any], x: Tensor) -> Tensor:
    """The float64 product of the layers' stored weights."""
    parts = []
    for layer in layers:
        weight = layer.weight if type(layer) is nn.Linear else layer.dequantize(torch.float32)
        part = F.linear(x.double(), weight.double())
        parts.append(part if layer.bias is None else part + layer.bias.double())
    return torch.cat(parts, dim=-1)


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS)
def config(request: pytest.FixtureRequest) -> QuantConfig | None:
    return request.param


@pytest.mark.parametrize("shape", [(1, K), (2, 3, K), (0, K)], ids=str)
@pytest.mark.parametrize("biases", [(), (0, 1, 2), (1,)], ids=str)
def test_one_product(config: QuantConfig | None, shape: tuple[int, ...], biases: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layers = [layer_of(config, rows, bias=index in biases) for index, rows in enumerate(ROWS)]
    before = raw(layers)
    x = torch.randn(shape)
    expected = exact(layers, x)
    joined = join(layers, tile=True)
    assert joined.reason is None
    assert joined.out_features == sum(ROWS)
    got = joined(x)
    assert got.shape == (*shape[:-1], sum(ROWS))
    assert got.dtype == x.dtype
    assert torch.allclose(got.double(), expected, rtol=0, atol=2e-6 * (float(expected.abs().max()) if len(x) else 1))
    assert joined.is_intact()
    assert same(raw(layers), before)
    joined.split()
    assert same(raw(layers), before)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gate_and_up_with_a_tail(config: QuantConfig | None, activation: str) -> None:
    layers = layers_of(config, (32, 32))
    x, residual = torch.randn(3, K), torch.randn(3, 32)
    gate, up = exact(layers, x).chunk(2, dim=-1)
    act = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
    joined = join(layers, tile=True)
    got = joined(x, residual=residual, activation=activation, gated=True)
    assert torch.allclose(got.double(), act * up + residual, rtol=0, atol=1e-5)


def test_one_memory_and_no_second_copy(config: QuantConfig | None) -> None:
    layers = layers_of(config, bias=True)
    joined = join(layers, tile=True)
    assert joined.buffers is not None
    storage = joined.buffers.weight.untyped_storage()
    assert {layer.weight.untyped_storage().data_ptr() for layer in layers} == {storage.data_ptr()}
    assert storage.nbytes() == sum(layer.weight.nbytes for layer in layers)
    joined.split()
    for layer in layers:
        assert layer.weight.untyped_storage().nbytes() == layer.weight.nbytes
        assert layer.bias.untyped_storage().nbytes() == layer.bias.nbytes
        assert not getattr(layer, "is_tiled", False)


def test_the_layers_stay_themselves(config: QuantConfig | None) -> None:
    layers = layers_of(config, bias=True)
    x = torch.randn(2, K)
    plain = [layer(x) for layer in layers]
    joined = join(layers, tile=True)
    for layer, expected in zip(layers, plain, strict=True):
        assert torch.allclose(layer(x), expected, rtol=1e-6, atol=1e-6)
    # A state loaded in place reaches the joint memory.
    others = layers_of(config, bias=True)[::-1]
    torch.manual_seed(7)
    others = [layer_of(config, rows, bias=True) for rows in ROWS]
    for layer, other in zip(layers, others, strict=True):
        layer.load_state_dict(other.state_dict())
    assert joined.is_intact()
    expected = exact(others, x)
    assert torch.allclose(joined(x).double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.load_state_dict(copy.deepcopy(layer.state_dict()), assign=True),
        lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight.clone(), requires_grad=False)),
        lambda layer: setattr(layer, "bias", nn.Parameter(layer.bias.clone(), requires_grad=False)),
    ],
    ids=["assigned", "weight", "bias"],
)
def test_what_is_replaced_is_noticed(config: QuantConfig | None, change: Callable[[Any], object]) -> None:
    layers = layers_of(config, bias=True)
    joined = join(layers, tile=True)
    assert joined.is_intact()
    change(layers[1])
    assert not joined.is_intact()


def test_a_copy_is_not_of_the_joint_memory(config: QuantConfig | None) -> None:
    layers = layers_of(config)
    joined = join(layers, tile=True)
    other: Joined = copy.deepcopy(joined)
    assert joined.is_intact()
    assert not other.is_intact()
    x = torch.randn(2, K)
    assert torch.equal(other(x), joined(x))


def test_one_layer_needs_no_copy(config: QuantConfig | None) -> None:
    [layer] = layers_of(config, (40,), bias=True)
    before, place = raw([layer]), layer.weight.data_ptr()
    joined = join([layer], tile=True)
    x = torch.randn(2, K)
    assert joined.reason is None
    assert torch.allclose(joined(x).double(), exact([layer], x), rtol=0, atol=1e-5)
    if not isinstance(layer, QuantLinear4bit):
        assert layer.weight.data_ptr() == place
    assert joined.is_intact()
    joined.split()
    assert same(raw([layer]), before)


def test_many_rows_of_int8_are_its_layers_own() -> None:
    layers = layers_of(QuantConfig("int8"))
    x = torch.randn(FEW_ROWS + 1, K)
    expected = torch.cat([layer(x) for layer in layers], dim=-1)
    assert torch.equal(join(layers)(x), expected)


def test_double_quantized_scales_keep_their_offsets() -> None:
    rows = 256 * 64 // K
    layers = layers_of(QuantConfig("nf4", double_quant=True), (rows, 2 * rows, 48))
    before, x = raw(layers), torch.randn(3, K)
    expected = exact(layers, x)
    joined = join(layers, tile=True)
    assert joined.reason is None
    assert torch.allclose(joined(x).double(), expected, rtol=0, atol=2e-6 * float(expected.abs().max()))
    assert joined.is_intact()
    joined.split()
    assert same(raw(layers), before)


def test_what_is_not_one_product_runs_one_by_one() -> None:
    torch.manual_seed(0)
    nested = QuantConfig("nf4", double_quant=True)
    x = torch.randn(3, K)

    def reason_of(layers: list[Any], tile: bool = True, dtype: torch.dtype = torch.float32) -> str:
        expected = torch.cat([layer(x) for layer in layers], dim=-1)
        joined = join(layers, dtype, tile=tile)
        gate, up = expected.chunk(2, dim=-1)
        assert torch.allclose(joined(x), expected, rtol=1e-6, atol=1e-6)
        assert torch.allclose(joined(x, activation="relu", gated=True), gate.relu() * up, rtol=1e-5, atol=1e-5)
        assert joined.is_intact()
        return joined.reason or ""

    hooked = nn.Linear(K, 16)
    hooked.register_forward_hook(lambda *_: None)
    plain, nf4, int8 = None, QuantConfig("nf4"), QuantConfig("int8")
    assert "no plain linear layer, or has hooks" in reason_of([nn.Linear(K, 16), hooked])
    assert "different kinds: Linear, QuantLinear4bit" in reason_of([layer_of(plain, 16), layer_of(nf4, 16)])
    assert "scales of 16 rows are no multiple of 256" in reason_of(layers_of(nested, (16, 16)))
    assert "40 rows are no multiple of 16" in reason_of(layers_of(nf4, (40, 40)))
    assert "rows on a CPU" in reason_of(layers_of(nf4), tile=False)
    assert "computes in torch.bfloat16" in reason_of(layers_of(int8, compute_dtype=torch.bfloat16))
    assert "differ in threshold" in reason_of([layer_of(int8, 16), layer_of(int8, 16, threshold=0.0)])
    assert "4-bit format" in reason_of([layer_of(nf4, 16), layer_of(QuantConfig("fp4"), 16)])
    shared = nn.Linear(K, 16)
    assert "share a weight" in reason_of([shared, shared])
    assert "biases differ" in reason_of(
        [layer_of(int8, 16, bias=True), layer_of(int8, 16, bias=True, dtype=torch.bfloat16)]
    )


def test_another_dtype_of_x_goes_layer_by_layer() -> None:
    layers = layers_of(QuantConfig("nf4"), compute_dtype=torch.float32)
    joined = join(layers, tile=True)
    x = torch.randn(2, K).bfloat16()
    assert torch.equal(joined(x), torch.cat([layer(x) for layer in layers], dim=-1))


def test_tiled_layers_are_joined_as_they_are() -> None:
    layers = layers_of(QuantConfig("nf4"))
    x = torch.randn(2, K)
    before = raw(layers)
    layout.tile(layers[1])
    joined = join(layers, tile=True)
    assert torch.allclose(joined(x).double(), exact(layers, x), rtol=0, atol=1e-5)
    joined.split()
    assert [layer.is_tiled for layer in layers] == [False, True, False]
    assert same(raw(layers), before)


def test_double_quantized_scales_loaded_in_place_are_noticed() -> None:
    """Part of the joint scales is a copy: a layer whose state is written to is not joined any more."""
    layers = layers_of(QuantConfig("nf4", double_quant=True), (128, 128))
    others = [layer_of(QuantConfig("nf4", double_quant=True), 128) for _ in range(2)]
    joined = join(layers, tile=True)
    assert joined.reason is None
    assert joined.is_intact()
    joined(torch.randn(2, K))
    assert joined.is_intact()
    layers[1].load_state_dict(others[1].state_dict())
    assert not joined.is_intact()
    expected = raw([layers[0], others[1]])
    joined.split()
    assert same(raw(layers), expected)
    x = torch.randn(2, K)
    again = join(layers, tile=True)
    assert torch.allclose(again(x).double(), exact(layers, x), rtol=0, atol=1e-5)
