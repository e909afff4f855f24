"""`optimize_encoder`: take the padding out of a model's encoders; `restore_encoder`: exactly what it was before.

find stacks -> why_not -> install -> prove on a small padded batch -> fuse and prove each part -> report
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from onegpu.encoder.find import find_stacks, reads_first_token, why_not
from onegpu.encoder.fuse import QkvGroup, fused_parts, prove_part
from onegpu.encoder.heads import AnswerCall, is_question_answering
from onegpu.encoder.options import EncoderOptions
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
# Largest difference allowed in the proof, of the plain result's largest magnitude.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}
INT8_COSINE = 0.98


@dataclass(slots=True)
class StackReport:
    """One layer stack: what was done, or why nothing. `outcomes` counts its forwards by the way they went."""

    name: str
    layers: int
    reason: str | None  # why it was left alone; None where it runs without padding
    proved: bool = False  # compared with the plain model on a padded batch, just now
    fused: dict[str, int] = field(default_factory=dict)
    not_fused: list[str] = field(default_factory=list)
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
    return f"{report.name}: {report.layers} layers without padding" + (f", fused: {fused}" if fused else "")


def encoder_report(model: nn.Module) -> EncoderReport | None:
    """The report of an optimized model, None for a plain one."""
    report = model.__dict__.get(ATTRIBUTE)
    return report if isinstance(report, EncoderReport) else None


def optimize_encoder(model: nn.Module, options: EncoderOptions | None = None, prove: bool = True) -> EncoderReport:
    """Make the encoders of a Transformers model run without padding, in place.

    Classes, weights, config and state dict stay the plain model's. Outputs keep their shapes; padded positions hold
    zeros where the layers end. Training, hidden states or attentions asked for, caches, and masks of unknown kinds
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


def prove_stack(stack: Stack) -> tuple[bool, str | None]:
    """Run the tower on two short rows, one padded, with and without padding: (proved, reason to leave it alone).

    A tower that takes something else than token ids, or that lives on no real device, can't be asked: it is kept on
    the word of the structure alone.
    """
    batch = probe_batch(stack.tower)
    if batch is None:
        return False, None
    training = [module for module in stack.tower.modules() if module.training]
    for module in training:
        module.training = False
    try:
        return compare_ways(stack, batch)
    finally:
        for module in training:
            module.training = True


def compare_ways(stack: Stack, batch: dict[str, Tensor]) -> tuple[bool, str | None]:
    """The tower's outputs on one batch, with padding and without."""
    try:
        stack.enabled = False
        with torch.no_grad():
            plain = floats(stack.tower(**batch))
    except Exception:  # it needs inputs that are not known here
        return False, None
    finally:
        stack.enabled = True
    stack.outcomes.clear()
    try:
        with torch.no_grad():
            mine = floats(stack.tower(**batch))
    except Exception as error:
        return False, f"without padding it failed: {type(error).__name__}: {error}"
    if not any(key.startswith(("direct", "deferred")) for key in stack.outcomes):
        return False, next(iter(stack.outcomes), "plain: its layers were never reached").partition(": ")[2]
    mask = batch["attention_mask"].bool()
    for name, want in plain.items():
        got = mine.get(name)
        if got is None or got.shape != want.shape:
            return False, f"without padding its output {name} has another shape"
        if want.shape[:2] == mask.shape:
            want, got = want[mask], got[mask]
        if not is_same(got, want, has_int8(stack)):
            return False, f"without padding its output {name} differs from the plain model's"
    return True, None


def has_int8(stack: Stack) -> bool:
    """Whether a layer holds int8 weights."""
    return any(t.dtype == torch.int8 for layer in stack.layers for t in (*layer.parameters(), *layer.buffers()))


def is_same(got: Tensor, want: Tensor, int8: bool) -> bool:
    """Whether two results agree. In int8 which columns are outliers depends on every row of a call, padding included,
    so that the plain model too differs from itself by some percent: there the direction of each vector counts."""
    if int8:
        return bool(torch.cosine_similarity(got.float(), want.float(), dim=-1).min() >= INT8_COSINE)
    limit = TOLERANCE.get(want.dtype, 1e-4) * max(float(want.abs().max()), 1e-6)
    return bool((got - want).abs().max() <= limit)


def probe_batch(tower: nn.Module) -> dict[str, Tensor] | None:
    """Ids and mask [2, 8] for a tower that takes token ids; None for any other, and for one with no weights yet."""
    if getattr(tower, "main_input_name", None) != "input_ids":
        return None
    first = next(tower.parameters(), None)
    vocabulary = getattr(getattr(tower, "config", None), "vocab_size", None)
    if first is None or first.is_meta or not isinstance(vocabulary, int) or hasattr(tower, "hf_device_map"):
        return None
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (2, 8), generator=generator)
    padding = getattr(tower.config, "pad_token_id", None)
    if isinstance(padding, int):
        ids[ids == padding] = (padding + 1) % vocabulary
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    if isinstance(padding, int):
        ids[mask == 0] = padding
    model: Any = tower
    embeddings = model.get_input_embeddings()
    device = next(embeddings.parameters()).device if isinstance(embeddings, nn.Module) else first.device
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def floats(output: Any) -> dict[str, Tensor]:
    """The floating tensors of a model's output, by name or place."""
    if isinstance(output, Tensor):
        return {"0": output} if output.is_floating_point() else {}
    items = output.items() if isinstance(output, dict) else enumerate(output)
    return {str(name): v for name, v in items if isinstance(v, Tensor) and v.is_floating_point()}


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
