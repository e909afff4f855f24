"""Every decoder and encoder-decoder, in 4 and 8 bit: the answer of the dequantized weights in plain Transformers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import onegpu
from onegpu.nn import QuantExperts, QuantLinear
from tiny_models import MODELS, TinyModel

# float32 compute on both sides. 4 bit: the same products summed in another order. 8 bit: activations are rounded to
# 127 steps of their row's maximum, about 1 % of a random row's norm, in each of a handful of layers.
TOLERANCE = {"nf4": 1e-5, "int8": 5e-2}


@pytest.fixture(scope="module", params=MODELS, ids=lambda tiny: tiny.name)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[TinyModel, Any, Path]:
    tiny = request.param
    model = tiny.build()
    folder = tmp_path_factory.mktemp(tiny.name)
    model.save_pretrained(folder)
    return tiny, model, folder


def quantized(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, (QuantLinear, QuantExperts))]


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("quant_type", ["nf4", "int8"])
def test_logits_equal_dequantized_plain_model(
    saved: tuple[TinyModel, Any, Path], quant_type: str, tmp_path: Path
) -> None:
    tiny, plain, folder = saved
    auto = getattr(onegpu, tiny.auto)
    flag = {"load_in_4bit": True} if quant_type == "nf4" else {"load_in_8bit": True}
    model = auto.from_pretrained(folder, dtype=torch.float32, **flag)
    assert isinstance(model, type(plain))
    assert type(model).__name__ == type(plain).__name__
    assert len(quantized(model)) >= 8
    report = onegpu.report(model)
    assert report.num_quantized >= len(quantized(model))
    assert report.quantized_bytes < report.original_bytes / 3
    logits = tiny.logits(model)
    assert torch.isfinite(logits).all()

    back = copy.deepcopy(model).dequantize()
    assert not quantized(back)
    assert [type(m).__name__ for m in back.modules()] == [type(m).__name__ for m in plain.modules()]
    assert relative_error(logits, tiny.logits(back)) < TOLERANCE[quant_type]
    # And the plain model of unquantized weights is near: nothing was transposed, swapped or left out.
    assert relative_error(logits, tiny.logits(plain)) < (0.5 if quant_type == "nf4" else 0.1)

    model.save_pretrained(tmp_path / "saved")
    again = auto.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert torch.equal(tiny.logits(again), logits)


def test_16bit_compute_by_default(saved: tuple[TinyModel, Any, Path]) -> None:
    tiny, _, folder = saved
    model = getattr(onegpu, tiny.auto).from_pretrained(folder, load_in_4bit=True)
    kept_in_fp32 = tuple(model._keep_in_fp32_modules or ()) + tuple(model._keep_in_fp32_modules_strict or ())
    wide = [
        name
        for name, parameter in model.named_parameters()
        if parameter.dtype == torch.float32 and not any(part in name.split(".") for part in kept_in_fp32)
    ]
    assert not wide
    assert torch.isfinite(tiny.logits(model)).all()
