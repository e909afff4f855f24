"""Errors of the operators against float64, beside those of dequantizing to x's dtype and multiplying with cuBLAS.

Both are |y - exact| / |exact| (Frobenius), exact being x @ W.T in float64 for the W that the stored codes and float32
scales stand for. x and the weights are normal, or heavy-tailed: Student's t with three degrees of freedom. Shapes that
no tile divides are measured too.

LLM.int8() rounds x as well, for many rows: its own definition, in float64 and rounded once, has an error then that no
kernel can be below, and the larger of the two is what it is held to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

from onegpu.bench.kernel_time import first_line, normals
from onegpu.formats import NestedAbsmax, blockwise, dequantize_absmax, quantize_absmax, rowwise, tiling
from onegpu.kernels import linear_4bit, linear_8bit, linear_16bit, quantize_4bit, quantize_8bit_rows

__all__ = ["ALLOWED", "ODD_SHAPES", "measure_errors", "worst"]

ODD_SHAPES: Final = {"odd rows": (4099, 4160), "odd": (1021, 1031)}
INPUTS: Final[dict[str, float | None]] = {"normal": None, "heavy-tailed": 3.0}
DTYPES: Final = (torch.bfloat16, torch.float16)
# What another order of float32 sums may add.
ALLOWED: Final = 1.01
Product = Callable[[Tensor], Tensor]


def measure_errors(
    shapes: Mapping[str, tuple[int, int]],
    rows: Sequence[int],
    device: torch.device,
    progress: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """One row for each operator, shape, dtype, kind of input and M: `error`, `allowed`, `ratio` of the two."""
    results: list[dict[str, Any]] = []
    for shape, (N, K) in shapes.items():
        for kind, freedom in INPUTS.items():
            for dtype in DTYPES:
                weight = (normals(N, K, device, freedom=freedom) / math.sqrt(K)).to(dtype)
                for operator, prepare in operators():
                    here = {"shape": shape, "N": N, "K": K, "inputs": kind, "dtype": str(dtype).removeprefix("torch.")}
                    here["operator"] = operator
                    try:
                        results += errors_of(here, prepare, weight, rows, freedom)
                    except Exception as error:  # one that fails is a row, not the end
                        results.append(here | {"M": 0, "error": None, "note": first_line(error)})
            progress(f"errors: {shape}, {kind}")
    return results


def errors_of(
    here: dict[str, Any],
    prepare: Callable[[Tensor], tuple[Product, Tensor, float | None]],
    weight: Tensor,
    rows: Sequence[int],
    freedom: float | None,
) -> Iterator[dict[str, Any]]:
    product, dense, threshold = prepare(weight)
    wide, rounded = dense.double(), dense.to(weight.dtype)
    for M in rows:
        x = normals(M, weight.shape[1], weight.device, seed=M, freedom=freedom)
        x[:, 5::1024] *= 20
        x = x.to(weight.dtype)
        exact = x.double() @ wide.t()
        with torch.no_grad():
            error = relative(product(x), exact)
        allowed = relative(torch.mm(x, rounded.t()), exact)
        if threshold is not None and weight_only_rows(x) < M:
            allowed = max(allowed, relative((rounded_rows(x, threshold) @ wide.t()).to(x.dtype), exact))
        yield here | {"M": M, "error": error, "allowed": allowed, "ratio": error / allowed, "note": ""}


def relative(y: Tensor, exact: Tensor) -> float:
    return float((y.double() - exact).norm() / exact.norm())


def weight_only_rows(x: Tensor) -> int:
    """Up to how many rows of x `linear_8bit` leaves x as it is."""
    if not x.is_cuda:
        return 0
    from onegpu.kernels.gemv_16bit import few_rows
    from onegpu.kernels.matmul_8bit import WEIGHT_ONLY_ROWS

    return min(WEIGHT_ONLY_ROWS, few_rows(x.device, x.dtype))


def rounded_rows(x: Tensor, threshold: float) -> Tensor:
    """float64: x as LLM.int8() has it, int8 rows and outlier columns as they are."""
    codes, row_stats, outlier_cols = rowwise.quantize_rows(x, threshold)
    return torch.where(outlier_cols, x.double(), codes.double() * row_stats.double()[:, None] / 127)


def operators() -> Iterator[tuple[str, Callable[[Tensor], tuple[Product, Tensor, float | None]]]]:
    """By name: from a weight to the product, the float32 weight it stands for, and the threshold where x is rounded."""
    yield "onegpu nf4", partial(prepare_4bit, "nf4", False)
    yield "onegpu nf4+double", partial(prepare_4bit, "nf4", True)
    yield "onegpu fp4", partial(prepare_4bit, "fp4", False)
    yield "onegpu int8", partial(prepare_8bit, 0.0)
    yield "onegpu int8, outliers", partial(prepare_8bit, 6.0)
    yield "onegpu 16bit", prepare_16bit


def prepare_4bit(quant_type: str, nested: bool, weight: Tensor) -> tuple[Product, Tensor, float | None]:
    """In tile order where the shape has one, in rows elsewhere."""
    from onegpu.kernels.tiled_ops import linear_4bit_tiled

    N, K = weight.shape
    packed, absmax = quantize_4bit(weight, quant_type, 64)
    rest: tuple[Tensor, ...] = ()
    plain = absmax
    if nested:
        absmax, *more = quantize_absmax(absmax)
        rest = tuple(more)
        plain = dequantize_absmax(NestedAbsmax(absmax, *rest))
    dense = blockwise.dequantize_4bit(packed, plain, (N, K), torch.float32, quant_type, 64)
    operator: Callable[..., Tensor] = linear_4bit
    if tiling.why_not_tiled(N, K, 64) is None:
        operator = linear_4bit_tiled
        packed, absmax = tiling.tile_codes(packed, N, K), tiling.tile_scales(absmax, N, K, 64)
    return lambda x: operator(x, packed, absmax, None, N, quant_type, 64, *rest), dense, None


def prepare_8bit(threshold: float, weight: Tensor) -> tuple[Product, Tensor, float | None]:
    codes, row_stats, _ = quantize_8bit_rows(weight)
    dense = rowwise.dequantize_rows(codes, row_stats, torch.float32)
    return lambda x: linear_8bit(x, codes, row_stats, None, threshold), dense, threshold


def prepare_16bit(weight: Tensor) -> tuple[Product, Tensor, float | None]:
    return lambda x: linear_16bit(x, weight), weight, None


def badness(row: Mapping[str, Any]) -> float:
    """NaN is worse than any number."""
    return math.inf if math.isnan(row["ratio"]) else float(row["ratio"])


def worst(results: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """For each operator and M the row whose error is the most of what is allowed; failures all."""
    found: dict[tuple[str, int], Mapping[str, Any]] = {}
    for row in results:
        if row["error"] is None:
            continue
        key = row["operator"], row["M"]
        if key not in found or badness(row) > badness(found[key]):
            found[key] = row
    return [*found.values(), *(row for row in results if row["error"] is None)]
