"""Random models: whole, finite, in the format asked for, and never larger than they end up."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Gemma2Config, GPT2Config, LlamaConfig, Qwen2Config, Qwen3MoeConfig

import onegpu
from onegpu.bench.measure import weight_bytes
from onegpu.bench.random_model import named_config, random_model
from onegpu.config import QuantConfig
from onegpu.errors import ConfigError
from onegpu.memory.shapes import SHAPES
from onegpu.nn import QuantExperts, QuantLinear

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LLAMA = LlamaConfig(**SIZES)
CONFIGS = {
    "llama": LLAMA,
    "tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "biases": Qwen2Config(**SIZES),
    "gemma2": Gemma2Config(**SIZES, head_dim=32),
    "experts": Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, head_dim=32),
    "gpt2": GPT2Config(vocab_size=300, n_embd=128, n_layer=2, n_head=4),
}
QUANTS = {
    "16bit": None,
    "nf4": QuantConfig("nf4"),
    "nf4+double": QuantConfig("nf4", double_quant=True),
    "int8": QuantConfig("int8"),
}


def is_quantized(module: nn.Module) -> bool:
    return isinstance(module, (QuantLinear, QuantExperts))


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_tensor_is_there_and_finite(name: str, quant: str) -> None:
    model = random_model(CONFIGS[name], QUANTS[quant], CPU, torch.bfloat16)
    tensors = [*model.named_parameters(), *model.named_buffers()]
    assert not [name for name, tensor in tensors if tensor.is_meta]
    assert any(map(is_quantized, model.modules())) == (quant != "16bit")
    with torch.no_grad():
        logits = model(torch.arange(7)[None]).logits.float()
    assert logits.isfinite().all()
    assert logits.std() > 1e-3
    assert not model.training
    tokens = model.generate(torch.arange(4)[None], max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert tokens.shape == (1, 7)


def test_it_is_what_loading_would_have_made(tmp_path: Path) -> None:
    random_model(LLAMA, None, CPU, torch.bfloat16).save_pretrained(tmp_path)
    loaded = onegpu.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=QuantConfig("nf4"))
    made = random_model(LLAMA, QuantConfig("nf4"), CPU, torch.bfloat16)
    assert {name: type(module) for name, module in made.named_modules()} == {
        name: type(module) for name, module in loaded.named_modules()
    }
    assert weight_bytes(made) == weight_bytes(loaded)
    assert "nf4" in str(onegpu.report(made))
    assert made.model.rotary_emb.inv_freq.equal(loaded.model.rotary_emb.inv_freq)


def test_the_same_each_time() -> None:
    first, second = (random_model(LLAMA, QuantConfig("nf4"), CPU, torch.bfloat16).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
@pytest.mark.parametrize("quant", ["nf4", "nf4+double", "int8"])
def test_rivals_are_their_own_layers(quant: str) -> None:
    config = CONFIGS["biases"]
    rival = random_model(config, QUANTS[quant], CPU, torch.bfloat16, rival=True)
    layer = rival.model.layers[0].self_attn.q_proj
    assert type(layer).__module__.startswith("bitsandbytes")
    assert type(rival.lm_head) is nn.Linear
    assert layer.bias is not None
    with torch.no_grad():
        assert rival(torch.arange(7)[None]).logits.isfinite().all()
    ours = random_model(config, QUANTS[quant], CPU, torch.bfloat16)
    assert abs(weight_bytes(ours) - weight_bytes(rival)) <= 14 * 4 * (16 + 256)


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
def test_rivals_have_no_experts() -> None:
    with pytest.raises(ConfigError, match="bitsandbytes has no stacked experts"):
        random_model(CONFIGS["experts"], QUANTS["nf4"], CPU, torch.bfloat16, rival=True)


@pytest.mark.parametrize("name", SHAPES)
def test_known_shapes_are_configs(name: str) -> None:
    config = named_config(name)
    assert config.model_type == SHAPES[name]["model_type"]
    for field in ("hidden_size", "num_hidden_layers", "num_key_value_heads", "vocab_size", "tie_word_embeddings"):
        assert getattr(config, field) == SHAPES[name][field]
    assert config.rope_parameters is not None


def test_a_folder_will_do(tmp_path: Path) -> None:
    LLAMA.save_pretrained(tmp_path)
    assert named_config(str(tmp_path)).hidden_size == 128
    with pytest.raises(ConfigError, match=r"(?s)no known shape and no folder .* 'llama-9'.*llama-3\.1-8b"):
        named_config("llama-9")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        named_config(str(tmp_path))


@pytest.mark.gpu
@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_the_16_bit_model_is_never_on_the_gpu(quant: str) -> None:
    config = LlamaConfig(
        vocab_size=1024, hidden_size=1024, intermediate_size=4096, num_hidden_layers=16, num_attention_heads=8
    )
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model = random_model(config, QUANTS[quant], torch.device("cuda"), torch.bfloat16)
    peak = torch.cuda.max_memory_allocated() - before
    matrix = 2 * 1024 * 4096
    # The finished model, and a few times the matrix that is being made: its draw, the scaled one, float32 in between.
    assert peak < weight_bytes(model) + 8 * matrix
