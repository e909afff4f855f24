"""Deciding which modules of a model are quantized, doing it on the meta device, and remembering why the rest was not.

plan_conversion   model, config, reasons to skip  ->  Conversion (what becomes what; what stays, and why)
convert           the model's modules replaced as the plan says; weights still to come
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from onegpu.config import QuantConfig
from onegpu.errors import CheckpointError
from onegpu.nn.experts import expert_parameters, quantize_experts_module
from onegpu.nn.linear import QuantLinear, QuantLinear4bit, QuantLinear8bit
from onegpu.nn.state import WeightSpec, dtype_named

__all__ = ["Conversion", "Kept", "convert", "linear_shape", "matches", "plan_conversion"]

# Subclasses of nn.Linear whose forward is x @ weight.T + bias and nothing else, known by the name of their class.
PLAIN_LINEAR_SUBCLASSES = ("FalconLinear",)


@dataclass(frozen=True, slots=True)
class Kept:
    """A module that stays as it was: its name, the reason as a phrase, and the bytes of its weights."""

    name: str
    reason: str
    num_bytes: int


@dataclass(slots=True)
class Conversion:
    """What a model's weights become.

    `specs` has one entry for each quantized weight, by the full name of the parameter; `kept` every other module that
    holds a matrix, with its reason; `unmatched` the names to skip that no module answered to.
    """

    config: QuantConfig
    specs: dict[str, WeightSpec] = field(default_factory=dict)
    kept: list[Kept] = field(default_factory=list)
    unmatched: list[str] = field(default_factory=list)

    def give_back(self, name: str, reason: str) -> None:
        """Take a weight off the plan: it stays plain after all."""
        spec = self.specs.pop(name)
        self.kept.append(Kept(name, reason, spec.numel * dtype_named(spec.dtype).itemsize))


def matches(name: str, pattern: str) -> bool:
    """Whether a module's dotted name answers to a pattern: whole components, anywhere in it; `*` is a wildcard.

    "lm_head" answers to "lm_head"; "model.layers.1.mlp.up_proj" to "layers.1", "up_proj" and "layers.*.mlp", but not
    to "layers.11" nor "proj".
    """
    parts, wanted = name.split("."), pattern.split(".")
    return any(
        all(fnmatchcase(part, want) for part, want in zip(parts[start:], wanted, strict=False))
        for start in range(len(parts) - len(wanted) + 1)
    )


def linear_shape(module: Any) -> tuple[int, int] | None:
    """(out_features, in_features) of a module that is a plain linear layer, None for any other.

    Transformers' `Conv1D` (GPT-2) holds its weight transposed, [in, out].
    """
    cls = type(module)
    if cls is nn.Linear or (isinstance(module, nn.Linear) and cls.__name__ in PLAIN_LINEAR_SUBCLASSES):
        return int(module.out_features), int(module.in_features)
    weight = getattr(module, "weight", None)
    if cls.__name__ == "Conv1D" and isinstance(weight, nn.Parameter):
        rows, columns = weight.shape
        return int(columns), int(rows)
    return None


def plan_conversion(
    model: nn.Module,
    config: QuantConfig,
    skip: Mapping[str, str],
    *,
    dtype: torch.dtype,
    found: Mapping[str, WeightSpec | None] | None = None,
) -> Conversion:
    """Decide for each matrix of the model whether it is quantized.

    Args:
        model: on the meta device or not; not changed.
        config: how; its `skip_modules` are added to `skip`.
        skip: pattern (see `matches`) -> the reason as a phrase.
        dtype: what the weights are in when they are quantized.
        found: for a quantized checkpoint, module name -> how its weight is stored there, None for plainly;
            modules that are not in it follow the rules.
    """
    plan = Conversion(config)
    patterns = {**dict.fromkeys(config.skip_modules, "named in skip_modules"), **skip}
    answered: set[str] = set()
    for name, module in model.named_modules():
        shape = linear_shape(module)
        stacked = {} if shape else expert_parameters(module)
        if not shape and not stacked:
            continue
        hits = [pattern for pattern in patterns if matches(name, pattern)]
        answered.update(hits)
        weights = {"weight": tuple(shape)} if shape else {key: tuple(value.shape) for key, value in stacked.items()}
        for parameter, weight_shape in weights.items():
            full_name = f"{name}.{parameter}" if name else parameter
            source_dtype = getattr(module, parameter).dtype
            in_file = (found or {}).get(name if shape else full_name, ...)
            spec = WeightSpec.of(config, weight_shape, dtype)
            reason = refusal(spec, source_dtype, patterns[hits[0]] if hits else None)
            if isinstance(in_file, WeightSpec):
                check_stored_shape(full_name, in_file, spec)
                plan.specs[full_name] = in_file
            elif in_file is None:
                plan.kept.append(Kept(full_name, "not quantized in the checkpoint", spec.numel * dtype.itemsize))
            elif reason:
                plan.kept.append(Kept(full_name, reason, spec.numel * dtype.itemsize))
            else:
                plan.specs[full_name] = spec
    plan.unmatched = [pattern for pattern in config.skip_modules if pattern not in answered]
    return plan


def check_stored_shape(name: str, stored: WeightSpec, expected: WeightSpec) -> None:
    """Refuse a stored weight whose description does not fit the model."""
    if stored.shape != expected.shape:
        raise CheckpointError(
            f"{name} says it holds a weight of shape {list(stored.shape)}, the model expects {list(expected.shape)}",
            "the checkpoint and its config.json do not belong together",
        )


def refusal(spec: WeightSpec, source_dtype: torch.dtype, skip_reason: str | None) -> str | None:
    """Why a weight is not quantized, or None."""
    if skip_reason:
        return skip_reason
    if not source_dtype.is_floating_point:
        return f"stored as {source_dtype}"
    if spec.numel == 0:
        return "empty"
    if spec.quant_type == "int8":
        return None
    per_expert = spec.numel // spec.num_experts
    if spec.num_experts > 1 and per_expert % spec.blocksize:
        return f"an expert's {per_expert} weights are not whole blocks of {spec.blocksize}"
    storage = dtype_named(spec.quant_storage)
    if ((spec.numel + 1) // 2) % storage.itemsize:
        return f"its {(spec.numel + 1) // 2} packed bytes are not whole {spec.quant_storage} elements"
    return None


def convert(model: nn.Module, plan: Conversion, *, compute_dtype: torch.dtype | None, packed: bool) -> None:
    """Replace the modules named in `plan`, on the meta device.

    With `packed`, weights take the stored shape at once, for a checkpoint that is quantized already; without, they
    keep their plain shape until loading quantizes them.
    """
    experts: dict[str, dict[str, WeightSpec]] = {}
    for full_name, spec in plan.specs.items():
        module_name, _, parameter = full_name.rpartition(".")
        module: Any = model.get_submodule(module_name)
        if linear_shape(module) is None:
            experts.setdefault(module_name, {})[parameter] = spec
            continue
        layer = quant_linear_for(module, spec, plan.config, compute_dtype)
        if not packed:
            layer.weight = nn.Parameter(torch.empty_like(module.weight, device="meta"), requires_grad=False)
        model.set_submodule(module_name, layer)
    for module_name, specs in experts.items():
        quantize_experts_module(model.get_submodule(module_name), specs, compute_dtype, packed=packed)


def quant_linear_for(
    module: nn.Module, spec: WeightSpec, config: QuantConfig, compute_dtype: torch.dtype | None
) -> QuantLinear:
    """An empty quantized layer in place of a linear one: the same features, bias and mode."""
    bias = getattr(module, "bias", None)
    options: dict[str, Any] = {
        "bias": bias is not None,
        "bias_dtype": None if bias is None else bias.dtype,
        "compute_dtype": compute_dtype,
        "source_cls": type(module),
    }
    layer: QuantLinear
    if spec.quant_type == "int8":
        layer = QuantLinear8bit(spec, threshold=config.threshold, **options)
    else:
        layer = QuantLinear4bit(spec, **options)
    layer.train(module.training)
    return layer
