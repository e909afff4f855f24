"""What a model became: formats, bytes, kernels, and what was left alone, with the reason."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from onegpu.errors import UnsupportedError
from onegpu.loading.placement import format_bytes

__all__ = ["Report", "report"]


@dataclass(frozen=True, slots=True)
class Report:
    """The state of one model. `str()` gives the page for people, `to_dict()` the one for machines.

    Bytes are of weights as stored: `quantized_bytes` of those in 4 or 8 bit with their scales, `original_bytes` of the
    same weights in the model's dtype, `total_bytes` of all parameters and buffers. `kept` says why the other matrices
    stayed: (reason, how many, bytes, an example).
    """

    model: str
    device: str
    dtype: str
    formats: dict[str, int]
    num_quantized: int
    original_bytes: int
    quantized_bytes: int
    total_bytes: int
    kept: list[tuple[str, int, int, str]] = field(default_factory=list)
    kernels: dict[str, str] = field(default_factory=dict)
    fast_paths: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{self.model} on {self.device}, {self.dtype}"]
        formats = ", ".join(f"{count} × {name}" for name, count in self.formats.items()) or "nothing quantized"
        lines.append(f"  weights   {format_bytes(self.total_bytes)} in all; {formats}")
        if self.num_quantized:
            share = self.original_bytes / max(self.total_bytes - self.quantized_bytes + self.original_bytes, 1)
            lines.append(
                f"  quantized {format_bytes(self.original_bytes)} -> {format_bytes(self.quantized_bytes)} "
                f"({share:.0%} of the model's bytes in {self.dtype})"
            )
        lines += [f"  kernel    {operator}: {kernel}" for operator, kernel in self.kernels.items()]
        lines += [
            f"  kept      {count} × {reason}, {format_bytes(size)} ({name})" for reason, count, size, name in self.kept
        ]
        lines += [f"  fast path {line}" for line in self.fast_paths]
        lines += [f"  note      {line}" for line in self.warnings]
        return "\n".join(lines)


def report(model: Any) -> Report:
    """What each part of a model is, on which kernels it runs, and what was left alone and why.

    Raises:
        UnsupportedError: not a torch module.
    """
    from onegpu.kernels import kernel_for
    from onegpu.nn import QuantExperts, QuantLinear

    if not isinstance(model, torch.nn.Module):
        raise UnsupportedError(f"report() takes a model; got {type(model).__name__}")
    specs = []
    for module in model.modules():
        if isinstance(module, QuantLinear):
            specs.append(module.spec)
        elif isinstance(module, QuantExperts):
            specs += module.expert_specs.values()
    conversion = getattr(getattr(model, "hf_quantizer", None), "conversion", None)
    device = next(iter(model.parameters()), torch.empty(0)).device
    names = ["linear_8bit" if spec.quant_type == "int8" else "linear_4bit" for spec in specs]
    return Report(
        model=type(model).__name__,
        device=str(device) if getattr(model, "hf_device_map", None) is None else spread(model.hf_device_map),
        dtype=str(getattr(model, "dtype", "")).removeprefix("torch."),
        formats=dict(Counter(spec.quant_type + (" double" if spec.nested else "") for spec in specs)),
        num_quantized=len(specs),
        original_bytes=sum(spec.numel * dtype_bytes(spec.dtype) for spec in specs),
        quantized_bytes=sum(spec.stored_bytes for spec in specs),
        total_bytes=total_bytes(model),
        kept=grouped(conversion.kept) if conversion else [],
        kernels={name: kernel_for(name, device) for name in sorted(set(names))},
        fast_paths=fast_paths(model),
        warnings=[f"skip_modules {name!r} matched no module" for name in conversion.unmatched] if conversion else [],
    )


def spread(device_map: Any) -> str:
    """A device map as "cuda:0 (30 parts), cpu (4 parts)"."""
    counts = Counter(f"cuda:{target}" if isinstance(target, int) else str(target) for target in device_map.values())
    return ", ".join(f"{target} ({count} parts)" for target, count in counts.items())


def dtype_bytes(name: str) -> int:
    """Bytes of one element of the dtype called `name`."""
    return int(getattr(torch, name).itemsize)


def total_bytes(model: torch.nn.Module) -> int:
    """Bytes of all parameters and buffers, shared ones counted once."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def grouped(kept: list[Any]) -> list[tuple[str, int, int, str]]:
    """Kept modules by reason: (reason, how many, bytes together, the first one's name)."""
    groups: dict[str, list[Any]] = {}
    for item in kept:
        groups.setdefault(item.reason, []).append(item)
    return [
        (reason, len(items), sum(item.num_bytes for item in items), items[0].name) for reason, items in groups.items()
    ]


def fast_paths(model: Any) -> list[str]:
    """One line for each part that `optimize` looked at: what it became, or why it stayed."""
    from onegpu.decoder import decoder_report
    from onegpu.encoder.optimize import encoder_report

    encoder, decoder = encoder_report(model), decoder_report(model)
    lines = [] if encoder is None else encoder.lines()
    if decoder is None:
        return lines
    # A pure decoder has no encoder to speak of.
    is_pure = encoder is not None and not encoder.is_optimized and len(decoder.parts) == 1
    return ([] if is_pure else lines) + decoder.lines()
