"""The tensors of well-known structures, written down from a config alone, for when there are no headers to read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from onegpu.errors import ConfigError
from onegpu.memory.geometry import lookup, text_part
from onegpu.memory.source import TensorInfo

__all__ = ["STRUCTURES", "tensors_from_config"]

Shapes = dict[str, tuple[int, ...]]
# Norms over the hidden size in one layer, and over a head's dimension.
NORMS = {"gemma2": (4, 0), "gemma3_text": (4, 2), "qwen3": (2, 2), "qwen3_moe": (2, 2)}
BIASED = ("qwen2",)


def tensors_from_config(config: Mapping[str, Any]) -> dict[str, TensorInfo]:
    """Names and shapes that a model of this config has, as if in bfloat16.

    Raises:
        ConfigError: a structure that is not known here, or a size that the config does not say.
    """
    text = text_part(config)
    model_type = str(text.get("model_type"))
    build = STRUCTURES.get(model_type)
    if build is None or text is not config:
        raise ConfigError(
            f"there are no safetensors headers to read, and the size of {config.get('model_type', 'this model')!r} "
            f"cannot be told from config.json alone: known are {', '.join(sorted(STRUCTURES))}",
            "give a folder or a revision with safetensors; save_pretrained() writes them",
        )
    try:
        shapes = build(text)
    except KeyError as error:
        raise ConfigError(
            f"there are no safetensors headers to read, and config.json of {model_type} does not say {error.args[0]!r}",
            "save the config again with a current Transformers, or add what is missing",
        ) from error
    return {name: TensorInfo("BF16", shape) for name, shape in shapes.items()}


def llama_like(text: Mapping[str, Any]) -> Shapes:
    """Llama and what is built like it: gated feed-forward, grouped heads, norms without biases."""
    hidden, inner, heads = text["hidden_size"], text["intermediate_size"], text["num_attention_heads"]
    head_dim = text.get("head_dim") or hidden // heads
    query, kv = heads * head_dim, (text.get("num_key_value_heads") or heads) * head_dim
    model_type = text["model_type"]
    hidden_norms, head_norms = NORMS.get(model_type, (2, 0))
    qkv_bias = text.get("attention_bias", False) or model_type in BIASED
    shapes: Shapes = {"model.embed_tokens.weight": (text["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    for layer in range(text["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        for name, rows in (("q", query), ("k", kv), ("v", kv)):
            shapes[f"{at}.self_attn.{name}_proj.weight"] = (rows, hidden)
            if qkv_bias:
                shapes[f"{at}.self_attn.{name}_proj.bias"] = (rows,)
        shapes[f"{at}.self_attn.o_proj.weight"] = (hidden, query)
        if text.get("attention_bias", False):
            shapes[f"{at}.self_attn.o_proj.bias"] = (hidden,)
        shapes |= {f"{at}.norms.{index}": (hidden,) for index in range(hidden_norms)}
        shapes |= {f"{at}.head_norms.{index}": (head_dim,) for index in range(head_norms)}
        shapes |= feed_forward(text, f"{at}.mlp", layer, hidden, inner)
    if not text.get("tie_word_embeddings", True):
        shapes["lm_head.weight"] = (text["vocab_size"], hidden)
    return shapes


def feed_forward(text: Mapping[str, Any], at: str, layer: int, hidden: int, inner: int) -> Shapes:
    """One gated feed-forward, or as many as there are experts."""
    experts = lookup(text, "experts")
    step = text.get("decoder_sparse_step") or 1
    if not experts or layer in (text.get("mlp_only_layers") or ()) or (layer + 1) % step:
        return gated(at, hidden, inner)
    inner = text.get("moe_intermediate_size") or inner
    shapes: Shapes = {f"{at}.gate.weight": (experts, hidden)}
    for expert in range(experts):
        shapes |= gated(f"{at}.experts.{expert}", hidden, inner)
    return shapes


def gated(at: str, hidden: int, inner: int) -> Shapes:
    """gate, up and down."""
    return {
        f"{at}.gate_proj.weight": (inner, hidden),
        f"{at}.up_proj.weight": (inner, hidden),
        f"{at}.down_proj.weight": (hidden, inner),
    }


def gpt2_like(text: Mapping[str, Any]) -> Shapes:
    """GPT-2: learned positions, biases everywhere, weights [in, out], a tied head."""
    hidden = text["n_embd"]
    inner = text.get("n_inner") or 4 * hidden
    shapes: Shapes = {"wte.weight": (text["vocab_size"], hidden), "wpe.weight": (text["n_positions"], hidden)}
    for layer in range(text["n_layer"]):
        at = f"h.{layer}"
        for name, rows, columns in (
            ("attn.c_attn", hidden, 3 * hidden),
            ("attn.c_proj", hidden, hidden),
            ("mlp.c_fc", hidden, inner),
            ("mlp.c_proj", inner, hidden),
        ):
            shapes |= {f"{at}.{name}.weight": (rows, columns), f"{at}.{name}.bias": (columns,)}
        shapes |= {f"{at}.{norm}.{part}": (hidden,) for norm in ("ln_1", "ln_2") for part in ("weight", "bias")}
    return shapes | {f"ln_f.{part}": (hidden,) for part in ("weight", "bias")}


def bert_like(text: Mapping[str, Any]) -> Shapes:
    """BERT and RoBERTa without a head, as `AutoModel` makes them: three embeddings, biases everywhere, a pooler."""
    hidden, inner = text["hidden_size"], text["intermediate_size"]
    tables = {"word": "vocab_size", "position": "max_position_embeddings", "token_type": "type_vocab_size"}
    shapes: Shapes = {f"embeddings.{name}_embeddings.weight": (text[key], hidden) for name, key in tables.items()}
    shapes |= {f"embeddings.LayerNorm.{part}": (hidden,) for part in ("weight", "bias")}
    for layer in range(text["num_hidden_layers"]):
        at = f"encoder.layer.{layer}"
        for name, rows, columns in (
            *((f"attention.self.{part}", hidden, hidden) for part in ("query", "key", "value")),
            ("attention.output.dense", hidden, hidden),
            ("intermediate.dense", inner, hidden),
            ("output.dense", hidden, inner),
        ):
            shapes |= {f"{at}.{name}.weight": (rows, columns), f"{at}.{name}.bias": (rows,)}
        for norm in ("attention.output", "output"):
            shapes |= {f"{at}.{norm}.LayerNorm.{part}": (hidden,) for part in ("weight", "bias")}
    return shapes | {"pooler.dense.weight": (hidden, hidden), "pooler.dense.bias": (hidden,)}


STRUCTURES: Mapping[str, Callable[[Mapping[str, Any]], Shapes]] = {
    **dict.fromkeys(
        ("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3_text"), llama_like
    ),
    "gpt2": gpt2_like,
    **dict.fromkeys(("bert", "roberta", "xlm-roberta"), bert_like),
}
