"""The operators measured: time of a call, as a share of what the device can read and multiply.

    weights     rotated over at least `ROTATION` bytes, so that none is in L2 (`kernel_time` says how times are taken)
    roofline    max(bytes / read bandwidth, operations / product speed); bytes are those of the weight as stored, x, y

Contenders are made from one weight and measured in turn at each number of rows; a contender that fails is a row with
the reason. A call that cannot be captured is timed as it is, and the row says so.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch
from torch import Tensor

from onegpu.bench.kernel_peers import PEERS, UNCAPTURED
from onegpu.bench.kernel_time import (
    Ceilings,
    call_times,
    copies_of,
    first_line,
    measure_ceilings,
    median_time,
    normals,
    time_limit,
    warm_up,
)
from onegpu.errors import ConfigError
from onegpu.formats import tiling
from onegpu.kernels import linear_4bit, linear_8bit, linear_16bit, quantize_4bit, quantize_8bit_rows

__all__ = [
    "BASELINE",
    "MODELS",
    "OURS",
    "ROTATION",
    "Ceilings",
    "Row",
    "call_times",
    "compare_kernels",
    "copies_of",
    "measure_ceilings",
    "parse_rows",
    "parse_shapes",
]

# Rows and columns of the products of one layer; q, k, v and gate, up are joined.
MODELS: Final = {
    "llama-8b": {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)},
    "qwen3-4b": {"qkv": (6144, 2560), "o": (2560, 4096), "gate_up": (19456, 2560), "down": (2560, 9728)},
    # One expert.
    "mixtral": {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)},
}
ROTATION: Final = 800_000_000
# Seconds that another package may take for one shape, and for a first call, which may compile or tune.
PEER_SECONDS: Final = 12.0
PEER_PATIENCE: Final = 8.0
# Relative error that no right product of 4-bit weights comes near; a time of another is not given.
WRONG: Final = 0.3
Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Row:
    """One operator at one shape. `us` is None where it failed, and `note` says why.

    `roofline_percent` is of the 16-bit ceilings: products of int8 tensor cores may pass 100.
    """

    shape: str
    N: int
    K: int
    M: int
    operator: str
    us: float | None
    gb_s: float | None = None
    tflop_s: float | None = None
    roofline_percent: float | None = None
    times_bf16: float | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Prepared:
    """One contender for one weight: calls on copies that lie apart, and the bytes of one copy.

    `seconds`: how long all numbers of rows may take, and `patience` one first call; None for as long as they do.
    """

    products: list[Product]
    num_bytes: int
    capture: bool = True
    seconds: float | None = None
    patience: float | None = None


Maker = Callable[[Tensor, int], Prepared]


def parse_shapes(text: str) -> dict[str, tuple[int, int]]:
    """A model of `MODELS`, or `N,K`.

    Raises:
        ConfigError: neither.
    """
    if text in MODELS:
        return dict(MODELS[text])
    parts = text.split(",")
    if len(parts) == 2 and all(part.strip().isdigit() and int(part) > 0 for part in parts):
        N, K = (int(part) for part in parts)
        return {f"{N}x{K}": (N, K)}
    raise ConfigError(f"--shapes must be one of {', '.join(MODELS)}, or N,K; got {text!r}", "--shapes 4096,4096")


def parse_rows(text: str) -> list[int]:
    """Numbers of rows of x, separated by commas.

    Raises:
        ConfigError: something else.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ConfigError(f"--m must be numbers separated by commas; got {text!r}", "--m 1,8,32")
    return [int(part) for part in parts]


def torch_product(weight: Tensor, x: Tensor) -> Tensor:
    return torch.mm(x, weight.t())


def our_product(weight: Tensor, x: Tensor) -> Tensor:
    return linear_16bit(x, weight)


def make_16bit(multiply: Callable[[Tensor, Tensor], Tensor]) -> Maker:
    """A product with the weight as it is."""

    def make(weight: Tensor, rotation: int) -> Prepared:
        copies = copies_of([weight], rotation)
        return Prepared([partial(multiply, w) for (w,) in copies], weight.nbytes)

    return make


def make_4bit(quant_type: str, tiled: bool, nested: bool) -> Maker:
    """Our 4-bit product, on rows as they are stored or on tiles."""

    def make(weight: Tensor, rotation: int) -> Prepared:
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

        return Prepared([partial(product, copy) for copy in copies], sum(tensor.nbytes for tensor in copies[0]))

    return make


def make_8bit(threshold: float) -> Maker:
    def make(weight: Tensor, rotation: int) -> Prepared:
        codes, row_stats, _ = quantize_8bit_rows(weight)
        copies = copies_of([codes, row_stats], rotation)

        def product(copy: tuple[Tensor, ...], x: Tensor) -> Tensor:
            return linear_8bit(x, copy[0], copy[1], None, threshold)

        return Prepared([partial(product, copy) for copy in copies], codes.nbytes + row_stats.nbytes)

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


