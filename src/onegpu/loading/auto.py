"""Transformers' Auto classes, with 4-bit and 8-bit loading: `onegpu.AutoModelForCausalLM` and the rest.

Each is made on first use from the class of the same name and gives that class's models. Nothing of Transformers' is
changed.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedConfig

from onegpu.config import AUTO_CLASSES
from onegpu.loading.pretrained import load

__all__ = ["AutoClass", "auto_class"]

# Arguments that say where the files are; AutoConfig and the model class both take them.
HUB_ARGUMENTS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
    "trust_remote_code",
    "code_revision",
)
# Arguments that AutoConfig would take for its own though they are meant for the model.
MODEL_ARGUMENTS = ("dtype", "torch_dtype", "quantization_config", "state_dict")


class AutoClass:
    """Base of the classes made here: Transformers' Auto class of the same name, behind our loading."""

    source: Any

    def __init__(self) -> None:
        raise OSError(f"{type(self).__name__} is made by from_pretrained() or from_config()")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """Load a model as Transformers does, in 4 or 8 bit if asked.

        Args:
            pretrained_model_name_or_path: hub name or folder.
            load_in_4bit: store the weights of linear layers and experts in NF4.
            load_in_8bit: store them in int8 (LLM.int8()).
            quantization_config: `onegpu.QuantConfig`, or Transformers' `BitsAndBytesConfig`, or a dict of either.
            device_map: "auto", "balanced", a device, or a dict; by default the current GPU, with what does not fit on
                the CPU, or the CPU alone where there is no GPU.
            max_memory: for "auto" and "balanced": {0: "600MB", 1: "1GB", "cpu": "20GiB"}.
            dtype: of what stays unquantized and of the product; by default the checkpoint's 16-bit dtype.
            strict: refuse a checkpoint that lacks weights of the model's body (default True).
            kwargs: all else that Transformers' method takes.

        Returns:
            An ordinary `PreTrainedModel` in eval mode.

        Raises:
            OneGpuError: what happened, what was expected, what to do; see `onegpu.errors`.
        """
        return load(
            cls.source.from_pretrained,
            resolve_auto_config,
            pretrained_model_name_or_path,
            *args,
            **kwargs,
        )

    @classmethod
    def from_config(cls, config: PreTrainedConfig, **kwargs: Any) -> Any:
        """A model with random weights, as Transformers makes it; not quantized."""
        return cls.source.from_config(config, **kwargs)


def resolve_auto_config(name: str, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The config that an Auto class would resolve, and the arguments that are left for the model.

    An adapter's folder has none; then Transformers resolves the base model's by itself.
    """
    config = kwargs.pop("config", None)
    if isinstance(config, PreTrainedConfig):
        return config.__class__.from_dict(config.to_dict()) if stored(config) else config, kwargs
    hub = {key: kwargs[key] for key in HUB_ARGUMENTS if key in kwargs}
    model_only = {key: kwargs[key] for key in MODEL_ARGUMENTS if key in kwargs}
    rest = {key: value for key, value in kwargs.items() if key not in hub and key not in model_only}
    resolved, unused = AutoConfig.from_pretrained(config or name, return_unused_kwargs=True, **hub, **rest)
    return resolved, {**unused, **hub, **model_only}


def stored(config: PreTrainedConfig) -> bool:
    """Whether a config carries a quantization description, which loading will replace."""
    return getattr(config, "quantization_config", None) is not None


@cache
def auto_class(name: str) -> type[AutoClass]:
    """Our Auto class of this name, one of `AUTO_CLASSES`."""
    source = getattr(transformers, name)
    return type(name, (AutoClass,), {"source": source, "__module__": "onegpu", "__doc__": AutoClass.__doc__})


def __getattr__(name: str) -> Any:
    if name in AUTO_CLASSES:
        return auto_class(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
