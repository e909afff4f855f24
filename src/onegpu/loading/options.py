"""From the arguments of `from_pretrained` to one `QuantConfig`: both flags, our config, Transformers' own, a dict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from onegpu.config import QuantConfig, check_choice
from onegpu.errors import ConfigError

__all__ = ["bitsandbytes_config", "quant_config", "take_quant_config"]


def take_quant_config(arguments: dict[str, Any]) -> QuantConfig | None:
    """Take `load_in_4bit`, `load_in_8bit` and `quantization_config` out of the arguments; None if none asks for it.

    Raises:
        ConfigError: both flags, a flag that contradicts the config, or a config of no kind we know.
    """
    flags = {name: arguments.pop(name, None) for name in ("load_in_4bit", "load_in_8bit")}
    for name, value in flags.items():
        if value is not None and not isinstance(value, bool):
            raise ConfigError(f"{name} must be True or False; got {value!r}")
    if flags["load_in_4bit"] and flags["load_in_8bit"]:
        raise ConfigError(
            "load_in_4bit and load_in_8bit are both True; a weight is stored once", "choose one of the two"
        )
    given = arguments.pop("quantization_config", None)
    if given is not None:
        config = quant_config(given)
        wanted = 4 if flags["load_in_4bit"] else 8 if flags["load_in_8bit"] else None
        if config is not None and wanted not in (None, config.bits):
            raise ConfigError(
                f"load_in_{wanted}bit=True, but quantization_config asks for {config.quant_type}",
                "pass one of the two",
            )
        return config
    if flags["load_in_4bit"]:
        return QuantConfig("nf4")
    return QuantConfig("int8") if flags["load_in_8bit"] else None


def quant_config(given: object) -> QuantConfig | None:
    """A `QuantConfig` from ours, from Transformers' `BitsAndBytesConfig`, or from a dict of either's fields.

    `BitsAndBytesConfig` computes in float32 unless told otherwise, which nobody who asks for 4 bit wants: its float32
    is read as "not said" and becomes the model's own 16-bit dtype. `QuantConfig(compute_dtype="float32")` or
    `dtype=torch.float32` computes in float32.
    """
    if isinstance(given, QuantConfig):
        return given
    if isinstance(given, Mapping):
        own = {field.name for field in fields(QuantConfig)}
        if not any(key.startswith(("bnb_4bit_", "llm_int8_", "load_in_", "_load_in_")) for key in given):
            return QuantConfig.from_dict({key: value for key, value in given.items() if key != "quant_method"})
        mixed = own & set(given)
        if mixed:
            raise ConfigError(
                f"quantization_config mixes {sorted(mixed)} with BitsAndBytesConfig's names", "use one kind"
            )
        given = BitsAndBytesConfig(**{key: value for key, value in given.items() if key != "quant_method"})
    if isinstance(given, BitsAndBytesConfig):
        return from_bitsandbytes(given)
    raise ConfigError(
        f"quantization_config must be a QuantConfig, a BitsAndBytesConfig or a dict; got {type(given).__name__}",
        "other quantization methods load through Transformers' own classes",
    )


def from_bitsandbytes(given: BitsAndBytesConfig) -> QuantConfig | None:
    """What a `BitsAndBytesConfig` asks for in our words; None if it asks for nothing."""
    if given.load_in_4bit and given.load_in_8bit:
        raise ConfigError(
            "load_in_4bit and load_in_8bit are both True; a weight is stored once", "choose one of the two"
        )
    skip = tuple(given.llm_int8_skip_modules or ())
    if given.load_in_8bit:
        return QuantConfig("int8", threshold=float(given.llm_int8_threshold), skip_modules=skip)
    if not given.load_in_4bit:
        return None
    check_choice("bnb_4bit_quant_type", given.bnb_4bit_quant_type, ("nf4", "fp4"))
    compute = dtype_name(given.bnb_4bit_compute_dtype)
    return QuantConfig(
        given.bnb_4bit_quant_type,
        double_quant=bool(given.bnb_4bit_use_double_quant),
        compute_dtype=None if compute == "float32" else compute,
        quant_storage=dtype_name(given.bnb_4bit_quant_storage),
        skip_modules=skip,
    )


def bitsandbytes_config(config: QuantConfig, skip: list[str], compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """The `BitsAndBytesConfig` that a saved model carries, so that plain Transformers reads it.

    `skip` must name every module that is left alone: a list given there replaces the reader's own defaults.
    """
    if config.quant_type == "int8":
        return BitsAndBytesConfig(
            load_in_8bit=True, llm_int8_threshold=float(config.threshold), llm_int8_skip_modules=skip
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.quant_type,
        bnb_4bit_compute_dtype=compute_dtype,
        bnb_4bit_use_double_quant=config.double_quant,
        bnb_4bit_quant_storage=config.quant_storage,
        llm_int8_skip_modules=skip,
    )


def with_overrides(stored: QuantConfig, given: QuantConfig | None) -> QuantConfig:
    """For a quantized checkpoint: how it is stored, with the compute dtype and threshold that the user gave."""
    if given is None:
        return stored
    if given.bits != stored.bits:
        raise ConfigError(
            f"the checkpoint is stored in {stored.quant_type}, but {given.quant_type} was asked for",
            "leave the argument out, or quantize from the original 16-bit checkpoint",
        )
    return replace(stored, compute_dtype=given.compute_dtype or stored.compute_dtype, threshold=given.threshold)


def dtype_name(dtype: torch.dtype | str) -> str:
    """ "bfloat16" for torch.bfloat16 and for itself."""
    return str(dtype).removeprefix("torch.")
