"""Well-known decoders as numbers: enough of each config.json to build it with random weights.

The numbers are those that the models' authors publish in their config.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

__all__ = ["SHAPES"]

LLAMA_3_ROPE: Final[Mapping[str, Any]] = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def decoder(
    model_type: str, hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocab: int, **more: Any
) -> dict[str, Any]:
    """A config of the fields that all of them have."""
    return {
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-6,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **more,
    }


def llama_3(hidden: int, inner: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    """Llama 3.1 and 3.2."""
    rope = {"rope_theta": 500000.0, "rope_scaling": dict(LLAMA_3_ROPE) | more.pop("scaling", {})}
    context = {"max_position_embeddings": 131072, "rms_norm_eps": 1e-5}
    return decoder("llama", hidden, inner, layers, heads, 8, 128256, **rope, **context, **more)


def qwen_3(hidden: int, inner: int, layers: int, heads: int, kv_heads: int = 8, **more: Any) -> dict[str, Any]:
    """Qwen 3: norms over the heads of queries and keys."""
    fields = {"head_dim": 128, "rope_theta": 1000000.0, "max_position_embeddings": 40960} | more
    return decoder(fields.pop("model_type", "qwen3"), hidden, inner, layers, heads, kv_heads, 151936, **fields)


SHAPES: Final[Mapping[str, Mapping[str, Any]]] = {
    "smollm2-135m": decoder(
        "llama", 576, 1536, 30, 9, 3, 49152,
        tie_word_embeddings=True, rope_theta=100000.0, max_position_embeddings=8192, rms_norm_eps=1e-5,
    ),
    "smollm2-1.7b": decoder(
        "llama", 2048, 8192, 24, 32, 32, 49152,
        tie_word_embeddings=True, rope_theta=130000.0, max_position_embeddings=8192, rms_norm_eps=1e-5,
    ),
    "llama-3.2-1b": llama_3(2048, 8192, 16, 32, head_dim=64, tie_word_embeddings=True, scaling={"factor": 32.0}),
    "llama-3.2-3b": llama_3(3072, 8192, 28, 24, head_dim=128, tie_word_embeddings=True, scaling={"factor": 32.0}),
    "llama-3.1-8b": llama_3(4096, 14336, 32, 32),
    "llama-3.1-70b": llama_3(8192, 28672, 80, 64),
    "mistral-7b": decoder(
        "mistral", 4096, 14336, 32, 32, 8, 32768,
        head_dim=128, rope_theta=1000000.0, max_position_embeddings=32768, sliding_window=None, rms_norm_eps=1e-5,
    ),
    "mixtral-8x7b": decoder(
        "mixtral", 4096, 14336, 32, 32, 8, 32000,
        num_local_experts=8, num_experts_per_tok=2, rope_theta=1000000.0, max_position_embeddings=32768,
        sliding_window=None, rms_norm_eps=1e-5,
    ),
    "qwen2.5-7b": decoder(
        "qwen2", 3584, 18944, 28, 28, 4, 152064, rope_theta=1000000.0, max_position_embeddings=32768,
        use_sliding_window=False,
    ),
    "qwen3-0.6b": qwen_3(1024, 3072, 28, 16, tie_word_embeddings=True),
    "qwen3-8b": qwen_3(4096, 12288, 36, 32),
    "qwen3-30b-a3b": qwen_3(
        2048, 6144, 48, 32, 4, model_type="qwen3_moe", num_experts=128, num_experts_per_tok=8,
        moe_intermediate_size=768, norm_topk_prob=True,
    ),
    "gemma-2-9b": decoder(
        "gemma2", 3584, 14336, 42, 16, 8, 256000,
        head_dim=256, tie_word_embeddings=True, max_position_embeddings=8192, sliding_window=4096,
        query_pre_attn_scalar=256, attn_logit_softcapping=50.0, final_logit_softcapping=30.0,
    ),
    "phi-3-mini": decoder(
        "phi3", 3072, 8192, 32, 32, 32, 32064,
        max_position_embeddings=4096, sliding_window=2047, rms_norm_eps=1e-5, pad_token_id=32000,
    ),
}  # fmt: skip
