"""The adapter for lm-eval: against a stand-in for lm-eval's registry and model, and against lm-eval where it is."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from onegpu.bench import harness
from onegpu.bench.harness import model_class, register
from onegpu.errors import ConfigError, UnsupportedError
from onegpu.nn import QuantLinear

needs_lm_eval = pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs lm_eval")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    model_class.cache_clear()
    yield
    model_class.cache_clear()


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Modules under lm-eval's names that keep what they are given."""
    registry: dict[str, Any] = {}

    class HFLM:
        def __init__(self, **kwargs: Any) -> None:
            self.given = kwargs

    def module(name: str, **attributes: Any) -> None:
        made = ModuleType(name)
        vars(made).update(attributes)
        monkeypatch.setitem(sys.modules, name, made)

    def register_model(name: str) -> Any:
        return lambda cls: registry.setdefault(name, cls)

    for package in ("lm_eval", "lm_eval.api", "lm_eval.models"):
        module(package)
    module("lm_eval.api.registry", MODEL_REGISTRY=registry, register_model=register_model)
    module("lm_eval.models.huggingface", HFLM=HFLM)
    module("lm_eval.__main__", cli_evaluate=lambda: registry.setdefault("called", "yes"))
    monkeypatch.setattr(harness, "find_spec", lambda name: object())
    return registry


def test_without_lm_eval_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match="lm-eval is not installed") as caught:
        register()
    assert caught.value.hint == "pip install lm_eval"


def test_it_is_registered_once(stand_in: dict[str, Any]) -> None:
    register()
    first = stand_in["onegpu"]
    register()
    assert stand_in == {"onegpu": first}


def test_the_command_registers_and_goes_on(stand_in: dict[str, Any]) -> None:
    harness.main()
    assert set(stand_in) == {"onegpu", "called"}


@pytest.mark.parametrize(("format", "quantized"), [("nf4", 14), ("16bit", 0), ("int8", 14)])
def test_the_model_is_ours(stand_in: dict[str, Any], tiny: Path, format: str, quantized: int) -> None:
    register()
    made = stand_in["onegpu"](str(tiny), format=format, device="cpu", batch_size=3)
    model = made.given["pretrained"]
    assert sum(isinstance(module, QuantLinear) for module in model.modules()) == quantized
    assert made.given["tokenizer"].decode(made.given["tokenizer"]("hi")["input_ids"]) == "hi"
    assert made.given["batch_size"] == 3


def test_a_format_that_is_none(stand_in: dict[str, Any], tiny: Path) -> None:
    with pytest.raises(ConfigError, match="format must be one of"):
        model_class()(str(tiny), format="nf3", device="cpu")


@needs_lm_eval
def test_lm_eval_scores_and_writes_with_it(tiny: Path) -> None:
    """Log likelihoods are the model's own, and generated text is what its `generate` gives."""
    from lm_eval.api.instance import Instance
    from lm_eval.api.registry import get_model

    register()
    lm = get_model("onegpu").create_from_arg_obj({"pretrained": str(tiny), "format": "nf4"}, {"device": "cpu"})

    def ask(kind: str, *arguments: Any) -> Any:
        return getattr(lm, kind)([Instance(request_type=kind, doc={}, arguments=arguments, idx=0)])[0]

    context, answer = "It was the best", " of times"
    ids = torch.tensor([lm.tokenizer(context + answer, add_special_tokens=False)["input_ids"]])
    start = len(lm.tokenizer(context, add_special_tokens=False)["input_ids"])
    with torch.no_grad():
        log_probs = lm.model(ids).logits.float().log_softmax(-1)
    expected = log_probs[0, start - 1 : -1].gather(1, ids[0, start:, None]).sum()
    assert ask("loglikelihood", context, answer)[0] == pytest.approx(float(expected), rel=1e-3)

    assert ask("loglikelihood_rolling", context) < 0

    given = lm.model.generate(ids[:, :start], attention_mask=torch.ones(1, start), max_new_tokens=5, do_sample=False)
    text = lm.tokenizer.decode(given[0, start:], skip_special_tokens=True)
    assert ask("generate_until", context, {"until": ["\n\n\n"], "max_gen_toks": 5, "do_sample": False}) == text
