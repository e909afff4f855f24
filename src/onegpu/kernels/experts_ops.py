"""The operators `experts_4bit` and `experts_8bit`: each row of x through the experts chosen for it, by stacked weights.

Bound like those in `ops`. The reference takes one expert after another in float32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

from onegpu.errors import ArgumentError, UnsupportedError
from onegpu.formats import blockwise, rowwise
from onegpu.kernels import checks
from onegpu.kernels.ops import NESTED, bind
from onegpu.kernels.reference import _plain_absmax

__all__ = ["experts_4bit", "experts_8bit", "why_not_experts"]

# Kernels count the weights of one expert in 32 bits.
LARGEST_EXPERT = 2**31


def why_not_experts(shape: tuple[int, ...], quant_type: str, blocksize: int) -> str | None:
    """None where the operators take a stacked weight [E, N, K] of this format, else the reason in a sentence."""
    _, N, K = shape
    if quant_type != "int8" and K % blocksize:
        return f"in_features {K} is no multiple of blocksize {blocksize}, so blocks straddle rows"
    if N * K >= LARGEST_EXPERT:
        return f"an expert of {N} x {K} weights is more than 32-bit offsets reach"
    return None


def check_experts_4bit(
    x: Tensor,
    expert_ids: Tensor,
    packed: Tensor,
    absmax: Tensor,
    num_experts: int,
    out_features: int,
    quant_type: str,
    blocksize: int,
    nested_absmax: Tensor | None = None,
    nested_code: Tensor | None = None,
    nested_offset: Tensor | None = None,
) -> None:
    op = "experts_4bit"
    K = _rows(op, x, expert_ids)
    if num_experts < 1 or out_features < 1:
        raise ArgumentError(
            f"{op}: num_experts and out_features must be at least 1; got {num_experts} and {out_features}"
        )
    checks._format(quant_type, blocksize)
    shape = (num_experts, out_features, K)
    _stack(op, shape, quant_type, blocksize)
    checks._same_device(op, "x", x, expert_ids=expert_ids, packed=packed)
    n = num_experts * out_features * K
    checks._packed_weight(op, packed, absmax, n, shape, blocksize, nested_absmax, nested_code, nested_offset)


def check_experts_8bit(x: Tensor, expert_ids: Tensor, codes: Tensor, row_stats: Tensor) -> None:
    op = "experts_8bit"
    K = _rows(op, x, expert_ids)
    if codes.dtype != torch.int8 or codes.dim() != 3 or codes.shape[-1] != K or 0 in codes.shape:
        raise ArgumentError(
            f"{op}: codes must be int8 [E, N, {K}] for x of shape {list(x.shape)}; got {checks._described(codes)}"
        )
    if row_stats.dtype != torch.float32 or row_stats.shape != codes.shape[:2]:
        raise ArgumentError(
            f"{op}: row_stats must be float32 {list(codes.shape[:2])}, one per row of codes; "
            f"got {checks._described(row_stats)}"
        )
    _stack(op, tuple(codes.shape), "int8", 1)
    checks._same_device(op, "x", x, expert_ids=expert_ids, codes=codes, row_stats=row_stats)


def _rows(op: str, x: Tensor, expert_ids: Tensor) -> int:
    K = checks._input(op, x)
    if x.dim() != 2:
        raise ArgumentError(f"{op}: x must be a matrix [T, K]; got shape {list(x.shape)}")
    integer = expert_ids.dtype in (torch.int32, torch.int64)
    if not integer or expert_ids.dim() not in (1, 2) or expert_ids.shape[0] != x.shape[0]:
        T = x.shape[0]
        raise ArgumentError(
            f"{op}: expert_ids must be int32 or int64 [{T}] or [{T}, k] for x of shape {list(x.shape)}; "
            f"got {checks._described(expert_ids)}"
        )
    return K


def _stack(op: str, shape: tuple[int, ...], quant_type: str, blocksize: int) -> None:
    reason = why_not_experts(shape, quant_type, blocksize)
    if reason is not None:
        raise ArgumentError(f"{op}: {reason}", "dequantize the experts instead")


def reference_experts_4bit(
    x: Tensor,
    expert_ids: Tensor,
    packed: Tensor,
    absmax: Tensor,
    num_experts: int,
    out_features: int,
    quant_type: str,
    blocksize: int,
    nested_absmax: Tensor | None = None,
    nested_code: Tensor | None = None,
    nested_offset: Tensor | None = None,
) -> Tensor:
    """Weights, products and sums in float32, rounded once to the dtype of x; zeros for an expert there is not."""
    shape = (out_features, x.shape[1])
    codes = packed.view(num_experts, -1)
    scales = _plain_absmax(absmax, nested_absmax, nested_code, nested_offset).view(num_experts, -1)

    def weight(expert: int) -> Tensor:
        return blockwise.dequantize_4bit(codes[expert], scales[expert], shape, torch.float32, quant_type, blocksize)

    return _expert_by_expert(x, expert_ids, num_experts, out_features, weight)


def reference_experts_8bit(x: Tensor, expert_ids: Tensor, codes: Tensor, row_stats: Tensor) -> Tensor:
    """As `reference_experts_4bit`, for int8 rows; x stays as it is."""

    def weight(expert: int) -> Tensor:
        return rowwise.dequantize_rows(codes[expert], row_stats[expert], torch.float32)

    return _expert_by_expert(x, expert_ids, codes.shape[0], codes.shape[1], weight)


def _expert_by_expert(
    x: Tensor, expert_ids: Tensor, num_experts: int, out_features: int, weight: Callable[[int], Tensor]
) -> Tensor:
    ids = expert_ids.reshape(-1)
    y = x.new_zeros(ids.numel(), out_features)
    if ids.numel() == 0:
        return y
    top_k = ids.numel() // x.shape[0]
    if x.device.type == "cpu":
        for expert in sorted({*ids.tolist()} & {*range(num_experts)}):
            pairs = (ids == expert).nonzero().view(-1)
            y[pairs] = linear(x[pairs // top_k].float(), weight(expert)).to(x.dtype)
        return y
    # Without asking a device which were chosen: every row through every expert.
    rows = x.float()
    for expert in range(num_experts):
        all_rows = linear(rows, weight(expert)).to(x.dtype).repeat_interleave(top_k, dim=0)
        y = torch.where((ids == expert)[:, None], all_rows, y)
    return y


def fake_experts_4bit(
    x: Tensor,
    expert_ids: Tensor,
    packed: Tensor,  # noqa: ARG001
    absmax: Tensor,  # noqa: ARG001
    num_experts: int,  # noqa: ARG001
    out_features: int,
    *_: object,
) -> Tensor:
    """Shape and dtype of the result."""
    return x.new_empty(expert_ids.numel(), out_features)


def fake_experts_8bit(x: Tensor, expert_ids: Tensor, codes: Tensor, row_stats: Tensor) -> Tensor:  # noqa: ARG001
    """Shape and dtype of the result."""
    return x.new_empty(expert_ids.numel(), codes.shape[1])


_experts_4bit = bind(
    "experts_4bit(Tensor x, Tensor expert_ids, Tensor packed, Tensor absmax, SymInt num_experts, SymInt out_features,"
    f" str quant_type, int blocksize, {NESTED}) -> Tensor",
    check=check_experts_4bit,
    fake=fake_experts_4bit,
    plain=reference_experts_4bit,
    cuda="onegpu.kernels.experts",
)
_experts_8bit = bind(
    "experts_8bit(Tensor x, Tensor expert_ids, Tensor codes, Tensor row_stats) -> Tensor",
    check=check_experts_8bit,
    fake=fake_experts_8bit,
    plain=reference_experts_8bit,
    cuda="onegpu.kernels.experts",
)


def experts_4bit(
    x: Tensor,
    expert_ids: Tensor,
    packed: Tensor,
    absmax: Tensor,
    num_experts: int,
    out_features: int,
    quant_type: str,
    blocksize: int,
    nested_absmax: Tensor | None = None,
    nested_code: Tensor | None = None,
    nested_offset: Tensor | None = None,
) -> Tensor:
    """Each row of x times the 4-bit weights of the experts chosen for it.

    Never less accurate than dequantizing the weights to the dtype of x and multiplying. The host does not learn which
    experts were chosen, so that a CUDA graph can hold the call. No gradients.

    Args:
        x: [T, K], bfloat16, float16 or float32; K a multiple of blocksize.
        expert_ids: int32 or int64 [T, k], or [T] for k = 1; a number that is no expert's gives zeros.
        packed: uint8 [E * N * K / 2], the weights [E, N, K] quantized one expert at a time.
        absmax: float32 [E * N * K / blocksize], or uint8 with the three nested tensors, as `dequantize_4bit` has them.
        num_experts: E. out_features: N.

    Returns:
        [T * k, N] in the dtype of x: row t * k + j is x[t] through expert expert_ids[t, j].

    Raises:
        ArgumentError, ConfigError, DeviceError: as `linear_4bit`.
        UnsupportedError: x needs a gradient.
    """
    _refuse_gradient("experts_4bit", x)
    y: Tensor = _experts_4bit(
        x, expert_ids, packed, absmax, num_experts, out_features, quant_type, blocksize, nested_absmax, nested_code,
        nested_offset,
    )  # fmt: skip
    return y


def experts_8bit(x: Tensor, expert_ids: Tensor, codes: Tensor, row_stats: Tensor) -> Tensor:
    """Each row of x times the int8 weights of the experts chosen for it; x is not quantized.

    Args:
        x, expert_ids: as `experts_4bit` takes them; any K.
        codes: int8 [E, N, K]; row_stats: float32 [E, N], of `quantize_8bit_rows`.

    Returns:
        As `experts_4bit`.

    Raises:
        ArgumentError, DeviceError: a tensor that does not fit.
        UnsupportedError: x needs a gradient.
    """
    _refuse_gradient("experts_8bit", x)
    y: Tensor = _experts_8bit(x, expert_ids, codes, row_stats)
    return y


def _refuse_gradient(op: str, x: Tensor) -> None:
    if x.requires_grad and torch.is_grad_enabled():
        raise UnsupportedError(
            f"{op} has no gradient, and x needs one", "dequantize the experts, or call it under torch.no_grad()"
        )
