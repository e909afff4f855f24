"""What each operator demands of its arguments, checked once for every device before anything runs.

Shapes use N out features, K in features, n = number of weights. Each check raises `ArgumentError` for a shape, dtype
or length, `DeviceError` for tensors on different devices, `ConfigError` for an unknown quant_type or blocksize.
They read shapes only, never values, so that they hold under tracing and cost no wait for a device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from onegpu.config import BLOCKSIZES, NESTED_BLOCKSIZE, check_choice
from onegpu.errors import ArgumentError, DeviceError

__all__ = [
    "FLOAT_DTYPES",
    "dequantize_4bit",
    "linear_4bit",
    "linear_8bit",
    "quantize_4bit",
    "quantize_8bit_rows",
]

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
QUANT_TYPES_4BIT = ("nf4", "fp4")


def quantize_4bit(
    weight: Tensor, quant_type: str, blocksize: int, scale_search: bool = False, importance: Tensor | None = None
) -> None:
    _float("quantize_4bit", "weight", weight)
    _format(quant_type, blocksize)
    if importance is None:
        return
    if not scale_search:
        raise ArgumentError("quantize_4bit: importance was given without scale_search; expected scale_search=True")
    _same_device("quantize_4bit", "weight", weight, importance=importance)
    if importance.dtype != torch.float32 or importance.shape not in (weight.shape, weight.shape[-1:]):
        raise ArgumentError(
            f"quantize_4bit: importance must be float32 {list(weight.shape[-1:])} or {list(weight.shape)}; "
            f"got {_described(importance)}"
        )


def dequantize_4bit(
    packed: Tensor,
    absmax: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
    quant_type: str,
    blocksize: int,
    nested_absmax: Tensor | None = None,
    nested_code: Tensor | None = None,
    nested_offset: Tensor | None = None,
) -> None:
    op = "dequantize_4bit"
    if dtype not in FLOAT_DTYPES:
        raise ArgumentError(f"{op}: dtype must be bfloat16, float16 or float32; got {_name(dtype)}")
    if any(size < 0 for size in shape):
        raise ArgumentError(f"{op}: shape must not have negative sizes; got {list(shape)}")
    _format(quant_type, blocksize)
    _packed_weight(op, packed, absmax, math.prod(shape), shape, blocksize, nested_absmax, nested_code, nested_offset)


def linear_4bit(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    bias: Tensor | None,
    out_features: int,
    quant_type: str,
    blocksize: int,
    nested_absmax: Tensor | None = None,
    nested_code: Tensor | None = None,
    nested_offset: Tensor | None = None,
) -> None:
    op = "linear_4bit"
    K = _input(op, x)
    if out_features < 1:
        raise ArgumentError(f"{op}: out_features must be at least 1; got {out_features}")
    _format(quant_type, blocksize)
    _bias(op, x, bias, out_features)
    shape = (out_features, K)
    _same_device(op, "x", x, packed=packed)
    _packed_weight(op, packed, absmax, out_features * K, shape, blocksize, nested_absmax, nested_code, nested_offset)


def quantize_8bit_rows(x: Tensor, threshold: float = 0.0) -> None:
    _float("quantize_8bit_rows", "x", x)
    if x.dim() != 2:
        raise ArgumentError(f"quantize_8bit_rows: x must be a matrix [M, K]; got shape {list(x.shape)}")
    _threshold("quantize_8bit_rows", threshold)


def linear_8bit(x: Tensor, codes: Tensor, row_stats: Tensor, bias: Tensor | None, threshold: float = 0.0) -> None:
    op = "linear_8bit"
    _row_codes(op, x, codes, row_stats)
    _bias(op, x, bias, codes.shape[0])
    _threshold(op, threshold)


def _row_codes(op: str, x: Tensor, codes: Tensor, row_stats: Tensor) -> None:
    K = _input(op, x)
    if codes.dtype != torch.int8 or codes.dim() != 2 or codes.shape[0] < 1 or codes.shape[1] != K:
        raise ArgumentError(
            f"{op}: codes must be int8 [N, {K}] for x of shape {list(x.shape)}; got {_described(codes)}"
        )
    N = codes.shape[0]
    if row_stats.dtype != torch.float32 or row_stats.dim() != 1 or row_stats.shape[0] != N:
        raise ArgumentError(f"{op}: row_stats must be float32 [{N}], one per row of codes; got {_described(row_stats)}")
    _same_device(op, "x", x, codes=codes, row_stats=row_stats)


def _packed_weight(
    op: str,
    packed: Tensor,
    absmax: Tensor,
    n: int,
    shape: Sequence[int],
    blocksize: int,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    nested_offset: Tensor | None,
) -> None:
    num_bytes = (n + 1) // 2
    num_blocks = (n + blocksize - 1) // blocksize
    of_weight = f"for a weight of shape {list(shape)}"
    if packed.dtype != torch.uint8 or packed.dim() != 1 or packed.shape[0] != num_bytes:
        raise ArgumentError(f"{op}: packed must be uint8 [{num_bytes}] {of_weight}; got {_described(packed)}")
    nested = nested_absmax is not None
    if (nested_code is not None) != nested or (nested_offset is not None) != nested:
        given = {"nested_absmax": nested_absmax, "nested_code": nested_code, "nested_offset": nested_offset}
        missing = [name for name, tensor in given.items() if tensor is None]
        raise ArgumentError(
            f"{op}: nested_absmax, nested_code and nested_offset go together; {', '.join(missing)} came as None"
        )
    dtype = torch.uint8 if nested else torch.float32
    if absmax.dtype != dtype or absmax.dim() != 1 or absmax.shape[0] != num_blocks:
        reason = "with nested scales" if nested else "without nested scales"
        raise ArgumentError(
            f"{op}: absmax must be {_name(dtype)} [{num_blocks}] {of_weight}, blocksize {blocksize}, {reason}; "
            f"got {_described(absmax)}"
        )
    _same_device(op, "packed", packed, absmax=absmax)
    if nested_absmax is None or nested_code is None or nested_offset is None:
        return
    num_nested = (num_blocks + NESTED_BLOCKSIZE - 1) // NESTED_BLOCKSIZE
    for name, tensor, length in (("nested_absmax", nested_absmax, num_nested), ("nested_code", nested_code, 256)):
        if tensor.dtype != torch.float32 or tensor.dim() != 1 or tensor.shape[0] != length:
            raise ArgumentError(f"{op}: {name} must be float32 [{length}] {of_weight}; got {_described(tensor)}")
    if nested_offset.dtype != torch.float32 or nested_offset.dim() != 0:
        raise ArgumentError(f"{op}: nested_offset must be a float32 scalar tensor []; got {_described(nested_offset)}")
    _same_device(
        op, "packed", packed, nested_absmax=nested_absmax, nested_code=nested_code, nested_offset=nested_offset
    )


def _format(quant_type: str, blocksize: int) -> None:
    # The plain membership tests come first: they are all that a correct call pays for.
    if quant_type not in QUANT_TYPES_4BIT:
        check_choice("quant_type", quant_type, QUANT_TYPES_4BIT)
    if blocksize not in BLOCKSIZES:
        check_choice("blocksize", blocksize, BLOCKSIZES)


def _float(op: str, name: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOAT_DTYPES:
        raise ArgumentError(f"{op}: {name} must be bfloat16, float16 or float32; got {_name(tensor.dtype)}")


def _input(op: str, x: Tensor) -> int:
    _float(op, "x", x)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ArgumentError(f"{op}: x must have shape [..., K] with K > 0; got {list(x.shape)}")
    return x.shape[-1]


def _bias(op: str, x: Tensor, bias: Tensor | None, out_features: int) -> None:
    if bias is None:
        return
    if bias.dtype not in FLOAT_DTYPES or bias.dim() != 1 or bias.shape[0] != out_features:
        raise ArgumentError(f"{op}: bias must be floating point [{out_features}]; got {_described(bias)}")
    _same_device(op, "x", x, bias=bias)


def _threshold(op: str, threshold: float) -> None:
    if not threshold >= 0:
        raise ArgumentError(f"{op}: threshold must not be negative; got {threshold}", "0 means no outlier columns")


def _same_device(op: str, first: str, tensor: Tensor, **others: Tensor) -> None:
    for name, other in others.items():
        if other.device != tensor.device:
            raise DeviceError(
                f"{op}: all tensors must be on one device; {first} is on {tensor.device}, {name} on {other.device}"
            )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _described(tensor: Tensor) -> str:
    return f"{_name(tensor.dtype)} {list(tensor.shape)}"
