"""Linear layers over quantized weights: the stored state and one operator call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from onegpu.kernels import linear_4bit, linear_8bit
from onegpu.kernels.tiled_ops import linear_4bit_tiled
from onegpu.nn.state import (
    NESTED,
    WeightSpec,
    apply_as_bytes,
    dequantize_weight,
    dtype_named,
    hidden,
    meta_state,
    stored,
    tile_state,
    untile_state,
)

__all__ = ["QuantLinear", "QuantLinear4bit", "QuantLinear8bit"]


class QuantLinear(nn.Linear):
    """A linear layer whose weight is stored in 4 or 8 bit; a subclass of `nn.Linear` so that PEFT and others know it.

    Args:
        spec: shape [out_features, in_features] and format of the stored weight.
        bias: whether there is one; kept in the model's dtype.
        compute_dtype: dtype of the product; None computes in the dtype of the input.
        source_cls: the class this layer replaced, so that dequantizing gives that class back.

    The weight and its scales are created on the meta device and set by loading; they take no gradient. Moving the
    module moves them as bytes: `.half()` and `.to(dtype)` change the bias only.
    """

    spec: WeightSpec
    weight: nn.Parameter
    bias: nn.Parameter | None  # type: ignore[assignment]
    absmax: Tensor
    row_stats: Tensor

    def __init__(
        self,
        spec: WeightSpec,
        *,
        bias: bool,
        bias_dtype: torch.dtype | None = None,
        compute_dtype: torch.dtype | None = None,
        source_cls: type[nn.Module] = nn.Linear,
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would allocate the weight in full
        self.spec = spec
        self.out_features, self.in_features = spec.shape
        self.compute_dtype = compute_dtype
        self.source_cls = source_cls
        for name, tensor in meta_state(spec).items():
            if name == "weight":
                self.weight = nn.Parameter(tensor, requires_grad=False)
            else:
                self.register_buffer(name, tensor)
        empty = torch.empty(self.out_features, dtype=bias_dtype, device="meta") if bias else None
        self.register_parameter("bias", None if empty is None else nn.Parameter(empty))

    @classmethod
    def from_state(
        cls, state: dict[str, Tensor], spec: WeightSpec, bias: Tensor | None = None, **options: Any
    ) -> QuantLinear:
        """A ready layer from the tensors that `quantize_weight` gives."""
        layer = cls(spec, bias=bias is not None, **options)
        layer.set_state(state)
        if bias is not None:
            layer.bias = nn.Parameter(bias, requires_grad=bias.requires_grad)
        return layer

    @property
    def held(self) -> dict[str, Tensor]:
        """The tensors of the weight as they lie in memory, in whatever layout, codes first."""
        return dict(stored(self, ("weight", *self.spec.companions)))

    @property
    def state(self) -> dict[str, Tensor]:
        """The stored tensors by name, codes first, as they are on disk."""
        return self.held

    def set_state(self, state: dict[str, Tensor]) -> None:
        """Take the stored tensors as they are."""
        self.hold(state)

    def hold(self, tensors: dict[str, Tensor]) -> None:
        """Take tensors in the layout in which the module holds them."""
        for name, tensor in tensors.items():
            setattr(self, name, nn.Parameter(tensor, requires_grad=False) if name == "weight" else tensor)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight [out_features, in_features] in `dtype`, by default the one it had before quantization."""
        return dequantize_weight(self.state, self.spec, dtype or dtype_named(self.spec.dtype))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        held = self.held
        with hidden(self, tuple(held)):
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.hold({name: apply_as_bytes(fn, tensor) for name, tensor in held.items()})
        return self

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"quant_type={self.spec.quant_type}, blocksize={self.spec.blocksize}, compute_dtype={self.compute_dtype}"
        )

    def reset_parameters(self) -> None:
        """Nothing to draw: the weight comes from a checkpoint."""


class QuantLinear4bit(QuantLinear):
    """NF4 or FP4 weights (QLoRA, arXiv 2305.14314, section 3): x [..., in] -> [..., out] in x's dtype.

    `is_tiled`: codes and scales are held in tile order (see `onegpu.nn.layout`). `state`, `state_dict()`,
    `dequantize()` and saving give the canonical tensors all the same, made on the spot; `load_state_dict()` takes them.
    """

    is_tiled: bool = False

    @property
    def state(self) -> dict[str, Tensor]:
        """The stored tensors by name, codes first, as they are on disk; copies where the module is tiled."""
        return untile_state(self.held, self.spec) if self.is_tiled else self.held

    def set_state(self, state: dict[str, Tensor]) -> None:
        """Take the stored tensors as they are; the module is not tiled then."""
        self.is_tiled = False
        self.hold(state)

    def forward(self, x: Tensor) -> Tensor:
        # A small model has hundreds of these in a token, each product microseconds long: no look-up for nothing.
        spec, buffers = self.spec, self._buffers
        dtype = self.compute_dtype or x.dtype
        weight, bias = self._parameters["weight"], self._parameters["bias"]
        assert weight is not None
        packed = weight if weight.dtype is torch.uint8 else weight.view(torch.uint8)
        y = (linear_4bit_tiled if self.is_tiled else linear_4bit)(
            x if x.dtype is dtype else x.to(dtype),
            packed.view(-1),
            buffers["absmax"],  # type: ignore[arg-type]
            bias if bias is None or bias.dtype is dtype else bias.to(dtype),
            self.out_features,
            spec.quant_type,
            spec.blocksize,
            *([buffers[name] for name in NESTED] if spec.nested else ()),
        )
        return y if y.dtype is x.dtype else y.to(x.dtype)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.is_tiled:
            destination.update({prefix + name: tensor for name, tensor in self.state.items()})

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        if not self.is_tiled:
            super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
            return
        held = self.held
        self.set_state(self.state)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        if local_metadata.get("assign_to_params_buffers", False):
            held = tile_state(self.state, self.spec)
        else:
            # In place: the memory may be part of a larger buffer.
            with torch.no_grad():
                loaded = self.state
                tile_state(loaded, self.spec, held)
                for name in NESTED if self.spec.nested else ():
                    held[name].copy_(loaded[name])
        self.hold_tiled(held)

    def hold_tiled(self, tensors: dict[str, Tensor]) -> None:
        """Take tensors in tile order, those of `onegpu.nn.state.tile_state`."""
        self.is_tiled = True
        self.hold(tensors)


class QuantLinear8bit(QuantLinear):
    """LLM.int8() weights (arXiv 2208.07339): int8 rows, outlier columns of x in 16 bit; x [..., in] -> [..., out].

    `threshold` is the magnitude from which a value of x makes its column an outlier; 0 for none. Which columns are
    outliers is decided over all rows of one call, so a row's result can depend on its neighbours in the batch.
    """

    def __init__(self, spec: WeightSpec, *, threshold: float = 6.0, **options: Any) -> None:
        super().__init__(spec, **options)
        self.threshold = threshold

    def forward(self, x: Tensor) -> Tensor:
        dtype = self.compute_dtype or x.dtype
        bias = self.bias if self.bias is None else self.bias.to(dtype)
        return linear_8bit(x.to(dtype), self.weight, self.row_stats, bias, self.threshold).to(x.dtype)
