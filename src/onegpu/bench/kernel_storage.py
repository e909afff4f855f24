"""Quantizing and dequantizing on the device: bytes moved in a second, as a share of what the device can read.

Every call has a weight of its own, and its result is kept, so that neither stays in L2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

from onegpu.bench.kernel_time import Ceilings, first_line, median_of_calls, normals, warm_up
from onegpu.formats import quantize_absmax
from onegpu.kernels import dequantize_4bit, quantize_4bit, quantize_8bit_rows

__all__ = ["SHAPE", "measure_storage"]

SHAPE: Final = (4096, 14336)
COPIES: Final = 8
Task = tuple[list[Callable[[], Any]], int]


def measure_storage(
    ceilings: Ceilings, device: torch.device, progress: Callable[[str], None] = lambda _: None
) -> list[dict[str, Any]]:
    """One row for each direction and format: `us`, `gb_s` of all bytes read and written, `percent` of the bandwidth."""
    weight = (normals(*SHAPE, device) / math.sqrt(SHAPE[1])).to(torch.bfloat16)
    results = []
    for name, prepare in tasks():
        found: dict[str, Any] = {"task": name, "N": SHAPE[0], "K": SHAPE[1], "us": None, "note": ""}
        results.append(found)
        try:
            calls, num_bytes = prepare(weight)
            warm_up(calls[:1])
            us, found["note"] = median_of_calls(calls)
        except Exception as error:  # one that fails is a row, not the end
            found["note"] = first_line(error)
            continue
        speed = num_bytes / us * 1e6
        found |= {"us": us, "gb_s": speed / 1e9, "percent": 100 * speed / ceilings.read_bandwidth}
        progress(f"{name}: {us:.1f} us, {found['percent']:.0f} % of the read bandwidth")
        del calls
    return results


def tasks() -> Iterator[tuple[str, Callable[[Tensor], Task]]]:
    """What is measured, by name."""
    for quant_type in ("nf4", "fp4"):
        yield f"quantize {quant_type}", partial(quantize, partial(quantize_4bit, quant_type=quant_type, blocksize=64))
        for nested in (False, True):
            name = f"dequantize {quant_type}{'+double' if nested else ''}"
            yield name, partial(dequantize, quant_type, nested)
    search = partial(quantize_4bit, quant_type="nf4", blocksize=64, scale_search=True)
    yield "quantize nf4, scale search", partial(quantize, search)
    yield "quantize int8 rows", partial(quantize, quantize_8bit_rows)


def quantize(operator: Callable[[Tensor], tuple[Tensor, ...]], weight: Tensor) -> Task:
    kept: dict[int, tuple[Tensor, ...]] = {}

    def call(index: int, copy: Tensor) -> None:
        kept[index] = operator(copy)

    out = operator(weight)
    num_bytes = weight.nbytes + sum(tensor.nbytes for tensor in out)
    return [partial(call, index, weight.clone()) for index in range(COPIES)], num_bytes


def dequantize(quant_type: str, nested: bool, weight: Tensor) -> Task:
    packed, absmax = quantize_4bit(weight, quant_type, 64)
    rest: tuple[Tensor, ...] = ()
    if nested:
        absmax, *more = quantize_absmax(absmax)
        rest = tuple(more)
    kept: dict[int, Tensor] = {}

    def call(index: int, copy: tuple[Tensor, ...]) -> None:
        kept[index] = dequantize_4bit(copy[0], copy[1], SHAPE, torch.bfloat16, quant_type, 64, *copy[2:])

    stored = (packed, absmax, *rest)
    num_bytes = weight.nbytes + sum(tensor.nbytes for tensor in stored)
    return [partial(call, index, tuple(tensor.clone() for tensor in stored)) for index in range(COPIES)], num_bytes
