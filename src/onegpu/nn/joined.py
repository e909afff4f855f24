"""Linear layers of one input run as one product; each layer's own tensors are views of the joint ones.

    16 bit         weight [N1 + N2 + ..., K]
    8 bit          codes [N1 + ..., K], row_stats [N1 + ...]
    4 bit, tiled   the row tiles one after another, and so the scales (see `onegpu.formats.tiling`)

The layers stay what they were for everyone else: their own forward, `state_dict()`, in-place loading and saving see
their parts. What cannot be joined runs layer by layer, with the same result, and says why.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from onegpu.config import NESTED_BLOCKSIZE
from onegpu.formats.tiling import TILE_ROWS
from onegpu.kernels import gated_activation, linear_8bit, linear_8bit_rows, linear_16bit
from onegpu.kernels.tail import apply_tail
from onegpu.kernels.tiled_ops import linear_4bit_tiled
from onegpu.nn import layout
from onegpu.nn.linear import QuantLinear, QuantLinear4bit, QuantLinear8bit
from onegpu.nn.state import NESTED, dtype_named, tile_state

__all__ = ["Joined", "is_plain_linear", "join"]

# Up to so many rows an 8-bit product keeps x in 16 bit; beyond, it is its layer's own, with x in int8 too. And up to so
# many a 16-bit product has its tail in the same kernel.
FEW_ROWS: Final = 64


@dataclass(slots=True)
class Buffers:
    """What the one product reads: a 16-bit weight, int8 codes with row_stats, or tiled codes with absmax."""

    weight: Tensor
    bias: Tensor | None
    scales: Tensor | None = None
    nested: tuple[Tensor, ...] = ()
    # The layers' own nested tensors where the joint ones are copies, and how often each had been written by then.
    copied: tuple[tuple[Tensor, int], ...] = ()


class Joined:
    """One product for `modules`, made by `join`.

    Attributes:
        modules: the layers, in the order of their rows.
        out_features: rows of all of them.
        reason: None where they run as one product, else why they run one by one.
        dtype: of x, for the one product; another x goes layer by layer.
    """

    def __init__(self, modules: Sequence[nn.Module], dtype: torch.dtype, reason: str | None) -> None:
        self.modules: tuple[nn.Linear, ...] = tuple(modules)  # type: ignore[arg-type]
        self.out_features = sum(int(module.out_features) for module in self.modules)
        self.dtype = dtype
        self.reason = reason
        self.buffers: Buffers | None = None
        self.tiled_here: list[QuantLinear4bit] = []

    def __call__(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        activation: str | None = None,
        gated: bool = False,
        overlap: bool = False,
    ) -> Tensor:
        """The product with its tail (see `onegpu.kernels.tail`): [..., K] to [..., N], or [..., N / 2] if gated.

        Args:
            residual, activation, gated, overlap: as `onegpu.kernels.linear_16bit` takes them; with `gated` the rows of
                the first half are the gate.

        Raises:
            ArgumentError, DeviceError: tensors that do not fit.
        """
        buffers = self.buffers
        if buffers is None or x.dtype is not self.dtype:
            parts = [module(x) for module in self.modules]
            return apply_tail(torch.cat(parts, dim=-1).float(), residual, activation, gated, x.dtype)
        first = self.modules[0]
        if isinstance(first, QuantLinear4bit):
            spec = first.spec
            return linear_4bit_tiled(
                x,
                buffers.weight,
                buffers.scales,  # type: ignore[arg-type]
                buffers.bias,
                self.out_features,
                spec.quant_type,
                spec.blocksize,
                *(buffers.nested or (None, None, None)),  # type: ignore[misc]
                residual=residual,
                activation=activation,
                gated=gated,
                overlap=overlap,
            )
        if isinstance(first, QuantLinear8bit):
            assert buffers.scales is not None
            if x.numel() <= FEW_ROWS * x.shape[-1]:
                return linear_8bit_rows(
                    x, buffers.weight, buffers.scales, buffers.bias, residual, activation, gated, overlap
                )
            y = linear_8bit(x, buffers.weight, buffers.scales, buffers.bias, first.threshold)
            return followed(y, residual, activation, gated)
        is_few, is_sum = x.numel() <= FEW_ROWS * x.shape[-1], activation is None and buffers.bias is None
        if x.dtype == torch.float32 or (x.is_cuda and (is_few or is_sum)):
            return linear_16bit(x, buffers.weight, buffers.bias, residual, activation, gated, overlap)
        # Many rows in float32 would be a second trip through memory, and on a CPU a copy of the weight.
        return followed(linear_16bit(x, buffers.weight, buffers.bias), residual, activation, gated)

    def is_intact(self) -> bool:
        """Whether the layers' tensors still are the parts of the joint ones: nobody moved, replaced or cast them.

        Double-quantized scales of several layers are copies in part: writing to those of a layer counts too.
        """
        buffers = self.buffers
        if buffers is None:
            return True
        joint = [buffers.weight, *([] if buffers.scales is None else [buffers.scales])]
        places = [tensor.data_ptr() for tensor in joint]
        if buffers.copied:
            now = nested_tensors(self.modules)
            if any(a is not b or a._version != version for a, (b, version) in zip(now, buffers.copied, strict=True)):
                return False
        bias_place = None if buffers.bias is None else buffers.bias.data_ptr()
        for module in self.modules:
            if isinstance(module, QuantLinear4bit) and not module.is_tiled:
                return False
            for index, tensor in enumerate(own_tensors(module)):
                if tensor.data_ptr() != places[index] or tensor.dtype != joint[index].dtype:
                    return False
                places[index] += tensor.nbytes
            bias: Tensor | None = module.bias
            if bias is not None and bias.data_ptr() != bias_place:
                return False
            if buffers.bias is not None and bias_place is not None:
                bias_place += module.out_features * buffers.bias.element_size()
        return True

    def split(self) -> None:
        """Give each layer memory of its own again, with the values it has now, in the layout it had before."""
        with torch.no_grad():
            if len(self.modules) > 1 and self.buffers is not None:
                for module in self.modules:
                    own_memory(module)
            for module in self.tiled_here:
                layout.untile(module)
        self.buffers, self.tiled_here = None, []
        self.reason = self.reason or "split"


def followed(y: Tensor, residual: Tensor | None, activation: str | None, gated: bool) -> Tensor:
    """The tail of a product y that nobody else holds, rounded before it as modules in a row do."""
    if activation is not None and gated and residual is None:
        return gated_activation(y, activation)
    if activation is not None:
        return apply_tail(y.float(), residual, activation, gated, y.dtype)
    return y if residual is None else y.add_(residual)


def join(modules: Sequence[nn.Module], dtype: torch.dtype | None = None, tile: bool | None = None) -> Joined:
    """Join layers of one input; one layer alone is a `Joined` too, without a copy.

    Args:
        modules: `nn.Linear`, `QuantLinear8bit` or `QuantLinear4bit`, all of one kind; gate before up where the product
            is to be gated.
        dtype: of x; by default the one that the layers compute in.
        tile: hold 4-bit weights in tile order; by default on a GPU, for the product on a CPU wants rows.

    Returns:
        `Joined`, whose `reason` says why there is not one product, if so. While it is made, no more than these layers'
        weights are in memory twice.
    """
    first = modules[0]
    if dtype is None:
        dtype = (first.compute_dtype or dtype_named(first.spec.dtype)) if isinstance(first, QuantLinear) else None
        dtype = first.weight.dtype if dtype is None else dtype  # type: ignore[assignment]
    joined = Joined(modules, dtype, why_not_joined(modules, dtype, tile))  # type: ignore[arg-type]
    if joined.reason is None:
        with torch.no_grad():
            joined.buffers = make_buffers(joined)
    return joined


def why_not_joined(modules: Sequence[nn.Module], dtype: torch.dtype | None, tile: bool | None) -> str | None:
    """None where `modules` can run as one product on x in `dtype`, else the reason in a sentence."""
    first = modules[0]
    for module in modules:
        if not is_plain_linear(module):
            return f"{type(module).__name__} is no plain linear layer, or has hooks"
    linears: Sequence[nn.Linear] = modules  # type: ignore[assignment]
    if any(type(module) is not type(first) for module in modules):
        return f"the layers are of different kinds: {', '.join(type(module).__name__ for module in modules)}"
    weights = [module.weight for module in linears]
    if any(weight.is_meta for weight in weights):
        return "a weight is on the meta device, not loaded or offloaded"
    if len({weight.data_ptr() for weight in weights}) < len(weights):
        return "the layers share a weight"
    alike = {(module.in_features, module.weight.dtype, module.weight.device) for module in linears}
    if len(alike) > 1:
        return "the layers differ in their input, dtype or device"
    biases = {module.bias.dtype for module in linears if module.bias is not None}
    if len(biases) > 1:
        return "the biases differ in dtype"
    if not isinstance(first, QuantLinear):
        weight = weights[0]
        return None if weight.dtype == dtype else f"the weights are {weight.dtype}, the activations {dtype}"
    quantized: list[QuantLinear] = list(modules)  # type: ignore[arg-type]
    for module in quantized:
        if module.compute_dtype not in (None, dtype):
            return f"computes in {module.compute_dtype}, the activations are {dtype}"
    if isinstance(first, QuantLinear8bit):
        if len({module.threshold for module in quantized}) > 1:
            return "the layers differ in threshold"
        return None
    return why_not_joined_4bit(quantized, first.weight.is_cuda if tile is None else tile)


def why_not_joined_4bit(modules: Sequence[QuantLinear], tile: bool) -> str | None:
    """The part of `why_not_joined` that is about tiles and scales."""
    for module in modules:
        assert isinstance(module, QuantLinear4bit)
        if not tile and not module.is_tiled:
            return "4-bit weights are in rows on a CPU, and joined in tiles only"
        reason = layout.why_not(module)
        if reason is not None:
            return reason
    if len({(m.spec.quant_type, m.spec.blocksize, m.spec.nested) for m in modules}) > 1:
        return "the layers differ in their 4-bit format"
    if len(modules) > 1:
        for module in modules:
            if module.out_features % TILE_ROWS:
                return f"{module.out_features} rows are no multiple of {TILE_ROWS}"
        if modules[0].spec.nested:
            return why_not_joined_scales(modules)
    return None


def why_not_joined_scales(modules: Sequence[QuantLinear]) -> str | None:
    """The part that is about double-quantized scales: a factor must not stand for blocks of two layers."""
    for module in modules[:-1]:
        if module.out_features * (module.in_features // module.spec.blocksize) % NESTED_BLOCKSIZE:
            return f"the scales of {module.out_features} rows are no multiple of {NESTED_BLOCKSIZE}"
    codes = [module.held["nested_code"] for module in modules]
    if not all(torch.equal(code, codes[0]) for code in codes):
        return "the layers' double-quantized scales have different codebooks"
    return None


def joined_nested(modules: Sequence[QuantLinear4bit]) -> tuple[Tensor, ...]:
    """The float32 part of double-quantized scales of all layers; with several, an offset for each row tile."""
    held = [module.held for module in modules]
    if len(modules) == 1:
        return tuple(held[0][name] for name in NESTED)
    offsets = [part["nested_offset"].repeat(m.out_features // TILE_ROWS) for part, m in zip(held, modules, strict=True)]
    return torch.cat([part["nested_absmax"] for part in held]), held[0]["nested_code"], torch.cat(offsets)


def nested_tensors(modules: Sequence[nn.Linear]) -> list[Tensor]:
    """The layers' own nested tensors."""
    held = [module.held for module in modules if isinstance(module, QuantLinear4bit)]
    return [part[name] for part in held for name in NESTED]


