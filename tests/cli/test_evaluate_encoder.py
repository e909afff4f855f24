from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from onegpu.cli.evaluate_encoder import limited
from tiny_checkpoint import byte_tokenizer

Call = Callable[..., Any]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer BERT whose matrices have a real spread."""
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=260,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        pad_token_id=0,
    )
    model = BertModel(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            with torch.no_grad():
                parameter.normal_(0, 1.0 if "embeddings" in name else parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.model_max_length = 64
    tokenizer.save_pretrained(folder)
    return folder


def test_the_table(call: Call, encoder: Path) -> None:
    result = call("eval", encoder, "--max-tokens", 400, "--device", "cpu", "--formats", "16bit,nf4")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].startswith("| format | weights, MiB | mean cosine")
    assert lines[2].endswith("| - | - | - |")
    assert "mean pooling" in result.stderr


def test_more_bits_are_nearer(call: Call, encoder: Path) -> None:
    result = call("eval", encoder, "--max-tokens", 2000, "--json", "--device", "cpu", "--formats", "fp32,int8,nf4,fp4")
    rows = {row["format"]: row for row in json.loads(result.stdout)["rows"]}
    means = [rows[label]["mean_cosine"] for label in ("fp32", "int8", "nf4", "fp4")]
    assert means == sorted(means, reverse=True)
    assert 0.5 < means[-1] < 0.9999 < means[0] <= 1
    for row in rows.values():
        assert row["smallest_cosine"] <= row["mean_cosine"]


def test_texts_of_ones_own(call: Call, encoder: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("one\ntwo\n\nthree\n")
    options = ["--text", texts, "--formats", "int8", "--json", "--device", "cpu"]
    assert json.loads(call("eval", encoder, *options).stdout)["rows"][0]["texts"] == 3
    texts.write_text("one\n")
    result = call("eval", encoder, *options)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: at least 2 lines of text are needed")


def test_a_limit_of_tokens_leaves_two_texts_at_least() -> None:
    texts = ["abcd"] * 5
    assert len(limited(byte_tokenizer(), texts, 12)) == 3
    assert len(limited(byte_tokenizer(), texts, 1)) == 2
    assert len(limited(byte_tokenizer(), texts, None)) == 5
