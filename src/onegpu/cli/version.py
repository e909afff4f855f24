"""`onegpu version`: what is installed, read from package metadata without importing it."""

from __future__ import annotations

from onegpu.cli.options import AsJson

__all__ = ["version"]


def version(as_json: AsJson = False) -> None:
    """Show the versions of onegpu and of what it stands on."""
    from onegpu.bench.environment import versions
    from onegpu.cli.console import print_document
    from onegpu.cli.run import to_stdout

    found = versions()
    if as_json:
        print_document(found)
        return
    width = max(map(len, found))
    for name in ("onegpu", *(name for name in found if name != "onegpu")):
        to_stdout(f"{name:<{width}}  {found[name] or 'not installed'}\n")
