"""`onegpu chat MODEL`: a conversation that keeps its history."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from onegpu.cli.options import (
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
from onegpu.cli.run import to_stdout

if TYPE_CHECKING:
    from onegpu.cli.models import Loaded

__all__ = ["chat"]

COMMANDS = "/reset forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C stops an answer"


def chat(
    model: Model,
    quantization: QuantizationOption = None,
    double_quant: DoubleQuant = False,
    scale_search: ScaleSearch = False,
    max_new_tokens: MaxNewTokens = 1024,
    temperature: Temperature = 0.7,
    top_p: TopP = 0.95,
    seed: Seed = 0,
    device: Device = "auto",
    system: System = None,
    plain: Plain = False,
    trust_remote_code: RemoteCode = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document for each answer, a line each.")] = False,
) -> None:
    """Talk with a model. Questions come from stdin, a line each; answers go to stdout."""
    from onegpu.cli.console import say
    from onegpu.cli.models import ModelName, load
    from onegpu.errors import UnsupportedError

    config = quant_config(quantization, double_quant, scale_search)
    chosen = quantization is not None or double_quant or scale_search
    name = ModelName.parse(model)
    loaded = load(name, config, chosen=chosen, device=device, fast=not plain, trust_remote_code=trust_remote_code)
    if not loaded.tokenizer.chat_template:
        raise UnsupportedError(f"{model} has no chat template, so it cannot hold a conversation", "use `onegpu run`")
    say(COMMANDS)
    converse(loaded, Sampling(max_new_tokens, temperature, top_p, seed), system, as_json)


def converse(loaded: Loaded, sampling: Sampling, system: str | None, as_json: bool) -> None:
    """Question, answer, question, until the questions end."""
    from onegpu.cli.answer import Message, answer, as_document, speed_line
    from onegpu.cli.console import print_line, say, say_error
    from onegpu.errors import ConfigError

    opening: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    history = list(opening)
    while (question := next_question(as_json)) is not None:
        if question in ("/exit", "/quit"):
            return
        if question == "/reset":
            history = list(opening)
            say("the conversation is forgotten")
        elif question.startswith("/"):
            say(COMMANDS)
        elif question:
            asked = [*history, {"role": "user", "content": question}]
            try:
                given = answer(loaded, asked, sampling, (lambda _: None) if as_json else to_stdout)
            except ConfigError as error:
                say_error(error.message, "/reset starts anew")
                continue
            if as_json:
                print_line({"question": question} | as_document(loaded, given))
            else:
                to_stdout("\n")
            say(speed_line(loaded, given))
            history = [*asked, {"role": "assistant", "content": given.text}]


def next_question(as_json: bool) -> str | None:
    """One line, with line editing at a terminal; None at the end. Ctrl-C gives the line up."""
    at_terminal = not as_json and sys.stdin.isatty() and sys.stdout.isatty()
    if at_terminal:
        import readline  # noqa: F401  (gives input() its line history)
    try:
        return input(">>> " if at_terminal else "").strip()
    except EOFError:
        return None
    except KeyboardInterrupt:
        if not as_json:
            to_stdout("\n")
        return ""
