"""A config alone gives the parameters of the model that Transformers builds from it."""

from __future__ import annotations

from typing import Any

import pytest
import transformers

from onegpu.errors import ConfigError
from onegpu.memory.known import STRUCTURES, tensors_from_config
from onegpu.memory.weights import bytes_in, read_weights
from tiny_models import MODELS

BY_NAME = {model.name: model for model in MODELS}
NAMES = ("llama", "llama-tied", "mistral", "mixtral", "qwen2", "qwen3", "qwen3-moe", "gemma2", "gemma3", "gpt2")


def counted(config: Any) -> int:
    values = config.to_dict()
    return sum(weight.numel for weight in read_weights(tensors_from_config(values), values))


@pytest.mark.parametrize("name", NAMES)
def test_decoders(name: str) -> None:
    model = BY_NAME[name].build()
    assert counted(model.config) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("cls", ["Bert", "Roberta", "XLMRoberta"])
def test_encoders(cls: str) -> None:
    sizes = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = getattr(transformers, f"{cls}Config")(**sizes, intermediate_size=128)
    model = getattr(transformers, f"{cls}Model")(config)
    assert counted(config) == sum(parameter.numel() for parameter in model.parameters())


def test_a_bias_in_attention() -> None:
    config = transformers.LlamaConfig(**BY_NAME["llama"].make_config().to_dict() | {"attention_bias": True})
    model = transformers.LlamaForCausalLM(config)
    assert counted(config) == sum(parameter.numel() for parameter in model.parameters())


def test_an_8b_llama_in_nf4_by_hand() -> None:
    """Linear weights at 0.5 byte and 4 bytes for 64; table and head in 16 bit."""
    config = {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    }
    linear = 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 14336 * 4096)
    plain = 2 * 128256 * 4096 + 65 * 4096
    weights = read_weights(tensors_from_config(config), config)
    assert sum(bytes_in(weight, "nf4") for weight in weights) == linear * 9 // 16 + 2 * plain
    assert sum(bytes_in(weight, "16bit") for weight in weights) == 2 * (linear + plain)


def test_an_unknown_structure_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"cannot be told from config\.json alone: known are bert") as caught:
        tensors_from_config({"model_type": "mamba"})
    assert "safetensors" in caught.value.hint
    assert "llama" in STRUCTURES


def test_a_size_that_is_not_said() -> None:
    with pytest.raises(ConfigError, match=r"config\.json of gpt2 does not say 'n_embd'"):
        tensors_from_config({"model_type": "gpt2"})
