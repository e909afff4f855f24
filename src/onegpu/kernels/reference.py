"""What each operator means, in plain torch: the CPU implementation, and the oracle that kernels are tested against.

Quantizing and dequantizing are defined by `onegpu.formats`; the two products are defined here.

    linear_4bit    y = round(sum_k x[k] * (code[q] * absmax) + bias)
    linear_8bit    y = round(((acc * row_stat_x) * row_stat_w) * (1 / 16129)
                             + (outliers * row_stat_w) * (1 / 127) + bias)

All in float32 and rounded once, to the dtype of x; `acc` is an exact int32 product of int8 codes. Rows of the weight
are decoded in chunks, so that what is needed beyond input and output stays small. Nothing waits for a device.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from onegpu.formats import blockwise, rowwise

__all__ = [
    "dequantize_4bit",
    "int8_product",
    "linear_4bit",
    "linear_8bit",
    "quantize_4bit",
    "quantize_8bit_rows",
]

# 1 / (127 * 127) in float32: two codes of 127 stand for a product of 1.
INVERSE_16129 = 6.2000122852623463e-05
# Decoded weights per chunk: 4 MiB of float32, which stay in a core's cache until the product has read them.
CHUNK = 2**20
# From so many rows on, bfloat16 uses the processor's own bfloat16 product where it has one.
BFLOAT16_ROWS = 32
# |int8 * int8| <= 2**14, so sums of 2**10 products are exact in float32.
EXACT_DEPTH = 2**10


def quantize_4bit(
    weight: Tensor, quant_type: str, blocksize: int, scale_search: bool = False, importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See `onegpu.formats.blockwise.quantize_4bit`; the scales are the block maxima or searched for."""
    return blockwise.quantize_4bit(weight, quant_type, blocksize, scale_search=scale_search, importance=importance)


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
) -> Tensor:
    """See `onegpu.formats.blockwise.dequantize_4bit`; nested scales are decoded first."""
    absmax = _plain_absmax(absmax, nested_absmax, nested_code, nested_offset)
    return blockwise.dequantize_4bit(packed, absmax, shape, dtype, quant_type, blocksize)


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
) -> Tensor:
    """x @ W.T + bias in float32 for a 4-bit W, rounded once to the dtype of x.

    One departure, for speed (2.4 times at 512 rows of 4096 x 4096): bfloat16 x of 32 rows and more, on a CPU that
    multiplies bfloat16 natively, meets weights rounded to bfloat16 first. That is dequantizing and then multiplying,
    and as accurate; sums stay float32.

    Args:
        x: [..., K], any floating dtype.
        packed, absmax, nested_*: the weight [N, K], N = `out_features`.
        bias: [N] or None.

    Returns:
        [..., N] in the dtype of x.
    """
    rows = x.reshape(-1, x.shape[-1])
    absmax = _plain_absmax(absmax, nested_absmax, nested_code, nested_offset)
    native = x.dtype == torch.bfloat16 and len(rows) >= BFLOAT16_ROWS and x.device.type == "cpu" and _fast_bfloat16()
    dtype = torch.bfloat16 if native else torch.float32
    rows = rows.to(dtype)
    bias = None if bias is None else bias.to(dtype) if native and bias.dtype == dtype else bias.float()
    y = torch.empty(len(rows), out_features, dtype=x.dtype, device=x.device)
    for first, last in _row_chunks(out_features, x.shape[-1], blocksize):
        weight = _dequantize_rows(packed, absmax, first, last, x.shape[-1], dtype, quant_type, blocksize)
        if bias is None or bias.dtype == dtype:
            y[:, first:last] = linear(rows, weight, None if bias is None else bias[first:last])
        else:
            y[:, first:last] = linear(rows, weight).float() + bias[first:last]
    return y.view(*x.shape[:-1], out_features)


