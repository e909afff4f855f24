"""The 2023 names on Transformers' own classes, for as long as `install()` holds.

    from_pretrained(..., load_in_4bit=True)   load_in_8bit=True, BitsAndBytesConfig: our formats and kernels
    model.to_bettertransformer()              onegpu.optimize(model)
    model.reverse_bettertransformer()         onegpu.restore(model)

`uninstall()` puts back what was there, object for object.
"""

from __future__ import annotations

import copy
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from onegpu.config import QuantConfig
from onegpu.fastpath import optimize, restore
from onegpu.loading import OneGpuQuantizer, load
from onegpu.loading.quantizer import is_bitsandbytes

__all__ = ["install", "uninstall"]

FLAGS = ("load_in_4bit", "load_in_8bit")
BITSANDBYTES = ("bitsandbytes_4bit", "bitsandbytes_8bit")
METHODS = {"to_bettertransformer": optimize, "reverse_bettertransformer": restore}


class InstalledLoading(classmethod):  # type: ignore[type-arg]
    """`PreTrainedModel.from_pretrained` while installed; carries what it replaced, so that nothing else must."""

    def __init__(self, original: Any, quantizers: dict[str, Any]) -> None:
        self.original = original
        self.quantizers = quantizers
        super().__init__(lambda cls, *args, **kwargs: from_pretrained(original, cls, *args, **kwargs))


def install() -> None:
    """Let Transformers' own classes load in 4 and 8 bit through `onegpu`; calling it again changes nothing."""
    if installed() is not None:
        return
    quantizers = {name: AUTO_QUANTIZER_MAPPING.get(name) for name in BITSANDBYTES}
    AUTO_QUANTIZER_MAPPING.update(dict.fromkeys(BITSANDBYTES, OneGpuQuantizer))
    PreTrainedModel.from_pretrained = InstalledLoading(PreTrainedModel.__dict__["from_pretrained"], quantizers)
    for name, function in METHODS.items():
        setattr(PreTrainedModel, name, function)


def uninstall() -> None:
    """Put back what `install()` replaced; models loaded in between go on working."""
    loading = installed()
    if loading is None:
        return
    PreTrainedModel.from_pretrained = loading.original
    for name, quantizer in loading.quantizers.items():
        if quantizer is None:
            del AUTO_QUANTIZER_MAPPING[name]
        else:
            AUTO_QUANTIZER_MAPPING[name] = quantizer
    for name in METHODS:
        delattr(PreTrainedModel, name)


def installed() -> InstalledLoading | None:
    """What `install()` put in place, None when it did not."""
    current = PreTrainedModel.__dict__["from_pretrained"]
    return current if isinstance(current, InstalledLoading) else None


def from_pretrained(original: Any, cls: type, name: Any, *args: Any, **kwargs: Any) -> Any:
    """Transformers' method, or ours where the arguments or the checkpoint ask for 4 or 8 bit."""
    plain = original.__get__(None, cls)
    given = kwargs.get("quantization_config")
    wanted = any(kwargs.get(flag) for flag in FLAGS) or isinstance(given, QuantConfig) or is_bitsandbytes(given)
    if not wanted and not is_bitsandbytes(getattr(kwargs.get("config"), "quantization_config", None)):
        for flag in FLAGS:
            kwargs.pop(flag, None)
        return plain(name, *args, **kwargs)

    def resolve(source: str, arguments: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        config = arguments.pop("config", None)
        if isinstance(config, PreTrainedConfig):
            return copy.deepcopy(config), arguments
        model_only = {key: arguments.pop(key) for key in ("dtype", "torch_dtype") if key in arguments}
        config, unused = cls.config_class.from_pretrained(  # type: ignore[attr-defined]
            config or source, return_unused_kwargs=True, **arguments
        )
        return config, {**unused, **model_only}

    return load(plain, resolve, name, *args, **kwargs)
