"""The operator `linear_4bit_tiled`: the 4-bit product on weights in tile order (`onegpu.formats.tiling`).

Bound like those in `ops`. The reference puts the weight back in rows and is `linear_4bit`'s from there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from onegpu.errors import ArgumentError
from onegpu.formats import NestedAbsmax, dequantize_absmax
from onegpu.formats.tiling import (
    TILE_ROWS,
    num_tiled_bytes,
    num_tiled_scales,
    untile_codes,
    untile_scales,
    why_not_tiled,
)
from onegpu.kernels import checks, reference, tail
from onegpu.kernels.ops import LIBRARY, NESTED, bind, dequantize_4bit

__all__ = ["linear_4bit_tiled", "why_not_tiled"]

OP = "linear_4bit_tiled"


def check_linear_4bit_tiled(
    x: Tensor,
    tiled: Tensor,
    absmax: Tensor,
    bias: Tensor | None,
    out_features: int,
    quant_type: str,
    blocksize: int,
    nested_absmax: Tensor | None = None,
    nested_code: Tensor | None = None,
    nested_offset: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    gated: bool = False,
    overlap: bool = False,  # noqa: ARG001
) -> None:
    """As `checks.linear_4bit`, with the lengths of the tile order."""
    K = checks._input(OP, x)
    if out_features < 1:
        raise ArgumentError(f"{OP}: out_features must be at least 1; got {out_features}")
    checks._format(quant_type, blocksize)
    reason = why_not_tiled(out_features, K, blocksize)
    if reason is not None:
        raise ArgumentError(f"{OP}: {reason}", "linear_4bit takes every shape")
    checks._bias(OP, x, bias, out_features)
    tail.check_tail(OP, x, out_features, residual, activation, gated)
    _length("tiled", tiled, torch.uint8, num_tiled_bytes(out_features, K), out_features, K)
    nested = nested_absmax is not None
    dtype = torch.uint8 if nested else torch.float32
    _length("absmax", absmax, dtype, num_tiled_scales(out_features, K, blocksize), out_features, K)
    checks._same_device(OP, "x", x, tiled=tiled, absmax=absmax)
    num_blocks = out_features * (K // blocksize)
    if nested_offset is not None and nested_offset.dim() == 1:
        _length("nested_offset", nested_offset, torch.float32, -(-out_features // TILE_ROWS), out_features, K)
        nested_offset = nested_offset[0]
    checks._packed_weight(
        OP,
        tiled[: out_features * K // 2],
        absmax[:num_blocks],
        out_features * K,
        (out_features, K),
        blocksize,
        nested_absmax,
        nested_code,
        nested_offset,
    )


def _length(name: str, tensor: Tensor, dtype: torch.dtype, length: int, out_features: int, in_features: int) -> None:
    if tensor.dtype != dtype or tensor.dim() != 1 or tensor.shape[0] != length:
        raise ArgumentError(
            f"{OP}: {name} must be {checks._name(dtype)} [{length}] for a weight of shape "
            f"[{out_features}, {in_features}], rows padded to a multiple of {TILE_ROWS}; "
            f"got {checks._described(tensor)}"
        )


def reference_linear_4bit_tiled(
    x: Tensor,
    tiled: Tensor,
    absmax: Tensor,
    bias: Tensor | None,
    out_features: int,
    quant_type: str,
    blocksize: int,
    nested_absmax: Tensor | None = None,
    nested_code: Tensor | None = None,
    nested_offset: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    gated: bool = False,
    overlap: bool = False,  # noqa: ARG001
) -> Tensor:
    """`reference.linear_4bit` on the weight put back in rows, in float32 up to the end of the tail."""
    packed, absmax = _rows(tiled, absmax, (out_features, x.shape[-1]), blocksize)
    if nested_absmax is not None and nested_code is not None and nested_offset is not None and nested_offset.dim() == 1:
        absmax = _each_offset(absmax, nested_absmax, nested_code, nested_offset, out_features)
        nested_absmax = nested_code = nested_offset = None
    plain = residual is None and activation is None
    y = reference.linear_4bit(
        x if plain else x.float(),
        packed, absmax, bias, out_features, quant_type, blocksize, nested_absmax, nested_code, nested_offset,
    )  # fmt: skip
    return y if plain else tail.apply_tail(y, residual, activation, gated, x.dtype)


def fake_linear_4bit_tiled(
    x: Tensor,
    tiled: Tensor,  # noqa: ARG001
    absmax: Tensor,  # noqa: ARG001
    bias: Tensor | None,  # noqa: ARG001
    out_features: int,
    *options: Any,
    gated: bool = False,
    **more: Any,  # noqa: ARG001
) -> Tensor:
    """Shape and dtype of the result."""
    gated = bool(options[7]) if len(options) > 7 else gated
    return x.new_empty(*x.shape[:-1], tail.out_features(out_features, gated))


def _rows(tiled: Tensor, absmax: Tensor, shape: tuple[int, int], blocksize: int) -> tuple[Tensor, Tensor]:
    return untile_codes(tiled, *shape), untile_scales(absmax, *shape, blocksize)


def _each_offset(absmax: Tensor, nested_absmax: Tensor, nested_code: Tensor, offsets: Tensor, rows: int) -> Tensor:
    """float32 scales in rows, from codes in rows and an offset for each 16 rows of W."""
    plain = dequantize_absmax(NestedAbsmax(absmax, nested_absmax, nested_code, offsets.new_zeros(())))
    return (plain.view(rows, -1) + offsets.repeat_interleave(TILE_ROWS)[:rows, None]).view(-1)


_linear_4bit_tiled = bind(
    f"{OP}(Tensor x, Tensor tiled, Tensor absmax, Tensor? bias, SymInt out_features, str quant_type, int blocksize,"
    f" {NESTED}, Tensor? residual=None, str? activation=None, bool gated=False, bool overlap=False) -> Tensor",
    check=check_linear_4bit_tiled,
    fake=fake_linear_4bit_tiled,
    plain=reference_linear_4bit_tiled,
    cuda="onegpu.kernels.matmul_4bit_tiled",
)


def setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001, passed by name
    x, tiled, absmax, bias, out_features, quant_type, blocksize, *nested, residual, activation, _, _ = inputs
    # The tail of a product that needs gradients is computed after it, see `linear_4bit_tiled`.
    assert residual is None
    assert activation is None
    ctx.save_for_backward(tiled, absmax, *nested)
    ctx.shape = (out_features, x.shape[-1])
    ctx.quant_type, ctx.blocksize = quant_type, blocksize
    ctx.x_dtype, ctx.bias_dtype = x.dtype, None if bias is None else bias.dtype


def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of x and bias; W is put back in rows and dequantized rather than kept."""
    tiled, absmax, *nested = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        packed, absmax = _rows(tiled, absmax, ctx.shape, ctx.blocksize)
        if nested[2] is not None and nested[2].dim() == 1:
            absmax = _each_offset(absmax, nested[0], nested[1], nested[2], ctx.shape[0])
            nested = [None] * 3
        weight = dequantize_4bit(packed, absmax, ctx.shape, ctx.x_dtype, ctx.quant_type, ctx.blocksize, *nested)
        grad_x = grad @ weight
    if ctx.needs_input_grad[3]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(dim=0, dtype=torch.float32).to(ctx.bias_dtype)
    return grad_x, None, None, grad_bias, *(None,) * 10


