"""`doctor`: the machine, the packages, every operator and attention kernel, in one page with an answer: healthy or not.

A machine without a GPU is healthy when its CPU path works. It is not when a GPU is there that torch cannot use, when
versions do not fit together, or when an operator does not run or gives wrong numbers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from onegpu.attention.sdpa import explain_sdpa
from onegpu.attention.varlen import VarlenSpec
from onegpu.diagnosis.finding import Finding
from onegpu.diagnosis.machine import look_at_gpus, look_at_system, look_at_versions
from onegpu.diagnosis.measure import measure as measure_gpu
from onegpu.diagnosis.model import look_at_model
from onegpu.diagnosis.operators import look_at_attention, look_at_operators
from onegpu.memory.source import model_config

__all__ = ["Diagnosis", "doctor"]

HEAD_DIM = 64


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Findings by section. `str()` gives the page, `to_dict()` plain values."""

    sections: dict[str, list[Finding]]

    @property
    def problems(self) -> list[Finding]:
        """The findings that make the machine unhealthy."""
        return [finding for findings in self.sections.values() for finding in findings if finding.is_problem]

    @property
    def is_healthy(self) -> bool:
        """Whether there is no problem."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """The sections as plain values, and `healthy`."""
        sections = {title: [asdict(finding) for finding in found] for title, found in self.sections.items()}
        return {"healthy": self.is_healthy, "sections": sections}

    def __str__(self) -> str:
        lines: list[str] = []
        for title, findings in self.sections.items():
            width = max((len(finding.subject) for finding in findings), default=0)
            lines += [title, *(line for finding in findings for line in finding.lines(width)), ""]
        count = len(self.problems)
        verdict = "healthy" if count == 0 else f"not healthy: {count} {'problem' if count == 1 else 'problems'}"
        return "\n".join([*lines, verdict])


def doctor(model: str | None = None, *, revision: str | None = None, measure: bool = False) -> Diagnosis:
    """Look at everything that decides what runs here, and how fast.

    Args:
        model: a folder or `org/name`, of which config.json is read: what its attention gets on this machine.
        revision: of a Hub name.
        measure: also the GPUs' bandwidth and matrix peak.

    Raises:
        NotFoundError, CheckpointError, ConfigError: there is no such model, or its config says too little.
    """
    config = None if model is None else model_config(model, revision)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = torch.device("cuda", torch.cuda.current_device()) if count else torch.device("cpu")
    sections = {
        "machine": [*look_at_system(), *look_at_gpus()],
        "packages": list(look_at_versions()),
        f"operators on {device}": list(look_at_operators(device)),
        f"attention over unpadded tokens on {device}": list(
            look_at_attention(VarlenSpec(device, half(device), HEAD_DIM, lengths_on_host=True))
        ),
        f"scaled_dot_product_attention on {device}, {half_name(device)}, head dim {HEAD_DIM}": look_at_sdpa(device),
    }
    if measure:
        sections["speed"] = list(measured(range(count)))
    if config is not None:
        sections[f"{model} on {device}"] = list(look_at_model(config, device))
    return Diagnosis(sections)


def measured(indices: Iterable[int]) -> Iterable[Finding]:
    """Each GPU's figures, or that there is none."""
    found = [finding for index in indices for finding in measure_gpu(index)]
    return found or [Finding("speed", "note", "there is no GPU to measure")]


def half(device: torch.device) -> torch.dtype:
    """The 16-bit dtype in use on a device."""
    old = device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0)
    return torch.float16 if old else torch.bfloat16


def half_name(device: torch.device) -> str:
    """Its name."""
    return str(half(device)).removeprefix("torch.")


def look_at_sdpa(device: torch.device) -> list[Finding]:
    """Each backend for an ordinary causal call, and the one that torch takes."""
    q = torch.empty(1, 4, 32, HEAD_DIM, device=device, dtype=half(device))
    explanation = explain_sdpa(q, q, q, is_causal=True)
    found = []
    for verdict in explanation.backends:
        if verdict.runs:
            text = "can run" + (", and is taken" if verdict.backend == explanation.chosen else "")
            found.append(Finding(verdict.backend, "ok", text))
        else:
            reason, cure = verdict.reasons[0]
            found.append(Finding(verdict.backend, "note", reason, cure))
    if explanation.chosen is None:
        found.append(Finding("attention", "problem", "torch can run none of them", found[-1].cure))
    return found
