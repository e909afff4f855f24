"""`optimize_encoder`: take the padding out of a model's encoders; `restore_encoder`: exactly what it was before.

find stacks -> why_not -> install -> prove on a small padded batch -> fuse and prove each part -> report
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from onegpu.encoder.find import find_stacks, reads_first_token, why_not
from onegpu.encoder.fuse import QkvGroup, fused_parts, prove_part
from onegpu.encoder.heads import AnswerCall, is_question_answering
from onegpu.encoder.options import EncoderOptions
from onegpu.encoder.proof import prove_late_embeddings, prove_stack
from onegpu.encoder.stack import Stack
from onegpu.errors import UnsupportedError

__all__ = [
    "EncoderOptions",
    "EncoderReport",
    "StackReport",
    "encoder_report",
    "known_batch",
    "optimize_encoder",
    "restore_encoder",
]

ATTRIBUTE = "_onegpu_encoder"


@dataclass(slots=True)
class StackReport:
    """One layer stack: what was done, or why nothing. `outcomes` counts its forwards by the way they went."""

    name: str
    layers: int
    reason: str | None  # why it was left alone; None where it runs without padding
    proved: bool = False  # compared with the plain model on a padded batch, just now
    fused: dict[str, int] = field(default_factory=dict)
    not_fused: list[str] = field(default_factory=list)
    embeds_late: bool = False  # the padding is left out before the embeddings
    stack: Stack | None = field(default=None, repr=False)

    @property
    def outcomes(self) -> dict[str, int]:
        """How many forwards went which way."""
        return dict(self.stack.outcomes) if self.stack is not None else {}

    @property
    def graphs(self) -> str:
        """How many graphs there are, or why there are none."""
        if self.stack is None:
            return "none"
        return self.stack.graphs.refused or str(len(self.stack.graphs.captured))


@dataclass(slots=True)
class EncoderReport:
    """What `optimize_encoder` did to a model. It stays on the model until `restore_encoder`."""

    model: str
    options: EncoderOptions
    stacks: list[StackReport] = field(default_factory=list)

    @property
    def is_optimized(self) -> bool:
        """Whether any stack runs without padding."""
        return any(stack.reason is None for stack in self.stacks)

    def lines(self) -> list[str]:
        """One sentence per stack."""
        if not self.stacks:
            return [f"{self.model}: no layer stack with attention was found; it runs as before"]
        return [describe(stack) for stack in self.stacks]


def describe(report: StackReport) -> str:
    if report.reason is not None:
        return f"{report.name}: as before, because {report.reason}"
    fused = ", ".join(f"{count} {name}" for name, count in report.fused.items())
    what = f"{report.layers} layers{' and the embeddings' if report.embeds_late else ''} without padding"
    return f"{report.name}: {what}" + (f", fused: {fused}" if fused else "")


def encoder_report(model: nn.Module) -> EncoderReport | None:
    """The report of an optimized model, None for a plain one."""
    report = model.__dict__.get(ATTRIBUTE)
    return report if isinstance(report, EncoderReport) else None


def optimize_encoder(model: nn.Module, options: EncoderOptions | None = None, prove: bool = True) -> EncoderReport:
    """Make the encoders of a Transformers model run without padding, in place.

    Classes, weights, config and state dict stay the plain model's. Outputs keep their shapes; padded positions hold
    zeros where layers end, in `hidden_states` too. Training, attentions asked for, caches, and masks of unknown kinds
    take the plain way by themselves; `outcomes` in the report counts how forwards went. Calling it again gives the
    report there is (with other options: restores first).

    Args:
        model: any Transformers model; its decoders are left alone.
        prove: compare each text stack with the plain model on a small padded batch and keep it only if equal.

    Returns:
        The report; `is_optimized` is False where nothing could be done, and each stack has its reason.
    """
    options = options or EncoderOptions()
    before = encoder_report(model)
    if before is not None:
        if before.options == options:
            return before
        restore_encoder(model)
    report = EncoderReport(type(model).__name__, options)
    for found in find_stacks(model):
        line = StackReport(found.name, len(found.layers), why_not(found))
        report.stacks.append(line)
        if line.reason is not None:
            continue
        unique = list(dict.fromkeys(found.layers))
        stack = Stack(found.name, found.tower, found.owner, unique, options, reads_first_token(model, found.tower))
        stack.install()
        if is_question_answering(model, found.tower):
            stack.add(AnswerCall(model, stack))
        line.stack = stack
        if prove:
            line.proved, line.reason = prove_stack(stack)
        if line.reason is not None:
            stack.remove()
            line.stack = None
            continue
        fuse(stack, line)
        stack.outcomes.clear()
    model.__dict__[ATTRIBUTE] = report
    return report


def restore_encoder(model: nn.Module) -> nn.Module:
    """Undo `optimize_encoder`: the same classes, weights bit for bit, the plain model's outputs. Gives the model."""
    report = model.__dict__.pop(ATTRIBUTE, None)
    if isinstance(report, EncoderReport):
        for line in reversed(report.stacks):
            if line.stack is not None:
                unfuse(line.stack)
                line.stack.remove()
                line.stack = None
    return model


def fuse(stack: Stack, line: StackReport) -> None:
    """Set the fused parts of a stack on a CUDA device, each proved on random input first."""
    first = next(stack.layers[0].parameters(), None)
    if first is None or (first.device.type != "cuda" and not stack.graphs.works_anywhere):
        return
    line.embeds_late = prove_late_embeddings(stack)
    for part in list(fused_parts(stack)):
        if isinstance(part, QkvGroup):
            part.join()
            for call in part.calls:
                call.install()
            name = "QKV products"
        else:
            part.install()
            name = {"NormCall": "residual + LayerNorm", "ActivationCall": "GELU"}[type(part).__name__]
        if prove_part(part, stack):
            stack.fused.append(part)
            line.fused[name] = line.fused.get(name, 0) + 1
        else:
            take_away(part)
            line.not_fused.append(f"{name}: the fused result differs from the plain one")


def take_away(part: Any) -> None:
    """Remove one fused part."""
    if isinstance(part, QkvGroup):
        for call in part.calls:
            call.remove()
        part.split()
    else:
        part.remove()


def unfuse(stack: Stack) -> None:
    """Take the fused parts away; parameters get memory of their own again."""
    for part in reversed(stack.fused):
        take_away(part)
    stack.fused.clear()


def known_batch(model: nn.Module, batch: Any) -> None:
    """Tell an optimized model the next batch, so that it need not ask the device. For a mask of the same shape only.

    Raises:
        UnsupportedError: the model is not optimized.
    """
    report = encoder_report(model)
    if report is None:
        raise UnsupportedError("this model's encoder is not optimized", "call optimize_encoder first")
    for line in report.stacks:
        if line.stack is not None:
            line.stack.hint = batch
