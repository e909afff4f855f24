"""The border where exceptions become words: `error: ...`, a blank line, `hint: ...`, and an exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperGroup

from onegpu.cli.console import say_error
from onegpu.errors import OneGpuError

__all__ = ["DEBUG_VARIABLE", "INTERRUPTED", "Commands", "debugging", "first_line", "show_unexpected"]

DEBUG_VARIABLE = "ONEGPU_DEBUG"
INTERRUPTED = 130  # what a shell gives a command that Ctrl-C ended


class Commands(TyperGroup):
    """A command group that answers our own errors in words, and an interrupt with its exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Run the chosen command; with --debug every error keeps its traceback."""
        try:
            return super().invoke(ctx)
        except OneGpuError as error:
            if ctx.params.get("debug"):
                raise
            say_error(error.message, error.hint)
            raise typer.Exit(1) from error
        except (MemoryError, RuntimeError) as error:
            if ctx.params.get("debug") or not is_out_of_memory(error):
                raise
            say_error(f"out of memory: {first_line(error)}", "a smaller --quantization or fewer tokens needs less")
            raise typer.Exit(1) from error
        except BrokenPipeError as error:
            # The reader of our stdout went away (`onegpu run ... | head`): nobody is left to tell.
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
            raise typer.Exit(1) from error
        except KeyboardInterrupt as error:
            raise typer.Exit(INTERRUPTED) from error


def debugging(arguments: Sequence[str]) -> bool:
    """Whether the traceback of an unexpected error is wanted."""
    return "--debug" in arguments or os.environ.get(DEBUG_VARIABLE, "") not in ("", "0")


def is_out_of_memory(error: Exception) -> bool:
    """Whether the host or the GPU ran out; torch's own class is told by its name, so that torch is not imported."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its kind where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def show_unexpected(error: Exception) -> None:
    """Tell of an error that is not one of ours: its kind, its first line, and how to see the rest."""
    say_error(
        f"{type(error).__name__}: {first_line(error)}", "`onegpu --debug ...` shows where; it may be worth an issue"
    )
