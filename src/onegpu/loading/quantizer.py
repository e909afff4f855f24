"""Our place in Transformers' loading: a quantizer that plans, converts, quantizes or reads, and cleans up.

Transformers calls it in this order: validate_environment, update_device_map, _process_model_before_weight_loading (the
model is on the meta device; modules are swapped), update_weight_conversions (how keys of the file become tensors of the
model), adjust_max_memory and validate_environment again (the placement is known), get_quantize_ops for each tensor,
_process_model_after_weight_loading.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer, get_keys_to_not_convert
from transformers.utils.quantization_config import QuantizationConfigMixin

from onegpu.config import QuantConfig
from onegpu.errors import CheckpointError, DeviceError
from onegpu.formats import COMPANIONS_4BIT, COMPANIONS_8BIT
from onegpu.loading.checkpoint import open_checkpoint
from onegpu.loading.ops import DeserializeExperts, DeserializeLinear, LoadAborted, PassThrough, QuantizeOnLoad
from onegpu.loading.options import bitsandbytes_config, quant_config
from onegpu.loading.placement import announce_offload, check_fits, device_in, target_in
from onegpu.loading.saving import atomic_class, disk_state, plain_class
from onegpu.nn import Conversion, QuantExperts, QuantLinear, WeightSpec, convert, dtype_named, plan_conversion
from onegpu.nn.experts import plain_experts_class

__all__ = ["METHOD", "LoadConfig", "OneGpuQuantizer"]

METHOD = "onegpu"


class LoadConfig(QuantizationConfigMixin):
    """What `from_pretrained` hands through Transformers to the quantizer; never written to disk.

    `quant` may be the fields of a `QuantConfig`, as a config object can carry them. `may_use_disk` says that an offload
    folder was given.
    """

    def __init__(self, quant: QuantConfig | Mapping[str, Any], *, may_use_disk: bool = False, **_: Any) -> None:
        self.quant_method = METHOD
        self.quant = quant if isinstance(quant, QuantConfig) else QuantConfig.from_dict(quant)
        self.may_use_disk = may_use_disk


class OneGpuQuantizer(HfQuantizer):
    """Loads into our modules, from 16-bit checkpoints by quantizing and from bitsandbytes' by reading."""

    requires_calibration = False

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        if isinstance(quantization_config, LoadConfig):
            quant: QuantConfig | None = quantization_config.quant
            self.may_use_disk = quantization_config.may_use_disk
        else:
            quant, self.may_use_disk = quant_config(quantization_config), True
        assert quant is not None, "from_pretrained resolves the config before it comes here"
        self.quant: QuantConfig = quant
        self.conversion = Conversion(quant)
        self.dtype = torch.bfloat16
        self.device_map: Mapping[str, Any] | None = None
        self.max_memory: Mapping[Any, Any] | None = None
        self.bytes_on: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.expert_sources: dict[str, tuple[str, ...]] = {}

    # What we can do

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    # Before loading

    def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
        if not isinstance(device_map, Mapping):
            return
        self.device_map = device_map
        if self.bytes_on:
            check_fits(device_map, self.max_memory, self.bytes_on[""], may_use_disk=self.may_use_disk)
            announce_offload(device_map, self.bytes_on)

    def update_device_map(self, device_map: Any) -> Any:
        if device_map is None:
            device_map = {"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"}
        self.device_map = device_map if isinstance(device_map, Mapping) else None
        return device_map

    def adjust_max_memory(self, max_memory: dict[Any, Any]) -> dict[Any, Any]:
        self.max_memory = dict(max_memory)
        return max_memory

    def preprocess_model(self, model: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> None:
        self.dtype = dtype or self.dtype
        super().preprocess_model(model, dtype=dtype, **kwargs)

    @property
    def compute_dtype(self) -> torch.dtype:
        """What the products are computed in: what the config says, else the model's dtype."""
        return dtype_named(self.quant.compute_dtype) if self.quant.compute_dtype else self.dtype

    def _process_model_before_weight_loading(
        self,
        model: nn.Module,
        checkpoint_files: Iterable[str] | None = None,
        **_: Any,
    ) -> nn.Module:
        files = [file for file in checkpoint_files or [] if str(file).endswith(".safetensors")]
        checkpoint = open_checkpoint(files)
        found = self.locate(model, checkpoint.quantized_specs(), checkpoint.tensors) if self.pre_quantized else None
        self.conversion = plan_conversion(model, self.quant, self.always_kept(model), dtype=self.dtype, found=found)
        if self.pre_quantized and not self.conversion.specs:
            raise CheckpointError(
                "config.json says the checkpoint is quantized, but no tensor in it is",
                "the quantization tensors were lost when it was saved; quantize again from the original checkpoint",
            )
        convert(model, self.conversion, compute_dtype=self.compute_dtype, packed=self.pre_quantized)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        self.bytes_on = self.count_bytes(model)
        return model

    def always_kept(self, model: Any) -> dict[str, str]:
        """Modules that stay in 16 bit whatever the user says, with the reason."""
        kept = dict.fromkeys(get_keys_to_not_convert(model), "output head, tied embedding or last layer")
        for name in model._keep_in_fp32_modules or ():
            kept[name] = "kept in float32 by its model"
        for name in getattr(model, "_keep_in_fp32_modules_strict", None) or ():
            kept[name] = "kept in float32 by its model"
        return {name.removesuffix(".weight"): reason for name, reason in kept.items()}

    def locate(
        self, model: Any, specs: Iterable[tuple[str, WeightSpec]], names: Iterable[str]
    ) -> dict[str, WeightSpec | None]:
        """From names in the file to modules of the model: how each is stored, None for plainly."""
        from transformers.conversion_mapping import get_model_conversion_mapping

        mapping = get_model_conversion_mapping(model, None, None)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        state = model.state_dict()
        stored = dict(specs)
        companions = (*COMPANIONS_4BIT, *COMPANIONS_8BIT)
        found: dict[str, WeightSpec | None] = {}
        for name in names:
            if name.endswith(companions):
                continue
            key, _ = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
            if key not in state:
                continue
            spec, shape = stored.get(name), tuple(state[key].shape)
            if spec is not None and len(shape) == 3:
                # One expert's tensor stands for all: they are merged, with their scales in float32.
                spec = WeightSpec(spec.quant_type, shape, spec.dtype, spec.blocksize)
            found[key if len(shape) == 3 else key.removesuffix(".weight")] = spec
        return found

    def count_bytes(self, model: nn.Module) -> dict[str, int]:
        """Bytes of every module, "" for the whole model, as they will be stored."""
        tied = set(getattr(model, "all_tied_weights_keys", {}) or ())
        counted: dict[str, int] = {}
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name in tied:
                continue
            size = int(tensor.numel() * self.param_element_size(model, name, tensor))
            parts = name.split(".")
            for length in range(len(parts) + 1):
                key = ".".join(parts[:length])
                counted[key] = counted.get(key, 0) + size
        return counted

    # While loading

    def param_needs_quantization(self, model: nn.Module, param_name: str, **_: Any) -> bool:
        return param_name in self.conversion.specs

    def param_element_size(self, model: nn.Module, param_name: str, param: torch.Tensor) -> float:
        spec = self.conversion.specs.get(param_name)
        if spec is None or not param.numel():
            return param.element_size()
        shape, dtype = spec.tensors()["weight"]
        return shape[0] * (shape[-1] if len(shape) < 3 else shape[1] * shape[2]) * dtype.itemsize / param.numel()

    def device_of(self, param_name: str, default: torch.device) -> torch.device:
        """Where the placement puts a parameter."""
        return device_in(self.device_map, param_name, default)

    def is_on_disk(self, param_name: str) -> bool:
        """Whether the placement puts a parameter on the disk."""
        return bool(target_in(self.device_map, param_name) == "disk")

    def get_quantize_ops(self) -> ConversionOps:
        return QuantizeOnLoad(self)

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """In a quantized checkpoint, cast what is plain and nothing else: stored tensors keep their dtype.

        The dtype that comes is the one of the model's tensor, which for codes and what lies beside them is an integer.
        """
        is_float = str(param.get_dtype()).startswith(("F", "BF")) if hasattr(param, "get_dtype") else False
        plain = dtype is not None and dtype.is_floating_point and self.quant.quant_storage in ("uint8", "int8")
        return dtype if is_float and plain else None

    def get_weight_conversions(self) -> list[WeightConverter]:
        if not self.pre_quantized:
            return []
        beside = COMPANIONS_8BIT if self.quant.quant_type == "int8" else COMPANIONS_4BIT
        # For 8 bit the scales lie beside the weight (`q_proj.SCB`), for 4 bit under it (`q_proj.weight.absmax`).
        names = [name.lstrip(".") if self.quant.quant_type == "int8" else f"weight{name}" for name in beside]
        return [WeightConverter([*names, "weight"], "weight", [DeserializeLinear(self)])]

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        stacked = {name for name, spec in self.conversion.specs.items() if len(spec.shape) == 3}
        updated = []
        for entry in weight_conversions:
            targets = self.expert_targets(entry, stacked)
            for target in targets:
                self.expert_sources[target] = per_expert_names(entry, target)
            if targets and self.pre_quantized:
                updated.append(self.reading_experts(entry))
            else:
                if targets:
                    # Merge a layer's experts on the CPU; quantizing then takes them to the device one by one.
                    entry.force_cpu = True
                updated.append(entry)
        if self.pre_quantized:
            updated += [
                self.reading_stacked(suffix) for suffix in sorted({".".join(n.split(".")[-2:]) for n in stacked})
            ]
        if self.may_use_disk and not self.pre_quantized:
            # Transformers writes a tensor to the offload folder anew only if a conversion made it; else it would read
            # the 16-bit one from the checkpoint in place of ours.
            updated.append(WeightConverter("weight", "weight", [PassThrough()]))
        return updated + self.get_weight_conversions()

    def expert_targets(self, entry: Any, stacked: Iterable[str]) -> list[str]:
        """The quantized stacked weights that a conversion makes out of one tensor per expert."""
        if not isinstance(entry, WeightConverter) or not all(
            "*" in source for source in entry._original_source_patterns
        ):
            return []
        target = plain_text(entry._original_target_patterns[0])
        return [name for name in stacked if name.endswith(target)]

    def reading_experts(self, entry: Any) -> WeightConverter:
        """The conversion of one tensor per expert, for experts that are stored quantized."""
        sources = tuple(entry._original_source_patterns)
        op = DeserializeExperts(self, sources)
        names = [name for source in sources for name in (*companion_patterns(source, self.quant.quant_type), source)]
        names.sort(key=len, reverse=True)
        made = WeightConverter(names, list(entry._original_target_patterns), [op])
        made.scope_prefix, made.base_model_prefix = entry.scope_prefix, entry.base_model_prefix
        return made

    def reading_stacked(self, suffix: str) -> WeightConverter:
        """The conversion of a stacked weight that is stored as one tensor."""
        beside = COMPANIONS_8BIT if self.quant.quant_type == "int8" else COMPANIONS_4BIT
        names = [*(f"{suffix}{name}" for name in beside), suffix]
        return WeightConverter(names, suffix, [DeserializeExperts(self, (suffix,))])

    # After loading

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        self.give_back_missing(model)
        self.check_shapes(model)
        quantized = [name.removesuffix(".weight") for name in self.conversion.specs]
        model._weight_conversions = [
            entry
            for entry in getattr(model, "_weight_conversions", None) or []
            if not isinstance(entry, WeightConverter) or not touches(entry, quantized)
        ]
        skip = [kept.name.removesuffix(".weight") for kept in self.conversion.kept]
        public = bitsandbytes_config(self.quant, skip, self.compute_dtype)
        self.quantization_config = model.config.quantization_config = public
        model.quantization_method = METHOD
        model.__class__ = atomic_class(type(model))
        model.register_forward_pre_hook(check_input_device, with_kwargs=True)
        return model

    def give_back_missing(self, model: nn.Module) -> None:
        """A layer that the checkpoint lacks was drawn at random: it stays plain, so that it can be trained."""
        for name, spec in list(self.conversion.specs.items()):
            module_name, _, parameter = name.rpartition(".")
            module = model.get_submodule(module_name)
            weight = getattr(module, parameter)
            if tuple(weight.shape) == spec.tensors()["weight"][0] and weight.dtype == spec.tensors()["weight"][1]:
                continue
            if isinstance(module, QuantLinear) and weight.is_floating_point() and not self.pre_quantized:
                model.set_submodule(module_name, plain_linear(module, self.dtype, weight.detach()))
                self.conversion.give_back(name, "not in the checkpoint")
                self.shapes.pop(name, None)

    def check_shapes(self, model: nn.Module) -> None:
        """Every tensor has the shape the model was built with (quantized ones: the stored shape)."""
        for name, tensor in model.state_dict().items():
            spec = self.conversion.specs.get(name)
            expected = spec.tensors()["weight"][0] if spec else self.shapes.get(name)
            if expected is not None and tuple(tensor.shape) != expected:
                raise LoadAborted(
                    CheckpointError(
                        f"tensor {name} has shape {list(tensor.shape)} in the checkpoint, expected {list(expected)}",
                        "the checkpoint and its config.json do not belong together",
                    )
                )

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        return disk_state(model, self.expert_sources), {}

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        target = dtype_named(dtype) if isinstance(dtype, str) else dtype or self.dtype
        for name, module in list(model.named_modules()):
            if isinstance(module, QuantLinear):
                plain = plain_linear(module, target)
                move_hook(module, plain)
                model.set_submodule(name, plain)
            elif isinstance(module, QuantExperts):
                dequantize_experts_in_place(module, target)
        model.__class__ = plain_class(type(model))
        return model


def companion_patterns(source: str, quant_type: str) -> list[str]:
    """Patterns of what is stored beside one expert's weight."""
    if quant_type == "int8":
        return [source.removesuffix(".weight") + name for name in COMPANIONS_8BIT]
    return [source + name for name in COMPANIONS_4BIT]


def plain_text(pattern: str) -> str:
    """A conversion's pattern without the marks of a regular expression."""
    return pattern.replace("\\", "").removeprefix("^").removesuffix("$")


def per_expert_names(entry: Any, target: str) -> tuple[str, ...]:
    """Names of the per-expert weights that make up the stacked weight `target`, with "{expert}" for the number."""
    prefix = target.removesuffix(plain_text(entry._original_target_patterns[0]))
    return tuple(prefix + plain_text(source).replace("*", "{expert}") for source in entry._original_source_patterns)


def touches(entry: WeightConverter, quantized: Iterable[str]) -> bool:
    """Whether a conversion has to do with quantized weights, so that saving must not reverse it."""
    if any(isinstance(op, (DeserializeLinear, DeserializeExperts, PassThrough)) for op in entry.operations):
        return True
    targets = [plain_text(pattern).removesuffix(".weight") for pattern in entry._original_target_patterns]
    return any(target in name for target in targets for name in quantized)


def plain_linear(module: QuantLinear, dtype: torch.dtype, weight: torch.Tensor | None = None) -> nn.Module:
    """The linear layer that a quantized one replaced, with the dequantized weight or the one given."""
    plain: Any
    with torch.device("meta"):
        if issubclass(module.source_cls, Conv1D):
            plain = Conv1D(module.out_features, module.in_features)
        else:
            plain = module.source_cls(module.in_features, module.out_features, bias=module.bias is not None)
    if weight is None:
        weight = module.dequantize(dtype)
        weight = weight.T.contiguous() if isinstance(plain, Conv1D) else weight
    plain.weight = nn.Parameter(weight)
    if module.bias is not None:
        plain.bias = nn.Parameter(module.bias.detach().to(dtype))
    return plain.train(module.training)


def dequantize_experts_in_place(module: QuantExperts, dtype: torch.dtype) -> None:
    """Give an experts module its plain class and weights back."""
    weights = {name: module.dequantize_experts(name, dtype) for name in module.expert_specs}
    for name, spec in module.expert_specs.items():
        for companion in spec.companions:
            del module._buffers[module.companion_name(name, companion)]
    del module.expert_specs, module.compute_dtype
    module.__class__ = plain_experts_class(type(module))
    for name, weight in weights.items():
        setattr(module, name, nn.Parameter(weight, requires_grad=False))


def move_hook(old: nn.Module, new: nn.Module) -> None:
    """Keep accelerate's hook of a module that is replaced."""
    hook = getattr(old, "_hf_hook", None)
    if hook is not None:
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(new, hook)


def check_input_device(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Inputs on another device than the model are an error with words, not a failure deep inside."""
    if getattr(model, "hf_device_map", None) is not None:
        return  # accelerate's hooks move the inputs
    weight = next(model.parameters())
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor) and value.device != weight.device:
            raise wrong_device(value, weight)


def wrong_device(value: torch.Tensor, weight: torch.Tensor) -> DeviceError:
    """The error for an input on the wrong device."""
    return DeviceError(
        f"the model is on {weight.device}, an input is on {value.device}",
        "move the inputs: inputs = inputs.to(model.device)",
    )


def is_bitsandbytes(config: Any) -> bool:
    """Whether a model's quantization_config describes bitsandbytes' formats."""
    if isinstance(config, BitsAndBytesConfig):
        return True
    if not isinstance(config, Mapping):
        return False
    method = config.get("quant_method")
    return method == "bitsandbytes" or (
        method is None and bool(config.get("load_in_4bit") or config.get("load_in_8bit"))
    )
