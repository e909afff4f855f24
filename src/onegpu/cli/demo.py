"""`onegpu demo`: one question, answered by a 4-bit model on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from onegpu.cli.options import AsJson, Device, MaxNewTokens, Sampling
from onegpu.config import QuantConfig

__all__ = ["demo"]

QUESTION = "What is gravity? Answer in two sentences."


def demo(
    question: Annotated[str, typer.Argument(help="Ask something else.")] = QUESTION,
    gguf: Annotated[
        Path | None, typer.Option("--gguf", envvar="ONEGPU_DEMO_GGUF", help="Another model, as a GGUF file.")
    ] = None,
    checkpoint: Annotated[Path | None, typer.Option("--checkpoint", help="Another model, as a folder.")] = None,
    max_new_tokens: MaxNewTokens = 160,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Answer a question with SmolLM2-135M-Instruct in 4 bit. Needs no network once it is installed."""
    from onegpu.cli.answer import answer, as_document, closing_line, messages_for
    from onegpu.cli.console import print_document, quiet_libraries, say
    from onegpu.cli.demo_model import demo_checkpoint, find_gguf
    from onegpu.cli.models import ModelName, load
    from onegpu.cli.run import to_stdout

    quiet_libraries()
    folder = checkpoint if checkpoint is not None else demo_checkpoint(find_gguf(gguf))
    loaded = load(ModelName.parse(str(folder)), QuantConfig(), chosen=False, device=device, fast=True)
    say(f"question: {question}")
    sampling = Sampling(max_new_tokens, temperature=0.0, top_p=1.0, seed=0)
    given = answer(loaded, messages_for(question, system=None), sampling, (lambda _: None) if as_json else to_stdout)
    if as_json:
        print_document({"question": question} | as_document(loaded, given))
    else:
        to_stdout("\n")
        say(closing_line(loaded, given))
