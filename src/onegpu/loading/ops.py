"""What happens to one tensor on its way from the file into the model: Transformers' conversion operations, ours.

Transformers reads the checkpoint, renames keys and hands tensors to these; they give back what the module stores.
An error here must stop the load at once, while Transformers collects exceptions and goes on:
`LoadAborted` passes it by.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps

from onegpu.errors import CheckpointError, OneGpuError, UnsupportedError
from onegpu.formats import check_finite, dequantize_absmax, from_tensors_4bit, from_tensors_8bit
from onegpu.nn import QuantExperts, QuantLinear, WeightSpec, quantize_weight
from onegpu.nn.state import meta_state

if TYPE_CHECKING:
    from onegpu.loading.quantizer import OneGpuQuantizer

__all__ = ["DeserializeExperts", "DeserializeLinear", "LoadAborted", "PassThrough", "QuantizeOnLoad"]

INT8_LIMIT = 65504.0  # the largest float16: LLM.int8() quantizes through it


class LoadAborted(BaseException):
    """Carries an error of ours out of Transformers' loading, which would collect an ordinary exception and go on."""

    def __init__(self, error: OneGpuError) -> None:
        super().__init__(str(error))
        self.error = error


def abort_on_error(
    convert: Callable[..., dict[str, Any]],
) -> Callable[..., dict[str, Any]]:
    """Let errors of ours out at once."""

    def guarded(*args: Any, **kwargs: Any) -> dict[str, Any]:
        try:
            return convert(*args, **kwargs)
        except OneGpuError as error:
            raise LoadAborted(error) from error

    return guarded


class SharedOps(ConversionOps):
    """An operation of which there is one.

    Transformers copies a conversion deeply for each tensor it makes: the quantizer and all that it knows of the model
    would go with each.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedOps:
        return self


class PassThrough(SharedOps):
    """Nothing. It is the reverse of reading too: saving writes the stored state through `loading.saving`."""

    def convert(self, input_dict: dict[str, Any], **_: Any) -> dict[str, Any]:
        return input_dict

    @property
    def reverse_op(self) -> ConversionOps:
        return self


class QuantizeOnLoad(SharedOps):
    """A 16-bit weight just read -> codes and scales, on the device it was read to."""

    def __init__(self, quantizer: OneGpuQuantizer) -> None:
        self.hf_quantizer = quantizer

    @abort_on_error
    def convert(self, input_dict: dict[str, Any], *, model: nn.Module, **_: Any) -> dict[str, Any]:
        done: dict[str, Any] = {}
        module: Any
        for full_name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            module_name, _dot, parameter = full_name.rpartition(".")
            module = model.get_submodule(module_name)
            spec = module.spec if isinstance(module, QuantLinear) else module.expert_specs[parameter]
            if isinstance(module, QuantLinear) and module.source_cls.__name__ == "Conv1D":
                weight = weight.T.contiguous()
            if tuple(weight.shape) != spec.shape:
                raise CheckpointError(
                    f"tensor {full_name} has shape {list(weight.shape)} in the checkpoint, expected {list(spec.shape)}",
                    "the checkpoint and its config.json do not belong together",
                )
            check_finite(weight, full_name, INT8_LIMIT if spec.quant_type == "int8" else None)
            device = self.hf_quantizer.device_of(full_name, weight.device)
            state = quantize_weight(weight, spec, scale_search=self.hf_quantizer.quant.scale_search, device=device)
            done.update(name_state(module_name, module, parameter, state))
            if self.hf_quantizer.is_on_disk(full_name):
                # What goes to the disk is not set on the module; it must show the stored shape all the same.
                set_state(module, parameter, meta_state(spec))
        return done

    @property
    def reverse_op(self) -> ConversionOps:
        return PassThrough()


class DeserializeLinear(SharedOps):
    """The tensors that describe one stored linear weight -> codes and scales, checked."""

    def __init__(self, quantizer: OneGpuQuantizer) -> None:
        self.hf_quantizer = quantizer

    @abort_on_error
    def convert(
        self, input_dict: dict[str, Any], *, full_layer_name: str, model: nn.Module, **_: Any
    ) -> dict[str, Any]:
        tensors = {key: value[0] if isinstance(value, list) else value for key, value in input_dict.items()}
        module_name, _dot, parameter = full_layer_name.rpartition(".")
        module = model.get_submodule(module_name)
        if not isinstance(module, QuantLinear) or parameter != "weight":
            if len(tensors) == 1:
                return input_dict
            raise CheckpointError(
                f"the checkpoint holds a quantized tensor {full_layer_name}, which this model has as a plain one",
                "the checkpoint and its config.json do not belong together",
            )
        state = read_state(full_layer_name, tensors, "weight", module.spec)
        names = name_state(module_name, module, "weight", state)
        # Transformers puts the module's prefix before what it finds in the full name.
        return {name.removeprefix(f"{module_name}."): tensor for name, tensor in names.items()}

    @property
    def reverse_op(self) -> ConversionOps:
        return PassThrough()


class DeserializeExperts(SharedOps):
    """Stored tensors of a stacked weight -> its codes and scales.

    `sources` are the patterns of the per-expert weights that make up one stacked weight, in order (gate, then up), or
    the stacked weight's own name. Scales that were double-quantized are kept in float32 here, since each expert had
    its own offset.
    """

    def __init__(self, quantizer: OneGpuQuantizer, sources: tuple[str, ...]) -> None:
        self.hf_quantizer = quantizer
        self.sources = sources

    @abort_on_error
    def convert(
        self, input_dict: dict[str, Any], *, full_layer_name: str, model: nn.Module, **_: Any
    ) -> dict[str, Any]:
        module_name, _dot, parameter = full_layer_name.rpartition(".")
        module = model.get_submodule(module_name)
        assert isinstance(module, QuantExperts)
        spec = module.expert_specs[parameter]
        columns = [self.read_source(full_layer_name, source, input_dict, spec) for source in self.sources]
        counts = {len(column) for column in columns}
        if counts not in ({spec.num_experts}, {1}):
            raise CheckpointError(
                f"{full_layer_name} needs {spec.num_experts} experts; the checkpoint holds {sorted(counts)}",
                "the checkpoint is incomplete; download or save it again",
            )
        merged = {
            name: torch.cat([part[name].reshape(-1) for experts in zip(*columns, strict=True) for part in experts])
            for name in columns[0][0]
        }
        stored = {name: merged[name].view(shape) for name, (shape, _) in spec.tensors().items()}
        return dict(name_state(module_name, module, parameter, stored))

    def read_source(
        self, full_name: str, source: str, input_dict: dict[str, Any], spec: WeightSpec
    ) -> list[dict[str, Tensor]]:
        """The state of each expert's part of the weight that `source` names."""
        values = {key.removeprefix(source): value for key, value in input_dict.items() if key.startswith(source)}
        if spec.quant_type == "int8":
            module = source.removesuffix(".weight")
            values = {
                ("" if key == source else "." + key.rpartition(".")[2]): value
                for key, value in input_dict.items()
                if key == source or key.rpartition(".")[0] == module
            }
        if "" not in values:
            raise CheckpointError(
                f"{full_name} has no tensor {source} in the checkpoint", "the checkpoint is incomplete"
            )
        as_lists = {key: value if isinstance(value, list) else [value] for key, value in values.items()}
        states = []
        for expert in range(len(as_lists[""])):
            tensors = {f"weight{key}": tensors[expert] for key, tensors in as_lists.items() if expert < len(tensors)}
            states.append(read_state(f"{full_name}[{expert}]", tensors, "weight", spec, whole=False))
        return states

    @property
    def reverse_op(self) -> ConversionOps:
        return PassThrough()


