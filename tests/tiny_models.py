"""Every decoder and encoder-decoder that must work, as a tiny config with random weights, and inputs for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers

VOCAB = 96


@dataclass(frozen=True)
class TinyModel:
    """A config to build from, the Auto class that loads it, and what to call it with."""

    name: str
    make_config: Callable[[], Any]
    auto: str = "AutoModelForCausalLM"
    kind: str = "decoder"

    def build(self, dtype: torch.dtype = torch.float32) -> Any:
        torch.manual_seed(0)
        model = getattr(transformers, self.auto).from_config(self.make_config(), dtype=dtype)
        # Random heads are so small that any answer would be within tolerance: give every matrix a real spread.
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim >= 2 and parameter.requires_grad:
                    parameter.normal_(0, 0.6 / parameter.shape[-1] ** 0.5)
        return model.eval()

    def logits(self, model: Any) -> torch.Tensor:
        """What the model says to this entry's inputs, in float32."""
        part = model.semantic if self.kind == "bark" else model
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        inputs = {
            name: value.to(model.device, dtype if value.is_floating_point() else None)
            for name, value in self.inputs().items()
        }
        with torch.no_grad():
            return part(**inputs).logits.float()

    def inputs(self) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(4, VOCAB - 4, (2, 9), generator=generator)
        if self.kind in ("decoder", "bark"):
            return {"input_ids": ids}
        if self.kind == "speech":
            features = torch.randn(2, 16, 64, generator=generator)
            return {"input_features": features, "decoder_input_ids": ids}
        if self.kind == "image-text":
            pixels = torch.randn(2, 3, 16, 16, generator=generator)
            ids = torch.cat([torch.full((2, 4), 95), ids], dim=1)
            return {"pixel_values": pixels, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return {"input_ids": ids, "decoder_input_ids": ids[:, :6], "attention_mask": torch.ones_like(ids)}


COMMON = {"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GATED = {**COMMON, "intermediate_size": 128, "num_key_value_heads": 2, "max_position_embeddings": 64, **TOKENS}
GPT = {"vocab_size": VOCAB, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, **TOKENS}
ED = {
    "vocab_size": VOCAB,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
SEQ2SEQ = {"auto": "AutoModelForSeq2SeqLM", "kind": "encoder-decoder"}


def make(cls: str, **fields: Any) -> Callable[[], Any]:
    return lambda: getattr(transformers, cls)(**fields)


def blip2() -> Any:
    return transformers.Blip2Config(
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 16,
            "patch_size": 8,
        },
        qformer_config={
            "vocab_size": VOCAB,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 128,
            "encoder_hidden_size": 64,
        },
        text_config=transformers.OPTConfig(
            vocab_size=VOCAB,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            ffn_dim=128,
            max_position_embeddings=64,
            word_embed_proj_dim=64,
            **TOKENS,
        ).to_dict(),
        num_query_tokens=4,
        image_token_index=95,
        image_token_id=95,
    )


def bark() -> Any:
    part = {"input_vocab_size": VOCAB, "output_vocab_size": VOCAB, "hidden_size": 64, "num_layers": 2, "num_heads": 4}
    part.update(block_size=64, bias=True)
    codec = transformers.EncodecConfig(num_filters=4, hidden_size=8, codebook_dim=8, upsampling_ratios=[2, 2])
    return transformers.BarkConfig(
        semantic_config=part,
        coarse_acoustics_config=part,
        fine_acoustics_config={**part, "n_codes_total": 4},
        codec_config=codec.to_dict(),
    )


MOE = {**GATED, "num_experts_per_tok": 2}
MODELS = [
    TinyModel(
        "bert-generation", make("BertGenerationConfig", **COMMON, intermediate_size=128, is_decoder=True, **TOKENS)
    ),
    TinyModel("bloom", make("BloomConfig", vocab_size=VOCAB, hidden_size=64, n_layer=2, n_head=4, **TOKENS)),
    TinyModel("codegen", make("CodeGenConfig", **GPT, rotary_dim=8)),
    TinyModel("falcon", make("FalconConfig", **COMMON, **TOKENS)),
    TinyModel("falcon-new", make("FalconConfig", **COMMON, new_decoder_architecture=True, num_kv_heads=2, **TOKENS)),
    TinyModel("gpt2", make("GPT2Config", **GPT)),
    TinyModel("gpt-bigcode", make("GPTBigCodeConfig", **GPT)),
    TinyModel("gptj", make("GPTJConfig", **GPT, rotary_dim=8)),
    TinyModel(
        "gpt-neo",
        make(
            "GPTNeoConfig",
            vocab_size=VOCAB,
            hidden_size=64,
            num_layers=2,
            num_heads=4,
            attention_types=[[["global", "local"], 1]],
            window_size=4,
            max_position_embeddings=64,
            **TOKENS,
        ),
    ),
    TinyModel("gpt-neox", make("GPTNeoXConfig", **COMMON, intermediate_size=128, max_position_embeddings=64, **TOKENS)),
    TinyModel("llama", make("LlamaConfig", **GATED)),
    TinyModel("llama-tied", make("LlamaConfig", **GATED, tie_word_embeddings=True)),
    TinyModel(
        "opt", make("OPTConfig", **COMMON, ffn_dim=128, max_position_embeddings=64, word_embed_proj_dim=64, **TOKENS)
    ),
    TinyModel("mistral", make("MistralConfig", **GATED, sliding_window=8)),
    TinyModel("mixtral", make("MixtralConfig", **MOE, num_local_experts=4)),
    TinyModel("qwen2", make("Qwen2Config", **GATED)),
    TinyModel("qwen3", make("Qwen3Config", **GATED, head_dim=16)),
    TinyModel(
        "qwen3-moe",
        make("Qwen3MoeConfig", **MOE, head_dim=16, num_experts=4, moe_intermediate_size=64, mlp_only_layers=[0]),
    ),
    TinyModel("gemma2", make("Gemma2Config", **GATED, head_dim=16, sliding_window=8)),
    TinyModel("gemma3", make("Gemma3TextConfig", **GATED, head_dim=16, sliding_window=8)),
    TinyModel("phi3", make("Phi3Config", **GATED)),
    TinyModel("olmo2", make("Olmo2Config", **GATED)),
    TinyModel("granite", make("GraniteConfig", **GATED)),
    TinyModel("smollm3", make("SmolLM3Config", **GATED)),
    TinyModel("bark", bark, "AutoModel", "bark"),
    TinyModel("bart", make("BartConfig", **ED), **SEQ2SEQ),
    TinyModel(
        "fsmt",
        make(
            "FSMTConfig",
            langs=["en", "de"],
            src_vocab_size=VOCAB,
            tgt_vocab_size=VOCAB,
            **{k: v for k, v in ED.items() if k != "vocab_size"},
        ),
        **SEQ2SEQ,
    ),
    TinyModel("m2m100", make("M2M100Config", **ED), **SEQ2SEQ),
    TinyModel("marian", make("MarianConfig", **ED, forced_eos_token_id=2), **SEQ2SEQ),
    TinyModel("mbart", make("MBartConfig", **ED), **SEQ2SEQ),
    TinyModel("pegasus", make("PegasusConfig", **ED), **SEQ2SEQ),
    TinyModel(
        "prophetnet",
        make(
            "ProphetNetConfig",
            vocab_size=VOCAB,
            hidden_size=64,
            num_encoder_layers=2,
            num_decoder_layers=2,
            num_encoder_attention_heads=4,
            num_decoder_attention_heads=4,
            encoder_ffn_dim=128,
            decoder_ffn_dim=128,
            max_position_embeddings=64,
            decoder_start_token_id=1,
            **TOKENS,
        ),
        **SEQ2SEQ,
    ),
    TinyModel(
        "t5",
        make(
            "T5Config",
            vocab_size=VOCAB,
            d_model=64,
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
            pad_token_id=0,
            eos_token_id=1,
        ),
        **SEQ2SEQ,
    ),
    TinyModel(
        "whisper",
        make(
            "WhisperConfig",
            **{**ED, "vocab_size": VOCAB},
            num_mel_bins=16,
            max_source_positions=32,
            max_target_positions=64,
        ),
        "AutoModelForSpeechSeq2Seq",
        "speech",
    ),
    TinyModel("blip-2", blip2, "AutoModelForImageTextToText", "image-text"),
]
