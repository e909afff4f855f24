"""`onegpu run MODEL PROMPT`: one answer, streamed."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from onegpu.cli.options import (
    AsJson,
    Device,
    DoubleQuant,
    MaxNewTokens,
    Model,
    Plain,
    QuantizationOption,
    RemoteCode,
    Sampling,
    ScaleSearch,
    Seed,
    System,
    Temperature,
    TopP,
    quant_config,
)

__all__ = ["read_prompt", "run", "to_stdout"]


def run(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="The question; - reads it from stdin.")],
    quantization: QuantizationOption = None,
    double_quant: DoubleQuant = False,
    scale_search: ScaleSearch = False,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    device: Device = "auto",
    system: System = None,
    plain: Plain = False,
    trust_remote_code: RemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Ask a model one question and stream the answer to stdout."""
    from onegpu.cli.answer import answer, as_document, closing_line, messages_for
    from onegpu.cli.console import print_document, say
    from onegpu.cli.errors import INTERRUPTED
    from onegpu.cli.models import ModelName, load

    name = ModelName.parse(model)
    config = quant_config(quantization, double_quant, scale_search)
    chosen = quantization is not None or double_quant or scale_search
    messages = messages_for(read_prompt(prompt), system)
    loaded = load(name, config, chosen=chosen, device=device, fast=not plain, trust_remote_code=trust_remote_code)
    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    given = answer(loaded, messages, sampling, (lambda _: None) if as_json else to_stdout)
    if as_json:
        print_document(as_document(loaded, given))
    else:
        to_stdout("\n")
        say(closing_line(loaded, given))
    if given.finish_reason == "interrupt":
        raise typer.Exit(INTERRUPTED)


def read_prompt(prompt: str) -> str:
    """The argument, or all of stdin for `-`."""
    return sys.stdin.read() if prompt == "-" else prompt


def to_stdout(text: str) -> None:
    """Write data at once, so that a reader sees each word as it comes."""
    sys.stdout.write(text)
    sys.stdout.flush()
