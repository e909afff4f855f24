"""What is compared, by label, and how each is loaded.

16bit             plain Transformers, the checkpoint's own 16-bit dtype (bfloat16 for a float32 checkpoint)
fp32              plain Transformers, float32
nf4  fp4  int8    onegpu; 4 bit takes `+double` (double quantization) and `+search` (scale search)
bitsandbytes:nf4  (also :fp4, :int8, :nf4+double) plain Transformers with bitsandbytes, if it is installed
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from onegpu.config import QUANT_TYPES, QuantConfig, check_choice
from onegpu.errors import ConfigError, UnsupportedError

__all__ = ["Contender", "parse_contender", "parse_contenders"]

PLAIN = ("16bit", "fp32")
EXTRAS = {"double": "double_quant", "search": "scale_search"}
RIVAL = "bitsandbytes"


@dataclass(frozen=True, slots=True)
class Contender:
    """One way to hold a model. `config` is None for plain Transformers."""

    label: str
    system: str  # "transformers", "onegpu" or "bitsandbytes"
    config: QuantConfig | None = None

    def load(self, name: str, auto: str = "AutoModelForCausalLM", **kwargs: Any) -> Any:
        """Load the model `name` through the Auto class `auto`; `kwargs` go to `from_pretrained` (device_map, ...).

        Raises:
            UnsupportedError: bitsandbytes is asked for and not installed.
        """
        import transformers
        from transformers import AutoConfig

        from onegpu.loading.auto import auto_class
        from onegpu.loading.pretrained import model_dtype

        plain = getattr(transformers, auto)
        if self.label == "fp32":
            return plain.from_pretrained(name, dtype="float32", **kwargs).eval()
        where = {key: kwargs[key] for key in ("revision", "trust_remote_code") if key in kwargs}
        dtype = model_dtype(AutoConfig.from_pretrained(name, **where), {})
        if self.system == "onegpu":
            ours = auto_class(auto)
            return ours.from_pretrained(name, quantization_config=self.config, dtype=dtype, **kwargs)
        if self.system == RIVAL:
            kwargs["quantization_config"] = rival_config(self.config, dtype)
        return plain.from_pretrained(name, dtype=dtype, **kwargs).eval()


def rival_config(config: QuantConfig | None, dtype: Any) -> Any:
    """The BitsAndBytesConfig that asks bitsandbytes for the same format."""
    from transformers import BitsAndBytesConfig

    if find_spec(RIVAL) is None:
        raise UnsupportedError(
            "bitsandbytes is not installed, so there is nothing to compare with", "leave --peers out"
        )
    assert config is not None
    if config.quant_type == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.quant_type,
        bnb_4bit_use_double_quant=config.double_quant,
        bnb_4bit_compute_dtype=dtype,
    )


def parse_contender(label: str) -> Contender:
    """Read one label of the table above.

    Raises:
        ConfigError: an unknown label, with the nearest valid one.
    """
    if label in PLAIN:
        return Contender(label, "transformers")
    rival, colon, rest = label.partition(":")
    if colon:
        check_choice("format before ':'", rival, (RIVAL,))
    quant_type, *extras = (rest if colon else label).split("+")
    check_choice("format", quant_type, QUANT_TYPES if colon else (*PLAIN, *QUANT_TYPES))
    if quant_type in PLAIN:
        raise ConfigError(f"{quant_type} takes no '+' option; got {label!r}", f"write {quant_type}")
    for extra in extras:
        check_choice("option after '+'", extra, EXTRAS)
    if extras and quant_type == "int8":
        raise ConfigError(f"int8 takes no '+' option; got {label!r}", "write int8")
    if colon and "search" in extras:
        raise ConfigError(f"bitsandbytes has no scale search; got {label!r}", "write nf4+search for onegpu's")
    config = QuantConfig.from_dict({"quant_type": quant_type} | {EXTRAS[extra]: True for extra in extras})
    return Contender(label, RIVAL if colon else "onegpu", config)


def parse_contenders(labels: str) -> list[Contender]:
    """Read a comma-separated list of labels; a label given twice counts once."""
    names = list(dict.fromkeys(label.strip() for label in labels.split(",") if label.strip()))
    if not names:
        raise ConfigError("no format given", "for example 16bit,nf4,int8")
    return [parse_contender(name) for name in names]
