"""Mixture-of-experts layers whose stacked 3-D weights are stored in 4 or 8 bit.

Transformers 5 keeps the experts of a layer as parameters of one module ([experts, rows, columns]) and routes tokens in
that module's forward. Here the module keeps its class, through a subclass made for it, and its parameters become codes
and scales under the same names (`gate_up_proj`, `gate_up_proj_absmax`, ...).

The host never learns which experts the tokens chose, so that a CUDA graph can hold the layer:

    on a GPU       the chosen experts' codes are read where they are, whatever the number of tokens, once that has been
                   seen to give what gathering them gives
    few tokens     elsewhere, or where gradients are needed: the experts they chose are gathered as codes, dequantized
                   and multiplied
    else           also for a structure we do not know: the layer's experts are dequantized for the length of the call
                   and the module's own forward runs on them
"""

from __future__ import annotations

import copyreg
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from onegpu.formats import dequantize_absmax
from onegpu.kernels import why_not_triton
from onegpu.kernels.experts_ops import experts_4bit, experts_8bit, why_not_experts
from onegpu.nn.state import (
    NESTED,
    WeightSpec,
    apply_as_bytes,
    dequantize_weight,
    dtype_named,
    hidden,
    meta_state,
    nested_of,
)

__all__ = ["QuantExperts", "expert_parameters", "plain_experts_class", "quantize_experts_module"]

# Several roundings to bfloat16, of the largest value; and enough tokens for the way of many.
PROOF_TOLERANCE = 3e-2
PROOF_COPIES = 64


