"""The operators of a decode step outside attention: products with a tail (`tail`), and RMSNorm.

    linear_16bit        x @ W.T for a 16-bit W
    linear_8bit_rows    x @ (codes * row_stats / 127).T, x as it is: LLM.int8() without rounding x

Bound like those in `ops`: a check, shapes for tracing, the torch reference as the CPU implementation and as what a GPU
without Triton runs, the Triton launcher elsewhere. All are right for any number of rows and made for few. None has a
gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from onegpu.errors import ArgumentError
from onegpu.formats.rowwise import INVERSE_127
from onegpu.kernels import checks
from onegpu.kernels.ops import bind
from onegpu.kernels.reference import CHUNK
from onegpu.kernels.tail import apply_tail, check_tail, out_features

__all__ = [
    "linear_8bit_rows",
    "linear_16bit",
    "reference_linear_8bit_rows",
    "reference_linear_16bit",
    "reference_rms_norm",
    "rms_norm",
]


def check_linear_16bit(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    gated: bool = False,
    overlap: bool = False,  # noqa: ARG001
) -> None:
    op = "linear_16bit"
    K = checks._input(op, x)
    if weight.dtype != x.dtype or weight.dim() != 2 or weight.shape[0] < 1 or weight.shape[1] != K:
        raise ArgumentError(
            f"{op}: weight must be {checks._name(x.dtype)} [N, {K}] for x of shape {list(x.shape)}; "
            f"got {checks._described(weight)}"
        )
    _check_rest(op, x, weight, bias, residual, activation, gated)


def check_linear_8bit_rows(
    x: Tensor,
    codes: Tensor,
    row_stats: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    gated: bool = False,
    overlap: bool = False,  # noqa: ARG001
) -> None:
    op = "linear_8bit_rows"
    checks._row_codes(op, x, codes, row_stats)
    _check_rest(op, x, codes, bias, residual, activation, gated)


def _check_rest(
    op: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    gated: bool,
) -> None:
    checks._bias(op, x, bias, weight.shape[0])
    check_tail(op, x, weight.shape[0], residual, activation, gated)
    checks._same_device(op, "x", x, weight=weight)
    if residual is not None:
        checks._same_device(op, "x", x, residual=residual)


def check_rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0, overlap: bool = False) -> None:  # noqa: ARG001
    op = "rms_norm"
    K = checks._input(op, x)
    checks._float(op, "weight", weight)
    if weight.shape != (K,):
        raise ArgumentError(f"{op}: weight must be [{K}] for x of shape {list(x.shape)}; got {list(weight.shape)}")
    if not eps >= 0:
        raise ArgumentError(f"{op}: eps must not be negative; got {eps}")
    checks._same_device(op, "x", x, weight=weight)


def fake_linear_16bit(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    gated = len(rest) > 3 and rest[3]
    return x.new_empty((*x.shape[:-1], out_features(weight.shape[0], gated)))


def fake_linear_8bit_rows(x: Tensor, codes: Tensor, _row_stats: Tensor, *rest: Any) -> Tensor:
    return fake_linear_16bit(x, codes, *rest)


def reference_linear_16bit(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    gated: bool = False,
    overlap: bool = False,  # noqa: ARG001
) -> Tensor:
    """The definition of `tail` on a float32 product, a few rows of W at a time."""
    if activation is None and residual is None and (bias is None or bias.dtype == x.dtype):
        # Sums in float32 and rounds once too, without a float32 copy of W.
        return F.linear(x, weight, bias)
    t = torch.empty(*x.shape[:-1], weight.shape[0], dtype=torch.float32, device=x.device)
    for part in _row_chunks(weight):
        t[..., part] = F.linear(x.float(), weight[part].float())
    if bias is not None:
        t += bias
    return apply_tail(t, residual, activation, gated, x.dtype)


def reference_linear_8bit_rows(
    x: Tensor,
    codes: Tensor,
    row_stats: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    gated: bool = False,
    overlap: bool = False,  # noqa: ARG001
) -> Tensor:
    """The definition of `tail` on t = (x @ codes.T) * row_stats * (1 / 127) + bias, the product in float32."""
    t = torch.empty(*x.shape[:-1], codes.shape[0], dtype=torch.float32, device=x.device)
    for part in _row_chunks(codes):
        t[..., part] = F.linear(x.float(), codes[part].float())
    t *= row_stats * INVERSE_127
    if bias is not None:
        t += bias
    return apply_tail(t, residual, activation, gated, x.dtype)


def _row_chunks(weight: Tensor) -> Iterator[slice]:
    N, K = weight.shape
    step = max(1, CHUNK // K)
    for first in range(0, N, step):
        yield slice(first, min(first + step, N))


def reference_rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0, overlap: bool = False) -> Tensor:  # noqa: ARG001
    """Statistics in float32; without an offset, rows are rounded before they meet the weight (see `rms_norm`)."""
    values = x.float()
    normalized = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + eps)
    if offset == 0:
        normalized = normalized.to(x.dtype).float()
    return (normalized * (weight.float() + offset)).to(x.dtype)


TAIL = "Tensor? bias=None, Tensor? residual=None, str? activation=None, bool gated=False, bool overlap=False"

_linear_16bit = bind(
    f"linear_16bit(Tensor x, Tensor weight, {TAIL}) -> Tensor",
    check=check_linear_16bit,
    fake=fake_linear_16bit,
    plain=reference_linear_16bit,
    cuda="onegpu.kernels.gemv_16bit",
)
_linear_8bit_rows = bind(
    f"linear_8bit_rows(Tensor x, Tensor codes, Tensor row_stats, {TAIL}) -> Tensor",
    check=check_linear_8bit_rows,
    fake=fake_linear_8bit_rows,
    plain=reference_linear_8bit_rows,
    cuda="onegpu.kernels.gemv_8bit",
)
_rms_norm = bind(
    "rms_norm(Tensor x, Tensor weight, float eps, float offset=0.0, bool overlap=False) -> Tensor",
    check=check_rms_norm,
    fake=lambda x, *_: x.new_empty(x.shape),
    plain=reference_rms_norm,
    cuda="onegpu.kernels.rms",
)


def linear_16bit(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    gated: bool = False,
    overlap: bool = False,
) -> Tensor:
    """x @ W.T with a tail (see `onegpu.kernels.tail`): sums in float32, one rounding. No gradient.

    Args:
        x: [..., K], bfloat16, float16 or float32; any number of rows, also none.
        weight: [N, K] in the dtype of x.
        bias: [N] in a floating dtype, or None.
        residual: added at the end, in the dtype and shape of the result; or None.
        activation: `silu`, `gelu`, `gelu_tanh`, `relu` or None.
        gated: the first N/2 rows of W are the gate, which alone goes through the activation, and multiplies the rest.
        overlap: the kernel may read weights while those before it on the stream still run. Only where none of these
            writes the weight: a product lets the next one begin, whatever its own `overlap`. Without effect below
            compute capability 9.0.

    Returns:
        [..., N], or [..., N/2] if gated, in the dtype of x.

    Raises:
        ArgumentError: a dtype, shape or activation that does not fit.
        DeviceError: tensors on different devices.
    """
    y: Tensor = _linear_16bit(x, weight, bias, residual, activation, gated, overlap)
    return y


def linear_8bit_rows(
    x: Tensor,
    codes: Tensor,
    row_stats: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    gated: bool = False,
    overlap: bool = False,
) -> Tensor:
    """x @ W.T with a tail, W = codes * row_stats / 127 exactly and x as it is. No gradient.

    At few rows LLM.int8() (arXiv 2208.07339) is bound by reading W, so that x need not be rounded to int8: outliers
    are exact for nothing, and a row's result does not depend on the other rows of a call.

    Args:
        x: [..., K], bfloat16, float16 or float32; any number of rows, also none.
        codes: int8 [N, K]; row_stats: float32 [N].
        bias, residual, activation, gated, overlap: as `linear_16bit`.

    Returns:
        [..., N], or [..., N/2] if gated, in the dtype of x.

    Raises:
        ArgumentError, DeviceError: as `linear_16bit`.
    """
    y: Tensor = _linear_8bit_rows(x, codes, row_stats, bias, residual, activation, gated, overlap)
    return y


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0, overlap: bool = False) -> Tensor:
    """RMSNorm (arXiv 1910.07467) over the last dimension, with float32 statistics. No gradient.

    With r = 1 / sqrt(mean(x * x) + eps): round(weight * round(x * r)) without an offset, as Llama has it;
    round(x * r * (offset + weight)) with one, as Gemma has it with offset 1.

    Args:
        x: [..., K], bfloat16, float16 or float32.
        weight: [K] in a floating dtype.
        offset: added to the weight.
        overlap: the kernel may begin while the one before it on the stream still runs; see `linear_16bit`.

    Returns:
        [..., K] in the dtype of x.

    Raises:
        ArgumentError, DeviceError: tensors that do not fit together.
    """
    y: Tensor = _rms_norm(x, weight, eps, offset, overlap)
    return y
