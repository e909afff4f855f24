"""What a model says of itself before it is downloaded: config.json, and the headers of its safetensors files.

From a folder both are read as they lie there. From the Hub the config is fetched, and of the weights only the headers,
by range requests; a model that is already in the cache is read there, without a network.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from onegpu.errors import CheckpointError, ConfigError, NotFoundError

__all__ = ["Source", "TensorInfo", "model_config", "read_source"]

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
BITS = {"F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16, "U16": 16}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Dtype, as safetensors spells it, and shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def is_float(self) -> bool:
        """Whether loading casts it to the model's dtype."""
        return self.dtype.startswith(("F", "BF"))

    @property
    def num_bytes(self) -> int:
        """Bytes in the file; of dtypes narrower than 16 bits, one each."""
        return self.numel * BITS.get(self.dtype, 8) // 8


@dataclass(frozen=True, slots=True)
class Source:
    """One model: `tensors` is None where there are no safetensors headers to read; `origin` says what was read."""

    name: str
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo] | None
    origin: str


def read_source(name: str, revision: str | None = None) -> Source:
    """Read config and headers of a folder, or of `org/name` on the Hub.

    Raises:
        NotFoundError: no such folder or model, or no network to ask.
        CheckpointError: files that are damaged, missing or outside their folder.
        ConfigError: config.json is no JSON object.
    """
    folder = Path(name).expanduser()
    return from_folder(name, folder) if folder.is_dir() else from_hub(name, revision)


def model_config(name: str, revision: str | None = None) -> Mapping[str, Any]:
    """config.json alone, of a folder or of `org/name` on the Hub.

    Raises:
        NotFoundError, CheckpointError, ConfigError: as `read_source`.
    """
    return read_config(config_path(name, revision))


def config_path(name: str, revision: str | None) -> Path:
    """Where config.json lies; from the Hub it is fetched into the cache."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"{folder} has no config.json", "name the folder that save_pretrained() wrote")
        return folder / "config.json"
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise NotFoundError(f"no folder {name}", "a Hub name has the form org/name")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, "config.json", revision=revision))
    except (OSError, ValueError) as error:
        raise not_found(name, error) from error


def from_folder(name: str, folder: Path) -> Source:
    """Read what lies in a folder."""
    config = model_config(str(folder))
    files = weight_files(folder)
    tensors = {name: info for file in files for name, info in read_header(file).items()}
    origin = f"config.json and the headers of {plural(len(files), 'file')}" if files else "config.json alone"
    return Source(name, config, tensors if files else None, origin)


def from_hub(name: str, revision: str | None) -> Source:
    """Fetch config.json, and the headers of the weights where they are not in the cache."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, NotASafetensorsRepoError, SafetensorsParsingError

    http_errors: Any = HfHubHTTPError.__bases__  # of the HTTP client, which differs by the hub's version
    path = config_path(name, revision)
    try:
        cached = from_folder(name, path.parent)
    except CheckpointError:
        cached = None  # a part of the shards
    if cached is not None and cached.tensors is not None:
        return cached
    config = read_config(path)
    try:
        metadata = HfApi().get_safetensors_metadata(name, revision=revision)
    except NotASafetensorsRepoError:
        return Source(name, config, None, "config.json alone, since there are no safetensors")
    except SafetensorsParsingError as error:
        raise CheckpointError(f"the headers of {name} cannot be read: {error}", "tell its owner") from error
    except (OSError, ValueError, *http_errors) as error:
        raise not_found(name, error) from error
    tensors = {
        tensor: TensorInfo(info.dtype, tuple(info.shape))
        for file in metadata.files_metadata.values()
        for tensor, info in file.tensors.items()
    }
    return Source(
        name, config, tensors, f"config.json and the headers of {plural(len(metadata.files_metadata), 'file')}"
    )


def not_found(name: str, error: Exception) -> NotFoundError:
    """The error for a model that the Hub did not give."""
    said = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return NotFoundError(
        f"no model called {name!r}: it is no folder here, and the hub did not give it ({said})",
        "check the spelling and the network; a private model needs `hf auth login`",
    )


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def read_config(path: Path) -> Mapping[str, Any]:
    """The JSON object in config.json."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}", "save or download it again") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path} must hold a JSON object; got {type(config).__name__}")
    return config


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files a folder's model is in, none where it has none; those an index names must be there."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        return []
    try:
        names = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / INDEX} cannot be read: {error}", "save or download it again") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{INDEX} names the file {name!r}, which is not in its folder", "do not trust it")
        if not (folder / name).is_file():
            raise CheckpointError(f"{INDEX} names {name}, which is missing", "download the missing file")
    return [folder / name for name in names]


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Dtype and shape of every tensor in one file; the library checks that the file is whole."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118, no mapping
            return {name: TensorInfo(part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}", "it is damaged or incomplete; get it again") from error
