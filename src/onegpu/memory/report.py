"""What `fit` answers: one row for each format, and the command to run."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from onegpu.memory.gpus import Gpu

__all__ = ["FitReport", "FormatFit"]


@dataclass(frozen=True, slots=True)
class FormatFit:
    """One format: bytes of weights, cache, workspace and all of them, whether that fits and how far it goes.

    `fits`, `max_context` and `tokens_per_second` (batch 1) are None where the GPU, or what is asked of it, is unknown.
    `smallest_gpu` is the first of the table, by memory, that would do.
    """

    format: str
    weight_bytes: int
    kv_bytes: int
    workspace_bytes: int
    total_bytes: int
    fits: bool | None
    max_context: int | None
    tokens_per_second: float | None
    smallest_gpu: str | None
    command: str


@dataclass(frozen=True, slots=True)
class FitReport:
    """Whether a model fits. `str()` gives the table, `to_dict()` plain values; `recommended` is a format or None."""

    model: str
    structure: str
    origin: str
    parameters: int
    active_parameters: int
    context: int
    batch: int
    kv_dtype: str
    gpu: Gpu | None
    formats: list[FormatFit]
    recommended: str | None
    notes: list[str] = field(default_factory=list)

    @property
    def fits(self) -> bool | None:
        """Whether any format fits; None without a GPU."""
        return None if self.gpu is None else self.recommended is not None

    def row(self, format: str) -> FormatFit:
        """The row of one format; KeyError without it."""
        return {row.format: row for row in self.formats}[format]

    @property
    def command(self) -> str | None:
        """The command of the recommended format."""
        return None if self.recommended is None else self.row(self.recommended).command

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, ready for JSON."""
        gpu = None if self.gpu is None else asdict(self.gpu) | {"free_bytes": self.gpu.free_bytes}
        return asdict(self) | {"gpu": gpu, "fits": self.fits, "command": self.command}

    def __str__(self) -> str:
        active = "" if self.active_parameters == self.parameters else f", {billions(self.active_parameters)} a token"
        lines = [
            f"{self.model}: {self.structure}, {billions(self.parameters)} parameters{active} ({self.origin})",
            f"context {self.context}, batch {self.batch}, cache in {self.kv_dtype}; {described(self.gpu)}",
            "",
            *table(self),
            "",
        ]
        if self.command is not None:
            lines += [f"run it: {self.command}"]
        elif self.gpu is not None:
            lines += ["no format fits: try a shorter --context, a smaller --batch or a larger --gpu"]
        return "\n".join([*lines, *(f"note: {line}" for line in self.notes)]).rstrip()


def described(gpu: Gpu | None) -> str:
    """A GPU in one phrase."""
    if gpu is None:
        return "no GPU here, so the last column names the smallest one that would do"
    speed = "" if gpu.bandwidth is None else f", {gpu.bandwidth / 1e9:.0f} GB/s"
    return f"{gpu.name}: {gib(gpu.free_bytes)} of {gib(gpu.memory_bytes)} for the model{speed}"


def table(report: FitReport) -> list[str]:
    """The rows, aligned."""
    last = "fits" if report.gpu else "smallest GPU"
    lines = [["format", "weights", "cache", "workspace", "all, GiB", last, "context up to", "tok/s"]]
    for row in report.formats:
        verdict = (row.smallest_gpu or "none known") if row.fits is None else ("yes" if row.fits else "no")
        sizes = [gib(size) for size in (row.weight_bytes, row.kv_bytes, row.workspace_bytes, row.total_bytes)]
        furthest = "-" if row.max_context is None else str(row.max_context)
        speed = "-" if row.tokens_per_second is None or row.fits is False else f"{row.tokens_per_second:.0f}"
        lines.append([row.format, *(size.removesuffix(" GiB") for size in sizes), verdict, furthest, speed])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column in (0, 5) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


def gib(num_bytes: int) -> str:
    """Bytes as "5.66 GiB"."""
    return f"{num_bytes / 2**30:.2f} GiB"


def billions(count: int) -> str:
    """A number of parameters as "8.03 B" or "135 M"."""
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.4g} M"
