"""Talk: what is not data goes to stderr. NO_COLOR and a stderr that is no terminal are respected by rich."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections.abc import Mapping
from typing import Any

__all__ = ["print_document", "print_line", "progress_bar", "quiet_libraries", "say", "say_error", "spare_progress_bars"]


def say(text: str) -> None:
    """Print one line of talk, dimmed where the terminal can."""
    from rich.console import Console

    Console(stderr=True, highlight=False, soft_wrap=True).print(text, style="dim", markup=False)


def say_error(message: str, hint: str = "") -> None:
    """Print `error: ...` and, after a blank line, `hint: ...`."""
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(Text.assemble(("error:", "bold red"), f" {message}"))
    if hint:
        console.print()
        console.print(Text.assemble(("hint:", "bold"), f" {hint}"))


def print_document(document: Mapping[str, object]) -> None:
    """Print one JSON document to stdout."""
    sys.stdout.write(json.dumps(document, ensure_ascii=False, indent=2) + "\n")
    sys.stdout.flush()


def print_line(document: Mapping[str, object]) -> None:
    """Print one JSON document to stdout as one line, for commands that give several."""
    sys.stdout.write(json.dumps(document, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def progress_bar(total: int, unit: str) -> Any:
    """A bar on stderr, shown at a terminal only; a context manager with `update(n)` and `set_description(text)`."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    return tqdm(total=total, unit=f" {unit}", disable=not sys.stderr.isatty(), leave=False, file=sys.stderr)


def spare_progress_bars() -> None:
    """No progress bars where stderr is no terminal. tqdm reads this when it is imported, so it comes first."""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")


def quiet_libraries() -> None:
    """Keep the libraries' own warnings off the terminal: what matters is said by us, or raised."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    for name in ("accelerate", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
