"""What a safetensors checkpoint says it holds, checked before anything is allocated.

Only headers and the few small tensors that describe quantized weights are read. A file that is cut off, overlaps
itself, points outside its folder or describes a weight it does not hold is a `CheckpointError` that names it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from onegpu.errors import CheckpointError, UnsafeCheckpointError
from onegpu.formats import from_tensors_4bit, from_tensors_8bit, quantized_name
from onegpu.nn import WeightSpec

__all__ = ["Checkpoint", "TensorInfo", "check_folder", "open_checkpoint"]

MAX_HEADER_BYTES = 100 << 20  # the safetensors library's own limit
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
Reader = Callable[[str], Tensor]
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies: its file, dtype as safetensors spells it, and shape."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The tensors of one or several safetensors files, by name, none of them read."""

    tensors: Mapping[str, TensorInfo]

    @contextmanager
    def reader(self) -> Iterator[Reader]:
        """A function that reads a tensor into memory by its name. Each file is opened once, its header parsed once."""
        with ExitStack() as stack:

            @cache
            def opened(file: Path) -> Any:
                return stack.enter_context(safe_open(file, framework="pt"))

            yield lambda name: opened(self.tensors[name].file).get_tensor(name)

    def placeholder(self, name: str) -> Tensor:
        """A tensor of the right shape and dtype on the meta device."""
        info = self.tensors[name]
        return torch.empty(info.shape, dtype=DTYPES[info.dtype], device="meta")

    def quantized_specs(self) -> Iterator[tuple[str, WeightSpec]]:
        """(parameter name, spec) of every 4-bit and 8-bit weight; each description is checked against the headers.

        Raises:
            CheckpointError: a description that is damaged or does not fit the tensors beside it.
        """
        families = self.families({found[0] for name in self.tensors if (found := quantized_name(name))})
        with self.reader() as read:
            for name in self.tensors:
                if found := quantized_name(name):
                    yield found[0], self.spec_4bit(found[0], families[found[0]], read)
                elif name.endswith(".SCB"):
                    yield self.spec_8bit(name.removesuffix(".SCB"), read)

    def families(self, parameters: set[str]) -> dict[str, list[str]]:
        """For each parameter the names of its tensors: its own and those under it."""
        found: dict[str, list[str]] = {parameter: [] for parameter in parameters}
        for name in self.tensors:
            owner = name
            while owner and owner not in parameters:
                owner = owner.rpartition(".")[0]
            if owner:
                found[owner].append(name)
        return found

    def spec_4bit(self, parameter: str, beside: Iterable[str], read: Reader) -> WeightSpec:
        """The checked description of one 4-bit weight, by the tensors of its family."""
        big = (parameter, f"{parameter}.absmax")
        described = {name: self.placeholder(name) if name in big else read(name) for name in beside}
        _, absmax, state = from_tensors_4bit(parameter, described)
        storage = str(described[parameter].dtype).removeprefix("torch.")
        nested = not isinstance(absmax, Tensor)
        return WeightSpec(state.quant_type, state.shape, state.dtype, state.blocksize, nested, storage)

    def spec_8bit(self, module: str, read: Reader) -> tuple[str, WeightSpec]:
        """(parameter name, checked description) of one 8-bit weight.

        A linear layer's scales lie beside its weight (`q_proj.SCB`, `q_proj.weight`), those of a stacked weight under
        the weight's own name (`gate_up_proj.SCB`, `gate_up_proj`).
        """
        parameter = f"{module}.weight" if f"{module}.weight" in self.tensors else module
        if parameter not in self.tensors:
            raise CheckpointError(
                f"{module}.SCB holds the scales of an 8-bit weight, but there is no {module}.weight",
                "the checkpoint is incomplete; download or save it again",
            )
        small = f"{module}.weight_format"
        described = {name: self.placeholder(name) for name in (parameter, f"{module}.SCB")}
        if small in self.tensors:
            described[small] = read(small)
        if parameter == module:
            return parameter, WeightSpec("int8", self.tensors[parameter].shape, "float16")
        codes, _ = from_tensors_8bit(module, described)
        return parameter, WeightSpec("int8", tuple(codes.shape), "float16")