def expert_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The stacked weights of an experts module by name; empty when it is not one.

    A stacked weight is a floating 3-D parameter held by the module itself. One such parameter alone can be many
    things (a convolution, a position table); two with the same leading dimension are taken for experts, or one when
    the class says so by its name.
    """
    found = {
        name: parameter
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.ndim == 3 and parameter.is_floating_point()
    }
    if not found or isinstance(module, (nn.Conv1d, nn.MultiheadAttention)):
        return {}
    same_count = len({parameter.shape[0] for parameter in found.values()}) == 1
    named_so = "expert" in type(module).__name__.lower()
    return found if same_count and named_so and min(p.shape[0] for p in found.values()) > 1 else {}


class QuantExperts(nn.Module):
    """What the made subclasses share: state under the parameters' own names, and a forward over it."""

    expert_specs: dict[str, WeightSpec]
    compute_dtype: torch.dtype | None
    _apply_gate: Callable[[Tensor], Tensor]

    def companion_name(self, parameter: str, companion: str) -> str:
        """Where a tensor of `WeightSpec.tensors()` lives on this module."""
        return parameter if companion == "weight" else f"{parameter}_{companion}"

    def expert_state(self, parameter: str) -> dict[str, Tensor]:
        """The stored tensors of one stacked weight, by the names of `WeightSpec.tensors()`."""
        names = ("weight", *self.expert_specs[parameter].companions)
        return {name: getattr(self, self.companion_name(parameter, name)) for name in names}

    def set_expert_state(self, parameter: str, state: dict[str, Tensor]) -> None:
        """Take the stored tensors of one stacked weight as they are."""
        for name, tensor in state.items():
            value = nn.Parameter(tensor, requires_grad=False) if name == "weight" else tensor
            setattr(self, self.companion_name(parameter, name), value)

    def dequantize_experts(self, parameter: str, dtype: torch.dtype | None = None) -> Tensor:
        """One stacked weight [experts, rows, columns] in `dtype`, by default the one it had."""
        spec = self.expert_specs[parameter]
        return dequantize_weight(self.expert_state(parameter), spec, dtype or dtype_named(spec.dtype))

    def gather_experts(self, parameter: str, index: Tensor, dtype: torch.dtype) -> Tensor:
        """The weights of experts `index` [S] as [S, rows, columns]; no host synchronisation."""
        spec, state = self.expert_specs[parameter], self.expert_state(parameter)
        chosen = WeightSpec(spec.quant_type, (index.shape[0], *spec.shape[1:]), spec.dtype, spec.blocksize, spec.nested)
        codes = state["weight"] if spec.quant_type == "int8" else state["weight"].view(torch.uint8)
        gathered = {"weight": _rows(codes, spec.num_experts, index)}
        per_expert = "row_stats" if spec.quant_type == "int8" else "absmax"
        gathered[per_expert] = _rows(state[per_expert], spec.num_experts, index)
        if spec.nested:
            # Nested blocks of 256 scales may straddle experts: undo the second quantization first.
            absmax = dequantize_absmax(nested_of(state))
            gathered["absmax"] = _rows(absmax, spec.num_experts, index)
            chosen = WeightSpec(spec.quant_type, chosen.shape, spec.dtype, spec.blocksize, nested=False)
        return dequantize_weight(gathered, chosen, dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantExperts:
        states = {name: self.expert_state(name) for name in self.expert_specs}
        names = [self.companion_name(name, companion) for name, state in states.items() for companion in state]
        with hidden(self, tuple(names)):
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, state in states.items():
            self.set_expert_state(name, {key: apply_as_bytes(fn, tensor) for key, tensor in state.items()})
        return self

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the plain module's: routing in, mixed hidden states out, in the dtype of `hidden_states`."""
        dtype = self.compute_dtype or hidden_states.dtype
        if len(args) == 2 and not kwargs and self.has_known_structure:
            top_k_index, top_k_weights = args
            if self.multiplies_in_place(hidden_states, top_k_index, top_k_weights, dtype):
                return self.forward_in_place(hidden_states, top_k_index, top_k_weights, dtype)
            if top_k_index.numel() < self.expert_specs["gate_up_proj"].num_experts:
                return self.forward_gathered(hidden_states, top_k_index, top_k_weights, dtype)
        return self.forward_plain(dtype, hidden_states, *args, **kwargs)

    @property
    def has_known_structure(self) -> bool:
        """Whether the experts are gated MLPs [gate; up] and down, stored [out, in], without biases."""
        return (
            set(self.expert_specs) == {"gate_up_proj", "down_proj"}
            and getattr(self, "is_concatenated", False)
            and getattr(self, "has_gate", False)
            and not getattr(self, "is_transposed", True)
            and not getattr(self, "has_bias", True)
            and not getattr(self, "has_post_expert_norm", False)
        )

    def multiplies_in_place(self, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor, dtype: torch.dtype) -> bool:
        """Whether `forward_in_place` is the way for these: on a GPU, without gradients, and a format it takes."""
        if not x.is_cuda or x.dim() != 2:
            return False
        if torch.is_grad_enabled() and (x.requires_grad or top_k_weights.requires_grad):
            return False
        specs = self.expert_specs.values()
        if any(why_not_experts(spec.shape, spec.quant_type, spec.blocksize) is not None for spec in specs):
            return False
        # Many rows want tensor cores, which Triton reaches from Ampere on and in 16 bit.
        few = top_k_index.numel() < self.expert_specs["gate_up_proj"].num_experts
        fast = dtype in (torch.bfloat16, torch.float16) and why_not_triton(x.device, (8, 0)) is None
        return (fast or (few and why_not_triton(x.device) is None)) and self.in_place_is_proved(x.device, dtype)

    def in_place_is_proved(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether `forward_in_place` was seen to do what `forward_gathered` does, here and with these weights.

        The first time it waits for the device; while a CUDA graph is captured it does not, and says no.
        """
        proofs: dict[tuple[torch.device, torch.dtype], bool] = self.__dict__.setdefault("in_place_proofs", {})
        if (device, dtype) not in proofs:
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                return False
            proofs[device, dtype] = self.in_place_agrees(device, dtype)
        return proofs[device, dtype]

    def in_place_agrees(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Two tokens through the chosen experts' gathered weights and in place, then many copies of them in place."""
        spec = self.expert_specs["gate_up_proj"]
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(2, spec.shape[-1], generator=generator).to(device, dtype)
        last = spec.num_experts - 1
        index = torch.tensor([[0, last], [last // 2, 0]], device=device)
        weights = torch.full((2, 2), 0.5, dtype=dtype, device=device)
        with torch.no_grad():
            expected = self.forward_gathered(x, index, weights, dtype).float()
            few = self.forward_in_place(x, index, weights, dtype).float()
            xs, indices, shares = (tensor.repeat(PROOF_COPIES, 1) for tensor in (x, index, weights))
            many = self.forward_in_place(xs, indices, shares, dtype).float().view(PROOF_COPIES, *expected.shape)
        bound = PROOF_TOLERANCE * expected.abs().max()
        worst = torch.maximum((few - expected).abs().max(), (many - expected).abs().max())
        return bool(worst <= bound)

    def forward_in_place(self, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor, dtype: torch.dtype) -> Tensor:
        """As `forward_gathered`; no code is copied, and no weight exists in `dtype`."""
        gate_up = self.multiply_experts("gate_up_proj", x.to(dtype), top_k_index)
        down = self.multiply_experts("down_proj", self._apply_gate(gate_up), top_k_index.reshape(-1))
        return _mixed(down, top_k_weights).to(x.dtype)

    def multiply_experts(self, parameter: str, x: Tensor, expert_ids: Tensor) -> Tensor:
        """Rows x [T, columns] through experts `expert_ids` [T, k] or [T]: [T * k, rows]; no host synchronisation."""
        spec, state = self.expert_specs[parameter], self.expert_state(parameter)
        codes = state["weight"].detach()
        if spec.quant_type == "int8":
            return experts_8bit(x, expert_ids, codes, state["row_stats"])
        nested = [state[name] for name in NESTED] if spec.nested else []
        return experts_4bit(
            x,
            expert_ids,
            codes.view(torch.uint8).view(-1),
            state["absmax"],
            spec.num_experts,
            spec.shape[1],
            spec.quant_type,
            spec.blocksize,
            *nested,
        )

    def forward_gathered(self, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor, dtype: torch.dtype) -> Tensor:
        """x [T, H], top_k_index [T, k], top_k_weights [T, k] -> [T, H], through the chosen experts only."""
        top_k = top_k_index.shape[1]
        index = top_k_index.reshape(-1)
        rows = x.to(dtype).repeat_interleave(top_k, dim=0).unsqueeze(-1)
        gate_up = torch.bmm(self.gather_experts("gate_up_proj", index, dtype), rows).squeeze(-1)
        hidden_rows = self._apply_gate(gate_up).unsqueeze(-1)
        down = torch.bmm(self.gather_experts("down_proj", index, dtype), hidden_rows).squeeze(-1)
        return _mixed(down, top_k_weights).to(x.dtype)

    def forward_plain(self, dtype: torch.dtype, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward on dequantized weights, which live for the length of the call."""
        plain_class = plain_experts_class(type(self))
        # A stand-in that shares everything but the parameters: nothing is changed on this module, so that two
        # threads may run it at once.
        stand_in = object.__new__(plain_class)
        weights = {name: nn.Parameter(self.dequantize_experts(name, dtype), False) for name in self.expert_specs}
        stand_in.__dict__.update(self.__dict__, _parameters={**self._parameters, **weights})
        return plain_class.forward(stand_in, *args, **kwargs)


def _mixed(rows: Tensor, top_k_weights: Tensor) -> Tensor:
    """Rows [T * k, H] of k experts for each token, added up by their weights [T, k]: [T, H]."""
    return (rows.view(*top_k_weights.shape, -1) * top_k_weights.unsqueeze(-1)).sum(dim=1)


def _rows(tensor: Tensor, num_experts: int, index: Tensor) -> Tensor:
    """The slices of a flat per-expert tensor that belong to experts `index`, flat again."""
    chosen = tensor.reshape(num_experts, -1).index_select(0, index)
    return chosen.reshape(-1, tensor.shape[-1]) if tensor.dtype == torch.int8 else chosen.reshape(-1)


def quant_experts_class(base: Any) -> type[QuantExperts]:
    """The subclass of `base` whose stacked weights are quantized; one per base, so that types compare equal."""
    return make_class(base)


@cache
def make_class(base: Any) -> type[QuantExperts]:
    made = type(f"Quant{base.__name__}", (QuantExperts, base), {"__module__": base.__module__, "__doc__": base.__doc__})
    copyreg.pickle(made, _reduce_experts)
    return made


def _reduce_experts(module: nn.Module) -> tuple[Any, ...]:
    return _rebuild_experts, (plain_experts_class(type(module)),), module.__dict__


def _rebuild_experts(base: type[nn.Module]) -> nn.Module:
    return object.__new__(quant_experts_class(base))


def plain_experts_class(cls: type[Any]) -> Any:
    """The class that a made subclass was made from."""
    return next(base for base in cls.__mro__ if base is not cls and not issubclass(base, QuantExperts))


def quantize_experts_module(
    module: nn.Module, specs: dict[str, WeightSpec], compute_dtype: torch.dtype | None, *, packed: bool
) -> None:
    """Turn an experts module on the meta device, in place, into one that holds codes and scales.

    With `packed` the parameters take the stored shapes at once (a quantized checkpoint follows); without, they keep
    their own until loading sets the codes.
    """
    module.__class__ = quant_experts_class(type(module))
    assert isinstance(module, QuantExperts)
    module.expert_specs = dict(specs)
    module.compute_dtype = compute_dtype
    for parameter, spec in specs.items():
        for name, tensor in meta_state(spec).items():
            if name != "weight":
                module.register_buffer(module.companion_name(parameter, name), tensor)
            elif packed:
                setattr(module, parameter, nn.Parameter(tensor, requires_grad=False))
