"""Reading headers: from folders, from the Hub's answers, and refusing what is damaged."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError, SafetensorsParsingError
from safetensors.torch import save_file

from onegpu.errors import CheckpointError, ConfigError, NotFoundError
from onegpu.memory.source import TensorInfo, model_config, read_source

TENSORS = {"a.weight": torch.zeros(4, 8, dtype=torch.bfloat16), "b": torch.zeros(3, dtype=torch.int64)}
INFOS = {"a.weight": TensorInfo("BF16", (4, 8)), "b": TensorInfo("I64", (3,))}


def folder_with(path: Path, config: object = None) -> Path:
    (path / "config.json").write_text(json.dumps({"model_type": "x"} if config is None else config))
    return path


def test_one_file(tmp_path: Path) -> None:
    save_file(TENSORS, folder_with(tmp_path) / "model.safetensors")
    source = read_source(str(tmp_path))
    assert source.tensors == INFOS
    assert source.origin == "config.json and the headers of 1 file"
    assert {name: info.num_bytes for name, info in INFOS.items()} == {"a.weight": 64, "b": 24}


def test_shards(tmp_path: Path) -> None:
    folder_with(tmp_path)
    for name, tensor in TENSORS.items():
        save_file({name: tensor}, tmp_path / f"{name}.safetensors")
    index = {"weight_map": {name: f"{name}.safetensors" for name in TENSORS}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert read_source(str(tmp_path)).tensors == INFOS
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"names b\.safetensors, which is missing"):
        read_source(str(tmp_path))


def test_no_weights(tmp_path: Path) -> None:
    source = read_source(str(folder_with(tmp_path)))
    assert source.tensors is None
    assert source.origin == "config.json alone"


@pytest.mark.parametrize("index", ["{", "[]", '{"weight_map": 3}'])
def test_a_damaged_index(tmp_path: Path, index: str) -> None:
    (folder_with(tmp_path) / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=r"index\.json cannot be read"):
        read_source(str(tmp_path))


def test_an_index_that_leads_out_of_the_folder(tmp_path: Path) -> None:
    (folder_with(tmp_path) / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x.safetensors"}}')
    with pytest.raises(CheckpointError, match="which is not in its folder"):
        read_source(str(tmp_path))


def test_a_file_that_is_cut_off(tmp_path: Path) -> None:
    file = folder_with(tmp_path) / "model.safetensors"
    save_file(TENSORS, file)
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        read_source(str(tmp_path))


@pytest.mark.parametrize(("text", "words"), [("{", "cannot be read"), ("[]", "must hold a JSON object; got list")])
def test_a_damaged_config(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=words):
        model_config(str(tmp_path))


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "a/b/c"])
def test_no_such_folder(name: str) -> None:
    with pytest.raises(NotFoundError, match=f"no folder {name}"):
        read_source(name)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hub that has one config."""
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: str(folder_with(tmp_path) / "config.json"))
    return tmp_path


def test_headers_from_the_hub(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    infos = {name: SimpleNamespace(dtype=info.dtype, shape=list(info.shape)) for name, info in INFOS.items()}
    metadata = SimpleNamespace(files_metadata={"model.safetensors": SimpleNamespace(tensors=infos)})
    asked: list[Any] = []

    def answer(_: Any, name: str, revision: str | None = None) -> Any:
        asked.append((name, revision))
        return metadata

    monkeypatch.setattr("huggingface_hub.HfApi.get_safetensors_metadata", answer)
    source = read_source("org/name", "main")
    assert source.tensors == INFOS
    assert asked == [("org/name", "main")]


def test_what_is_in_the_cache_needs_no_network(hub: Path) -> None:
    save_file(TENSORS, hub / "model.safetensors")
    assert read_source("org/name").tensors == INFOS


def test_the_hub_has_no_safetensors(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import NotASafetensorsRepoError

    def refuse(*_: Any, **__: Any) -> Any:
        raise NotASafetensorsRepoError("pickle only")

    monkeypatch.setattr("huggingface_hub.HfApi.get_safetensors_metadata", refuse)
    assert read_source("org/name").tensors is None


@pytest.mark.parametrize(
    ("error", "expected", "words"),
    [
        (OSError("timed out"), NotFoundError, "the hub did not give it (timed out)"),
        (HfHubHTTPError.__bases__[0]("no route"), NotFoundError, "the hub did not give it (no route)"),
        (SafetensorsParsingError("not JSON"), CheckpointError, "the headers of org/name cannot be read: not JSON"),
    ],
)
def test_the_hub_fails_between_config_and_headers(
    hub: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, expected: type[Exception], words: str
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr("huggingface_hub.HfApi.get_safetensors_metadata", refuse)
    with pytest.raises(expected, match=re.escape(words)):
        read_source("org/name")
