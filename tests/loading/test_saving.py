"""A save is whole or did not happen."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import onegpu
from onegpu.errors import SaveError
from onegpu.loading.quantizer import OneGpuQuantizer
from onegpu.loading.saving import replace_folder

Auto = onegpu.AutoModelForCausalLM


@pytest.fixture(scope="module")
def model(llama_folder: Path) -> Any:
    return Auto.from_pretrained(llama_folder, load_in_4bit=True)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_saving_over_an_earlier_save(model: Any, tmp_path: Path, ids: torch.Tensor) -> None:
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    shards = [path.name for path in tmp_path.glob("model-*.safetensors")]
    assert len(shards) > 1
    (tmp_path / "tokenizer.json").write_text("{}")
    model.save_pretrained(tmp_path)
    assert sorted(contents(tmp_path)) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert torch.equal(Auto.from_pretrained(tmp_path)(ids).logits, model(ids).logits)


def test_shards_load_again(model: Any, tmp_path: Path, ids: torch.Tensor) -> None:
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert torch.equal(Auto.from_pretrained(tmp_path)(ids).logits, model(ids).logits)


@pytest.mark.parametrize("quant_type", ["nf4", "int8"])
def test_reading_copies_no_quantizer(quant_type: str, llama_folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Transformers copies what converts a tensor deeply, once for each."""
    loaded = onegpu.AutoModelForCausalLM.from_pretrained(
        llama_folder, quantization_config=onegpu.QuantConfig(quant_type, double_quant=quant_type == "nf4")
    )
    loaded.save_pretrained(tmp_path)

    def refuse(self: Any, memo: dict[int, Any]) -> Any:
        raise AssertionError("the quantizer is copied")

    monkeypatch.setattr(OneGpuQuantizer, "__deepcopy__", refuse, raising=False)
    again = onegpu.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(torch.arange(8)[None]).logits, loaded(torch.arange(8)[None]).logits)


def test_a_temporary_model_can_be_saved(llama_folder: Path, tmp_path: Path) -> None:
    Auto.from_pretrained(llama_folder, load_in_4bit=True).save_pretrained(tmp_path / "new" / "folder")
    assert (tmp_path / "new" / "folder" / "model.safetensors").is_file()
    assert (tmp_path / "new" / "folder").stat().st_mode & 0o700 == 0o700


def test_a_full_disk_leaves_the_old_save(llama_folder: Path, tmp_path: Path) -> None:
    """The system refuses to write beyond a size: a real failure in the middle of a file."""
    target = tmp_path / "saved"
    Auto.from_pretrained(llama_folder, load_in_8bit=True).save_pretrained(target)
    before = contents(target)
    code = f"""
import resource, signal, onegpu
model = onegpu.AutoModelForCausalLM.from_pretrained({str(llama_folder)!r}, load_in_4bit=True)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
try:
    model.save_pretrained({str(target)!r})
except onegpu.errors.SaveError as error:
    print("refused:", error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert "refused: the model could not be saved to" in done.stdout, done.stdout + done.stderr
    assert "what was in the folder before is unchanged" in done.stdout
    assert contents(target) == before
    assert os.listdir(tmp_path) == ["saved"]


def test_a_file_in_the_way(model: Any, tmp_path: Path) -> None:
    (tmp_path / "saved").write_text("mine")
    with pytest.raises(SaveError, match=r"could not be saved to .*saved: .*is a file"):
        model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved").read_text() == "mine"


def test_a_folder_that_cannot_be_made(model: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SaveError, match="choose a folder you may write to"):
        model.save_pretrained(tmp_path / "file" / "saved")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder(model: Any, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(SaveError, match="choose a folder you may write to"):
            model.save_pretrained(tmp_path / "saved")
    finally:
        tmp_path.chmod(0o700)


def test_a_failure_while_moving_in_puts_the_old_files_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "saved"
    target.mkdir()
    for name in ("a.json", "b.json", "model-00001-of-00002.safetensors"):
        (target / name).write_text(f"old {name}")
    before = contents(target)
    real, calls = os.replace, []

    def replace(source: Any, destination: Any) -> None:
        calls.append(destination)
        if len(calls) == 4:
            raise OSError(28, "No space left on device")
        real(source, destination)

    with pytest.raises(SaveError, match="No space left on device"), replace_folder(target) as folder:
        for name in ("a.json", "b.json", "model.safetensors"):
            (folder / name).write_text("new")
        monkeypatch.setattr(os, "replace", replace)
    assert contents(target) == before
    assert os.listdir(tmp_path) == ["saved"]


def test_an_error_of_the_writer_passes_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), replace_folder(tmp_path / "saved") as folder:
        (folder / "half.json").write_text("half")
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == []
