from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

from onegpu.bench import contenders
from onegpu.bench.contenders import Contender, parse_contender, parse_contenders
from onegpu.bench.measure import weight_bytes
from onegpu.config import QuantConfig
from onegpu.errors import ConfigError, UnsupportedError
from onegpu.nn import QuantLinear
from tiny_checkpoint import save_tiny


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("16bit", Contender("16bit", "transformers")),
        ("fp32", Contender("fp32", "transformers")),
        ("nf4", Contender("nf4", "onegpu", QuantConfig("nf4"))),
        ("fp4+double", Contender("fp4+double", "onegpu", QuantConfig("fp4", double_quant=True))),
        (
            "nf4+double+search",
            Contender("nf4+double+search", "onegpu", QuantConfig("nf4", double_quant=True, scale_search=True)),
        ),
        ("int8", Contender("int8", "onegpu", QuantConfig("int8"))),
        ("bitsandbytes:int8", Contender("bitsandbytes:int8", "bitsandbytes", QuantConfig("int8"))),
    ],
)
def test_labels(label: str, expected: Contender) -> None:
    assert parse_contender(label) == expected


@pytest.mark.parametrize(
    ("label", "words"),
    [
        ("nf5", "format must be one of"),
        ("nf4+doubel", r"option after '\+' must be one of"),
        ("int8+double", "int8 takes no"),
        ("16bit+double", "16bit takes no"),
        ("bitsandbytes:nf4+search", "bitsandbytes has no scale search"),
        ("bitsandbytes:16bit", "format must be one of"),
        ("vllm:nf4", "format before ':' must be one of"),
        (" , ", "no format given"),
    ],
)
def test_a_wrong_label_says_what_is_wrong(label: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_contenders(label)


def test_a_list_keeps_its_order_and_each_label_once() -> None:
    assert [contender.label for contender in parse_contenders("nf4, 16bit,nf4")] == ["nf4", "16bit"]


def test_a_missing_rival_is_said(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contenders, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match="bitsandbytes is not installed") as caught:
        parse_contender("bitsandbytes:nf4").load(str(tiny), device_map="cpu")
    assert caught.value.hint == "leave --peers out"


@pytest.mark.parametrize(
    ("label", "dtype"), [("16bit", torch.bfloat16), ("fp32", torch.float32), ("nf4", torch.bfloat16)]
)
def test_each_is_loaded_as_its_label_says(tiny: Path, label: str, dtype: torch.dtype) -> None:
    model = parse_contender(label).load(str(tiny), device_map="cpu")
    assert model.dtype == dtype
    assert not model.training
    projection = model.model.layers[0].self_attn.q_proj
    assert isinstance(projection, QuantLinear) == (label == "nf4")
    assert isinstance(projection, nn.Linear)


def test_16bit_keeps_float16(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "half", dtype=torch.float16)
    assert parse_contender("16bit").load(str(folder), device_map="cpu").dtype == torch.float16
    assert parse_contender("nf4").load(str(folder), device_map="cpu").dtype == torch.float16


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
@pytest.mark.parametrize("label", ["nf4", "nf4+double", "int8"])
def test_the_rival_holds_the_same_bytes(tiny: Path, label: str) -> None:
    """The formats are the same, so the sizes are, but for tables of 16 (and 256) values a layer may have or share."""
    ours = parse_contender(label).load(str(tiny), device_map="cpu")
    theirs = parse_contender(f"bitsandbytes:{label}").load(str(tiny), device_map="cpu")
    assert type(theirs.model.layers[0].self_attn.q_proj).__module__.startswith("bitsandbytes")
    layers = sum(isinstance(module, QuantLinear) for module in ours.modules())
    assert layers == 14
    assert abs(weight_bytes(ours) - weight_bytes(theirs)) <= layers * 4 * ((16 + 256) if label != "int8" else 0)
