"""`onegpu doctor`: what runs here, what does not, why, and the cure. Exit code 0 says healthy, 1 not."""

from __future__ import annotations

from typing import Annotated

import typer

from onegpu.cli.options import AsJson

__all__ = ["doctor"]


def doctor(
    model: Annotated[
        str | None, typer.Option("--model", metavar="MODEL", help="Also what this model gets; only its config is read.")
    ] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Also the GPUs' bandwidth and matrix peak.")] = False,
    as_json: AsJson = False,
) -> None:
    """Check driver, packages, every operator and every attention kernel on this machine."""
    from onegpu.cli.console import print_document
    from onegpu.cli.models import ModelName
    from onegpu.cli.run import to_stdout
    from onegpu.diagnosis import doctor as look

    name = None if model is None else ModelName.parse(model)
    found = look(name.name if name else None, revision=name.revision if name else None, measure=measure)
    if as_json:
        print_document(found.to_dict())
    else:
        to_stdout(f"{found}\n")
    if not found.is_healthy:
        raise typer.Exit(1)
