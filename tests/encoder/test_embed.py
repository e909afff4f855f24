"""Texts to vectors: the same as sentence-transformers', in the order given, whatever the batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from encoder.zoo import TEXT
from onegpu.encoder import Encoder
from onegpu.encoder.batching import CHUNK, FIRST_CHUNK, Rows, Tokenize, batches, tokenized_chunks
from onegpu.encoder.optimize import encoder_report, optimize_encoder
from onegpu.encoder.recipe import Recipe, pool, read_recipe
from onegpu.errors import ArgumentError, CheckpointError, ConfigError, NotFoundError, UnsupportedError

TEXTS = [
    "hello world",
    "",
    "A longer sentence about cats and dogs, sitting on a mat.",
    "many words " * 300,
    "Ünïcode 漢字",
    "   spaces   ",
]


def cosines(a: Any, b: Any) -> Any:
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


@pytest.fixture(scope="module")
def encoder(minilm: Path) -> Encoder:
    return Encoder.from_pretrained(str(minilm), device="cpu")


def test_equal_to_sentence_transformers(encoder: Encoder, minilm: Path) -> None:
    from sentence_transformers import SentenceTransformer

    theirs = SentenceTransformer(str(minilm), device="cpu")
    want = theirs.encode(TEXTS)
    got = encoder.encode(TEXTS)
    assert got.shape == want.shape
    assert got.dtype == np.float32
    assert cosines(got, want).min() >= 1 - 1e-4
    assert np.abs(got - want).max() <= 1e-5
    # An optimized model inside sentence-transformers itself.
    model = theirs[0].auto_model
    optimize_encoder(model)
    assert np.abs(theirs.encode(TEXTS) - want).max() <= 1e-5
    report = encoder_report(model)
    assert report is not None
    assert report.stacks[0].outcomes == {"direct": 1}


def test_the_recipe_was_read(encoder: Encoder) -> None:
    assert encoder.recipe == Recipe("mean", True, 256)
    assert encoder.max_length == 256


def test_order_and_batches_do_not_matter(encoder: Encoder) -> None:
    many = TEXTS * 3
    want = encoder.encode(many)
    small = Encoder(encoder.model, encoder.tokenizer, recipe=encoder.recipe, tokens_per_batch=20)
    np.testing.assert_allclose(small.encode(many), want, atol=2e-6)
    np.testing.assert_allclose(encoder.encode(many[::-1])[::-1], want, atol=2e-6)


def test_shapes_and_kinds(encoder: Encoder) -> None:
    one = encoder.encode("hello world")
    assert one.shape == (384,)
    listed = encoder.encode(["hello world"], to="torch")
    assert isinstance(listed, torch.Tensor)
    np.testing.assert_allclose(listed[0], one, atol=2e-6)
    assert encoder.encode([]).shape == (0, 384)
    raw = encoder.encode(TEXTS[:3], normalize=False)
    assert np.linalg.norm(raw, axis=1).min() > 1.5
    np.testing.assert_allclose(raw / np.linalg.norm(raw, axis=1, keepdims=True), encoder.encode(TEXTS[:3]), atol=2e-6)


def test_the_callers_tokenizer_is_untouched(encoder: Encoder) -> None:
    assert len(encoder.tokenizer("many words " * 300)["input_ids"]) > 256
    assert encoder.encode(["many words " * 300]).shape == (1, 384)
    assert len(encoder.tokenizer("many words " * 300)["input_ids"]) > 256


def test_wrong_calls(encoder: Encoder, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="number 1 is int"):
        encoder.encode(["a", 3])  # type: ignore[list-item]
    with pytest.raises(ConfigError, match="to must be one of 'numpy', 'torch'; got 'list'"):
        encoder.encode(["a"], to="list")
    with pytest.raises(ConfigError, match="tokens_per_batch must be at least 1; got 0"):
        Encoder(encoder.model, encoder.tokenizer, tokens_per_batch=0)
    with pytest.raises(NotFoundError, match="no model"):
        Encoder.from_pretrained(str(tmp_path))


class Letters:
    """A tokenizer of letters, with nothing around them: an empty text has no token at all."""

    is_fast = False
    pad_token_id = 1
    model_max_length = 16

    def __call__(self, texts: list[str], **_: object) -> dict[str, list[list[int]]]:
        return {"input_ids": [[5 + ord(letter) % 90 for letter in text][:16] for text in texts]}


def tiny() -> Any:
    torch.manual_seed(0)
    return transformers.BertModel(transformers.BertConfig(**TEXT)).eval()


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_poolings(pooling: str) -> None:
    model, texts = tiny(), ["abcdef", "x", "hello you"]
    got = Encoder(model, Letters(), recipe=Recipe(pooling)).encode(texts)
    for text, vector in zip(texts, got, strict=True):
        with torch.no_grad():
            hidden = model(input_ids=torch.tensor(Letters()([text])["input_ids"])).last_hidden_state[0]
        want = {"mean": hidden.mean(0), "cls": hidden[0], "last": hidden[-1]}[pooling]
        np.testing.assert_allclose(vector, want, atol=2e-5)


def test_a_text_without_tokens_is_zero() -> None:
    got = Encoder(tiny(), Letters(), recipe=Recipe(normalize=True)).encode(["", "abc", ""])
    assert np.all(got[[0, 2]] == 0)
    assert np.linalg.norm(got[1]) == pytest.approx(1)


def test_padding_is_no_part_of_a_mean() -> None:
    hidden = torch.full((1, 3, 2), torch.nan)
    hidden[0, :2] = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert pool(hidden, torch.tensor([2]), Recipe()).tolist() == [[2.0, 3.0]]


def test_chunks_come_in_order_and_whole() -> None:
    texts = [str(number) for number in range(FIRST_CHUNK + CHUNK + 7)]
    chunks = list(tokenized_chunks(texts, Tokenize(Letters(), 16)))
    assert [len(chunk.places) for chunk in chunks] == [FIRST_CHUNK, CHUNK, 7]
    assert [place for chunk in chunks for place in chunk.places] == list(range(len(texts)))


def test_batches_keep_to_the_budget() -> None:
    lengths = [3, 0, 9, 1, 20, 4, 4]
    rows = Rows(list(range(10, 17)), [[7] * length for length in lengths])
    found = list(batches(rows, 10))
    assert [[len(ids) for ids in batch.ids] for batch in found] == [[20], [9], [4, 4], [3, 1]]
    assert sorted(place for batch in found for place in batch.places) == [10, 12, 13, 14, 15, 16]


def write(folder: Path, name: str, content: Any) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def steps(*kinds: str) -> list[dict[str, str]]:
    paths = {"Transformer": "", "Pooling": "1_Pooling"}
    return [{"type": f"sentence_transformers.models.{kind}", "path": paths.get(kind, f"2_{kind}")} for kind in kinds]


def test_recipes(tmp_path: Path) -> None:
    assert read_recipe(tmp_path) is None
    write(tmp_path, "modules.json", steps("Transformer", "Pooling"))
    write(tmp_path, "1_Pooling/config.json", {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False})
    assert read_recipe(tmp_path) == Recipe("cls", False)
    write(tmp_path, "1_Pooling/config.json", {"pooling_mode": "lasttoken", "include_prompt": True})
    write(tmp_path, "sentence_bert_config.json", {"max_seq_length": 77})
    prompts = {"prompts": {"query": "query: "}, "default_prompt_name": "query"}
    write(tmp_path, "config_sentence_transformers.json", prompts)
    assert read_recipe(tmp_path) == Recipe("last", False, 77, "query: ")
    write(tmp_path, "1_Pooling/config.json", {"pooling_mode_max_tokens": True})
    with pytest.raises(UnsupportedError, match="pooling max_tokens is not known here"):
        read_recipe(tmp_path)
    both = {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}
    write(tmp_path, "1_Pooling/config.json", both)
    with pytest.raises(UnsupportedError, match=r"pooling mean \+ cls"):
        read_recipe(tmp_path)
    write(tmp_path, "modules.json", steps("Transformer", "Pooling", "Dense"))
    with pytest.raises(UnsupportedError, match="a step Dense follows the model"):
        read_recipe(tmp_path)
    (tmp_path / "modules.json").write_text("{")
    with pytest.raises(CheckpointError, match="is not JSON"):
        read_recipe(tmp_path)
    with pytest.raises(ConfigError, match="pooling must be one of"):
        Recipe("max")
