"""A decoder of any size with random weights, made where it will run, one layer after another.

The model is built without memory; then each module gets its own. A weight that will be quantized is drawn in 16 bit,
quantized and let go before the next is drawn, so that a GPU holds the finished model and one matrix, never the 16-bit
model. The draws are those of Transformers' own initialization (normal, the config's range), so that activations stay
finite in any depth.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from onegpu.config import QuantConfig
from onegpu.errors import ConfigError
from onegpu.memory.shapes import SHAPES
from onegpu.nn import QuantExperts, QuantLinear
from onegpu.nn.state import WeightSpec, quantize_weight

__all__ = ["named_config", "random_model"]

SEED = 0
RANGE = 0.02


def named_config(name: str) -> Any:
    """The Transformers config of a known shape, or of a folder with a config.json.

    Raises:
        ConfigError: neither, or a config that Transformers does not know.
    """
    from transformers import AutoConfig

    if name in SHAPES:
        return from_fields(SHAPES[name])
    file = Path(name).expanduser() / "config.json"
    if not file.is_file():
        raise ConfigError(
            f"--random: no known shape and no folder with a config.json is called {name!r}",
            f"known are {', '.join(SHAPES)}",
        )
    try:
        return AutoConfig.from_pretrained(str(file.parent))
    except (OSError, ValueError, json.JSONDecodeError) as error:
        raise ConfigError(f"{file} cannot be read: {str(error).splitlines()[0]}") from error


def from_fields(fields: Mapping[str, Any]) -> Any:
    """A config from the fields of a config.json."""
    from transformers import AutoConfig

    return type(AutoConfig.for_model(fields["model_type"])).from_dict(dict(fields))


def random_model(
    config: Any, quant: QuantConfig | None, device: torch.device, dtype: torch.dtype, *, rival: bool = False
) -> Any:
    """A model of `config` in `dtype`, its matrices quantized as `quant` says, in eval mode on `device`.

    With `rival` the quantized layers are bitsandbytes' own, which must be installed.
    """
    from transformers import AutoModelForCausalLM

    from onegpu.loading import OneGpuQuantizer

    torch.manual_seed(SEED)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
    if quant is None:
        fill(model, device, dtype)
    elif rival:
        quantizer = OneGpuQuantizer(quant)
        quantizer.dtype = dtype
        quantizer._process_model_before_weight_loading(model)
        for name, spec in quantizer.conversion.specs.items():
            replace_by_rival(model, name.removesuffix(".weight"), spec, quant, device, dtype)
        fill(model, device, dtype)
    else:
        quantizer = OneGpuQuantizer(quant)
        quantizer.dtype = dtype
        quantizer._process_model_before_weight_loading(model)
        fill(model, device, dtype, quant)
        model.hf_quantizer = quantizer
        quantizer._process_model_after_weight_loading(model)
    model.tie_weights()
    return model.eval()


def fill(model: Any, device: torch.device, dtype: torch.dtype, quant: QuantConfig | None = None) -> None:
    """Give memory and values to every module that has none."""
    search = quant is not None and quant.scale_search
    spread = float(getattr(model.config, "initializer_range", RANGE) or RANGE)
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            weight = torch.randn(module.spec.shape, dtype=dtype, device=device) * spread
            module.set_state(quantize_weight(weight, module.spec, scale_search=search))
            if module.bias is not None:
                module.bias = nn.Parameter(torch.zeros(module.out_features, dtype=dtype, device=device))
        elif isinstance(module, QuantExperts):
            fill_experts(module, device, dtype, spread, search)
        elif any(tensor.is_meta for tensor in own_tensors(module)):
            own = {f"{name}.{parameter}" for parameter, _ in module.named_parameters(recurse=False)}
            if own and own <= tied:
                continue  # they will be another module's
            module.to_empty(device=device, recurse=False)
            model._init_weights(module)
        elif own_tensors(module):
            module.to(device)


def fill_experts(module: Any, device: torch.device, dtype: torch.dtype, spread: float, search: bool) -> None:
    """Draw and quantize the stacked weights of one layer."""
    for parameter, spec in module.expert_specs.items():
        weight = torch.randn(spec.shape, dtype=dtype, device=device) * spread
        module.set_expert_state(parameter, quantize_weight(weight, spec, scale_search=search))
    for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
        if tensor.is_meta:
            setattr(module, name, nn.Parameter(torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)))


def own_tensors(module: nn.Module) -> list[torch.Tensor]:
    """Parameters and buffers that are the module's own."""
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]


def replace_by_rival(
    model: nn.Module, name: str, spec: WeightSpec, quant: QuantConfig, device: torch.device, dtype: torch.dtype
) -> None:
    """Put bitsandbytes' layer, with random weights, where one of ours was planned.

    Raises:
        ConfigError: stacked experts, which bitsandbytes does not quantize.
    """
    if len(spec.shape) != 2:
        raise ConfigError(f"bitsandbytes has no stacked experts, and {name} holds some", "leave --peers out")
    package = import_module("bitsandbytes").nn
    planned: Any = model.get_submodule(name)
    N, K = spec.shape
    has_bias = planned.bias is not None
    weight = torch.randn(N, K, dtype=dtype, device=device) * RANGE
    layer: Any
    with torch.device("meta"):
        if quant.quant_type == "int8":
            layer = package.Linear8bitLt(K, N, bias=has_bias, has_fp16_weights=False, threshold=quant.threshold)
        else:
            layer = package.Linear4bit(
                K, N, bias=has_bias, compute_dtype=dtype, compress_statistics=spec.nested, quant_type=spec.quant_type
            )
    if quant.quant_type == "int8":
        # It quantizes when it leaves the CPU, or stays there.
        layer.weight = package.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False).to(device)
    else:
        layer.weight = package.Params4bit(
            weight,
            requires_grad=False,
            quant_type=spec.quant_type,
            blocksize=spec.blocksize,
            compress_statistics=spec.nested,
            module=layer,
        ).to(device)
    if has_bias:
        layer.bias = nn.Parameter(torch.zeros(N, dtype=dtype, device=device))
    model.set_submodule(name, layer)
