"""Fused parts: equal to their modules, gone after restore, and out of the way when a linear changes under them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import onegpu
from encoder.test_architectures import assert_equal, run
from encoder.zoo import CASES, padded_mask
from onegpu.encoder import EncoderOptions
from onegpu.encoder.fuse import is_exact_gelu, linear_gelu_in_chunks
from onegpu.encoder.graphs import record_on_host
from onegpu.encoder.optimize import EncoderReport, fuse, optimize_encoder, restore_encoder

PARTS = {
    "bert": {"QKV products": 3, "residual + LayerNorm": 6, "GELU": 3},
    "roberta": {"QKV products": 3, "residual + LayerNorm": 6, "GELU": 3},
    "albert": {"QKV products": 2},
    "distilbert": {"QKV products": 3},
    "bart": {"QKV products": 2},
    "t5": {"QKV products": 2},
    "wav2vec2": {"QKV products": 2},
    "vit": {"QKV products": 2},
    "mpnet": {"QKV products": 3, "residual + LayerNorm": 3, "GELU": 3},
    "rembert": {"QKV products": 3, "residual + LayerNorm": 6, "GELU": 3},
}


def case_of(name: str) -> Any:
    return next(case for case in CASES if case.name == name)


def optimized(model: Any, options: EncoderOptions | None = None) -> EncoderReport:
    """As on a GPU: noted down, fused; the operators run their references."""
    report = optimize_encoder(model, options)
    for line in report.stacks:
        if line.stack is not None:
            line.stack.graphs.works_anywhere = True
            line.stack.graphs.capture = record_on_host
            fuse(line.stack, line)
    return report


@pytest.mark.parametrize("activation", ["inplace", "epilogue", "chunked"])
@pytest.mark.parametrize("name", PARTS)
def test_equal(name: str, activation: str) -> None:
    case, mask = case_of(name), padded_mask((5, 10, 4, 2))
    model, inputs = case.build(), case.inputs(mask)
    want = run(model, inputs)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    report = optimized(model, EncoderOptions(fuse_activation=activation))
    assert report.stacks[0].fused == PARTS[name]
    assert not report.stacks[0].not_fused
    for _ in range(4):
        assert_equal(case, mask, run(model, inputs), want)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    restore_encoder(model)
    for key, value in model.state_dict().items():
        assert torch.equal(value, weights[key])
    for parameter in model.parameters():
        assert parameter.untyped_storage().nbytes() == parameter.nbytes
    got = run(model, inputs)
    assert all(torch.equal(got[key], want[key]) for key in want)


def test_options_switch_parts_off() -> None:
    model = case_of("bert").build()
    report = optimized(model, EncoderOptions(fuse_qkv=False, fuse_norm=False, fuse_activation="off"))
    assert report.stacks[0].fused == {}


def test_a_change_in_place_is_seen() -> None:
    case, mask = case_of("bert"), padded_mask((5, 10, 4, 2))
    model, inputs = case.build(), case.inputs(mask)
    other = copy.deepcopy(model)
    optimized(model)
    for _ in range(3):
        run(model, inputs)
    with torch.no_grad():
        for one in (model, other):
            one.encoder.layer[1].attention.self.key.weight.mul_(1.5)
    assert_equal(case, mask, run(model, inputs), run(other, inputs))
    state = {key: value * 0.7 if "encoder" in key else value for key, value in other.state_dict().items()}
    model.load_state_dict(state)
    other.load_state_dict(state)
    assert_equal(case, mask, run(model, inputs), run(other, inputs))


def test_an_exchange_is_seen() -> None:
    """Other storage, another module: what was fused or captured from the old one is not used again."""
    case, mask = case_of("bert"), padded_mask((5, 10, 4, 2))
    model, inputs = case.build(), case.inputs(mask)
    other = copy.deepcopy(model)
    optimized(model)
    for _ in range(3):
        run(model, inputs)
    for one in (model, other):
        torch.manual_seed(9)
        attention = one.encoder.layer[0].attention
        attention.self.query.weight.data = torch.randn_like(attention.self.query.weight)
        attention.self.value = nn.Linear(32, 32)
        attention.output.LayerNorm = nn.LayerNorm(32, eps=0.5)
        one.encoder.layer[2].output.dense = nn.Sequential(nn.Linear(64, 32), nn.Tanh())
    assert_equal(case, mask, run(model, inputs), run(other, inputs))
    assert_equal(case, mask, run(model, inputs), run(other, inputs))


def test_saved_while_fused(tmp_path: Path) -> None:
    case, mask = case_of("bert"), padded_mask()
    model, inputs = case.build(), case.inputs(mask)
    want = run(model, inputs)
    optimized(model)
    model.save_pretrained(tmp_path)
    again = transformers.BertModel.from_pretrained(tmp_path).eval()
    got = run(again, inputs)
    assert all(torch.equal(got[key], want[key]) for key in want)
    assert again.state_dict().keys() == model.state_dict().keys()


def test_a_copy_is_its_own() -> None:
    case, mask = case_of("bert"), padded_mask((5, 10, 4, 2))
    model, inputs = case.build(), case.inputs(mask)
    want = run(model, inputs)
    stack = optimized(model).stacks[0].stack
    for _ in range(3):
        run(model, inputs)
    assert stack.graphs.captured
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    for _ in range(3):
        assert_equal(case, mask, run(copied, inputs), want)
    restore_encoder(copied)
    assert_equal(case, mask, run(copied, inputs), want)


@pytest.mark.parametrize("rows", [0, 1, 300, 1000])
def test_chunks(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Every row once, however they are cut: 300 rows in three chunks, the last one short."""
    monkeypatch.setattr("onegpu.encoder.fuse.CHUNK_BYTES", 128 * 24 * 4)
    torch.manual_seed(0)
    x, linear = torch.randn(1, rows, 16), nn.Linear(16, 24)
    with torch.no_grad():
        got = linear_gelu_in_chunks(x, linear.weight, linear.bias)
        want = nn.functional.gelu(linear(x))
    assert got.shape == (1, rows, 24)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


def test_only_the_exact_gelu() -> None:
    assert is_exact_gelu(nn.GELU())
    assert is_exact_gelu(transformers.activations.ACT2FN["gelu"])
    for name in ("gelu_new", "relu", "gelu_pytorch_tanh", "quick_gelu"):
        assert not is_exact_gelu(transformers.activations.ACT2FN[name])
    assert not is_exact_gelu(None)
    assert not is_exact_gelu(lambda x: 1)


def test_a_wrong_part_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onegpu.encoder.fuse.gelu_", lambda x: x.relu_())
    model = case_of("bert").build()
    report = optimized(model)
    assert "GELU" not in report.stacks[0].fused
    assert report.stacks[0].not_fused[0] == "GELU: the fused result differs from the plain one"
    assert "forward" not in model.encoder.layer[0].intermediate.__dict__


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_quantized_layers_are_proved_in_the_dtype_they_compute_in(dtype: torch.dtype, tmp_path: Path) -> None:
    """Their own parameters may all be codes."""
    case_of("bert").build().save_pretrained(tmp_path)
    model = onegpu.AutoModel.from_pretrained(tmp_path, load_in_4bit=True, dtype=dtype, strict=False).eval()
    report = optimized(model)
    assert report.stacks[0].fused["residual + LayerNorm"] == 6
    assert not report.stacks[0].not_fused