def quantize_8bit_rows(x: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """See `onegpu.formats.rowwise.quantize_rows`."""
    codes, row_stats, outlier_cols = rowwise.quantize_rows(x, threshold)
    return codes, row_stats, outlier_cols


def linear_8bit(x: Tensor, codes: Tensor, row_stats: Tensor, bias: Tensor | None, threshold: float = 0.0) -> Tensor:
    """LLM.int8() (arXiv 2208.07339): x @ W.T + bias for int8 rows of W, x quantized to int8 rows on the way.

    Columns of x with an element of magnitude `threshold` or more, in any row of the call, are left out of the int8
    product; there x keeps its own dtype and meets the dequantized column of W.

    Args:
        x: [..., K], any floating dtype.
        codes: int8 [N, K]; row_stats: float32 [N], the weight's row maxima.
        bias: [N] or None.
        threshold: 0 for no outlier columns.

    Returns:
        [..., N] in the dtype of x.
    """
    rows = x.reshape(-1, x.shape[-1])
    x_codes, x_stats, outlier_cols = rowwise.quantize_rows(rows, threshold)
    outliers, columns = _outliers(rows, outlier_cols) if threshold > 0 else (None, None)
    N = codes.shape[0]
    y = torch.empty(len(rows), N, dtype=x.dtype, device=x.device)
    # The int32 and float32 results are four bytes each, so they too are made a few columns at a time.
    step = max(1, 16 * CHUNK // max(1, len(rows)))
    for first in range(0, N, step):
        part = slice(first, min(first + step, N))
        out = int8_product(x_codes, codes[part]).float().mul_(x_stats[:, None])
        out = out.mul_(row_stats[part]).mul_(INVERSE_16129)
        if outliers is not None:
            weight = codes[part] if columns is None else codes[part][:, columns]
            out += linear(outliers, weight.float()).mul_(row_stats[part]).mul_(rowwise.INVERSE_127)
        if bias is not None:
            out += bias[part].float()
        y[:, part] = out
    return y.view(*x.shape[:-1], N)


def int8_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b.T for int8 [M, K] and [N, K], exactly: int32 [M, N]. Right for K up to 131,071."""
    M, K = a.shape
    N = b.shape[0]
    if M == 0:
        return torch.empty(0, N, dtype=torch.int32, device=a.device)
    if a.device.type == "cpu" and not _int_mm_is_exact():
        out = torch.zeros(M, N, dtype=torch.int32)
        for first in range(0, K, EXACT_DEPTH):
            part = slice(first, first + EXACT_DEPTH)
            out += linear(a[:, part].float(), b[:, part].float()).to(torch.int32)
        return out
    # cuBLAS takes more than 16 rows and multiples of 8; one of oneDNN's kernels is wrong at depth 1.
    more = 0 if a.device.type == "cpu" else max(0, 32 - M)
    a = pad(a, (0, -K % 8, 0, more))
    b = pad(b, (0, -K % 8, 0, 0 if a.device.type == "cpu" else -N % 8))
    return torch._int_mm(a, b.t())[:M, :N]


def _plain_absmax(
    absmax: Tensor, nested_absmax: Tensor | None, nested_code: Tensor | None, nested_offset: Tensor | None
) -> Tensor:
    if nested_absmax is None or nested_code is None or nested_offset is None:
        return absmax
    return blockwise.dequantize_absmax(blockwise.NestedAbsmax(absmax, nested_absmax, nested_code, nested_offset))


def _row_chunks(N: int, K: int, blocksize: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows that begin on a block boundary of the flat weight, hence on a byte boundary too."""
    aligned = blocksize // math.gcd(K, blocksize)
    step = max(aligned, CHUNK // K // aligned * aligned)
    for first in range(0, N, step):
        yield first, min(first + step, N)


def _dequantize_rows(
    packed: Tensor, absmax: Tensor, first: int, last: int, K: int, dtype: torch.dtype, quant_type: str, blocksize: int
) -> Tensor:
    start, stop = first * K, last * K
    return blockwise.dequantize_4bit(
        packed[start // 2 : -(-stop // 2)],
        absmax[start // blocksize : -(-stop // blocksize)],
        (last - first, K),
        dtype,
        quant_type,
        blocksize,
    )


def _outliers(rows: Tensor, outlier_cols: Tensor) -> tuple[Tensor, Tensor | None]:
    """The outlier columns in float32, and which they are; on a GPU all columns, so that nothing waits for a count."""
    if rows.device.type == "cpu":
        columns = outlier_cols.nonzero().view(-1)
        return rows[:, columns].float(), columns
    return torch.where(outlier_cols, rows, 0).float(), None


@functools.cache
def _fast_bfloat16() -> bool:
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, bool)() for probe in probes)


@functools.cache
def _int_mm_is_exact() -> bool:
    """Whether int8 products come out whole here: without VNNI, pairs of products may saturate at 16 bits."""
    a = torch.tensor([-128, 127, -127], dtype=torch.int8)[:, None].expand(3, 256).contiguous()
    expected = linear(a.float(), a.float()).to(torch.int32)
    return torch.equal(torch._int_mm(a, a.t()), expected)
