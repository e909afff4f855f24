"""Tiny random models of every encoder architecture, with inputs that have padding where the model knows padding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor

HIDDEN, VOCABULARY, PAD = 32, 100, 1
TEXT = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "pad_token_id": PAD,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.4,
}
SEQ2SEQ = {
    "vocab_size": VOCABULARY,
    "d_model": HIDDEN,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 64,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "init_std": 0.4,
    "pad_token_id": PAD,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
VISION = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 16,
    "patch_size": 4,
    "initializer_range": 0.4,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
SPEECH = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "conv_dim": (8, 8),
    "conv_stride": (2, 2),
    "conv_kernel": (4, 4),
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "feat_proj_dropout": 0.0,
    "apply_spec_augment": False,
    "mask_time_prob": 0.0,
    "layerdrop": 0.0,
    "initializer_range": 0.4,
    "vocab_size": 20,
}


def padded_mask(rows: tuple[int, ...] = (6, 10, 3, 1), length: int = 10) -> Tensor:
    """Right padding: rows of the given lengths."""
    return (torch.arange(length)[None] < torch.tensor(rows)[:, None]).long()


def token_ids(mask: Tensor, low: int = 5) -> Tensor:
    ids = torch.randint(low, VOCABULARY, mask.shape, generator=torch.Generator().manual_seed(3))
    return torch.where(mask.bool(), ids, PAD)


def text(mask: Tensor) -> dict[str, Tensor]:
    return {"input_ids": token_ids(mask), "attention_mask": mask}


@dataclass
class Case:
    """One architecture. `reason` is part of why a stack is left alone, None where at least one runs unpadded."""

    name: str
    config: str
    model: str
    options: dict[str, Any] = field(default_factory=dict)
    inputs: Callable[[Tensor], dict[str, Tensor]] = text
    reason: str | None = None
    decoder: bool = False

    def valid(self, mask: Tensor, length: int) -> Tensor:
        """Which of `length` output positions of each row stand for something real."""
        if length == mask.shape[1]:
            return mask.bool()
        if self.inputs is speech:
            frames = ((mask.sum(1) * 8 - 4) // 2 + 1 - 4) // 2 + 1
            return torch.arange(length)[None] < frames[:, None]
        extra = torch.ones(len(mask), length - mask.shape[1], dtype=torch.bool)
        return torch.cat([mask.bool(), extra], dim=1)

    def build(self) -> Any:
        torch.manual_seed(0)
        config = getattr(transformers, self.config)(**self.options)
        return getattr(transformers, self.model)(config).eval()


def seq2seq(mask: Tensor) -> dict[str, Tensor]:
    ids = torch.randint(5, VOCABULARY, (mask.shape[0], 4), generator=torch.Generator().manual_seed(4))
    return {**text(mask), "decoder_input_ids": ids}


def tables(mask: Tensor) -> dict[str, Tensor]:
    return {**text(mask), "token_type_ids": torch.zeros(*mask.shape, 7, dtype=torch.long)}


def images(mask: Tensor) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(5))}


def blip2(mask: Tensor) -> dict[str, Tensor]:
    ids = torch.cat([torch.full((2, 4), 4), token_ids(mask)[:2]], dim=1)
    return {**images(mask), "input_ids": ids, "decoder_input_ids": seq2seq(mask)["decoder_input_ids"][:2]}


def masked_images(mask: Tensor) -> dict[str, Tensor]:
    return {**images(mask), "noise": torch.arange(16).float()[None].repeat(2, 1)}


def text_and_images(mask: Tensor) -> dict[str, Tensor]:
    pixels = torch.randn(len(mask), 3, 16, 16, generator=torch.Generator().manual_seed(5))
    return {**text(mask), "pixel_values": pixels}


def vilt(mask: Tensor) -> dict[str, Tensor]:
    ones = torch.ones(len(mask), 16, 16, dtype=torch.long)
    return {**text_and_images(mask), "token_type_ids": torch.zeros_like(mask), "pixel_mask": ones}


def speech(mask: Tensor) -> dict[str, Tensor]:
    samples = mask.repeat_interleave(8, dim=1)
    wave = torch.randn(samples.shape, generator=torch.Generator().manual_seed(6)) * samples
    return {"input_values": wave, "attention_mask": samples}


def whisper(mask: Tensor) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(5, VOCABULARY, (2, 4), generator=generator)
    return {"input_features": torch.randn(2, 8, 40, generator=generator), "decoder_input_ids": ids}


def t5(**options: Any) -> dict[str, Any]:
    return dict(
        vocab_size=VOCABULARY,
        d_model=HIDDEN,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        initializer_factor=3.0,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=12,
        pad_token_id=PAD,
        eos_token_id=2,
        decoder_start_token_id=0,
        **options,
    )


CLIP_TEXT = {key: TEXT[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")}
CLIP_TEXT |= {"intermediate_size": 64, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 99}
CLIP = {"text_config": CLIP_TEXT, "vision_config": VISION, "projection_dim": 16}
BLIP2 = {
    "vision_config": {**VISION, "attention_dropout": 0.0},
    "image_token_index": 4,
    "qformer_config": {**TEXT, "encoder_hidden_size": HIDDEN, "cross_attention_frequency": 2},
    "text_config": {**t5(), "model_type": "t5"},
    "num_query_tokens": 4,
}
MODERN = dict(
    TEXT,
    global_attn_every_n_layers=2,
    local_attention=4,
    attention_dropout=0.0,
    embedding_dropout=0.0,
    mlp_dropout=0.0,
    initializer_cutoff_factor=2.0,
    cls_token_id=0,
    sep_token_id=2,
    bos_token_id=0,
    eos_token_id=2,
)
ROC = dict(
    TEXT,
    enable_pronunciation=False,
    enable_shape=False,
    pronunciation_vocab_size=10,
    shape_vocab_size=10,
    pronunciation_embed_dim=8,
    shape_embed_dim=8,
)

CASES = [
    Case("albert", "AlbertConfig", "AlbertModel", {**TEXT, "embedding_size": 16, "num_hidden_groups": 2}),
    Case("bert", "BertConfig", "BertModel", TEXT),
    Case("bert-generation", "BertGenerationConfig", "BertGenerationEncoder", TEXT),
    Case("camembert", "CamembertConfig", "CamembertModel", TEXT),
    Case("data2vec-text", "Data2VecTextConfig", "Data2VecTextModel", TEXT),
    Case(
        "distilbert",
        "DistilBertConfig",
        "DistilBertModel",
        {
            "dim": HIDDEN,
            "n_heads": 4,
            "n_layers": 3,
            "hidden_dim": 64,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 64,
            "dropout": 0.0,
            "attention_dropout": 0.0,
            "initializer_range": 0.4,
            "pad_token_id": PAD,
        },
    ),
    Case("electra", "ElectraConfig", "ElectraModel", {**TEXT, "embedding_size": 16}),
    Case("ernie", "ErnieConfig", "ErnieModel", TEXT),
    Case("layoutlm", "LayoutLMConfig", "LayoutLMModel", TEXT),
    Case("markuplm", "MarkupLMConfig", "MarkupLMModel", {**TEXT, "max_depth": 4}),
    Case("modernbert", "ModernBertConfig", "ModernBertModel", MODERN),
    Case("mpnet", "MPNetConfig", "MPNetModel", {**TEXT, "relative_attention_num_buckets": 32}),
    Case("rembert", "RemBertConfig", "RemBertModel", {**TEXT, "input_embedding_size": 16}),
    Case("roberta", "RobertaConfig", "RobertaModel", TEXT),
    Case("roc-bert", "RoCBertConfig", "RoCBertModel", ROC),
    Case("roformer", "RoFormerConfig", "RoFormerModel", {**TEXT, "embedding_size": 16}),
    Case("splinter", "SplinterConfig", "SplinterModel", TEXT),
    Case("tapas", "TapasConfig", "TapasModel", TEXT, tables),
    Case("xlm-roberta", "XLMRobertaConfig", "XLMRobertaModel", TEXT),
    Case("bart", "BartConfig", "BartModel", SEQ2SEQ, seq2seq),
    Case("m2m-100", "M2M100Config", "M2M100Model", SEQ2SEQ, seq2seq),
    Case("marian", "MarianConfig", "MarianModel", SEQ2SEQ, seq2seq),
    Case("mbart", "MBartConfig", "MBartModel", SEQ2SEQ, seq2seq),
    Case("pegasus", "PegasusConfig", "PegasusModel", SEQ2SEQ, seq2seq),
    Case("t5", "T5Config", "T5Model", t5(), seq2seq),
    Case("t5-encoder", "T5Config", "T5EncoderModel", t5()),
    Case("wav2vec2", "Wav2Vec2Config", "Wav2Vec2Model", SPEECH, speech),
    Case(
        "wav2vec2-stable",
        "Wav2Vec2Config",
        "Wav2Vec2Model",
        {**SPEECH, "do_stable_layer_norm": True, "feat_extract_norm": "layer"},
        speech,
    ),
    Case("hubert", "HubertConfig", "HubertModel", SPEECH, speech),
    Case("data2vec-audio", "Data2VecAudioConfig", "Data2VecAudioModel", SPEECH, speech),
    Case("vilt", "ViltConfig", "ViltModel", {**TEXT, **VISION, "max_image_length": -1}, vilt),
    Case("clip", "CLIPConfig", "CLIPModel", CLIP, text_and_images),
    Case(
        "whisper",
        "WhisperConfig",
        "WhisperModel",
        {**SEQ2SEQ, "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 20},
        whisper,
    ),
    Case("vit", "ViTConfig", "ViTModel", VISION, images),
    Case("deit", "DeiTConfig", "DeiTModel", VISION, images),
    Case("vit-mae", "ViTMAEConfig", "ViTMAEModel", {**VISION, "mask_ratio": 0.0}, masked_images),
    Case("vit-msn", "ViTMSNConfig", "ViTMSNModel", VISION, images),
    Case("yolos", "YolosConfig", "YolosModel", {**VISION, "image_size": [16, 16], "num_detection_tokens": 3}, images),
    Case("blip-2", "Blip2Config", "Blip2ForConditionalGeneration", BLIP2, blip2),
    Case(
        "fsmt",
        "FSMTConfig",
        "FSMTModel",
        {**SEQ2SEQ, "src_vocab_size": VOCABULARY, "tgt_vocab_size": VOCABULARY, "langs": ["en", "de"]},
        seq2seq,
        reason="past Transformers' attention interface",
    ),
    Case(
        "prophetnet",
        "ProphetNetConfig",
        "ProphetNetModel",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": HIDDEN,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
            "num_encoder_layers": 2,
            "num_decoder_layers": 2,
            "num_encoder_attention_heads": 4,
            "num_decoder_attention_heads": 4,
            "dropout": 0.0,
            "attention_dropout": 0.0,
            "max_position_embeddings": 64,
            "pad_token_id": PAD,
        },
        seq2seq,
        reason="past Transformers' attention interface",
    ),
]
