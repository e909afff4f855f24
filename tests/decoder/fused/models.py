"""Decoders for the fused step: those of `tiny_models`, and more with numbers that a default config leaves at one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from onegpu.config import QuantConfig
from onegpu.decoder.cache import KVCache, LayerShape
from onegpu.decoder.fused import FusedPlan, FusedStep, recognise
from onegpu.nn import QuantLinear, QuantLinear4bit, QuantLinear8bit, WeightSpec, quantize_weight
from tiny_models import GATED, MODELS, MOE, TinyModel, make

FOUR = {**GATED, "num_hidden_layers": 4}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
GRANITE = {
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.4,
    "residual_multiplier": 0.3,
    "logits_scaling": 5.0,
}
MORE = [
    TinyModel("llama-bias", make("LlamaConfig", **GATED, attention_bias=True, mlp_bias=True)),
    TinyModel("llama-3", make("LlamaConfig", **GATED, rope_parameters=LLAMA3)),
    TinyModel("llama-yarn", make("LlamaConfig", **GATED, rope_parameters=YARN)),
    TinyModel("llama-gelu", make("LlamaConfig", **GATED, hidden_act="gelu")),
    TinyModel("llama-odd", make("LlamaConfig", **{**GATED, "intermediate_size": 118, "head_dim": 24})),
    TinyModel("mha", make("LlamaConfig", **{**GATED, "num_key_value_heads": 4})),
    TinyModel("mqa", make("LlamaConfig", **{**GATED, "num_key_value_heads": 1})),
    TinyModel("granite-numbers", make("GraniteConfig", **GATED, **GRANITE)),
    TinyModel("smollm3-norope", make("SmolLM3Config", **FOUR, no_rope_layer_interval=2)),
    TinyModel(
        "gemma3-both",
        make(
            "Gemma3TextConfig",
            **FOUR,
            head_dim=16,
            sliding_window=4,
            layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        ),
    ),
    TinyModel(
        "gemma2-capped",
        make(
            "Gemma2Config",
            **GATED,
            head_dim=16,
            sliding_window=4,
            attn_logit_softcapping=0.7,
            final_logit_softcapping=1.5,
            query_pre_attn_scalar=5,
            attn_implementation="eager",  # what caps the scores on every Transformers
        ),
    ),
    TinyModel("phi3-partial", make("Phi3Config", **GATED, partial_rotary_factor=0.5, sliding_window=4)),
    TinyModel("qwen3-bias", make("Qwen3Config", **GATED, head_dim=32, attention_bias=True)),
    TinyModel("glm", make("GlmConfig", **GATED, head_dim=16)),
    TinyModel("glm4", make("Glm4Config", **GATED, head_dim=16)),
    TinyModel("ernie", make("Ernie4_5Config", **GATED, head_dim=16)),
    TinyModel("gpt-oss", make("GptOssConfig", **MOE, head_dim=16, num_local_experts=4, sliding_window=4)),
]
TINY = {tiny.name: tiny for tiny in [*MODELS, *MORE]}

FORMATS: dict[str, QuantConfig | None] = {
    "plain": None,
    "nf4": QuantConfig("nf4"),
    "nf4-double": QuantConfig("nf4", double_quant=True),
    "int8": QuantConfig("int8"),
}


def build(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model whose norms and biases are not all ones and zeros."""
    model = TINY[name].build(dtype)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator).to(dtype)
    return model


def quantize(model: Any, config: QuantConfig | None, compute_dtype: torch.dtype | None = None) -> Any:
    """The layers' linear modules quantized in place; the head stays."""
    if config is None:
        return model
    kind = QuantLinear8bit if config.quant_type == "int8" else QuantLinear4bit
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and module is not model.get_output_embeddings():
            spec = WeightSpec.of(config, tuple(module.weight.shape), module.weight.dtype)
            state = quantize_weight(module.weight.detach(), spec)
            layer: QuantLinear = kind.from_state(state, spec, module.bias, compute_dtype=compute_dtype)
            model.set_submodule(name, layer.eval())
    return model


def plan_of(model: Any) -> FusedPlan:
    plan = recognise(model)
    assert isinstance(plan, FusedPlan), plan
    return plan


def cache_for(plan: FusedPlan, slots: int, capacity: int, kv_cache_dtype: str | None = None) -> KVCache:
    shapes = [
        LayerShape(layer.num_kv_heads, layer.head_dim, layer.head_dim, plan.dtype, plan.device, layer.window)
        for layer in plan.layers
    ]
    return KVCache(shapes, slots, capacity, kv_cache_dtype)


def tokens_for(rows: int, length: int, device: Any = "cpu") -> Tensor:
    return torch.randint(3, 90, (rows, length), generator=torch.Generator().manual_seed(3)).to(device)


def decode(step: FusedStep, tokens: Tensor) -> Tensor:
    """Logits [B, S, V] of tokens [B, S] fed one by one."""
    rows, length = tokens.shape
    place = torch.zeros(rows, dtype=torch.int32, device=tokens.device)
    return torch.stack([step(tokens[:, index], place + index) for index in range(length)], dim=1)
