"""Errors of the operators against float64, beside those of dequantizing to x's dtype and multiplying with cuBLAS.

Both are |y - exact| / |exact| (Frobenius), exact being x @ W.T in float64 for the W that the stored codes and float32
scales stand for. x and the weights are normal, or heavy-tailed: Student's t with three degrees of freedom. Shapes that
no tile divides are measured too.

LLM.int8() rounds x as well, for many rows: its own definition, in float64 and rounded once, has an error then that no
kernel can be below, and the larger of the two is what it is held to.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any, Final

import torch
from torch import Tensor

from onegpu.bench.kernel_time import first_line, normals, warm_up_products
from onegpu.formats import NestedAbsmax, blockwise, dequantize_absmax, quantize_absmax, rowwise, tiling
from onegpu.kernels import linear_4bit, linear_8bit, linear_16bit, quantize_4bit, quantize_8bit_rows

__all__ = ["ALLOWED", "ODD_SHAPES", "measure_errors", "worst"]

ODD_SHAPES: Final = {"odd rows": (4099, 4160), "odd": (1021, 1031)}
INPUTS: Final[dict[str, int | None]] = {"normal": None, "heavy-tailed": 3}
DTYPES: Final = (torch.bfloat16, torch.float16)
# What another order of float32 sums may add.
ALLOWED: Final = 1.01
Shapes = Mapping[str, tuple[int, int]]
# A product, the float32 weight that it stands for, and the threshold where x is rounded.
Prepared = tuple[Callable[[Tensor], Tensor], Tensor, float | None]


def measure_errors(
    shapes: Shapes, rows: Sequence[int], device: torch.device, progress: Callable[[str], None] = lambda _: None
) -> list[dict[str, Any]]:
    """One row for each operator, shape, dtype, kind of input and M: `error`, `allowed`, `ratio` of the two.

    float16 is measured at the odd shapes alone: kernels differ by dtype no more than that shows. M rows of x are the
    first M of as many as are measured, so that one exact product serves them all.
    """
    begun = time.perf_counter()

    def say(text: str) -> None:
        progress(f"errors, {time.perf_counter() - begun:.0f} s: {text}")

    if device.type == "cuda":
        say("compiling kernels")
        compile_kernels(shapes, rows, device)
    results: list[dict[str, Any]] = []
    for (shape, (N, K)), (kind, freedom) in product(shapes.items(), INPUTS.items()):
        inputs, weight = drawn(max(rows), N, K, device, freedom)
        for dtype in dtypes_of(shape):
            here = {"shape": shape, "N": N, "K": K, "inputs": kind, "dtype": str(dtype).removeprefix("torch.")}
            found = list(errors_of_all(here, weight.to(dtype), inputs.to(dtype), rows))
            results += found
            say(f"{shape} {N}x{K}, {kind}, {here['dtype']}: {brief(found)}")
    return results


def drawn(M: int, N: int, K: int, device: torch.device, freedom: int | None = None) -> tuple[Tensor, Tensor]:
    """float32 x [M, K], with a few columns of outliers, and W [N, K]."""
    x = normals(M, K, device, seed=1, freedom=freedom)
    x[:, 5::1024] *= 20
    return x, normals(N, K, device, freedom=freedom) / math.sqrt(K)


def dtypes_of(shape: str) -> Sequence[torch.dtype]:
    return DTYPES if shape in ODD_SHAPES else DTYPES[:1]


def compile_kernels(shapes: Shapes, rows: Sequence[int], device: torch.device) -> None:
    """Every kernel of every operator, before anything is measured: the more there are, the more go side by side."""
    products = []
    for shape, (N, K) in shapes.items():
        inputs, weight = drawn(max(rows), N, K, device)
        for dtype in dtypes_of(shape):
            x, narrow = inputs.to(dtype), weight.to(dtype)
            for operator, prepare in operators():
                try:
                    multiply = prepare(narrow)[0]
                except Exception:  # it fails again, and is a row, when it is measured
                    continue
                kind = operator.partition(",")[0], dtype
                products += [(kind, multiply, x[:M]) for M in rows]
    warm_up_products(products)


def brief(found: Sequence[Mapping[str, Any]]) -> str:
    """The worst ratio of each operator, and at how many rows."""
    highest: dict[str, Mapping[str, Any]] = {}
    for row in worst(found):
        name = row["operator"]
        if name not in highest or badness(row) > badness(highest[name]):
            highest[name] = row
    return ", ".join(
        f"{name} {row['note']}" if row["error"] is None else f"{name} {row['ratio']:.3f} at {row['M']}"
        for name, row in highest.items()
    )


def errors_of_all(
    here: dict[str, Any], weight: Tensor, inputs: Tensor, rows: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """Every operator on one weight."""
    for operator, prepare in operators():
        found = here | {"operator": operator}
        try:
            yield from errors_of(found, prepare(weight), inputs, rows)
        except Exception as error:  # one that fails is a row, not the end
            yield found | {"M": 0, "error": None, "note": first_line(error)}


def errors_of(
    here: dict[str, Any], prepared: Prepared, inputs: Tensor, rows: Sequence[int]
) -> Iterator[dict[str, Any]]:
    multiply, dense, threshold = prepared
    wide, narrow = dense.double(), dense.to(inputs.dtype)
    exact_of_all = inputs.double() @ wide.t()
    for M in rows:
        x, exact = inputs[:M], exact_of_all[:M]
        with torch.no_grad():
            error = relative(multiply(x), exact)
        allowed = relative(torch.mm(x, narrow.t()), exact)
        if threshold is not None and weight_only_rows(x, dense.shape) < M:
            allowed = max(allowed, relative((rounded_rows(x, threshold) @ wide.t()).to(x.dtype), exact))
        yield here | {"M": M, "error": error, "allowed": allowed, "ratio": error / allowed, "note": ""}


def relative(y: Tensor, exact: Tensor) -> float:
    return float((y.double() - exact).norm() / exact.norm())


def weight_only_rows(x: Tensor, shape: Sequence[int]) -> int:
    """Up to how many rows `linear_8bit` leaves x as it is, for codes of a shape."""
    if not x.is_cuda:
        return 0
    from onegpu.kernels import matmul_8bit

    return matmul_8bit.weight_only_rows(x, torch.empty(tuple(shape), dtype=torch.int8, device=x.device))


def rounded_rows(x: Tensor, threshold: float) -> Tensor:
    """float64: x as LLM.int8() has it, int8 rows and outlier columns as they are."""
    codes, row_stats, outlier_cols = rowwise.quantize_rows(x, threshold)
    return torch.where(outlier_cols, x.double(), codes.double() * row_stats.double()[:, None] / 127)


def operators() -> Iterator[tuple[str, Callable[[Tensor], Prepared]]]:
    """What is measured, by name."""
    yield "onegpu nf4", partial(prepare_4bit, "nf4", False)
    yield "onegpu nf4+double", partial(prepare_4bit, "nf4", True)
    yield "onegpu fp4", partial(prepare_4bit, "fp4", False)
    yield "onegpu int8", partial(prepare_8bit, 0.0)
    yield "onegpu int8, outliers", partial(prepare_8bit, 6.0)
    yield "onegpu 16bit", prepare_16bit


def prepare_4bit(quant_type: str, nested: bool, weight: Tensor) -> Prepared:
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


def prepare_8bit(threshold: float, weight: Tensor) -> Prepared:
    codes, row_stats, _ = quantize_8bit_rows(weight)
    dense = rowwise.dequantize_rows(codes, row_stats, torch.float32)
    return lambda x: linear_8bit(x, codes, row_stats, None, threshold), dense, threshold


def prepare_16bit(weight: Tensor) -> Prepared:
    return lambda x: linear_16bit(x, weight), weight, None


def badness(row: Mapping[str, Any]) -> float:
    """NaN is worse than any number, and so is what failed."""
    return math.inf if row["error"] is None or math.isnan(row["ratio"]) else float(row["ratio"])


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