def is_plain_linear(module: nn.Module) -> bool:
    """A linear layer of torch or ours, with no hook and no forward of its own: nothing would be passed over."""
    return type(module) in (nn.Linear, QuantLinear4bit, QuantLinear8bit) and not (
        module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__
    )


def make_buffers(joined: Joined) -> Buffers:
    """The joint tensors, each layer's own made views of them; for one layer alone, its own tensors."""
    modules = joined.modules
    bias = joined_bias(modules)
    if isinstance(modules[0], QuantLinear4bit):
        weight, scales = tiled_buffers(joined)
        quantized: list[QuantLinear4bit] = list(modules)  # type: ignore[arg-type]
        nested = joined_nested(quantized) if quantized[0].spec.nested else ()
        copied = nested_tensors(modules) if len(modules) > 1 and nested else []
        return Buffers(weight, bias, scales, nested, tuple((tensor, tensor._version) for tensor in copied))
    if len(modules) == 1:
        own = own_tensors(modules[0])
        return Buffers(own[0], bias, own[1] if len(own) > 1 else None)
    joint = [torch.cat(tensors) for tensors in zip(*(own_tensors(module) for module in modules), strict=True)]
    start = 0
    for module in modules:
        part = slice(start, start + module.out_features)
        if isinstance(module, QuantLinear8bit):
            module.hold({"weight": joint[0][part], "row_stats": joint[1][part]})
        else:
            module.weight.data = joint[0][part]
        start = part.stop
    return Buffers(joint[0], bias, joint[1] if len(joint) > 1 else None)


