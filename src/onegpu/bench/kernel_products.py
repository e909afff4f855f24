"""The products that are compared, each made from one bfloat16 weight: cuBLAS, ours, other packages'."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch
from torch import Tensor

from onegpu.bench.kernel_peers import PEERS, UNCAPTURED
from onegpu.bench.kernel_time import copies_of
from onegpu.formats import tiling
from onegpu.kernels import linear_4bit, linear_8bit, linear_16bit, quantize_4bit, quantize_8bit_rows

__all__ = ["BASELINE", "OURS", "Contender", "Maker", "makers", "torch_product"]

# Seconds that another package may take for one shape, and for a first call, which may compile or tune.
PEER_SECONDS: Final = 12.0
PEER_PATIENCE: Final = 8.0
Product = Callable[[Tensor], Tensor]


@dataclass(slots=True)
class Contender:
    """One operator on one weight: calls on copies that lie apart, and the bytes of one copy.

    `seconds`: how long all numbers of rows may take, and `patience` one first call; None for as long as they do.
    `spent` counts these seconds.
    """

    products: list[Product]
    num_bytes: int
    capture: bool = True
    seconds: float | None = None
    patience: float | None = None
    spent: float = 0.0


Maker = Callable[[Tensor, int], Contender]


def torch_product(weight: Tensor, x: Tensor) -> Tensor:
    return torch.mm(x, weight.t())


def our_product(weight: Tensor, x: Tensor) -> Tensor:
    return linear_16bit(x, weight)


def make_16bit(multiply: Callable[[Tensor, Tensor], Tensor]) -> Maker:
    """A product with the weight as it is."""

    def make(weight: Tensor, rotation: int) -> Contender:
        copies = copies_of([weight], rotation)
        return Contender([partial(multiply, w) for (w,) in copies], weight.nbytes)

    return make


def make_4bit(quant_type: str, tiled: bool, nested: bool) -> Maker:
    """Our 4-bit product, on rows as they are stored or on tiles."""

    def make(weight: Tensor, rotation: int) -> Contender:
        from onegpu.formats.blockwise import quantize_absmax
        from onegpu.kernels.tiled_ops import linear_4bit_tiled

        N, K = weight.shape
        packed, absmax = quantize_4bit(weight, quant_type, 64)
        rest: tuple[Tensor, ...] = ()
        if nested:
            absmax, *more = quantize_absmax(absmax)
            rest = tuple(more)
        if tiled:
            packed, absmax = tiling.tile_codes(packed, N, K), tiling.tile_scales(absmax, N, K, 64)
        operator: Callable[..., Tensor] = linear_4bit_tiled if tiled else linear_4bit
        copies = copies_of([packed, absmax, *rest], rotation)

        def product(copy: tuple[Tensor, ...], x: Tensor) -> Tensor:
            return operator(x, copy[0], copy[1], None, N, quant_type, 64, *copy[2:])

        return Contender([partial(product, copy) for copy in copies], sum(tensor.nbytes for tensor in copies[0]))

    return make


def make_8bit(threshold: float) -> Maker:
    def make(weight: Tensor, rotation: int) -> Contender:
        codes, row_stats, _ = quantize_8bit_rows(weight)
        copies = copies_of([codes, row_stats], rotation)

        def product(copy: tuple[Tensor, ...], x: Tensor) -> Tensor:
            return linear_8bit(x, copy[0], copy[1], None, threshold)

        return Contender([partial(product, copy) for copy in copies], codes.nbytes + row_stats.nbytes)

    return make


# In tile order as optimized models have them, in rows as they are loaded.
OURS: Final[dict[str, Maker]] = {
    "onegpu nf4, tiled": make_4bit("nf4", tiled=True, nested=False),
    "onegpu nf4+double, tiled": make_4bit("nf4", tiled=True, nested=True),
    "onegpu fp4, tiled": make_4bit("fp4", tiled=True, nested=False),
    "onegpu nf4": make_4bit("nf4", tiled=False, nested=False),
    "onegpu int8": make_8bit(0.0),
    "onegpu int8, outliers": make_8bit(6.0),
    "onegpu bf16": make_16bit(our_product),
}
BASELINE: Final = "bf16 cuBLAS"


def makers(peers: bool) -> dict[str, Maker]:
    """By name; the baseline first, so that the others can be held against it, and other packages last."""
    found = {BASELINE: make_16bit(torch_product)} | OURS
    return found | {name: wrap_peer(make, name not in UNCAPTURED) for name, make in PEERS.items() if peers}


def wrap_peer(make: Callable[[Tensor], tuple[Product, int]], capture: bool) -> Maker:
    def prepared(weight: Tensor, rotation: int) -> Contender:
        product, size = make(weight)
        count = max(2, math.ceil(rotation / size))
        products = [product, *(make(weight)[0] for _ in range(count - 1))]
        return Contender(products, size, capture, PEER_SECONDS, PEER_PATIENCE)

    return prepared
