"""The 2023 names on Transformers' own classes, for as long as `install()` holds.

    from_pretrained(..., load_in_4bit=True)   load_in_8bit=True, BitsAndBytesConfig: our formats and kernels
    model.to_bettertransformer()              onegpu.optimize(model)
    model.reverse_bettertransformer()         onegpu.restore(model)
    torch.backends.cuda.sdp_kernel(...)       onegpu.sdp_kernel(...)

`uninstall()` puts back what was there, object for object.
"""

from __future__ import annotations

import copy
from typing import Any

from torch.backends import cuda as torch_cuda
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from onegpu.attention.sdp_kernel import sdp_kernel
from onegpu.config import QuantConfig
from onegpu.fastpath import optimize, restore
from onegpu.loading import OneGpuQuantizer, load
from onegpu.loading.quantizer import is_bitsandbytes

__all__ = ["install", "uninstall"]

FLAGS = ("load_in_4bit", "load_in_8bit")
BITSANDBYTES = ("bitsandbytes_4bit", "bitsandbytes_8bit")
SDP_KERNEL = "sdp_kernel"
METHODS = {"to_bettertransformer": optimize, "reverse_bettertransformer": restore}


class InstalledLoading(classmethod):  # type: ignore[type-arg]
    """`PreTrainedModel.from_pretrained` while installed; carries what it replaced, so that nothing else must."""

    def __init__(self, original: Any, quantizers: dict[str, Any], sdp_kernel: Any) -> None:
        self.original = original
        self.quantizers = quantizers
        self.sdp_kernel = sdp_kernel
        super().__init__(lambda cls, *args, **kwargs: from_pretrained(original, cls, *args, **kwargs))


def install() -> None:
    """Let Transformers' own classes load in 4 and 8 bit through `onegpu`; calling it again changes nothing."""
    if installed() is not None:
        return
    quantizers = {name: AUTO_QUANTIZER_MAPPING.get(name) for name in BITSANDBYTES}
    AUTO_QUANTIZER_MAPPING.update(dict.fromkeys(BITSANDBYTES, OneGpuQuantizer))
    loading = InstalledLoading(
        PreTrainedModel.__dict__["from_pretrained"], quantizers, vars(torch_cuda).get(SDP_KERNEL)
    )
    PreTrainedModel.from_pretrained = loading
    for name, function in METHODS.items():
        setattr(PreTrainedModel, name, function)
    # Torch has deprecated its own; a later one may have none.
    setattr(torch_cuda, SDP_KERNEL, sdp_kernel)


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
    if loading.sdp_kernel is None:
        delattr(torch_cuda, SDP_KERNEL)
    else:
        setattr(torch_cuda, SDP_KERNEL, loading.sdp_kernel)


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
