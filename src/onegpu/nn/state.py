"""The stored state of one quantized weight: which tensors, under which names, of what shape and dtype.

The canonical state is the one on disk. Two forms share this page: 4 bit (codes, absmax, with double quantization three
more) and 8 bit (codes, row_stats). A 4-bit state can also be held in tile order (`onegpu.formats.tiling`), the same
names over permuted bytes; `tile_state` and `untile_state` go there and back without loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from onegpu.config import NESTED_BLOCKSIZE, QuantConfig
from onegpu.formats import NestedAbsmax, dequantize_rows, quantize_absmax, view_storage
from onegpu.formats.tiling import (
    TILE_ROWS,
    num_tiled_bytes,
    num_tiled_scales,
    tile_codes,
    tile_scales,
    untile_codes,
    untile_scales,
)
from onegpu.kernels import dequantize_4bit, quantize_4bit, quantize_8bit_rows

__all__ = [
    "NESTED",
    "WeightSpec",
    "apply_as_bytes",
    "dequantize_weight",
    "dtype_named",
    "hidden",
    "meta_state",
    "nested_of",
    "quantize_weight",
    "stored",
    "tile_state",
    "untile_state",
]

NESTED = ("nested_absmax", "nested_code", "nested_offset")
# Packed bytes permuted at a time, so that a conversion needs no second copy of a large weight besides its result.
TILING_CHUNK = 2**25


def dtype_named(name: str) -> torch.dtype:
    """The torch dtype called `name` ("bfloat16"), as configs and checkpoints spell it."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype), name
    return dtype


@dataclass(frozen=True, slots=True)
class WeightSpec:
    """What is known of a quantized weight before its bytes are there.

    `shape` is the weight's own shape, [out, in] or [experts, rows, columns]; `dtype` the name of the dtype it had when
    it was quantized. `nested` says that the scales are quantized again (double quantization).
    """

    quant_type: str
    shape: tuple[int, ...]
    dtype: str
    blocksize: int = 64
    nested: bool = False
    quant_storage: str = "uint8"

    @classmethod
    def of(cls, config: QuantConfig, shape: tuple[int, ...], dtype: torch.dtype) -> WeightSpec:
        """The spec of a weight of this shape and dtype, quantized as `config` says."""
        return cls(
            config.quant_type,
            tuple(shape),
            str(dtype).removeprefix("torch."),
            config.blocksize,
            config.double_quant and config.quant_type != "int8",
            config.quant_storage,
        )

    @property
    def numel(self) -> int:
        """Number of weights."""
        return prod(self.shape)

    @property
    def num_experts(self) -> int:
        """Leading dimension of a stacked 3-D weight, 1 for a plain one."""
        return self.shape[0] if len(self.shape) == 3 else 1

    @property
    def companions(self) -> tuple[str, ...]:
        """Names of the tensors stored beside the codes."""
        if self.quant_type == "int8":
            return ("row_stats",)
        return ("absmax", *NESTED) if self.nested else ("absmax",)

    def tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of every stored tensor; the codes are called "weight"."""
        if self.quant_type == "int8":
            return {"weight": (self.shape, torch.int8), "row_stats": (self.shape[:-1], torch.float32)}
        num_bytes = (self.numel + 1) // 2
        num_blocks = -(-self.numel // self.blocksize)
        storage = dtype_named(self.quant_storage)
        stored = {
            "weight": ((num_bytes // storage.itemsize, 1), storage),
            "absmax": ((num_blocks,), torch.uint8 if self.nested else torch.float32),
        }
        if self.nested:
            stored["nested_absmax"] = ((-(-num_blocks // NESTED_BLOCKSIZE),), torch.float32)
            stored["nested_code"] = ((256,), torch.float32)
            stored["nested_offset"] = ((), torch.float32)
        return stored

    @property
    def stored_bytes(self) -> int:
        """Bytes of codes and scales together."""
        return sum(prod(shape) * dtype.itemsize for shape, dtype in self.tensors().values())


def meta_state(spec: WeightSpec) -> dict[str, Tensor]:
    """Every stored tensor with its shape and dtype and no memory."""
    return {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in spec.tensors().items()}


def quantize_weight(
    weight: Tensor, spec: WeightSpec, *, scale_search: bool = False, device: torch.device | None = None
) -> dict[str, Tensor]:
    """Quantize `weight` as `spec` says, on `device` (default: where it is); the tensors of `spec.tensors()`.

    A stacked weight goes to the device and through the quantizer one expert at a time, so that blocks never straddle
    experts and no more than one of them is on the device in 16 bit.
    """
    device = weight.device if device is None else device
    parts = weight if len(spec.shape) == 3 else weight.unsqueeze(0)
    if spec.quant_type == "int8":
        rows = [quantize_8bit_rows(part.to(device))[:2] for part in parts]
        codes, row_stats = (joined(list(tensors)) for tensors in zip(*rows, strict=True))
        return {"weight": codes.view(spec.shape), "row_stats": row_stats.view(spec.shape[:-1])}
    done = [quantize_4bit(part.to(device), spec.quant_type, spec.blocksize, scale_search) for part in parts]
    packed, absmax = (joined(list(tensors)) for tensors in zip(*done, strict=True))
    state = {"weight": view_storage(packed, dtype_named(spec.quant_storage)), "absmax": absmax}
    if spec.nested:
        nested = quantize_absmax(absmax)
        state.update(zip(("absmax", *NESTED), nested, strict=True))
    return state


def joined(tensors: list[Tensor]) -> Tensor:
    """One tensor as it is, several one after another."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def dequantize_weight(state: dict[str, Tensor], spec: WeightSpec, dtype: torch.dtype) -> Tensor:
    """The weight in `dtype`, of shape `spec.shape`: one float32 product per weight, rounded once."""
    codes = state["weight"]
    if spec.quant_type == "int8":
        flat = dequantize_rows(codes.reshape(-1, spec.shape[-1]), state["row_stats"].reshape(-1), dtype)
        return flat.view(spec.shape)
    nested = {name: state[name] for name in NESTED} if spec.nested else {}
    return dequantize_4bit(
        codes.view(torch.uint8).view(-1),
        state["absmax"],
        list(spec.shape),
        dtype,
        spec.quant_type,
        spec.blocksize,
        **nested,
    )


