"""A checkpoint small enough to make in a test: a random two-layer Llama, a byte tokenizer, a chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

CHAT_TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
SPECIAL = ("<|end|>", "<|start|>")
MERGES = (("z", "z"), ("zz", "z"))  # files of byte-level BPE have some


def byte_vocabulary() -> list[str]:
    """The specials, one token per byte in the alphabet of byte-level BPE, and the merges."""
    from tokenizers.pre_tokenizers import ByteLevel

    return [*SPECIAL, *sorted(ByteLevel.alphabet()), *map("".join, MERGES)]


def byte_tokenizer() -> Any:
    """One token per UTF-8 byte (and one for zz and zzz), so that any text can be written and read back."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate(byte_vocabulary())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(MERGES)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=SPECIAL[0],
        bos_token=SPECIAL[1],
        pad_token=SPECIAL[0],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def tiny_llama(dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Any:
    """A random Llama over the byte vocabulary; its matrices have a real spread, so that formats differ."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **{
            "vocab_size": 260,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "tie_word_embeddings": True,
            "bos_token_id": 1,
            "eos_token_id": 0,
            "pad_token_id": 0,
        }
        | changes
    )
    model = LlamaForCausalLM(config)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 1.0 / parameter.shape[-1] ** 0.5)
    return model.to(dtype).eval()


def save_tiny(folder: Path, *, chat: bool = True, **changes: Any) -> Path:
    """Save both to `folder`; without `chat`, the tokenizer has no chat template."""
    tokenizer = byte_tokenizer()
    if not chat:
        tokenizer.chat_template = None
    tiny_llama(**changes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