def makers(peers: bool) -> list[dict[str, Maker]]:
    """The baseline first, so that the others can be held against it; then other packages, for what they may break."""
    found = [{BASELINE: make_16bit(torch_product)} | OURS]
    if peers:
        found.append({name: wrap_peer(make, name not in UNCAPTURED) for name, make in PEERS.items()})
    return found


def wrap_peer(make: Callable[[Tensor], tuple[Product, int]], capture: bool) -> Maker:
    def prepared(weight: Tensor, rotation: int) -> Prepared:
        product, size = make(weight)
        count = max(2, math.ceil(rotation / size))
        products = [product, *(make(weight)[0] for _ in range(count - 1))]
        return Prepared(products, size, capture, PEER_SECONDS, PEER_PATIENCE)

    return prepared


def activations(M: int, K: int, device: torch.device) -> Tensor:
    """bfloat16 [M, K], normal, with a few columns of outliers."""
    x = normals(M, K, device, seed=M)
    x[:, 5::1024] *= 20
    return x.to(torch.bfloat16)


def compare_kernels(
    shapes: Mapping[str, tuple[int, int]],
    rows: Sequence[int],
    ceilings: Ceilings,
    device: torch.device,
    *,
    peers: bool,
    rotation: int = ROTATION,
    progress: Callable[[str], None] = lambda _: None,
) -> Iterator[Row]:
    """Every contender at every shape and number of rows, ours at all shapes first; each is made once for a shape."""
    base: dict[str, dict[int, float]] = {shape: {} for shape in shapes}
    for contenders in makers(peers):
        for shape, (N, K) in shapes.items():
            weight = (normals(N, K, device) / math.sqrt(K)).to(torch.bfloat16)
            inputs = {M: activations(M, K, device) for M in rows}
            for operator, make in contenders.items():
                found = list(rows_of(shape, operator, make, weight, inputs, ceilings, base[shape], rotation))
                progress(f"{shape} {operator}: " + ", ".join(brief(row) for row in found))
                yield from found


def rows_of(
    shape: str,
    operator: str,
    make: Maker,
    weight: Tensor,
    inputs: Mapping[int, Tensor],
    ceilings: Ceilings,
    base: dict[int, float],
    rotation: int,
) -> Iterator[Row]:
    """One contender at every number of rows; `base` holds the baseline's times by M and takes them."""
    N, K = weight.shape
    started = time.monotonic()
    try:
        prepared = make(weight, rotation)
    except Exception as error:  # a peer that is absent or fails is a row, not the end
        yield Row(shape, N, K, 0, operator, None, note=first_line(error))
        return
    if operator in OURS and weight.is_cuda:
        warm_up([partial(prepared.products[0], x) for x in inputs.values()])
    for M, x in inputs.items():
        if prepared.seconds is not None and time.monotonic() - started > prepared.seconds:
            yield Row(shape, N, K, M, operator, None, note=f"left out after {prepared.seconds:.0f} s")
            continue
        yield measure_row(shape, operator, prepared, x, weight, ceilings, base)
    del prepared
    if weight.is_cuda:
        try:
            torch.cuda.empty_cache()
        except RuntimeError:  # a kernel went wrong: what comes next says so
            return


def measure_row(
    shape: str,
    operator: str,
    prepared: Prepared,
    x: Tensor,
    weight: Tensor,
    ceilings: Ceilings,
    base: dict[int, float],
) -> Row:
    """One row of the table."""
    (M, K), N = x.shape, weight.shape[0]
    try:
        with torch.no_grad():
            plain = torch_product(weight, x).float()
            with time_limit(prepared.patience):
                y = prepared.products[-1](x).float()
            error = float((y - plain).norm() / plain.norm())
            if not error < WRONG:
                return Row(shape, N, K, M, operator, None, note=f"wrong: relative error {error:.2g}")
            us, note = median_time(prepared.products, x, capture=prepared.capture, patience=prepared.patience)
    except Exception as error:
        return Row(shape, N, K, M, operator, None, note=first_line(error))
    if operator == BASELINE:
        base[M] = us
    num_bytes, operations = prepared.num_bytes + 2 * M * (N + K), 2 * M * N * K
    return Row(
        shape,
        N,
        K,
        M,
        operator,
        us,
        gb_s=num_bytes / us / 1e3,
        tflop_s=operations / us / 1e6,
        roofline_percent=100 * ceilings.seconds(num_bytes, operations) / (us / 1e6),
        times_bf16=base[M] / us if M in base else None,
        note=note,
    )


def brief(row: Row) -> str:
    """A row in a line of progress: rows of x, microseconds, times bf16; or why not."""
    if row.us is None:
        return f"{row.M or 'all'}: {row.note}"
    ratio = "" if row.times_bf16 is None else f" {row.times_bf16:.2f}x"
    return f"{row.M}: {row.us:.1f} us {row.roofline_percent:.0f}%{ratio}"