def tile_state(state: dict[str, Tensor], spec: WeightSpec, into: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """A canonical 4-bit state in tile order: "weight" flat uint8, "absmax" flat, the nested tensors as they are.

    Args:
        into: "weight" and "absmax" to write to, of `num_tiled_bytes` and `num_tiled_scales` elements.

    Raises:
        UnsupportedError: a shape that cannot be tiled (`onegpu.formats.tiling.why_not_tiled`).
    """
    N, K = spec.shape
    packed = state["weight"].detach().view(torch.uint8).view(-1)
    if into is None:
        into = {
            "weight": packed.new_empty(num_tiled_bytes(N, K)),
            "absmax": state["absmax"].new_empty(num_tiled_scales(N, K, spec.blocksize)),
        }
    for rows, first, last in row_chunks(N, K):
        into["weight"][first : first + num_tiled_bytes(rows, K)] = tile_codes(packed[first:last], rows, K)
    into["absmax"].copy_(tile_scales(state["absmax"], N, K, spec.blocksize))
    return {**state, "weight": into["weight"], "absmax": into["absmax"]}


def untile_state(tiled: dict[str, Tensor], spec: WeightSpec) -> dict[str, Tensor]:
    """The inverse of `tile_state`, bit for bit: the tensors of `spec.tensors()`."""
    N, K = spec.shape
    codes = tiled["weight"].detach()
    packed = codes.new_empty(N * K // 2)
    for rows, first, last in row_chunks(N, K):
        packed[first:last] = untile_codes(codes[first : first + num_tiled_bytes(rows, K)], rows, K)
    absmax = untile_scales(tiled["absmax"], N, K, spec.blocksize)
    return {**tiled, "weight": view_storage(packed, dtype_named(spec.quant_storage)), "absmax": absmax}


def row_chunks(N: int, K: int) -> Iterator[tuple[int, int, int]]:
    """(rows, first packed byte, last packed byte + 1) of runs of whole row tiles; only the last may be ragged."""
    step = max(1, TILING_CHUNK * 2 // K // TILE_ROWS) * TILE_ROWS
    for first in range(0, N, step):
        rows = min(step, N - first)
        yield rows, first * K // 2, (first + rows) * K // 2


def nested_of(state: dict[str, Tensor]) -> NestedAbsmax:
    """The double-quantized scales of a state that has them."""
    return NestedAbsmax(*(state[name] for name in ("absmax", *NESTED)))


def apply_as_bytes(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """Apply a move to `tensor` as raw bytes: a device changes, a dtype never does.

    `Module.half()` and `.to(dtype)` cast whatever is floating; scales and codes kept in a floating storage dtype would
    be destroyed by that.
    """
    as_bytes = tensor.reshape(-1).view(torch.uint8)
    moved = fn(as_bytes)
    return tensor if moved is as_bytes else moved.view(tensor.dtype).view(tensor.shape)


@contextmanager
def hidden(module: nn.Module, names: tuple[str, ...]) -> Iterator[None]:
    """Take the named parameters and buffers out of the module for a while, so that `Module._apply` passes them by."""
    kept_parameters = {name: module._parameters[name] for name in names if name in module._parameters}
    kept_buffers = {name: module._buffers[name] for name in names if name in module._buffers}
    module._parameters.update(dict.fromkeys(kept_parameters))
    module._buffers.update(dict.fromkeys(kept_buffers))
    try:
        yield
    finally:
        module._parameters.update(kept_parameters)
        module._buffers.update(kept_buffers)


def stored(module: nn.Module, names: tuple[str, ...]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of those `names` that are registered on the module."""
    for name in names:
        tensor = getattr(module, name, None)
        if isinstance(tensor, Tensor):
            yield name, tensor
