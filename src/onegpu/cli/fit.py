"""`onegpu fit MODEL`: does it fit, how long a context, how fast, and the command; nothing is downloaded but headers."""

from __future__ import annotations

import re
from enum import Enum
from typing import Annotated

import typer

from onegpu.cli.options import AsJson, Model
from onegpu.errors import ConfigError

__all__ = ["fit", "parse_count"]


class KvDtype(str, Enum):
    """How keys and values are kept."""

    sixteen_bit = "16bit"
    fp8 = "fp8"
    int8 = "int8"


def fit(
    model: Model,
    context: Annotated[
        str | None, typer.Option("--context", "-c", help="Tokens of prompt and answer, 8192 or 8k. [default: 4k]")
    ] = None,
    batch: Annotated[int, typer.Option("--batch", "-b", min=1, help="Sequences at once.")] = 1,
    gpu: Annotated[
        str | None, typer.Option("--gpu", help='"RTX 4090" or a size, 24GiB; else the GPU of this machine.')
    ] = None,
    kv_dtype: Annotated[KvDtype, typer.Option("--kv-dtype", help="Plan the cache in another format.")] = (
        KvDtype.sixteen_bit
    ),
    as_json: AsJson = False,
) -> None:
    """Plan a model's memory and speed from its config and headers. Exit code 1 when no format fits the GPU."""
    from onegpu.cli.console import print_document
    from onegpu.cli.models import ModelName
    from onegpu.cli.run import to_stdout
    from onegpu.memory import fit as plan

    name = ModelName.parse(model)
    tokens = None if context is None else parse_count(context)
    report = plan(name.name, context=tokens, batch=batch, gpu=gpu, kv_dtype=kv_dtype.value, revision=name.revision)
    if as_json:
        print_document(report.to_dict())
    else:
        to_stdout(f"{report}\n")
    if report.fits is False:
        raise typer.Exit(1)


def parse_count(text: str) -> int:
    """A number of tokens: "8192", "8k" (8 x 1024), "1m".

    Raises:
        ConfigError: anything else.
    """
    found = re.fullmatch(r"\s*(\d+)\s*([km]?)\s*", text.lower())
    if not found or int(found[1]) == 0:
        raise ConfigError(f"--context must be a number of tokens, such as 8192 or 8k; got {text!r}")
    return int(found[1]) * {"": 1, "k": 1024, "m": 1024**2}[found[2]]
