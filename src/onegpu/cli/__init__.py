"""The `onegpu` command. Data goes to stdout, talk to stderr; an error is one line, a blank line and a hint.

`build_app` lists the commands; each lives in the file of its name and imports torch and Transformers only when it
runs, so that `--help` answers at once. Exit codes: 0 done, 1 an error of ours, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import sys

import typer

from onegpu.cli import bench, chat, demo, doctor, embed, env, evaluate, fit, quantize, run, version
from onegpu.cli.console import spare_progress_bars
from onegpu.cli.errors import Commands, debugging, show_unexpected
from onegpu.cli.options import Debug

__all__ = ["build_app", "main"]


def start(debug: Debug = False) -> None:  # noqa: ARG001  (read by Commands.invoke)
    """Run any Transformers model small and fast on the one GPU you have."""
    spare_progress_bars()


def build_app() -> typer.Typer:
    """The whole command line. Every option can also be set by a variable: ONEGPU_RUN_DEVICE=cpu, and so on."""
    app = typer.Typer(
        cls=Commands,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"auto_envvar_prefix": "ONEGPU", "help_option_names": ["-h", "--help"]},
    )
    app.callback()(start)
    app.command("run")(run.run)
    app.command("chat")(chat.chat)
    app.command("quantize")(quantize.quantize)
    app.command("eval")(evaluate.evaluate)
    app.command("embed")(embed.embed)
    app.command("fit")(fit.fit)
    app.command("doctor")(doctor.doctor)
    app.command("env")(env.env)
    app.add_typer(bench.build_app(), name="bench")
    app.command("demo")(demo.demo)
    app.command("version")(version.version)
    return app


def main() -> None:
    """Entry point of `onegpu` and of `python -m onegpu.cli`."""
    try:
        build_app()(prog_name="onegpu")
    except Exception as error:
        if debugging(sys.argv):
            raise
        show_unexpected(error)
        sys.exit(1)
