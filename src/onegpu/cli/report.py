"""What every `onegpu bench` does with its result: a table or a document on stdout, and a page where one is wanted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onegpu.errors import ConfigError

__all__ = ["check_report", "deliver"]


def check_report(path: Path | None) -> None:
    """Refuse a place for the page before anything is measured.

    Raises:
        ConfigError: not an .html file in a folder that is there.
    """
    if path is None:
        return
    if path.suffix not in (".html", ".htm"):
        raise ConfigError(f"--report must end in .html; got {path}", "for example --report report.html")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"--report: there is no folder {path.absolute().parent}", "make it first")


def deliver(kind: str, document: Mapping[str, Any], tables: str, *, as_json: bool, report: Path | None) -> None:
    """Print `document` as JSON or `tables` as Markdown, and write the page of both to `report`.

    Raises:
        SaveError: the page cannot be written.
    """
    from onegpu.cli.console import print_document, say
    from onegpu.cli.run import to_stdout

    if as_json:
        print_document(document)
    else:
        to_stdout(tables)
    if report is None:
        return
    from onegpu.bench.html_report import write

    note = write(report, kind, document, tables)
    say(f"report: {report}" + (f" ({note})" if note else ""))
