from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

Call = Callable[..., Any]


def saved_dtypes(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {str(file.get_slice(name).get_dtype()) for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize("options", [("-q", "nf4"), ("-q", "nf4", "--double-quant"), ("-q", "fp4"), ("-q", "int8")])
def test_what_is_saved_answers_as_what_was_loaded(
    call: Call, tiny: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    out = tmp_path / "out"
    result = call("quantize", tiny, out, *options, "--json", "--device", "cpu")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["file_bytes"] == (out / "model.safetensors").stat().st_size < said["weight_bytes_16bit"]
    assert said["format"] == options[1] + ("+double" if len(options) > 2 else "")
    assert {"U8", "I8"} & saved_dtypes(out)

    again = json.loads(call("run", out, "hello", "-n", 12, "--json", "--device", "cpu").stdout)
    fresh = json.loads(call("run", tiny, "hello", *options, "-n", 12, "--json", "--device", "cpu").stdout)
    assert again["text"] == fresh["text"]
    assert again["format"] == fresh["format"] == said["format"]
    assert again["weight_bytes"] == fresh["weight_bytes"]


def test_a_format_that_is_not_the_stored_one_is_refused(call: Call, tiny: Path, tmp_path: Path) -> None:
    assert call("quantize", tiny, tmp_path / "out", "--device", "cpu").exit_code == 0
    result = call("run", tmp_path / "out", "hello", "-q", "int8", "--device", "cpu")
    assert result.exit_code == 1
    assert "stored in nf4, but int8 was asked for" in result.stderr


def test_a_folder_with_something_in_it_needs_force(call: Call, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("mine")
    refused = call("quantize", tiny, tmp_path, "--device", "cpu")
    assert refused.exit_code == 1
    assert f"{tmp_path} is not empty" in refused.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]
    forced = call("quantize", tiny, tmp_path, "--force", "--device", "cpu")
    assert forced.exit_code == 0, forced.output
    assert (tmp_path / "config.json").is_file()
    assert (tmp_path / "tokenizer.json").is_file()


def test_the_models_own_folder_is_never_replaced(call: Call, tiny: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in tiny.iterdir()}
    result = call("quantize", tiny, tiny, "--force")
    assert result.exit_code == 1
    assert "OUT_DIR is the folder of the model itself" in result.stderr
    assert {path.name: path.stat().st_mtime_ns for path in tiny.iterdir()} == before


def test_a_file_is_no_folder(call: Call, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    result = call("quantize", tiny, tmp_path / "out", "--force")
    assert result.exit_code == 1
    assert "is a file" in result.stderr


def test_16_bit_is_nothing_to_do(call: Call, tiny: Path, tmp_path: Path) -> None:
    result = call("quantize", tiny, tmp_path / "out", "-q", "none")
    assert result.exit_code == 1
    assert "leaves nothing to do" in result.stderr