def joined_bias(modules: Sequence[nn.Linear]) -> Tensor | None:
    """The biases one after another, zeros where a layer has none; each layer's own made a view."""
    present = [module.bias for module in modules if module.bias is not None]
    if not present:
        return None
    if len(modules) == 1:
        return present[0].detach()
    parts: list[Tensor] = [
        present[0].new_zeros(module.out_features) if module.bias is None else module.bias for module in modules
    ]
    bias = torch.cat(parts)
    start = 0
    for module in modules:
        if module.bias is not None:
            module.bias.data = bias[start : start + module.out_features]
        start += module.out_features
    return bias


def tiled_buffers(joined: Joined) -> tuple[Tensor, Tensor]:
    """Tiled codes and scales of all layers; the canonical ones are let go layer by layer."""
    modules: list[QuantLinear4bit] = list(joined.modules)  # type: ignore[arg-type]
    joined.tiled_here = [module for module in modules if not module.is_tiled]
    if len(modules) == 1:
        layout.tile(modules[0])
        return modules[0].weight.detach(), modules[0].absmax
    K, blocksize = modules[0].in_features, modules[0].spec.blocksize
    rows = sum(module.out_features for module in modules)
    held = modules[0].held
    codes = torch.empty(rows * K // 2, dtype=torch.uint8, device=held["weight"].device)
    scales = torch.empty(rows * (K // blocksize), dtype=held["absmax"].dtype, device=codes.device)
    start = 0
    for module in modules:
        stop = start + module.out_features
        part = {
            "weight": codes[start * K // 2 : stop * K // 2],
            "absmax": scales[start * (K // blocksize) : stop * (K // blocksize)],
        }
        if module.is_tiled:
            for name, tensor in part.items():
                tensor.copy_(module.held[name])
        else:
            tile_state(module.state, module.spec, part)
        module.hold_tiled(part)
        start = stop
    return codes, scales


def own_tensors(module: nn.Linear) -> list[Tensor]:
    """The tensors of one layer that are parts of joint ones: its weight or codes, and its scales by row or block."""
    if isinstance(module, QuantLinear4bit):
        return [module.weight.detach(), module.absmax]
    if isinstance(module, QuantLinear8bit):
        return [module.weight.detach(), module.row_stats]
    return [module.weight.detach()]


def own_memory(module: nn.Linear) -> None:
    """Copy whatever of the layer lies in a larger storage."""
    if isinstance(module, QuantLinear):
        module.hold({name: tensor.detach().clone() for name, tensor in module.held.items() if is_view(tensor)})
    elif is_view(module.weight):
        module.weight.data = module.weight.data.clone()
    if module.bias is not None and is_view(module.bias):
        module.bias.data = module.bias.data.clone()


def is_view(tensor: Tensor) -> bool:
    """Whether the memory holds more than this tensor."""
    return tensor.untyped_storage().nbytes() != tensor.nbytes
