"""`from_pretrained`, from arguments to a ready model: read the wish, check, resolve the config, load, check again.

Transformers does the loading; `loading.quantizer` takes its place in it. Errors of Transformers, safetensors and torch
become ours at this border.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from onegpu.config import QuantConfig
from onegpu.errors import (
    CheckpointError,
    ConfigError,
    DoesNotFitError,
    NotFoundError,
    OneGpuError,
    UnsafeCheckpointError,
)
from onegpu.loading.checkpoint import check_folder
from onegpu.loading.ops import LoadAborted
from onegpu.loading.options import dtype_name, quant_config, take_quant_config, with_overrides
from onegpu.loading.placement import check_devices, default_device_map
from onegpu.loading.quantizer import METHOD, LoadConfig, OneGpuQuantizer, is_bitsandbytes
from onegpu.nn.state import NESTED

__all__ = ["load", "register"]

COMPANIONS = ("absmax", *NESTED, "row_stats")
ResolveConfig = Callable[[str, dict[str, Any]], tuple[Any, dict[str, Any]]]


def register() -> None:
    """Make our quantizer known to Transformers under our own name; nothing that was there changes."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

    AUTO_QUANTIZER_MAPPING.setdefault(METHOD, OneGpuQuantizer)
    AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(METHOD, LoadConfig)


def load(
    from_pretrained: Callable[..., Any],
    resolve_config: ResolveConfig,
    name: str | os.PathLike[str],
    *args: Any,
    strict: bool = True,
    **kwargs: Any,
) -> Any:
    """Load a model as Transformers' `from_pretrained` does, in 4 or 8 bit where that is asked for or stored.

    Args:
        from_pretrained: Transformers' own, of an Auto class or a model class.
        resolve_config: (name, kwargs) -> (config, kwargs that were not for it).
        name: hub name or folder.
        strict: refuse a checkpoint that lacks weights of the model's body, or has some the body does not know.
        kwargs: all that `from_pretrained` takes, and load_in_4bit, load_in_8bit, quantization_config.

    Raises:
        OneGpuError: whatever of the tree in `onegpu.errors` fits.
    """
    register()
    wanted = take_quant_config(kwargs)
    with_info = kwargs.pop("output_loading_info", False)
    check_devices(kwargs.get("device_map"), kwargs.get("max_memory"))
    check_source(name, kwargs)
    with foreign_errors(name):
        config, kwargs = resolve_config(os.fspath(name), kwargs)
        kwargs = quantized_arguments(config, wanted, kwargs)
        model, info = from_pretrained(name, *args, config=config, output_loading_info=True, **kwargs)
    if strict:
        check_loaded(model, info)
    return (model, info) if with_info else model


def check_source(name: str | os.PathLike[str], kwargs: dict[str, Any]) -> None:
    """Set the safe defaults and check what lies on this machine before Transformers opens it."""
    if kwargs.get("trust_remote_code") is None:
        kwargs["trust_remote_code"] = False
    if "gguf_file" in kwargs or "state_dict" in kwargs:
        return
    allow_pickle = kwargs.get("use_safetensors") is False
    if kwargs.get("use_safetensors") is None:
        kwargs["use_safetensors"] = True
    path = Path(name)
    if path.is_dir():
        check_folder(path / (kwargs.get("subfolder") or ""), allow_pickle=allow_pickle)
    elif str(name).startswith((".", "/", "~")) or str(name).count("/") > 1:
        raise NotFoundError(f"the folder {str(name)!r} does not exist", "check the path, or give a hub name: org/model")


