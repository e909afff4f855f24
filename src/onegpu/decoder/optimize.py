"""`optimize_decoder`: let `generate` run through the engine; `restore_decoder`: exactly what it was before."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from onegpu.decoder.classes import ATTRIBUTE, driver_of, generating_class, is_generating, original_class
from onegpu.decoder.driver import Driver, Way
from onegpu.decoder.options import DecoderOptions

__all__ = ["DecoderReport", "PartReport", "decoder_report", "optimize_decoder", "restore_decoder"]

WAYS = {
    "slots": "layers of Transformers over slots of keys and values",
    "masked": "layers of Transformers over whole slots with a mask",
    "fused": "fused layers",
    "crossed": "layers of Transformers over whole slots, the encoder's side computed once",
}


@dataclass(slots=True)
class PartReport:
    """One model that generates: `name` in the whole, "" for itself; how, or why Transformers' own loop runs.

    `outcomes` counts its generations by the way they went, `graphs` the captured steps; `refused` says why steps run
    eagerly though graphs were asked for.
    """

    name: str
    kind: str
    way: str | None
    reason: str | None
    notes: tuple[str, ...] = ()
    outcomes: dict[str, int] = field(default_factory=dict)
    graphs: int = 0
    refused: str | None = None

    def lines(self) -> list[str]:
        """One sentence for the way, one for each reason."""
        name = self.name or self.kind
        if self.reason is not None:
            lines = [f"{name}: generates by Transformers' own loop, because {self.reason}"]
        else:
            lines = [f"{name}: generates through {WAYS[str(self.way)]}, {self.graphs} steps captured"]
        lines += [f"{name}: {note}" for note in self.notes]
        if self.refused is not None:
            lines.append(f"{name}: its steps are not captured: {self.refused}")
        lines += [f"{name}: {count} × {outcome}" for outcome, count in self.outcomes.items()]
        return lines


@dataclass(slots=True)
class DecoderReport:
    """What generation of a model is at this moment."""

    model: str
    options: DecoderOptions
    parts: list[PartReport] = field(default_factory=list)

    @property
    def is_optimized(self) -> bool:
        """Whether any part generates through the engine."""
        return any(part.reason is None for part in self.parts)

    def lines(self) -> list[str]:
        """What `onegpu.report` prints."""
        return [line for part in self.parts for line in part.lines()]


def optimize_decoder(model: nn.Module, options: DecoderOptions | None = None) -> DecoderReport:
    """Make `generate` of a Transformers model, and of models inside it, run through the engine, in place.

    Weights, config, state dict, `forward` and training stay the plain model's; its class becomes a subclass of the same
    name. Calling it again gives the report there is (with other options: restores first). What the engine can't do
    takes Transformers' own loop, and the report counts it with the reason.
    """
    options = options or DecoderOptions()
    before = decoder_report(model)
    if before is not None:
        if before.options == options:
            return before
        restore_decoder(model)
    for _, part in generating_parts(model):
        driver = Driver(part, options)
        part.__dict__[ATTRIBUTE] = driver
        part.__class__ = generating_class(type(part))
        driver.prepare()
    return decoder_report(model) or DecoderReport(type(model).__name__, options)


def restore_decoder(model: nn.Module) -> nn.Module:
    """Undo `optimize_decoder`: the same classes, and `generate` is Transformers' own. Gives the model."""
    for part in model.modules():
        driver = part.__dict__.pop(ATTRIBUTE, None)
        if isinstance(driver, Driver):
            driver.undo()
        if is_generating(part):
            part.__class__ = original_class(type(part))
    return model


def decoder_report(model: nn.Module) -> DecoderReport | None:
    """What generation of an optimized model is now, None for a plain one."""
    report: DecoderReport | None = None
    for name, part in model.named_modules():
        driver = driver_of(part)
        if driver is None:
            continue
        report = report or DecoderReport(type(model).__name__, driver.options)
        report.parts.append(part_report(name, part, driver))
    return report


def part_report(name: str, part: nn.Module, driver: Driver) -> PartReport:
    """The report of one part."""
    way = driver.way
    spaces = [space for space, _ in driver.workspaces]
    return PartReport(
        name=name,
        kind=type(part).__name__,
        way=way.name if isinstance(way, Way) else None,
        reason=None if isinstance(way, Way) else way,
        notes=way.notes if isinstance(way, Way) else (),
        outcomes=dict(driver.outcomes),
        graphs=sum(len(space.captured) for space in spaces),
        refused=next((space.refused for space in spaces if space.refused), None),
    )


def generating_parts(model: nn.Module) -> list[tuple[str, Any]]:
    """The model and the models in it that generate by Transformers' own `generate`, by name."""
    from transformers import GenerationMixin

    return [
        (name, part)
        for name, part in model.named_modules()
        if isinstance(part, GenerationMixin) and part.can_generate()
    ]
