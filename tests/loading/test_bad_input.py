"""Every refusal, by its words: what was expected, what came, what to do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig

import onegpu
from onegpu import QuantConfig
from onegpu.errors import (
    CheckpointError,
    ConfigError,
    DeviceError,
    DoesNotFitError,
    NotFoundError,
    OneGpuError,
    UnsafeCheckpointError,
)

Auto = onegpu.AutoModelForCausalLM


@pytest.fixture
def folder(llama_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama_folder, tmp_path / "model"))


@pytest.fixture(scope="module")
def stored_folder(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stored")
    Auto.from_pretrained(llama_folder, load_in_4bit=True).save_pretrained(path)
    return path


@pytest.fixture
def stored(stored_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stored_folder, tmp_path / "stored"))


def edit_tensors(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def edit_state(folder: Path, **fields: Any) -> None:
    """Make the description of one stored weight say something else."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        key = f"{PROJ}.quant_state.bitsandbytes__nf4"
        state = {**json.loads(bytes(tensors[key].tolist())), **fields}
        tensors[key] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    edit_tensors(folder, change)


PROJ = "model.layers.0.self_attn.q_proj.weight"

ARGUMENTS = {
    "both flags": ({"load_in_4bit": True, "load_in_8bit": True}, ConfigError, "load_in_4bit and load_in_8bit are both"),
    "flag of no kind": ({"load_in_4bit": "yes"}, ConfigError, "load_in_4bit must be True or False; got 'yes'"),
    "flag against config": (
        {"load_in_8bit": True, "quantization_config": QuantConfig("nf4")},
        ConfigError,
        "load_in_8bit=True, but quantization_config asks for nf4",
    ),
    "unknown type": (
        {"quantization_config": {"quant_type": "nf5"}},
        ConfigError,
        "quant_type must be one of 'nf4', 'fp4', 'int8'; got 'nf5'\n\nhint: did you mean 'nf4'",
    ),
    "unknown bnb type": (
        {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="int4")},
        ConfigError,
        "bnb_4bit_quant_type must be one of 'nf4', 'fp4'",
    ),
    "unknown field": (
        {"quantization_config": {"block_size": 64}},
        ConfigError,
        "QuantConfig field must be one of .* got 'block_size'\n\nhint: did you mean 'blocksize'",
    ),
    "blocksize": ({"quantization_config": {"blocksize": 100}}, ConfigError, "blocksize must be one of 32, .* got 100"),
    "compute dtype": (
        {"quantization_config": {"compute_dtype": "float8"}},
        ConfigError,
        "compute_dtype must be one of 'bfloat16', 'float16', 'float32'; got 'float8'",
    ),
    "dtype": ({"load_in_4bit": True, "dtype": "int8"}, ConfigError, "dtype must be a floating torch dtype"),
    "no config": (
        {"quantization_config": 4},
        ConfigError,
        "must be a QuantConfig, a BitsAndBytesConfig or a dict; got int",
    ),
    "max_memory": ({"max_memory": {"cpu": "6 apples"}}, ConfigError, r"max_memory\['cpu'\] must be bytes or a size"),
    "max_memory form": ({"max_memory": "6GiB"}, ConfigError, "max_memory must be a dict such as"),
    "device": ({"load_in_4bit": True, "device_map": "gpu"}, ConfigError, "'gpu' is not a device"),
}


