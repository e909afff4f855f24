"""Writes the command line's reference from the commands themselves while the site is built.

A page that has the line `<!-- generated: commands -->` gets, in its place, a section for each command: what it does,
how it is called, its arguments and its options, as `onegpu COMMAND --help` tells them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

MARK = "<!-- generated: commands -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The site builder's hook: put the reference where a page asks for it."""
    return markdown.replace(MARK, "\n".join(reference())) if MARK in markdown else markdown


def reference() -> Iterator[str]:
    """The whole reference as Markdown lines."""
    import typer

    from onegpu.cli import build_app

    for path, command in commands(typer.main.get_command(build_app()), ()):
        yield from section(path, command)


def commands(command: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command that does something, in the order of the help, with the words that call it."""
    for name, child in getattr(command, "commands", {}).items():
        if hasattr(child, "commands"):
            yield from commands(child, (*path, name))
        else:
            yield (*path, name), child


def section(path: tuple[str, ...], command: Any) -> Iterator[str]:
    """One command."""
    words = " ".join(("onegpu", *path))
    arguments = [one for one in command.params if one.param_type_name == "argument"]
    options = [one for one in command.params if one.param_type_name == "option" and not one.hidden]
    yield from (f"## `{words}`", "", str(command.help or "").strip(), "")
    yield from ("```text", " ".join([words, *map(called, arguments), "[OPTIONS]"]), "```", "")
    if arguments:
        yield from ("| argument | |", "| --- | --- |")
        for one in arguments:
            yield f"| `{called(one)}` | {cell(one.help)} |"
        yield ""
    if options:
        yield from ("| option | default | |", "| --- | --- | --- |")
        for one in options:
            names = ", ".join(f"`{name}`" for name in (*one.opts, *one.secondary_opts))
            yield f"| {names} | {default(one)} | {cell(one.help)} |"
        yield ""


def called(argument: Any) -> str:
    """An argument as the usage line writes it."""
    name = str(argument.metavar or argument.name).upper()
    return name if argument.required or name.startswith("[") else f"[{name}]"


def default(option: Any) -> str:
    """What holds when the option is not given."""
    value = getattr(option.default, "value", option.default)
    if value is None or value is False or value == "" or callable(value):
        return ""
    return "on" if value is True else f"`{value}`"


def cell(text: str | None) -> str:
    """A help text in a table."""
    return (text or "").replace("|", "\\|").replace("\n", " ")