torch.library.register_autograd(f"onegpu::{OP}", backward, setup_context=setup, lib=LIBRARY)


def linear_4bit_tiled(
    x: Tensor,
    tiled: Tensor,
    absmax: Tensor,
    bias: Tensor | None,
    out_features: int,
    quant_type: str,
    blocksize: int,
    nested_absmax: Tensor | None = None,
    nested_code: Tensor | None = None,
    nested_offset: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    gated: bool = False,
    overlap: bool = False,
) -> Tensor:
    """x @ W.T + bias and what follows it, for a 4-bit weight W of shape [N, K] in tile order.

    Made for up to 32 rows of x. Never less accurate than dequantizing W to the dtype of x and multiplying.
    Differentiable in x, bias and residual.

    Args:
        x: [..., K], bfloat16, float16 or float32; any number of rows, also none. K is a multiple of 64.
        tiled: uint8 [ceil(N / 16) * K * 8] of `onegpu.formats.tiling.tile_codes`.
        absmax: float32, or uint8 with the three nested tensors, of `onegpu.formats.tiling.tile_scales`.
        bias: [N] in a floating dtype, or None.
        out_features: N.
        blocksize: divides K.
        nested_absmax, nested_code, nested_offset: as `linear_4bit` takes them; only absmax is in tile order. Weights
            quantized apart and joined have an offset for each 16 rows: nested_offset [ceil(N / 16)].
        residual: added at the end, of the result's shape and dtype.
        activation, gated: as `onegpu.kernels.tail` says; gated rows of W are all gates, then all they multiply.
        overlap: the kernel may read weights while those before it on the stream still run. Only where none of these
            writes the weight: a product lets the next one begin, whatever its own `overlap`. Without effect below
            compute capability 9.0.

    Returns:
        [..., N], or [..., N / 2] if gated, in the dtype of x.

    Raises:
        ArgumentError, ConfigError, DeviceError: as `linear_4bit`; also for a shape that cannot be tiled.
    """
    has_tail = residual is not None or activation is not None
    weight = (tiled, absmax, bias, out_features, quant_type, blocksize, nested_absmax, nested_code, nested_offset)
    if has_tail and torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, bias, residual)):
        tail.check_tail(OP, x, out_features, residual, activation, gated)
        t = _linear_4bit_tiled(x, *weight, None, None, False, overlap)
        return tail.apply_tail(t.float(), residual, activation, gated, x.dtype)
    y: Tensor
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        y = _linear_4bit_tiled(x, *weight, residual, activation, gated, overlap)
    else:
        # Past the Python in which torch would find out that there is nothing to keep for a backward.
        with torch._C._AutoDispatchBelowAutograd():
            y = _linear_4bit_tiled(x, *weight, residual, activation, gated, overlap)
    return y
