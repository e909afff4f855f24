"""Which modules are quantized, which are kept, and why."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from onegpu.config import QuantConfig
from onegpu.errors import CheckpointError
from onegpu.nn import QuantLinear4bit, QuantLinear8bit, WeightSpec, convert, linear_shape, matches, plan_conversion


@pytest.mark.parametrize(
    ("name", "pattern", "expected"),
    [
        ("lm_head", "lm_head", True),
        ("model.lm_head", "lm_head", True),
        ("model.layers.1.mlp.up_proj", "layers.1", True),
        ("model.layers.11.mlp.up_proj", "layers.1", False),
        ("model.layers.1.mlp.up_proj", "proj", False),
        ("model.layers.1.mlp.up_proj", "mlp.up_proj", True),
        ("model.layers.1.mlp.up_proj", "layers.*.mlp", True),
        ("model.layers.1.mlp.up_proj", "*_proj", True),
        ("mlp", "model.mlp", False),
    ],
)
def test_matches_whole_components(name: str, pattern: str, expected: bool) -> None:
    assert matches(name, pattern) is expected


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 128)
        self.down = nn.Linear(128, 64, bias=False)
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, 10)


def test_plan_says_what_and_why() -> None:
    plan = plan_conversion(
        Block(), QuantConfig(skip_modules=("down", "nothing")), {"head": "output head"}, dtype=torch.bfloat16
    )
    assert plan.specs == {"up.weight": WeightSpec("nf4", (128, 64), "bfloat16")}
    assert [(kept.name, kept.reason, kept.num_bytes) for kept in plan.kept] == [
        ("down.weight", "named in skip_modules", 64 * 128 * 2),
        ("head.weight", "output head", 640 * 2),
    ]
    assert plan.unmatched == ["nothing"]


def test_storage_that_does_not_divide_is_kept() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    plan = plan_conversion(model, QuantConfig(quant_storage="float32"), {}, dtype=torch.bfloat16)
    assert [kept.reason for kept in plan.kept] == ["its 5 packed bytes are not whole float32 elements"]


def test_a_stored_shape_that_does_not_fit() -> None:
    found = {"up": WeightSpec("nf4", (64, 128), "bfloat16")}
    with pytest.raises(CheckpointError, match=r"up.weight says it holds a weight of shape \[64, 128\], .* \[128, 64\]"):
        plan_conversion(Block(), QuantConfig(), {}, dtype=torch.bfloat16, found=found)


@pytest.mark.parametrize(("quant_type", "kind"), [("nf4", QuantLinear4bit), ("int8", QuantLinear8bit)])
def test_convert_keeps_features_bias_and_mode(quant_type: str, kind: type) -> None:
    with torch.device("meta"):
        model = Block().eval()
    plan = plan_conversion(model, QuantConfig(quant_type), {"head": "output head"}, dtype=torch.bfloat16)
    convert(model, plan, compute_dtype=torch.bfloat16, packed=True)
    assert type(model.up) is kind
    assert (model.up.in_features, model.up.out_features) == (64, 128)
    assert model.up.bias is not None
    assert model.down.bias is None
    assert not model.up.training
    assert type(model.head) is nn.Linear


def test_only_plain_linears_are_taken() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 2

    assert linear_shape(nn.Linear(3, 5)) == (5, 3)
    assert linear_shape(Scaled(3, 5)) is None
    assert linear_shape(nn.LayerNorm(3)) is None