@pytest.mark.parametrize(("arguments", "error", "words"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_arguments(arguments: dict[str, Any], error: type[OneGpuError], words: str, llama_folder: Path) -> None:
    with pytest.raises(error, match=words):
        Auto.from_pretrained(llama_folder, **arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize("device_map", ["cuda", "cuda:0", 0, {"": 0}])
def test_cuda_without_cuda(device_map: Any, llama_folder: Path) -> None:
    with pytest.raises(DeviceError, match="sees no CUDA device\n\nhint: leave device_map out to run on the CPU"):
        Auto.from_pretrained(llama_folder, load_in_4bit=True, device_map=device_map)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weight(bits: int, value: float, folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value

    edit_tensors(folder, change)
    with pytest.raises(CheckpointError, match=r"model.layers.1.mlp.up_proj.weight"):
        Auto.from_pretrained(folder, **{f"load_in_{bits}bit": True})


def test_int8_weight_beyond_float16(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e6

    edit_tensors(folder, change)
    with pytest.raises(CheckpointError, match=r"model.layers.0.mlp.up_proj.weight"):
        Auto.from_pretrained(folder, load_in_8bit=True)


@pytest.mark.parametrize("flags", [{}, {"load_in_4bit": True}], ids=["plain", "4bit"])
def test_truncated_shard(flags: dict[str, bool], folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="is cut off or too long"):
        Auto.from_pretrained(folder, **flags)


def test_header_longer_than_the_file(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes((2**40).to_bytes(8, "little") + path.read_bytes()[8:])
    with pytest.raises(CheckpointError, match="its header says 1099511627776 bytes, the file has"):
        Auto.from_pretrained(folder, load_in_4bit=True)


def test_header_that_is_no_json(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"dtype"', b'"dtypo"', 1))
    with pytest.raises(CheckpointError, match=r"the header of .* cannot be read"):
        Auto.from_pretrained(folder, load_in_4bit=True)


def test_overlapping_tensors(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    first, second = (name for name in sorted(header)[:3] if name != "__metadata__")
    header[first]["data_offsets"] = header[second]["data_offsets"]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    with pytest.raises(CheckpointError, match=r"starts at byte|needs .* bytes, but claims"):
        Auto.from_pretrained(folder, load_in_4bit=True)


@pytest.mark.parametrize("flags", [{}, {"load_in_4bit": True}], ids=["plain", "4bit"])
def test_missing_tensor(flags: dict[str, bool], folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.pop("model.layers.1.mlp.down_proj.weight"))
    with pytest.raises(
        CheckpointError, match=r"lacks 1 tensors of LlamaForCausalLM: model.layers.1.mlp.down_proj.weight"
    ):
        Auto.from_pretrained(folder, **flags)


def test_extra_tensor(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=1)
    with pytest.raises(CheckpointError, match=r"has 9 tensors that LlamaForCausalLM does not know: model.layers.1"):
        Auto.from_pretrained(folder, load_in_4bit=True)
    assert Auto.from_pretrained(folder, load_in_4bit=True, strict=False).config.num_hidden_layers == 1


@pytest.mark.parametrize("flags", [{}, {"load_in_4bit": True}, {"load_in_8bit": True}], ids=["plain", "4bit", "8bit"])
@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "model.norm.weight"])
def test_wrong_shape(flags: dict[str, bool], name: str, folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name][:-2].clone()

    edit_tensors(folder, change)
    with pytest.raises(CheckpointError, match=r"shape|shapes"):
        Auto.from_pretrained(folder, **flags)


LIES = {
    "blocksize": ({"blocksize": 128}, "absmax.*must be float32 .128.; got float32 .256."),
    "unknown blocksize": ({"blocksize": 7}, "blocksize"),
    "shape": ({"shape": [128, 64]}, "its shape takes 4096 packed bytes, got 8192"),
    "huge shape": ({"shape": [2**40, 2**40]}, "shape"),
    "swapped shape": ({"shape": [64, 256]}, "says it holds a weight of shape .64, 256., the model expects .128, 128."),
    "type": ({"quant_type": "fp4"}, "its key says nf4, its quant_state says fp4"),
    "dtype": ({"dtype": "int4"}, "dtype"),
    "half nested": ({"nested_offset": 0.5, "nested_blocksize": 256, "nested_dtype": "float32"}, "nested_absmax"),
}


@pytest.mark.parametrize(("fields", "words"), LIES.values(), ids=LIES)
def test_description_that_lies(fields: dict[str, Any], words: str, stored: Path) -> None:
    edit_state(stored, **fields)
    with pytest.raises(CheckpointError, match=words):
        Auto.from_pretrained(stored)


def test_absmax_of_another_length(stored: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{PROJ}.absmax"] = tensors[f"{PROJ}.absmax"][:-1].clone()

    edit_tensors(stored, change)
    with pytest.raises(CheckpointError, match=r"absmax' must be float32 \[256\]; got float32 \[255\]"):
        Auto.from_pretrained(stored)


def test_another_codebook(stored: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{PROJ}.quant_map"] = torch.linspace(-1, 1, 16)

    edit_tensors(stored, change)
    with pytest.raises(CheckpointError, match="is not the nf4 codebook"):
        Auto.from_pretrained(stored)


@pytest.mark.parametrize("lost", ["absmax", "quant_map"])
def test_lost_companion(lost: str, stored: Path) -> None:
    edit_tensors(stored, lambda tensors: tensors.pop(f"{PROJ}.{lost}"))
    with pytest.raises(CheckpointError, match=f"tensor '{PROJ}.{lost}' is missing"):
        Auto.from_pretrained(stored)


def test_lost_description(stored: Path) -> None:
    edit_tensors(stored, lambda tensors: tensors.pop(f"{PROJ}.quant_state.bitsandbytes__nf4"))
    with pytest.raises(CheckpointError):
        Auto.from_pretrained(stored)


def test_quantizing_what_is_stored_otherwise(stored: Path) -> None:
    with pytest.raises(ConfigError, match="the checkpoint is stored in nf4, but int8 was asked for"):
        Auto.from_pretrained(stored, load_in_8bit=True)


def test_config_that_says_quantized_and_is_not(folder: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    with pytest.raises(CheckpointError, match="says the checkpoint is quantized, but no tensor in it is"):
        Auto.from_pretrained(folder)


def test_other_method_cannot_be_quantized_again(folder: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ConfigError, match="already quantized with gptq"):
        Auto.from_pretrained(folder, load_in_4bit=True)


@pytest.mark.parametrize("flags", [{}, {"load_in_4bit": True}], ids=["plain", "4bit"])
def test_pickle_only(flags: dict[str, bool], folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UnsafeCheckpointError, match=r"only in pickle files .pytorch_model.bin."):
        Auto.from_pretrained(folder, **flags)
    assert Auto.from_pretrained(folder, use_safetensors=False, **flags) is not None


def test_remote_code(folder: Path) -> None:
    edit_config(folder, model_type="unheard_of", auto_map={"AutoConfig": "conf.C", "AutoModelForCausalLM": "mod.M"})
    (folder / "conf.py").write_text("raise SystemExit('ran')")
    with pytest.raises(UnsafeCheckpointError, match="needs code from its own repository"):
        Auto.from_pretrained(folder, load_in_4bit=True)


def test_index_that_points_outside(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "elsewhere.safetensors")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "../elsewhere.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"names the file '../elsewhere.safetensors', which is not in its folder"):
        Auto.from_pretrained(folder)


def test_index_that_names_a_missing_shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"names model-00001-of-00002.safetensors, which is missing"):
        Auto.from_pretrained(folder)


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has a config.json but no weights"):
        Auto.from_pretrained(folder)


@pytest.mark.parametrize("name", ["no-such-org/no-such-model", "nosuchmodel"])
def test_unknown_name_without_network(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotFoundError, match=f"no model called '{name}'"):
        Auto.from_pretrained(name, load_in_4bit=True)


def test_unknown_folder() -> None:
    with pytest.raises(NotFoundError, match=r"the folder './nowhere' does not exist"):
        Auto.from_pretrained("./nowhere")


def test_does_not_fit_max_memory(llama_folder: Path) -> None:
    with pytest.raises(
        DoesNotFitError, match=r"the model does not fit: it needs .* max_memory allows .*\n\nhint: allow"
    ):
        Auto.from_pretrained(llama_folder, load_in_4bit=True, device_map="auto", max_memory={"cpu": "60KB"})


def test_a_skip_that_matches_nothing_is_told(llama_folder: Path) -> None:
    config = QuantConfig(skip_modules=("q_prj", "down_proj"))
    model = Auto.from_pretrained(llama_folder, quantization_config=config)
    report = onegpu.report(model)
    assert report.warnings == ["skip_modules 'q_prj' matched no module"]
    reasons = {reason: count for reason, count, _, _ in report.kept}
    assert reasons == {"named in skip_modules": 2, "output head, tied embedding or last layer": 1}


def test_errors_are_one_tree_and_say_what_to_do(llama_folder: Path) -> None:
    with pytest.raises(OneGpuError) as caught:
        Auto.from_pretrained(llama_folder, load_in_4bit=True, load_in_8bit=True)
    assert caught.value.hint == "choose one of the two"
    assert str(caught.value).endswith("hint: choose one of the two")
    assert isinstance(caught.value, ValueError)
