"""Row-wise int8 of LLM.int8() (arXiv 2208.07339): one scale per row, and columns that stay out of it.

The same rule serves weights and activations, and goes through float16 first, as bitsandbytes' files do:

    a     = row in float16, saturating at +-65504
    stat  = max |a| over the row
    scale = (1 / stat) * 127         two float32 roundings
    code  = round-half-even(a * scale)

With a threshold, an element of magnitude >= threshold (after the float16 cast; the threshold rounded to float16
too) is an outlier. Outlier elements do not count for their row's stat, and every column that holds one, in any row,
gets code 0 throughout; its smaller elements still counted for their rows' stats.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from onegpu.errors import ArgumentError
from onegpu.formats.blockwise import CHUNK, FLOAT16_MAX
from onegpu.formats.codebooks import reciprocal

__all__ = ["INVERSE_127", "RowQuantized", "dequantize_rows", "quantize_rows"]

INVERSE_127 = 0.007874015718698502  # 1 / 127 in float32


class RowQuantized(NamedTuple):
    """Rows in int8: `codes * row_stats / 127`, without the outlier columns."""

    codes: Tensor  # int8 [M, K]
    row_stats: Tensor  # float32 [M], the largest magnitude that counted
    outlier_cols: Tensor  # bool [K]


def quantize_rows(x: Tensor, threshold: float = 0.0) -> RowQuantized:
    """Quantize the rows of a matrix to int8.

    Args:
        x: float32, float16 or bfloat16 [M, K]. Magnitudes above 65504 count as 65504; a NaN makes its row's stat
            NaN, so that it shows in whatever is computed from it.
        threshold: outlier magnitude; 0 for none. Weights take 0.

    Raises:
        ArgumentError: another rank or dtype, or a negative threshold.
    """
    if x.dim() != 2 or not x.is_floating_point():
        raise ArgumentError(f"x must be a floating-point matrix [M, K]; got {x.dtype} of shape {list(x.shape)}")
    if not threshold >= 0:
        raise ArgumentError(f"threshold must not be negative; got {threshold}")
    M, K = x.shape
    codes = torch.empty(M, K, dtype=torch.int8, device=x.device)
    row_stats = torch.zeros(M, dtype=torch.float32, device=x.device)
    outlier_cols = torch.zeros(K, dtype=torch.bool, device=x.device)
    if M == 0 or K == 0:
        return RowQuantized(codes, row_stats, outlier_cols)
    # The largest float16 stands for "above every value": saturated elements are outliers of any threshold.
    limit = float(torch.tensor(min(threshold, FLOAT16_MAX), dtype=torch.float16))
    rows = max(1, CHUNK // K)
    for start in range(0, M, rows):
        a = _to_float16(x[start : start + rows])
        if threshold > 0:
            is_outlier = a.abs() >= limit
            outlier_cols |= is_outlier.any(dim=0)
            a = a.masked_fill_(is_outlier, 0.0)
        stat = a.abs().amax(dim=1)
        row_stats[start : start + rows] = stat
        scaled = a.mul_((reciprocal(stat) * 127.0)[:, None])
        codes[start : start + rows] = scaled.round_().nan_to_num_(nan=0.0).to(torch.int8)
    if threshold > 0:
        codes *= ~outlier_cols
    return RowQuantized(codes, row_stats, outlier_cols)


def dequantize_rows(codes: Tensor, row_stats: Tensor, dtype: torch.dtype) -> Tensor:
    """The matrix that int8 rows stand for: (codes * row_stats) * (1 / 127) in float32, rounded once to `dtype`.

    Args:
        codes: int8 [M, K].
        row_stats: float32 [M].

    Raises:
        ArgumentError: a shape or dtype that does not fit.
    """
    if codes.dtype != torch.int8 or codes.dim() != 2:
        raise ArgumentError(f"codes must be int8 [M, K]; got {codes.dtype} of shape {list(codes.shape)}")
    if row_stats.dtype != torch.float32 or row_stats.shape != codes.shape[:1]:
        raise ArgumentError(
            f"row_stats must be float32 [{codes.shape[0]}]; got {row_stats.dtype} of shape {list(row_stats.shape)}"
        )
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    rows = max(1, CHUNK // max(1, codes.shape[1]))
    for start in range(0, codes.shape[0], rows):
        part = codes[start : start + rows].float()
        out[start : start + rows] = part.mul_(row_stats[start : start + rows, None]).mul_(INVERSE_127)
    return out


def _to_float16(x: Tensor) -> Tensor:
    """A float32 copy of values rounded to float16."""
    return x.detach().float().clamp(-FLOAT16_MAX, FLOAT16_MAX).half().float()
