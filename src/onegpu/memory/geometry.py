"""The shape of a model as its config.json tells it: layers, heads, windows, experts, under whichever names.

One reading serves the key-value cache, the workspace and the speed. What a config does not say is a `ConfigError` that
names it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from onegpu.errors import ConfigError

__all__ = ["Geometry", "read_geometry", "text_part"]

NAMES = {
    "layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers", "num_decoder_layers"),
    "hidden": ("hidden_size", "n_embd", "d_model", "dim"),
    "heads": (
        "num_attention_heads",
        "n_head",
        "num_heads",
        "n_heads",
        "decoder_attention_heads",
        "num_decoder_attention_heads",
    ),
    "inner": ("intermediate_size", "n_inner", "ffn_dim", "d_ff", "ffn_hidden_size", "decoder_ffn_dim", "hidden_dim"),
    "longest": ("max_position_embeddings", "n_positions", "n_ctx", "max_target_positions", "max_seq_len", "seq_length"),
    "experts": ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
    "chosen": ("num_experts_per_tok", "num_experts_per_token", "moe_k", "top_k_experts"),
}
ENCODERS = frozenset(
    [
        "albert",
        "bert",
        "camembert",
        "convbert",
        "data2vec-text",
        "deberta",
        "deberta-v2",
        "distilbert",
        "electra",
        "ernie",
        "esm",
        "eurobert",
        "funnel",
        "ibert",
        "layoutlm",
        "luke",
        "mobilebert",
        "modernbert",
        "mpnet",
        "nomic_bert",
        "roberta",
        "roberta-prelayernorm",
        "roformer",
        "squeezebert",
        "xlm-roberta",
        "xlm-roberta-xl",
    ]
)
WITHOUT_CACHE = ("linear_attention", "mamba", "mamba2", "conv", "recurrent", "moe", "mlp", "dummy")


@dataclass(frozen=True, slots=True)
class Geometry:
    """What memory and speed depend on.

    `kind` is "decoder", "encoder" or "encoder-decoder". `windows` has one entry for each layer with a key-value cache:
    the most tokens it keeps, None for all. `values_per_token` are the numbers one such layer keeps for a token, as
    `vectors_per_token` vectors. `source_tokens` is the fixed length of an encoder's output, None where it is the
    prompt's. `gated` says that the feed-forward has two products side by side.
    """

    model_type: str
    kind: str
    layers: int
    hidden: int
    heads: int
    head_dim: int
    inner: int
    gated: bool
    vocab: int
    windows: tuple[int | None, ...]
    values_per_token: int
    vectors_per_token: int
    longest: int | None
    experts: int
    chosen: int
    source_tokens: int | None
    notes: tuple[str, ...] = ()


def text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that describes the text model: the whole of it, or what a multimodal model nests."""
    for name in ("text_config", "llm_config", "language_config", "decoder", "thinker_config"):
        if isinstance(config.get(name), Mapping) and lookup(config, "layers") is None:
            return text_part(config[name])
    return config


def lookup(config: Mapping[str, Any], what: str) -> Any:
    """The first of the names for `what` that the config has, None without one."""
    return next((config[name] for name in NAMES[what] if config.get(name) is not None), None)


def number(config: Mapping[str, Any], what: str) -> int:
    """A count that the config must have.

    Raises:
        ConfigError: it is absent, or no positive number.
    """
    value = lookup(config, what)
    model = config.get("model_type", "the model")
    if value is None:
        raise ConfigError(
            f"config.json of {model} does not say its number of {what}: expected one of {', '.join(NAMES[what])}",
            "without it neither the cache nor the workspace can be planned",
        )
    # A list has one entry for each layer, as in OpenELM; the largest is an upper bound.
    value = max(value) if isinstance(value, list) and value else value
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ConfigError(f"config.json of {model}: the number of {what} must be a positive integer; got {value!r}")
    return value