def open_checkpoint(files: Iterable[str | Path]) -> Checkpoint:
    """Read and check the headers of safetensors files.

    Raises:
        CheckpointError: a file that is not whole, or a tensor that is in two of them.
    """
    tensors: dict[str, TensorInfo] = {}
    for file in map(Path, files):
        for name, info in read_header(file).items():
            if name in tensors:
                raise CheckpointError(
                    f"tensor {name} is in {tensors[name].file.name} and again in {file.name}",
                    "the folder mixes two saves; keep the files that the index names",
                )
            tensors[name] = info
    return Checkpoint(tensors)


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Name -> place of every tensor in one safetensors file, checked to fill the file exactly."""
    size = file.stat().st_size
    again = f"{file.name} is damaged or was not downloaded whole; get it again"
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise CheckpointError(
                f"{file} is not a whole safetensors file: its header says {length} bytes, the file has {size}", again
            )
        text = stream.read(length)
    try:
        header = json.loads(text)
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        spans = sorted((*map(int, entry["data_offsets"]), name) for name, entry in entries.items())
        infos = {name: tensor_info(file, name, entry) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"the header of {file} cannot be read: {error}", again) from error
    end = 0
    for start, stop, name in spans:
        if start != end or stop < start:
            raise CheckpointError(f"{file}: tensor {name} starts at byte {start}, expected {end}", again)
        end = stop
    if end != size - 8 - length:
        raise CheckpointError(
            f"{file} is cut off or too long: its tensors need {end} bytes, it holds {size - 8 - length}", again
        )
    return infos


def tensor_info(file: Path, name: str, entry: dict[str, Any]) -> TensorInfo:
    """The place of one tensor, its shape and dtype agreeing with the bytes it claims."""
    shape = tuple(int(size) for size in entry["shape"])
    start, stop = entry["data_offsets"]
    dtype = DTYPES.get(entry["dtype"])
    if dtype is not None and (min(shape, default=0) < 0 or prod(shape) * dtype.itemsize != stop - start):
        raise CheckpointError(
            f"{file}: tensor {name} of shape {list(shape)} in {entry['dtype']} needs {prod(shape) * dtype.itemsize} "
            f"bytes, but claims {stop - start}",
            f"{file.name} is damaged; get it again",
        )
    return TensorInfo(file, entry["dtype"], shape)


def check_folder(folder: Path, *, allow_pickle: bool) -> None:
    """Check that a local folder holds a whole safetensors checkpoint, before Transformers opens it.

    Raises:
        CheckpointError: no weights, an index that names files that are missing or lie elsewhere, damaged files.
        UnsafeCheckpointError: only pickle files, unless `allow_pickle`.
    """
    if (folder / INDEX).is_file() and not (folder / WEIGHTS).is_file():
        open_checkpoint(indexed_files(folder))
    elif (folder / WEIGHTS).is_file():
        open_checkpoint([folder / WEIGHTS])
    elif allow_pickle or any(folder.glob("*.safetensors")) or (folder / "adapter_config.json").is_file():
        return
    elif found := sorted(path.name for path in folder.glob("*") if path.suffix in {".bin", ".pt", ".pth", ".ckpt"}):
        raise UnsafeCheckpointError(
            f"{folder} has its weights only in pickle files ({', '.join(found[:3])}), which can run code when read",
            "pass use_safetensors=False if you trust where they come from, then save_pretrained() writes safetensors",
        )
    elif (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} has a config.json but no weights: expected {WEIGHTS} or {INDEX}", "")


def indexed_files(folder: Path) -> list[Path]:
    """The shards an index names, all of them inside the folder and there."""
    path = folder / INDEX
    try:
        names = sorted(set(json.loads(path.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}", "save or download the checkpoint again") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(
                f"{path} names the file {name!r}, which is not in its folder", "do not trust this file"
            )
        if not (folder / name).is_file():
            raise CheckpointError(f"{path} names {name}, which is missing", "download the missing file")
    return [folder / name for name in names]
