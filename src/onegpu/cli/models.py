"""From the MODEL argument to a loaded model and its tokenizer."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onegpu.cli.console import quiet_libraries, say
from onegpu.cli.errors import first_line
from onegpu.cli.options import device_map
from onegpu.config import QuantConfig
from onegpu.errors import ConfigError, DeviceError, NotFoundError, OneGpuError, UnsafeCheckpointError

__all__ = ["Loaded", "ModelName", "format_label", "load", "load_config", "load_tokenizer", "placement"]

REMOTE_CODE_HINT = "read that code; if you trust it, add --trust-remote-code"


@dataclass(frozen=True, slots=True)
class ModelName:
    """A folder or a Hub name, with the revision after `@` if there is one."""

    name: str
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> ModelName:
        """Read `folder`, `org/name` or `org/name@revision`; an existing folder wins over any other reading.

        Raises:
            NotFoundError: it looks like a folder, and there is none.
            ConfigError: an empty name or revision.
        """
        if Path(text).expanduser().is_dir():
            return cls(str(Path(text).expanduser()))
        if text.startswith(("/", "./", "../", "~")):
            raise NotFoundError(f"no folder {text}", "a Hub name has the form org/name")
        name, at, revision = text.partition("@")
        if not name or (at and not revision):
            raise ConfigError(f"MODEL must be a folder, org/name or org/name@revision; got {text!r}")
        return cls(name, revision or None)

    def arguments(self, trust_remote_code: bool) -> dict[str, Any]:
        """What every `from_pretrained` of this model gets. Without a yes, remote code is refused, never asked about."""
        found: dict[str, Any] = {"trust_remote_code": trust_remote_code}
        if self.revision is not None:
            found["revision"] = self.revision
        return found


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model ready to generate."""

    name: ModelName
    model: Any
    tokenizer: Any
    format: str  # "nf4", "nf4+double", "int8", "16bit", ...
    load_seconds: float


def format_label(config: QuantConfig | None) -> str:
    """The short name of a format: `nf4+double+search`, `int8`, `16bit`."""
    if config is None:
        return "16bit"
    extras = ("+double" if config.double_quant else "") + ("+search" if config.scale_search else "")
    return config.quant_type + extras


def stored_label(stored: Any) -> str:
    """The short name of the format that a checkpoint's own `quantization_config` describes."""
    values = stored if isinstance(stored, dict) else stored.to_dict()
    if values.get("load_in_8bit"):
        return "int8"
    if values.get("load_in_4bit"):
        return str(values.get("bnb_4bit_quant_type", "fp4")) + (
            "+double" if values.get("bnb_4bit_use_double_quant") else ""
        )
    return str(values.get("quant_method", "quantized"))


def placement(device: str) -> str:
    """The `device_map` for --device; `auto` is the GPU if there is one.

    Raises:
        ConfigError: an unknown device name.
        DeviceError: a GPU is asked for that is not there.
    """
    import torch

    wanted = device_map(device)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "auto":
        return "auto" if count else "cpu"
    if wanted.startswith("cuda") and int(wanted.partition(":")[2] or 0) >= count:
        raise DeviceError(f"--device {wanted}: {count} CUDA devices here", "--device cpu runs without one")
    return wanted


def load_config(name: ModelName, trust_remote_code: bool) -> Any:
    """The model's configuration, which is also the first proof that there is such a model.

    Raises:
        NotFoundError, UnsafeCheckpointError, ConfigError
    """
    from transformers import AutoConfig

    from onegpu.loading.pretrained import foreign_errors

    try:
        with foreign_errors(name.name):
            return AutoConfig.from_pretrained(name.name, **name.arguments(trust_remote_code))
    except UnsafeCheckpointError as error:
        raise UnsafeCheckpointError(error.message, REMOTE_CODE_HINT) from error
    except OneGpuError:
        raise
    except (OSError, ValueError) as error:
        raise ConfigError(f"{name.name} has no config.json that Transformers knows: {first_line(error)}") from error


def load_tokenizer(name: ModelName, trust_remote_code: bool) -> Any:
    """The model's tokenizer.

    Raises:
        NotFoundError: the checkpoint has none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name.name, **name.arguments(trust_remote_code))
    except (OSError, ValueError, TypeError) as error:
        raise NotFoundError(
            f"no tokenizer in {name.name}: {first_line(error)}", "save it beside the weights: tokenizer.save_pretrained"
        ) from error


def load(
    name: ModelName,
    config: QuantConfig | None,
    *,
    chosen: bool,
    device: str,
    fast: bool = False,
    trust_remote_code: bool = False,
) -> Loaded:
    """Load MODEL in the format of `config` and time it.

    A checkpoint that is quantized already is loaded as it is, unless the user has `chosen` a format: then the
    loader is asked, and its refusal stands. With `fast` the model is put on its fast path, which the time includes.
    """
    where = placement(device)
    quiet_libraries()
    from onegpu.loading.auto import auto_class
    from onegpu.loading.pretrained import model_dtype, stored_config

    own_config = load_config(name, trust_remote_code)
    stored = stored_config(own_config)
    as_stored = stored is not None and not chosen
    label = stored_label(stored) if as_stored else format_label(config)
    tokenizer = load_tokenizer(name, trust_remote_code)
    say(f"loading {name.name} as {label} on {where}")
    arguments = name.arguments(trust_remote_code) | {"device_map": where, "dtype": model_dtype(own_config, {})}
    if not as_stored:
        arguments["quantization_config"] = config
    begun = time.perf_counter()
    model = auto_class("AutoModelForCausalLM").from_pretrained(name.name, **arguments)
    if fast:
        from onegpu.fastpath import optimize

        if where != "cpu":
            say("preparing the fast path; the first time here its kernels are compiled, which takes some seconds")
        optimize(model)
    return Loaded(name, model, tokenizer, label, time.perf_counter() - begun)