def read_state(
    full_name: str, tensors: dict[str, Tensor], key: str, spec: WeightSpec, *, whole: bool = True
) -> dict[str, Tensor]:
    """Checked codes and scales from the tensors beside `key`; with `whole`, of exactly `spec`'s shape."""
    if spec.quant_type == "int8":
        return read_8bit(full_name, tensors, key)
    named = {f"{full_name}{name.removeprefix(key)}": tensor for name, tensor in tensors.items()}
    packed, absmax, state = from_tensors_4bit(full_name, named)
    if whole and state.shape != spec.shape:
        raise CheckpointError(
            f"{full_name} says it holds a weight of shape {list(state.shape)}, the model expects {list(spec.shape)}",
            "the checkpoint and its config.json do not belong together",
        )
    if not whole and state.num_elements % state.blocksize:
        raise UnsupportedError(
            f"{full_name} has {state.num_elements} weights, which are not whole blocks of {state.blocksize}",
            "quantize again from the original 16-bit checkpoint",
        )
    if isinstance(absmax, Tensor):
        scales = {"absmax": absmax}
    elif whole:
        scales = dict(zip(("absmax", "nested_absmax", "nested_code", "nested_offset"), absmax, strict=True))
    else:
        scales = {"absmax": dequantize_absmax(absmax)}
    return {"weight": tensors[key] if whole else packed, **scales}


def read_8bit(full_name: str, tensors: dict[str, Tensor], key: str) -> dict[str, Tensor]:
    """Checked int8 codes and row scales."""
    codes = tensors[key]
    scales = next((tensor for name, tensor in tensors.items() if name.endswith("SCB")), None)
    layout = next((tensor for name, tensor in tensors.items() if name.endswith("weight_format")), None)
    module = full_name.removesuffix(".weight")
    flat = {f"{module}.weight": codes.reshape(-1, codes.shape[-1])}
    if scales is not None:
        flat[f"{module}.SCB"] = scales.reshape(-1)
    if layout is not None:
        flat[f"{module}.weight_format"] = layout
    _, row_stats = from_tensors_8bit(module, flat)
    return {"weight": codes, "row_stats": row_stats.view(codes.shape[:-1])}


def set_state(module: nn.Module, parameter: str, state: dict[str, Tensor]) -> None:
    """Set the stored tensors of one weight on its module."""
    if isinstance(module, QuantExperts):
        module.set_expert_state(parameter, state)
    else:
        assert isinstance(module, QuantLinear)
        module.set_state(state)
    for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
        if tensor.is_meta:
            tensor._is_hf_initialized = True  # type: ignore[attr-defined]  # else Transformers would draw it


def name_state(module_name: str, module: nn.Module, parameter: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The stored tensors under the full names they have in the model; codes as a parameter without gradient."""
    named: dict[str, Tensor] = {}
    for name, tensor in state.items():
        own = module.companion_name(parameter, name) if isinstance(module, QuantExperts) else name
        value = nn.Parameter(tensor, requires_grad=False) if name == "weight" else tensor
        named[f"{module_name}.{own}" if module_name else own] = value
    return named