def quantized_arguments(config: Any, wanted: QuantConfig | None, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments for Transformers, with our quantizer in them where the model is to be, or is, quantized.

    `config` is changed in place: a stored bitsandbytes description becomes one that leads to our quantizer.
    """
    stored = stored_config(config)
    if stored is not None and is_bitsandbytes(stored):
        given = quant_config(stored)
        if given is None:
            raise CheckpointError(
                "config.json says quant_method bitsandbytes, but neither load_in_4bit nor load_in_8bit is true",
                "exactly one of them must be",
            )
        if any(kwargs.get(key) not in (None, "auto") for key in ("dtype", "torch_dtype")):
            given = replace(given, compute_dtype=None)  # a dtype said now outweighs the one written then
        quant = with_overrides(given, wanted)
        holder = config if getattr(config, "quantization_config", None) is not None else config.get_text_config()
        holder.quantization_config = {
            "quant_method": METHOD,
            "quant": asdict(quant),
            "may_use_disk": bool(kwargs.get("offload_folder")),
        }
    elif wanted is not None:
        if stored is not None:
            raise ConfigError(
                f"the checkpoint is already quantized with {method_of(stored)}; it cannot be quantized again",
                "leave load_in_4bit / load_in_8bit out, or start from the original 16-bit checkpoint",
            )
        quant = wanted
        kwargs["quantization_config"] = LoadConfig(quant, may_use_disk=bool(kwargs.get("offload_folder")))
    else:
        return kwargs
    kwargs["dtype"] = model_dtype(config, kwargs)
    kwargs.setdefault("offload_buffers", True)
    if kwargs.get("device_map") is None:
        kwargs["device_map"], kwargs["max_memory"] = default_device_map(kwargs.get("max_memory"))
    return kwargs


def stored_config(config: Any) -> Any:
    """The quantization description in a model's config or in its text part, None if there is none."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        found = getattr(config.get_text_config(decoder=True), "quantization_config", None)
    return found


def method_of(stored: Any) -> str:
    """The name of a quantization method as its config has it."""
    method = stored.get("quant_method") if isinstance(stored, dict) else getattr(stored, "quant_method", None)
    return str(getattr(method, "value", method))


def model_dtype(config: Any, kwargs: dict[str, Any]) -> torch.dtype:
    """The dtype of what stays unquantized: the user's word, else the checkpoint's 16-bit dtype, never float32.

    bfloat16 when the checkpoint is float32 or does not say; float16 on a GPU that has no bfloat16 units.
    """
    said = kwargs.pop("torch_dtype", None)
    said = kwargs.pop("dtype", None) or said
    if said not in (None, "auto"):
        dtype = getattr(torch, dtype_name(said), None)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise ConfigError(f"dtype must be a floating torch dtype or its name; got {said!r}", "for example bfloat16")
        return dtype
    own = getattr(config, "dtype", None) or getattr(config.get_text_config(decoder=True), "dtype", None)
    own = getattr(torch, dtype_name(own), None) if own else None
    if own in (torch.float16, torch.bfloat16):
        return own
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        return torch.float16
    return torch.bfloat16


def check_loaded(model: nn.Module, info: dict[str, Any]) -> None:
    """Refuse a model whose body has random weights, or a checkpoint with weights that its body does not know.

    A missing head is no error: Transformers draws it, says so, and training it is the usual next step.
    """
    lost = [key for key in info["missing_keys"] if in_body(model, key) and "pooler" not in key]
    # Scales are made from the weight: where it is missing, so are they.
    missing = [key for key in lost if key.rpartition(".")[2] not in COMPANIONS]
    if missing:
        raise CheckpointError(
            f"the checkpoint lacks {len(missing)} tensors of {type(model).__name__}: {listed(missing)}; "
            "they would have random values",
            "the checkpoint is incomplete or belongs to another config.json; strict=False loads it all the same",
        )
    extra = [key for key in info["unexpected_keys"] if key.endswith("weight") and in_body(model, key)]
    if extra:
        raise CheckpointError(
            f"the checkpoint has {len(extra)} tensors that {type(model).__name__} does not know: {listed(extra)}",
            "config.json may describe a smaller model than the files hold; strict=False loads it all the same",
        )


def in_body(model: Any, key: str) -> bool:
    """Whether a key of the checkpoint lies in the model's body (what all heads share)."""
    prefix = getattr(model, "base_model_prefix", "")
    body = getattr(model, prefix, model) if prefix else model
    own = key.removeprefix(f"{prefix}.")
    if body is not model and own == key:
        return False
    return own.split(".")[0] in dict(body.named_children())


def listed(names: list[str]) -> str:
    """The first few names, and how many more."""
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


@contextmanager
def foreign_errors(name: str | os.PathLike[str]) -> Iterator[None]:
    """Turn what Transformers, safetensors, the hub and torch raise into errors of ours, most specific first."""
    try:
        yield
    except LoadAborted as aborted:
        raise aborted.error from aborted.error.__cause__
    except OneGpuError:
        raise
    except SafetensorError as error:
        raise CheckpointError(
            f"a safetensors file of {str(name)!r} cannot be read: {error}", "it is damaged or incomplete; get it again"
        ) from error
    except torch.OutOfMemoryError as error:
        raise DoesNotFitError(
            f"the GPU ran out of memory while {str(name)!r} was loading: {str(error).splitlines()[0]}",
            'close what uses the GPU, choose load_in_4bit, or allow the CPU: max_memory={0: "6GiB", "cpu": "20GiB"}',
        ) from error
    except (OSError, ValueError, RuntimeError) as error:
        raise translated(name, error) from error


def translated(name: str | os.PathLike[str], error: Exception) -> Exception:
    """Our error for one of Transformers', told by its words; the error itself when it is none of those."""
    text = str(error)
    if "trust_remote_code" in text:
        return UnsafeCheckpointError(
            f"{str(name)!r} needs code from its own repository to load, which was not allowed",
            "read that code; if you trust it, pass trust_remote_code=True",
        )
    if "model.safetensors" in text and "does not appear to have a file named" in text:
        return UnsafeCheckpointError(
            f"{str(name)!r} has no safetensors weights; others (pickle files) can run code when read",
            "pass use_safetensors=False if you trust where they come from",
        )
    if "ignore_mismatched_sizes" in text or "size mismatch" in text:
        return CheckpointError(
            f"tensors of {str(name)!r} have other shapes than its config.json says: {text.splitlines()[0]}",
            "the checkpoint and its config.json do not belong together",
        )
    if isinstance(error, OSError) and not Path(name).is_dir():
        return NotFoundError(
            f"no model called {str(name)!r}: it is no folder here, and the hub did not give it "
            f"({text.splitlines()[0] if text else type(error).__name__})",
            "check the spelling and the network; a private model needs `hf auth login`",
        )
    return error