def read_geometry(config: Mapping[str, Any]) -> Geometry:
    """Read the geometry out of a config.

    Raises:
        ConfigError: the config does not say something that is needed, or says what cannot be.
    """
    text = text_part(config)
    model_type = str(text.get("model_type") or config.get("model_type") or "unknown")
    layers, hidden, heads = (number(text, what) for what in ("layers", "hidden", "heads"))
    if text.get("is_encoder_decoder"):
        layers = text.get("num_decoder_layers") or text.get("decoder_layers") or layers
    head_dim = text.get("head_dim") or text.get("d_kv") or hidden // heads
    kind = kind_of(text, model_type)
    windows = () if kind == "encoder" else cache_windows(text, layers)
    values, vectors = kept_per_token(text, heads, head_dim)
    notes: tuple[str, ...] = ()
    if len(windows) < layers and kind == "decoder":
        notes = (f"{layers - len(windows)} of {layers} layers keep no cache that grows; their small state is left out",)
    experts = lookup(text, "experts") or 0
    inner = lookup(text, "inner") or 4 * hidden
    if experts:
        inner = max(text.get("moe_intermediate_size") or 0, inner if text.get("moe_intermediate_size") is None else 0)
    return Geometry(
        model_type=model_type,
        kind=kind,
        layers=layers,
        hidden=hidden,
        heads=heads,
        head_dim=int(head_dim),
        inner=max(inner) if isinstance(inner, list) else int(inner),
        gated=is_gated(text, model_type),
        vocab=int(text.get("vocab_size") or config.get("vocab_size") or 0),
        windows=windows,
        values_per_token=values,
        vectors_per_token=vectors,
        longest=lookup(text, "longest"),
        experts=int(experts),
        chosen=int(lookup(text, "chosen") or experts),
        source_tokens=text.get("max_source_positions"),
        notes=notes,
    )


def kind_of(text: Mapping[str, Any], model_type: str) -> str:
    """Decoder, encoder or both."""
    if text.get("is_encoder_decoder"):
        return "encoder-decoder"
    return "encoder" if model_type in ENCODERS and not text.get("is_decoder") else "decoder"


def is_gated(text: Mapping[str, Any], model_type: str) -> bool:
    """Whether the feed-forward multiplies an activated product with a plain one."""
    if model_type in ("t5", "mt5", "umt5"):
        return str(text.get("feed_forward_proj", "")).startswith("gated")
    plain = ("falcon", "gpt", "opt", "phi", "bloom", "starcoder2", "bart", "mbart", "marian", "m2m_100", "pegasus")
    fused = ("gpt_oss", "phi3", "phi4_multimodal", "phimoe")
    is_plain = model_type in ENCODERS | {"whisper"} or model_type.startswith(plain)
    return model_type in fused or not is_plain


def kept_per_token(text: Mapping[str, Any], heads: int, head_dim: int) -> tuple[int, int]:
    """Numbers, and vectors, that one layer keeps for one token.

    Latent attention (DeepSeek, arXiv 2405.04434) keeps one latent of `kv_lora_rank` and one rotated key for all heads.
    """
    if text.get("kv_lora_rank"):
        return int(text["kv_lora_rank"]) + int(text.get("qk_rope_head_dim") or 0), 2
    kv_heads = text.get("num_key_value_heads") or text.get("num_kv_heads")
    if text.get("multi_query") and not text.get("new_decoder_architecture"):
        kv_heads = 1  # Falcon, GPT-BigCode
    elif text.get("model_type") == "falcon":
        kv_heads = heads  # its groups are spread over all heads before they are kept
    if kv_heads is None:
        kv_heads = heads
    kv_heads = max(kv_heads) if isinstance(kv_heads, list) else int(kv_heads)
    return 2 * kv_heads * int(head_dim), 2 * kv_heads


def cache_windows(text: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
    """For each layer that keeps keys and values, the most tokens it keeps."""
    types = text.get("layer_types")
    if not isinstance(types, list):
        types = inferred_types(text, layers, text.get("sliding_window"))
    limits = {"sliding_attention": text.get("sliding_window"), "chunked_attention": text.get("attention_chunk_size")}
    kept = [limits.get(kind) for kind in types if kind not in WITHOUT_CACHE]
    return tuple(kept[: len(kept) - int(text.get("num_kv_shared_layers") or 0)])


def inferred_types(text: Mapping[str, Any], layers: int, window: Any) -> list[str]:
    """The kinds of the layers where an older config.json does not list them."""
    full, sliding = "full_attention", "sliding_attention"
    if not window or text.get("use_sliding_window") is False:
        return [full] * layers
    if text.get("use_sliding_window"):  # Qwen2: the first `max_window_layers` are full
        return [sliding if layer >= (text.get("max_window_layers") or 0) else full for layer in range(layers)]
    pattern = text.get("sliding_window_pattern") or {"gemma2": 2, "gemma3_text": 6, "cohere2": 4}.get(
        str(text.get("model_type")), 0
    )
    if pattern:
        return [full if (layer + 1) % int(pattern) == 0 else sliding for layer in range(layers)]
    return [sliding] * layers
