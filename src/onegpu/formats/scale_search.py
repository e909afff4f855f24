"""Each block's scale by least squared error instead of by its largest weight.

The formats only ever multiply a table value by the stored scale, so a file with better scales is an ordinary file.
Dividing by the maximum lets one outlier decide for its whole block. The search, for one block of weights w with
importance i (1 if not given):

    y      = w * reciprocal(absmax)                          so that |y| <= 1
    plain:   v = nearest(y),  factor 1
    each multiplier k:
             v = nearest(y * k)
             factor = floor(256 * sum(i y v) / sum(i v v) + 1/2) / 256
    error  = sum(i (y - factor v)^2)
    scale  = absmax * factor  of the least error; the earlier wins a tie, plain before all

A multiplier proposes codes; the factor is then the best scale for those codes in closed form, brought to steps of
1/256 so that machines that sum in another order still agree on it to the bit but for near ties. The block is at last
encoded anew with its scale, which can only lower the error again. Plain is always among the candidates and only a
lower error replaces it, so no block gets worse.

The NF4 table has eight values above zero and seven below, so turning it around by a negative scale fits about half of
all blocks better. Readers multiply and never ask for the sign.
"""

from __future__ import annotations

import torch
from torch import Tensor

from onegpu.config import check_choice
from onegpu.formats.codebooks import QUANT_TYPES_4BIT, nearest, reciprocal

__all__ = ["FACTOR_STEPS", "MULTIPLIERS", "multipliers", "search_scale"]

# Exact in float32. Picked greedily on Gaussian weights: each adds most to those before it.
MULTIPLIERS = {
    "nf4": (1.046875, -1.046875, 0.96875, -0.96875, 1.125, -1.125),
    "fp4": (1.09375, 0.984375, 1.1875),
}
FACTOR_STEPS = 256


def multipliers(quant_type: str, signed: bool) -> tuple[float, ...]:
    """The multipliers to try in order; without the negative ones unless `signed`.

    Raises:
        ConfigError: another quant_type.
    """
    check_choice("quant_type", quant_type, QUANT_TYPES_4BIT)
    return tuple(k for k in MULTIPLIERS[quant_type] if signed or k > 0)


def search_scale(
    blocks: Tensor, absmax: Tensor, quant_type: str, *, importance: Tensor | None = None, signed: bool = True
) -> Tensor:
    """The scale of least squared error of each block: float32 [num_blocks].

    Args:
        blocks: float32 [num_blocks, blocksize].
        absmax: float32 [num_blocks], the largest magnitude of each.
        quant_type: `nf4` or `fp4`.
        importance: float32 like `blocks`, weights >= 0 of the squared errors.
        signed: whether a scale may be negative.

    Raises:
        ConfigError: another quant_type.
    """
    y = blocks * reciprocal(absmax)[:, None]
    best = torch.ones_like(absmax)
    least = _error(y, nearest(y, quant_type), best, importance)
    for multiplier in multipliers(quant_type, signed):
        values = nearest(y * multiplier, quant_type)
        weighted = values if importance is None else values * importance
        ratio = (y * weighted).sum(dim=1) / (values * weighted).sum(dim=1)
        factor = torch.floor(ratio * FACTOR_STEPS + 0.5) / FACTOR_STEPS
        error = _error(y, values, factor, importance)
        # A block whose values are all zero has the ratio 0 / 0, and NaN is not less.
        better = error < least
        best = torch.where(better, factor, best)
        least = torch.where(better, error, least)
    return absmax * best


def _error(y: Tensor, values: Tensor, factor: Tensor, importance: Tensor | None) -> Tensor:
    squares = torch.addcmul(y, values, factor[:, None], value=-1).square_()
    return (squares if importance is None else squares.mul_(importance)).sum(dim=1)
