"""Files go both ways between onegpu and plain Transformers with bitsandbytes, bit for bit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import onegpu
from onegpu import QuantConfig
from onegpu.nn import QuantLinear, dequantize_weight

pytest.importorskip("bitsandbytes")

FORMATS = {
    "nf4": QuantConfig("nf4"),
    "fp4": QuantConfig("fp4"),
    "nf4-double": QuantConfig("nf4", double_quant=True),
    "nf4-search": QuantConfig("nf4", scale_search=True),
    "nf4-search-double": QuantConfig("nf4", scale_search=True, double_quant=True),
    "nf4-storage": QuantConfig("nf4", quant_storage="bfloat16"),
    "int8": QuantConfig("int8"),
}


def plain_config(config: QuantConfig) -> BitsAndBytesConfig:
    if config.quant_type == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.quant_type,
        bnb_4bit_use_double_quant=config.double_quant,
        bnb_4bit_quant_storage=config.quant_storage,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(raw(one), raw(other))


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def layers(model: Any) -> dict[str, QuantLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


@pytest.mark.parametrize("config", FORMATS.values(), ids=FORMATS)
def test_what_we_write_loads_in_plain_transformers(config: QuantConfig, llama_folder: Path, tmp_path: Path) -> None:
    ours = onegpu.AutoModelForCausalLM.from_pretrained(llama_folder, quantization_config=config)
    ours.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu", dtype=torch.bfloat16)
    modules = dict(theirs.named_modules())
    assert layers(ours)
    for name, layer in layers(ours).items():
        weight = modules[name].weight
        assert type(modules[name]).__module__.startswith("bitsandbytes"), name
        assert same_bytes(weight.data, layer.weight), name
        if config.quant_type == "int8":
            assert same_bytes(weight.SCB, layer.row_stats), name
            continue
        state = weight.quant_state
        assert state.quant_type == config.quant_type
        assert state.blocksize == config.blocksize
        assert tuple(state.shape) == layer.spec.shape
        assert same_bytes(state.absmax, layer.absmax), name
        if config.double_quant:
            assert same_bytes(state.state2.absmax, layer.nested_absmax)
            assert float(state.offset) == float(layer.nested_offset)
    quantized_by_them = {name for name, m in modules.items() if type(m).__module__.startswith("bitsandbytes")}
    assert quantized_by_them == set(layers(ours))


@pytest.mark.parametrize("name", ["nf4", "fp4", "nf4-double", "nf4-storage", "int8"])
def test_what_bitsandbytes_wrote_loads_here(name: str, llama_folder: Path, tmp_path: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(
        llama_folder, quantization_config=plain_config(FORMATS[name]), device_map="cpu", dtype=torch.bfloat16
    )
    theirs.save_pretrained(tmp_path / "theirs")
    ours = onegpu.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")
    assert ours.dtype == torch.bfloat16
    ours.save_pretrained(tmp_path / "ours")
    before, after = tensors(tmp_path / "theirs"), tensors(tmp_path / "ours")
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert same_bytes(tensor, after[key]), key


def test_it_needs_no_bitsandbytes(llama_folder: Path, tmp_path: Path) -> None:
    """A checkpoint loads, answers and saves where `import bitsandbytes` fails."""
    onegpu.AutoModelForCausalLM.from_pretrained(llama_folder, load_in_4bit=True).save_pretrained(tmp_path)
    code = f"""
import sys
sys.modules["bitsandbytes"] = None
import torch, onegpu
model = onegpu.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})
print(model(torch.arange(8)[None]).logits.shape[-1], model.num_parameters())
model.save_pretrained({str(tmp_path / "again")!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == "128"


@pytest.mark.parametrize("config", FORMATS.values(), ids=FORMATS)
def test_save_load_save_is_byte_identical(config: QuantConfig, llama_folder: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    model = onegpu.AutoModelForCausalLM.from_pretrained(llama_folder, quantization_config=config)
    model.save_pretrained(first)
    again = onegpu.AutoModelForCausalLM.from_pretrained(first)
    again.save_pretrained(second)
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes(), path.name
    stored = json.loads((first / "config.json").read_text())["quantization_config"]
    assert stored["quant_method"] == "bitsandbytes"
    assert stored["llm_int8_skip_modules"] == ["lm_head"]


def test_pre_v5_mixtral_with_one_tensor_per_expert(tmp_path: Path) -> None:
    """What we write for experts are one quantized linear weight each, under the hub's names, and read back whole."""
    from tiny_models import MODELS

    tiny = next(model for model in MODELS if model.name == "mixtral")
    tiny.build(torch.bfloat16).save_pretrained(tmp_path / "plain")
    model = onegpu.AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=QuantConfig(double_quant=True)
    )
    model.save_pretrained(tmp_path / "saved")
    stored = tensors(tmp_path / "saved")
    key = "model.layers.0.block_sparse_moe.experts.3.w1.weight"
    assert stored[key].dtype == torch.uint8
    assert json.loads(bytes(stored[f"{key}.quant_state.bitsandbytes__nf4"].tolist()))["shape"] == [128, 64]
    again = onegpu.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(tiny.logits(again), tiny.logits(model))
    experts = again.model.layers[0].mlp.experts
    for name, spec in experts.expert_specs.items():
        both = [m.model.layers[0].mlp.experts.dequantize_experts(name) for m in (model, again)]
        assert torch.equal(*both)
        assert dequantize_weight(experts.expert_state(name), spec, torch.bfloat16).shape == spec.shape
