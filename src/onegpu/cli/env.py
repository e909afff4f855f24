"""`onegpu env`: the facts that an issue needs, ready to paste."""

from __future__ import annotations

from typing import Any

from onegpu.cli.options import AsJson

__all__ = ["env"]


def env(as_json: AsJson = False) -> None:
    """Show device, system and versions, as a block to paste into an issue."""
    import torch

    from onegpu.bench.environment import environment
    from onegpu.cli.bench import torch_device
    from onegpu.cli.console import print_document
    from onegpu.cli.run import to_stdout
    from onegpu.diagnosis.machine import driver_version

    facts = environment(torch_device("auto"))
    facts["cuda"] = torch.version.cuda or torch.version.hip
    facts["driver"] = driver_version()
    if as_json:
        print_document(facts)
    else:
        to_stdout(as_block(facts))


def as_block(facts: dict[str, Any]) -> str:
    """The facts as a Markdown code block, one to a line."""
    flat = {key: value for key, value in facts.items() if key != "versions"} | facts["versions"]
    width = max(map(len, flat))
    lines = [f"{key:<{width}}  {'none' if value is None else value}" for key, value in flat.items()]
    return "\n".join(["```", *lines, "```", ""])
