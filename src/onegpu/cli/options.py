"""The options that several commands share, and what they mean for `from_pretrained` and `generate`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from onegpu.config import QuantConfig
from onegpu.errors import ConfigError

__all__ = [
    "AsJson",
    "Debug",
    "Device",
    "DoubleQuant",
    "MaxNewTokens",
    "Model",
    "Plain",
    "Quantization",
    "QuantizationOption",
    "RemoteCode",
    "ReportFile",
    "Sampling",
    "ScaleSearch",
    "Seed",
    "System",
    "Temperature",
    "TopP",
    "device_map",
    "quant_config",
]


class Quantization(str, Enum):
    """How the weights are stored."""

    nf4 = "nf4"
    fp4 = "fp4"
    int8 = "int8"
    none = "none"


Model = Annotated[str, typer.Argument(metavar="MODEL", help="A Hub name, name@revision, or a folder.")]
QuantizationOption = Annotated[
    Quantization | None,
    typer.Option("--quantization", "-q", help="nf4 unless the checkpoint is already quantized."),
]
DoubleQuant = Annotated[bool, typer.Option("--double-quant", help="4 bit: store the scales in 8 bit too.")]
ScaleSearch = Annotated[
    bool, typer.Option("--scale-search", help="4 bit: choose each scale by least squared error. Slower to load.")
]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="Stop after so many tokens.")]
Temperature = Annotated[float, typer.Option("--temperature", "-t", min=0.0, help="0 takes the likeliest token.")]
TopP = Annotated[float, typer.Option("--top-p", min=0.0, max=1.0, help="Sample from this share of probability.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of the sampling.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
System = Annotated[str | None, typer.Option("--system", help="System message, if the chat template takes one.")]
Plain = Annotated[bool, typer.Option("--plain", help="Generate by Transformers' own loop, without the fast path.")]
RemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model. Read it first.")
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
ReportFile = Annotated[
    Path | None,
    typer.Option("--report", metavar="FILE.html", dir_okay=False, help="Also one HTML file with tables and plots."),
]
Debug = Annotated[bool, typer.Option("--debug", envvar="ONEGPU_DEBUG", help="Show the traceback of an error.")]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen, and how many."""

    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of `generate`; a greedy choice names no sampling option at all."""
        if self.temperature == 0:
            return {"max_new_tokens": self.max_new_tokens, "do_sample": False} | dict.fromkeys(
                ("temperature", "top_p", "top_k")
            )
        return {
            "max_new_tokens": self.max_new_tokens,
            "do_sample": True,
            "temperature": self.temperature,
            "top_p": self.top_p,
        }


def quant_config(chosen: Quantization | None, double_quant: bool, scale_search: bool) -> QuantConfig | None:
    """The format asked for; None for plain 16 bit.

    Raises:
        ConfigError: a 4-bit option beside a format that is not 4 bit.
    """
    kind = Quantization.nf4 if chosen is None else chosen
    if kind in (Quantization.none, Quantization.int8):
        named = [flag for flag, on in (("--double-quant", double_quant), ("--scale-search", scale_search)) if on]
        if named:
            raise ConfigError(
                f"{' and '.join(named)} is for 4 bit; --quantization is {kind.value}", "add --quantization nf4"
            )
        return None if kind is Quantization.none else QuantConfig(quant_type="int8")
    return QuantConfig(quant_type=kind.value, double_quant=double_quant, scale_search=scale_search)


def device_map(device: str) -> str:
    """Check --device and say it as `from_pretrained` takes it.

    Raises:
        ConfigError: not one of auto, cpu, cuda, cuda:N.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise ConfigError(
            f"--device must be auto, cpu, cuda or cuda:N; got {device!r}", "leave it out to choose the GPU"
        )
    return device
