"""What `fit` says to do next, beside each refusal, by its words."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub.errors import SafetensorsParsingError
from safetensors.torch import save_file

import onegpu
from onegpu.errors import OneGpuError
from onegpu.memory.gpus import find_gpu
from onegpu.memory.source import read_header, read_source

LLAMA = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
INDEX = "model.safetensors.index.json"


def written(folder: Path, **files: Any) -> Path:
    """Files of JSON, or of text as it is."""
    for name, value in files.items():
        stem = {"config": "config.json", "index": INDEX, "weights": "model.safetensors"}[name]
        (folder / stem).write_text(value if isinstance(value, str) else json.dumps(value))
    return folder


def hint_of(call: Callable[[], object]) -> str:
    with pytest.raises(OneGpuError) as caught:
        call()
    return caught.value.hint


@pytest.mark.parametrize(
    ("files", "hint"),
    [
        ({}, "name the folder that save_pretrained() wrote"),
        ({"config": "{"}, "save or download it again"),
        ({"config": LLAMA, "index": "{"}, "save or download it again"),
        ({"config": LLAMA, "index": {"weight_map": {"a": "../b"}}}, "do not trust it"),
        ({"config": LLAMA, "index": {"weight_map": {"a": "b.safetensors"}}}, "download the missing file"),
        ({"config": LLAMA, "weights": "cut off"}, "it is damaged or incomplete; get it again"),
        ({"config": {"model_type": "llama"}}, "without it neither the cache nor the workspace can be planned"),
        (
            {"config": LLAMA | {"model_type": "foo", "intermediate_size": 8}},
            "give a folder or a revision with safetensors; save_pretrained() writes them",
        ),
        ({"config": LLAMA}, "save the config again with a current Transformers, or add what is missing"),
        (
            {"config": LLAMA | {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}},
            "give a folder or a revision with safetensors",
        ),
        (
            {"config": LLAMA | {"quantization_config": {"quant_method": "gptq"}}},
            "fit the original 16-bit checkpoint, or one in bitsandbytes' 4 or 8 bit",
        ),
    ],
)
def test_a_folder_that_cannot_be_planned(tmp_path: Path, files: dict[str, Any], hint: str) -> None:
    folder = written(tmp_path, **files)
    assert hint_of(lambda: onegpu.fit(str(folder), gpu="24GiB")) == hint


@pytest.mark.parametrize(
    ("gpu", "hint"),
    [
        ("0GiB", "write for example 24GiB"),
        ("RTX 4091", "did you mean 'RTX 4090', 'RTX 5090', 'RTX 4080'? A size does too: 24GiB"),
        ("?", "give its memory: 24GiB"),
    ],
)
def test_a_gpu_that_is_not_known(gpu: str, hint: str) -> None:
    assert hint_of(lambda: find_gpu(gpu)) == hint


def test_the_hub_gives_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = "check the spelling and the network; a private model needs `hf auth login`"
    assert hint_of(lambda: read_source("no/such-model")) == expected
    path = written(tmp_path, config=LLAMA) / "config.json"
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: str(path))

    def refuse(*_: Any, **__: Any) -> Any:
        raise SafetensorsParsingError("not JSON")

    monkeypatch.setattr("huggingface_hub.HfApi.get_safetensors_metadata", refuse)
    assert "tell its owner" in hint_of(lambda: read_source("org/name"))


def test_a_header_that_is_whole_is_read(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2, 3)}, tmp_path / "a.safetensors")
    assert read_header(tmp_path / "a.safetensors")["a"].shape == (2, 3)


@pytest.mark.parametrize(("name", "value"), [("context", 0), ("batch", -1), ("batch", True), ("context", 1.5)])
def test_a_number_that_cannot_be(name: str, value: object) -> None:
    given = SimpleNamespace(**{name: value})
    assert hint_of(lambda: onegpu.fit("m", **vars(given))) == f"for example {name}=1"
