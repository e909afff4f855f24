"""A place where the pages' commands can be typed: the models they name are folders in the working directory.

`org/name` is looked up as a folder before it is a name on the Hub, by us and by Transformers. So a folder
`Qwen/Qwen3-8B` with a tiny random model of the same architecture answers to that name, and no network is needed. What a
command would do for minutes is made short through the command's own variables (ONEGPU_EVAL_MAX_TOKENS and others), the
shapes that `bench --random` knows by name are as tiny as the folders, and the product that `bench encode` takes its
limit from is not run: it is large on purpose.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from onegpu.memory.shapes import SHAPES
from tiny_checkpoint import byte_tokenizer

SIZES = {
    "vocab_size": 260,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
QWEN3 = SIZES | {"num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 4096}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "decoder_sparse_step": 1}
OPT = SIZES | {"ffn_dim": 128, "word_embed_proj_dim": 64, "max_position_embeddings": 512}
# Name in the pages -> Auto class, model type, config.
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Qwen/Qwen3-8B": ("AutoModelForCausalLM", "qwen3", QWEN3),
    "Qwen/Qwen3-30B-A3B": ("AutoModelForCausalLM", "qwen3_moe", QWEN3 | EXPERTS),
    "HuggingFaceTB/SmolLM2-135M-Instruct": (
        "AutoModelForCausalLM",
        "llama",
        SIZES | {"num_key_value_heads": 2, "max_position_embeddings": 4096},
    ),
    "my-model": ("AutoModelForCausalLM", "llama", SIZES | {"num_key_value_heads": 2, "max_position_embeddings": 4096}),
    "bigscience/bloom-2b5": ("AutoModelForCausalLM", "bloom", SIZES | {"n_layer": 2, "n_head": 4}),
    "facebook/opt-350m": ("AutoModelForCausalLM", "opt", OPT),
    "bert-base-uncased": ("AutoModelForMaskedLM", "bert", SIZES),
    "sentence-transformers/all-MiniLM-L6-v2": ("AutoModel", "bert", SIZES),
    "cross-encoder/ms-marco-MiniLM-L6-v2": (
        "AutoModelForSequenceClassification",
        "bert",
        SIZES | {"id2label": {0: "LABEL_0"}, "label2id": {"LABEL_0": 0}},
    ),
}
SHORT = {
    "ONEGPU_RUN_MAX_NEW_TOKENS": "8",
    "ONEGPU_CHAT_MAX_NEW_TOKENS": "8",
    "ONEGPU_EVAL_MAX_TOKENS": "64",
    "ONEGPU_BENCH_GENERATE_RUNS": "1",
    "ONEGPU_BENCH_GENERATE_MAX_NEW_TOKENS": "4",
    "ONEGPU_BENCH_GENERATE_PROMPT_TOKENS": "8",
    "ONEGPU_BENCH_LOAD_RUNS": "1",
    "ONEGPU_BENCH_ENCODE_TEXTS": "4",
    "ONEGPU_BENCH_ENCODE_BATCH": "2",
    "ONEGPU_BENCH_ENCODE_LONGEST": "16",
    "ONEGPU_BENCH_ENCODE_RUNS": "1",
    "ONEGPU_BENCH_ENCODE_SINGLE": "0",
}


def make(folder: Path, auto: str, model_type: str, fields: dict[str, Any]) -> None:
    """A random model in float32 with a byte tokenizer, saved as a Hub repository is."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **fields)
    model = getattr(transformers, auto).from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.model_max_length = 512
    if auto != "AutoModelForCausalLM":
        tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)


def add_recipe(folder: Path) -> None:
    """What sentence-transformers keeps beside a model: mean pooling, normalised."""
    kinds = ("Transformer", "Pooling", "Normalize")
    steps = [
        {
            "idx": index,
            "name": str(index),
            "path": "" if index == 0 else f"{index}_{kind}",
            "type": f"sentence_transformers.models.{kind}",
        }
        for index, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(steps))
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": SIZES["hidden_size"], "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling/config.json").write_text(json.dumps(pooling))


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All the models that the pages name."""
    root = tmp_path_factory.mktemp("library")
    for name, description in MODELS.items():
        make(root / name, *description)
    add_recipe(root / "sentence-transformers/all-MiniLM-L6-v2")
    return root


@pytest.fixture
def workplace(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with those models, a few texts, and what `install()` did undone afterwards."""
    import onegpu

    for name in MODELS:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(library / name)
    (tmp_path / "texts.txt").write_text("A cat sat on the mat.\nThe dog did not.\n\nNor did the bird.\n" * 3)
    for name, value in SHORT.items():
        monkeypatch.setenv(name, value)
    tiny_shape = {"model_type": "llama", "tie_word_embeddings": False, **QWEN3}
    monkeypatch.setattr("onegpu.bench.random_model.SHAPES", dict.fromkeys(SHAPES, tiny_shape))
    monkeypatch.setattr("onegpu.bench.encode.matmul_flops", lambda dtype, device: 1e12)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    onegpu.uninstall()
