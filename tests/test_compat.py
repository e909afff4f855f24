"""install(): the snippets of the 2023 guide on Transformers' own classes; uninstall(): no trace."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

import onegpu
from onegpu.errors import ConfigError, UnsupportedError
from onegpu.nn import QuantLinear4bit, QuantLinear8bit


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    path = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    return path


@pytest.fixture
def installed() -> Iterator[None]:
    onegpu.install()
    yield
    onegpu.uninstall()


def surface() -> dict[str, Any]:
    return {
        "class": dict(vars(PreTrainedModel)),
        "mixins": {base: dict(vars(base)) for base in PreTrainedModel.__mro__[1:-1]},
        "quantizers": dict(AUTO_QUANTIZER_MAPPING),
        "configs": dict(AUTO_QUANTIZATION_CONFIG_MAPPING),
        "attention": dict(vars(torch.backends.cuda)),
        "module": {name: value for name, value in vars(transformers).items() if name.startswith("AutoModel")},
    }


def test_uninstall_leaves_no_trace(folder: Path) -> None:
    onegpu.AutoModelForCausalLM.from_pretrained(folder, load_in_4bit=True)
    before = surface()
    onegpu.install()
    onegpu.install()
    assert surface() != before
    AutoModelForCausalLM.from_pretrained(folder, load_in_4bit=True)
    onegpu.uninstall()
    onegpu.uninstall()
    assert surface() == before
    with pytest.raises(TypeError, match="load_in_4bit"):
        AutoModelForCausalLM.from_pretrained(folder, load_in_4bit=True)
    assert not hasattr(PreTrainedModel, "to_bettertransformer")


def test_without_install_nothing_is_patched(folder: Path) -> None:
    onegpu.AutoModelForCausalLM.from_pretrained(folder)
    before = surface()
    model = onegpu.AutoModelForCausalLM.from_pretrained(folder, load_in_4bit=True)
    model.save_pretrained(folder.parent / "unpatched")
    assert surface() == before


@pytest.mark.parametrize("loader", [AutoModelForCausalLM, LlamaForCausalLM], ids=["auto", "class"])
@pytest.mark.parametrize(("flag", "kind"), [("load_in_4bit", QuantLinear4bit), ("load_in_8bit", QuantLinear8bit)])
@pytest.mark.usefixtures("installed")
def test_flags(loader: Any, flag: str, kind: type, folder: Path) -> None:
    model = loader.from_pretrained(folder, device_map="auto", max_memory={"cpu": "2GB"}, **{flag: True})
    assert isinstance(model, LlamaForCausalLM)
    assert type(model.model.layers[0].mlp.up_proj) is kind
    assert model.generate(torch.arange(6)[None], max_new_tokens=3, pad_token_id=0).shape[1] > 6


@pytest.mark.usefixtures("installed")
def test_bitsandbytes_config_as_it_is(folder: Path, tmp_path: Path) -> None:
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float16, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    layer = model.model.layers[0].mlp.up_proj
    assert (layer.spec.quant_type, layer.compute_dtype) == ("nf4", torch.float16)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again.model.layers[0].mlp.up_proj) is QuantLinear4bit
    ids = torch.arange(6)[None]
    assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.usefixtures("installed")
def test_float32_by_default_is_nobodys_wish(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    layer = model.model.layers[0].mlp.up_proj
    assert (layer.spec.quant_type, layer.compute_dtype) == ("fp4", torch.bfloat16)
    assert model(torch.arange(6)[None]).logits.dtype == torch.bfloat16


@pytest.mark.usefixtures("installed")
def test_bettertransformer_there_and_back(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, load_in_4bit=True)
    ids = torch.arange(6)[None]
    before = model(ids).logits
    kinds = [type(module) for module in model.modules()]
    assert model.to_bettertransformer() is model
    assert str(onegpu.report(model))
    assert model.reverse_bettertransformer() is model
    assert [type(module) for module in model.modules()] == kinds
    assert torch.equal(model(ids).logits, before)
    model.save_pretrained(tmp_path / "saved_model")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "saved_model")(ids).logits, before)


@pytest.mark.usefixtures("installed")
def test_plain_loads_are_transformers_own(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, load_in_4bit=False)
    assert type(model) is LlamaForCausalLM
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear
    with pytest.raises(OSError, match=r"does not appear to have|not a valid|couldn't connect|Can't load|local"):
        AutoModelForCausalLM.from_pretrained("no-such-org/no-such-model")


@pytest.mark.usefixtures("installed")
def test_errors_have_our_words(folder: Path) -> None:
    with pytest.raises(ConfigError, match="are both True"):
        LlamaForCausalLM.from_pretrained(folder, load_in_4bit=True, load_in_8bit=True)


def test_optimize_takes_models_only() -> None:
    with pytest.raises(UnsupportedError, match=r"expected a Transformers model .* got Linear"):
        onegpu.optimize(torch.nn.Linear(2, 2))


def test_sdp_kernel_under_its_old_name() -> None:
    def allowed() -> bool:
        return torch.backends.cuda.math_sdp_enabled()

    original = torch.backends.cuda.sdp_kernel
    onegpu.install()
    try:
        q = torch.randn(1, 2, 4, 8)
        # No word of deprecation: warnings are errors here.
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with torch.backends.cuda.sdp_kernel(enable_flash=True, enable_math=False, enable_mem_efficient=False):
                assert not allowed()
        assert allowed()
        with (
            pytest.raises(UnsupportedError, match="has no dropout on a CPU"),
            torch.backends.cuda.sdp_kernel(enable_math=False),
        ):
            torch.nn.functional.scaled_dot_product_attention(q, q, q, dropout_p=0.5)
    finally:
        onegpu.uninstall()
    assert torch.backends.cuda.sdp_kernel is original


def test_sdp_kernel_where_torch_has_none_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.backends.cuda, "sdp_kernel")
    onegpu.install()
    assert torch.backends.cuda.sdp_kernel is onegpu.sdp_kernel
    onegpu.uninstall()
    assert not hasattr(torch.backends.cuda, "sdp_kernel")
