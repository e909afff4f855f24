"""4-bit layers in tile order: the same layer for everyone, and the canonical bytes back."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from onegpu.config import QuantConfig
from onegpu.errors import UnsupportedError
from onegpu.formats.tiling import tile_codes, tile_scales
from onegpu.loading.saving import disk_state
from onegpu.nn import QuantLinear4bit, QuantLinear8bit, WeightSpec, layout, quantize_weight, state

CONFIGS = {
    "nf4": QuantConfig("nf4"),
    "nf4-double": QuantConfig("nf4", double_quant=True),
    "fp4-storage": QuantConfig("fp4", quant_storage="float16", blocksize=128),
}
SHAPES = [(40, 128), (1, 128), (48, 384)]


def layer_of(
    config: QuantConfig, shape: tuple[int, int], bias: bool = False, seed: int = 0, **options: Any
) -> QuantLinear4bit:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    spec = WeightSpec.of(config, shape, weight.dtype)
    made = QuantLinear4bit.from_state(
        quantize_weight(weight, spec), spec, torch.randn(shape[0], generator=generator) if bias else None, **options
    )
    assert isinstance(made, QuantLinear4bit)
    return made


def raw(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().reshape(-1).view(torch.uint8).clone() for name, tensor in tensors.items()}


def same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return got.keys() == expected.keys() and all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS)
def config(request: pytest.FixtureRequest) -> QuantConfig:
    return request.param


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_there_and_back(config: QuantConfig, shape: tuple[int, int], bias: bool) -> None:
    layer = layer_of(config, shape, bias)
    before, described = raw(layer.state), layer.spec.tensors()
    x = torch.randn(3, shape[1])
    plain, weight = layer(x), layer.dequantize()
    layout.tile(layer)
    assert layer.is_tiled
    codes = before["weight"]
    assert torch.equal(layer.weight, tile_codes(codes, *shape))
    assert layer.absmax.numel() == -(-shape[0] // 16) * 16 * (shape[1] // config.blocksize)
    assert same(raw(layer.state), before)
    assert {n: (tuple(t.shape), t.dtype) for n, t in layer.state.items()} == described
    assert torch.equal(layer.dequantize(), weight)
    assert torch.allclose(layer(x), plain, rtol=1e-6, atol=1e-6 * float(plain.abs().max()))
    layout.tile(layer)  # once more changes nothing
    assert torch.equal(layer.weight, tile_codes(codes, *shape))
    layout.untile(layer)
    assert not layer.is_tiled
    assert same(raw(layer.held), before)
    assert {n: (tuple(t.shape), t.dtype) for n, t in layer.held.items()} == described
    assert torch.equal(layer(x), plain)
    layout.untile(layer)
    assert same(raw(layer.held), before)


def test_large_weights_go_in_chunks(config: QuantConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of(config, (88, 384))
    before = raw(layer.state)
    whole = tile_codes(before["weight"], 88, 384), tile_scales(layer.absmax, 88, 384, config.blocksize)
    monkeypatch.setattr(state, "TILING_CHUNK", 384 // 2 * 32)  # two row tiles at a time; the last is ragged
    layout.tile(layer)
    assert torch.equal(layer.weight, whole[0])
    assert torch.equal(layer.absmax, whole[1])
    layout.untile(layer)
    assert same(raw(layer.held), before)


def test_state_dict_is_canonical(config: QuantConfig) -> None:
    layer = layer_of(config, (40, 128), bias=True)
    before = layer.state_dict()
    on_disk = disk_state(nn.ModuleDict({"up": layer}), {})
    layout.tile(layer)
    assert list(layer.state_dict()) == list(before)
    assert same(raw(layer.state_dict()), raw(before))
    assert same(raw(disk_state(nn.ModuleDict({"up": layer}), {})), raw(on_disk))


@pytest.mark.parametrize("assign", [False, True])
def test_loads_a_canonical_state(config: QuantConfig, assign: bool) -> None:
    layer, other = layer_of(config, (40, 128), bias=True), layer_of(config, (40, 128), bias=True, seed=1)
    layout.tile(layer)
    place = layer.weight.data_ptr()
    given = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    layer.load_state_dict(given, assign=assign)
    assert layer.is_tiled
    assert (layer.weight.data_ptr() == place) != assign
    x = torch.randn(3, 128)
    assert torch.allclose(layer(x), other(x), rtol=1e-5, atol=1e-5)
    assert same(raw(layer.state), raw(other.state))


def test_a_state_that_does_not_fit_leaves_the_weight(config: QuantConfig) -> None:
    layer, other = layer_of(config, (40, 128)), layer_of(config, (48, 128), seed=1)
    before = raw(layer.state)
    layout.tile(layer)
    with pytest.raises(RuntimeError, match="size mismatch"):
        layer.load_state_dict({name: tensor for name, tensor in other.state_dict().items() if name == "weight"}, False)
    assert same(raw(layer.state), before)


def test_setting_a_state_makes_it_canonical(config: QuantConfig) -> None:
    layer, other = layer_of(config, (40, 128)), layer_of(config, (40, 128), seed=1)
    layout.tile(layer)
    layer.set_state(other.state)
    assert not layer.is_tiled
    assert same(raw(layer.held), raw(other.held))


def test_copies_pickles_and_moves(config: QuantConfig) -> None:
    layer = layer_of(config, (40, 128), bias=True)
    before = raw(layer.state)
    x = torch.randn(2, 128)
    layout.tile(layer)
    expected = layer(x)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for made in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert made.is_tiled
        assert torch.equal(made(x), expected)
        assert made.weight.data_ptr() != layer.weight.data_ptr()
        layout.untile(made)
        assert same(raw(made.state), before)
    for cast in (lambda m: m.half(), lambda m: m.double(), lambda m: m.to(torch.bfloat16), lambda m: m.cpu()):
        moved = cast(copy.deepcopy(layer))
        assert moved.is_tiled
        assert same(raw(moved.state), before)


def test_gradients_and_compute_dtype() -> None:
    layer = layer_of(QuantConfig("nf4"), (40, 128), bias=True, compute_dtype=torch.bfloat16)
    layout.tile(layer)
    x = torch.randn(3, 128, requires_grad=True)
    y = layer(x)
    assert y.dtype == torch.float32
    y.sum().backward()
    expected = layer.dequantize(torch.float32).sum(0).expand(3, -1)
    assert torch.allclose(x.grad, expected, atol=2e-2 * float(expected.abs().max()))
    assert layer.weight.grad is None


def test_lora_trains_on_a_tiled_layer(config: QuantConfig) -> None:
    grads = []
    for tiled in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(128, 128), layer_of(config, (48, 128)))
        if tiled:
            layout.tile(model[1])
        peft = get_peft_model(model, LoraConfig(target_modules=["1"], r=4, init_lora_weights=False))
        peft(torch.randn(5, 128)).square().sum().backward()
        grads.append({name: p.grad for name, p in peft.named_parameters() if p.grad is not None})
    assert any("lora_A" in name for name in grads[0])
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        assert torch.allclose(grads[1][name], grad, rtol=1e-4, atol=1e-5 * float(grad.abs().max())), name


def test_the_canonical_copy_is_let_go(config: QuantConfig) -> None:
    layer = layer_of(config, (48, 384))
    layout.tile(layer)
    own = layer.weight.untyped_storage().nbytes() + layer.absmax.untyped_storage().nbytes()
    assert own == layer.weight.nbytes + layer.absmax.nbytes
    expected = 48 * 384 // 2 + 48 * (384 // config.blocksize) * layer.absmax.element_size()
    assert own == expected
    tensors = [t for t in vars(layer).values() if isinstance(t, Tensor)]
    assert tensors == []


def test_reasons() -> None:
    spec = WeightSpec.of(QuantConfig("int8"), (16, 64), torch.float32)
    int8 = QuantLinear8bit.from_state(quantize_weight(torch.randn(16, 64), spec), spec)
    assert layout.why_not(int8) == "QuantLinear8bit has no 4-bit weight"
    assert layout.why_not(nn.Linear(4, 4)) == "Linear has no 4-bit weight"
    narrow = layer_of(QuantConfig("nf4"), (16, 96))
    assert "in_features 96 is no multiple of 64" in (layout.why_not(narrow) or "")
    with pytest.raises(UnsupportedError, match="in_features 96 is no multiple of 64"):
        layout.tile(narrow)
    assert not narrow.is_tiled
    assert "meta device" in (layout.why_not(QuantLinear4bit(narrow.spec, bias=False)) or "")
    assert layout.why_not(layer_of(QuantConfig("nf4"), (17, 64))) is None
