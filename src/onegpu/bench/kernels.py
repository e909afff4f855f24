"""The operators measured: time of a call, as a share of what the device can read and multiply.

    ceilings    read bandwidth and the speed of a large bfloat16 product, measured first
    weights     rotated over at least `ROTATION` bytes, so that none is in L2; CUDA-graph replay, one call after another
    roofline    max(bytes / read bandwidth, operations / product speed); bytes are those of the weight as stored, x, y
    chain       a decode step's products, 32 layers in one graph, each reading the one before

Contenders are made from one weight and measured in turn at each number of rows; a contender that fails is a row with
the reason. A call that cannot be captured is timed as it is, and the row says so.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

from onegpu.bench.kernel_peers import PEERS
from onegpu.errors import ConfigError
from onegpu.formats import tiling
from onegpu.kernels import linear_4bit, linear_8bit, quantize_4bit, quantize_8bit_rows

__all__ = [
    "MODELS",
    "ROTATION",
    "Ceilings",
    "Row",
    "compare_kernels",
    "measure_ceilings",
    "measure_chain",
    "parse_rows",
    "parse_shapes",
    "table",
]

# Rows and columns of the products of one layer; q, k, v and gate, up are joined.
MODELS: Final = {
    "llama-8b": {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)},
    "qwen3-4b": {"qkv": (6144, 2560), "o": (2560, 4096), "gate_up": (19456, 2560), "down": (2560, 9728)},
    # One expert.
    "mixtral": {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)},
}
ROTATION: Final = 800_000_000
CALLS: Final = 24
LAYERS: Final = 32
Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Of this device: bytes read per second; operations per second of a bfloat16 product of 8192 cubed."""

    read_bandwidth: float
    flops: float

    def seconds(self, num_bytes: float, operations: float) -> float:
        """The least time that reading and multiplying take, each alone."""
        return max(num_bytes / self.read_bandwidth, operations / self.flops)


@dataclass(frozen=True, slots=True)
class Row:
    """One operator at one shape. `us` is None where it failed, and `note` says why."""

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
    """One contender for one weight: calls on copies that lie apart, and the bytes of one copy."""

    products: list[Product]
    num_bytes: int


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


def measure_ceilings(device: torch.device) -> Ceilings:
    """Read 2 GiB, and multiply 8192 x 8192 x 8192 in bfloat16; the best of several."""
    from onegpu.kernels.ceiling import BLOCK, read_once

    source = torch.zeros(2**29, dtype=torch.int32, device=device)
    out = torch.empty(source.numel() // BLOCK, dtype=torch.int32, device=device)
    bandwidth = source.nbytes / (min(call_times([partial(read_once, source, out)] * 4)) / 1e6)
    a, b = (torch.randn(8192, 8192, device=device).to(torch.bfloat16) for _ in range(2))
    flops = 2 * 8192**3 / (min(call_times([partial(torch.mm, a, b)] * 4)) / 1e6)
    return Ceilings(bandwidth, flops)


def call_times(calls: Sequence[Callable[[], Any]], rounds: int = 7) -> list[float]:
    """Microseconds of one call in each of several replays of all calls, captured in a graph."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return timed(graph.replay, len(calls), rounds)


def timed(run: Callable[[], Any], count: int, rounds: int) -> list[float]:
    run()
    run()
    times = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / count)
    return times


def median_time(products: Sequence[Product], x: Tensor) -> tuple[float, str]:
    """Median microseconds of a call, products in turn; and a note if they could not be captured."""
    count = max(CALLS, len(products))
    calls = [partial(products[i % len(products)], x) for i in range(count)]
    try:
        return statistics.median(call_times(calls)), ""
    except RuntimeError as error:
        torch.cuda.synchronize()
        reason = first_line(error)

    def all_calls() -> None:
        for call in calls:
            call()

    return statistics.median(timed(all_calls, count, 3)), f"not captured: {reason}"


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:160]


def copies_of(tensors: Sequence[Tensor], rotation: int) -> list[tuple[Tensor, ...]]:
    """Copies of a weight's tensors that take `rotation` bytes or more together."""
    size = sum(tensor.nbytes for tensor in tensors)
    return [tuple(tensor.clone() for tensor in tensors) for _ in range(max(2, math.ceil(rotation / size)))]


def torch_product(weight: Tensor, x: Tensor) -> Tensor:
    return torch.mm(x, weight.t())


def make_bf16(weight: Tensor, rotation: int) -> Prepared:
    copies = copies_of([weight], rotation)
    return Prepared([partial(torch_product, w) for (w,) in copies], weight.nbytes)


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


OURS: Final[dict[str, Maker]] = {
    "onegpu nf4, tiled": make_4bit("nf4", tiled=True, nested=False),
    "onegpu nf4+double, tiled": make_4bit("nf4", tiled=True, nested=True),
    "onegpu fp4, tiled": make_4bit("fp4", tiled=True, nested=False),
    "onegpu nf4": make_4bit("nf4", tiled=False, nested=False),
    "onegpu int8": make_8bit(0.0),
    "onegpu int8, outliers": make_8bit(6.0),
}
BASELINE: Final = "bf16 cuBLAS"


def makers(peers: bool) -> dict[str, Maker]:
    """The baseline first, so that the others can be held against it."""
    theirs: dict[str, Maker] = {}
    for name, make in PEERS.items() if peers else ():
        theirs[name] = wrap_peer(make)
    return {BASELINE: make_bf16} | OURS | theirs


def wrap_peer(make: Callable[[Tensor], tuple[Product, int]]) -> Maker:
    def prepared(weight: Tensor, rotation: int) -> Prepared:
        product, size = make(weight)
        count = max(2, math.ceil(rotation / size))
        return Prepared([product, *(make(weight)[0] for _ in range(count - 1))], size)

    return prepared


def activations(M: int, K: int, device: torch.device) -> Tensor:
    """bfloat16 [M, K], normal, with a few columns of outliers."""
    x = torch.randn(M, K, generator=torch.Generator(device).manual_seed(M), device=device)
    x[:, 5::1024] *= 20
    return x.to(torch.bfloat16)


def compare_kernels(
    shapes: dict[str, tuple[int, int]],
    rows: Sequence[int],
    ceilings: Ceilings,
    device: torch.device,
    *,
    peers: bool,
    rotation: int = ROTATION,
    progress: Callable[[str], None] = lambda _: None,
) -> Iterator[Row]:
    """Every contender at every shape and number of rows; each is made once for a shape."""
    for shape, (N, K) in shapes.items():
        weight = torch.randn(N, K, generator=torch.Generator(device).manual_seed(0), device=device)
        weight = (weight / math.sqrt(K)).to(torch.bfloat16)
        base: dict[int, float] = {}
        for operator, make in makers(peers).items():
            progress(f"{shape}: {operator}")
            try:
                prepared = make(weight, rotation)
            except Exception as error:  # a peer that is absent or fails is a row, not the end
                yield Row(shape, N, K, 0, operator, None, note=first_line(error))
                continue
            for M in rows:
                yield measure_row(shape, N, K, M, operator, prepared, ceilings, base, device)
            del prepared
            torch.cuda.empty_cache()


def measure_row(
    shape: str,
    N: int,
    K: int,
    M: int,
    operator: str,
    prepared: Prepared,
    ceilings: Ceilings,
    base: dict[int, float],
    device: torch.device,
) -> Row:
    """One row; `base` holds the baseline's times by M and takes them."""
    try:
        with torch.no_grad():
            us, note = median_time(prepared.products, activations(M, K, device))
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


@dataclass(frozen=True, slots=True)
class Layer:
    """Tiled weights of one decoder layer, by the name of the product."""

    weights: dict[str, tuple[Tensor, ...]]


def random_layers(shapes: dict[str, tuple[int, int]], nested: bool, count: int, device: torch.device) -> list[Layer]:
    """Weights of random codes, scaled so that a chain of products neither grows nor vanishes.

    Scales of either sign: NF4's values do not cancel out, and a mean would grow with each product of the chain.
    """
    from onegpu.formats.blockwise import quantize_absmax

    layers = []
    for _ in range(count):
        weights: dict[str, tuple[Tensor, ...]] = {}
        for name, (N, K) in shapes.items():
            codes = torch.randint(0, 256, (tiling.num_tiled_bytes(N, K),), dtype=torch.uint8, device=device)
            sign = torch.randint(0, 2, (N * K // 64,), device=device) * 2.0 - 1.0
            absmax = sign * (1.0 + torch.rand(N * K // 64, device=device)) * (1.2 / math.sqrt(K))
            rest: tuple[Tensor, ...] = ()
            if nested:
                absmax, *more = quantize_absmax(absmax)
                rest = tuple(more)
            weights[name] = (codes, tiling.tile_scales(absmax, N, K, 64), *rest)
        layers.append(Layer(weights))
    return layers


def chain_step(layers: Sequence[Layer], shapes: dict[str, tuple[int, int]], overlap: bool, x: Tensor) -> Tensor:
    """All products, each on the first columns of the one before."""
    from onegpu.kernels.tiled_ops import linear_4bit_tiled

    for layer in layers:
        for name, (N, K) in shapes.items():
            codes, absmax, *rest = layer.weights[name]
            nested: list[Tensor | None] = [*rest] or [None, None, None]
            scales = nested[0], nested[1], nested[2]
            x = linear_4bit_tiled(x[:, :K], codes, absmax, None, N, "nf4", 64, *scales, overlap=overlap)
    return x


def measure_chain(
    model: str, ceilings: Ceilings, device: torch.device, *, rows: int = 1, layers: int = LAYERS
) -> list[dict[str, Any]]:
    """A decode step's products in one graph, with and without overlapping kernels; microseconds of the whole.

    `difference` is that of the last output from the one without overlap, relative; other configurations sum in
    another order, and 128 bfloat16 roundings in a row carry it on. `repeats` is whether replays give the same bits.
    """
    shapes = MODELS[model]
    results = []
    for nested in (False, True):
        built = random_layers(shapes, nested, layers, device)
        num_bytes = sum(tensor.nbytes for layer in built for weight in layer.weights.values() for tensor in weight)
        start = torch.randn(rows, shapes["qkv"][1], device=device).to(torch.bfloat16)
        reference: Tensor | None = None
        for overlap in (False, True):
            with torch.no_grad():
                us, first, repeats = replayed(partial(chain_step, built, shapes, overlap, start))
            reference = first if reference is None else reference
            results.append(
                {
                    "model": model,
                    "operator": f"onegpu nf4{'+double' if nested else ''}, tiled",
                    "M": rows,
                    "layers": layers,
                    "overlap": overlap,
                    "us": us,
                    "roofline_percent": 100 * num_bytes / ceilings.read_bandwidth / (us / 1e6),
                    "difference": float((first - reference).norm() / reference.norm()),
                    "finite": bool(first.isfinite().all()),
                    "repeats": repeats,
                }
            )
        del built
        torch.cuda.empty_cache()
    return results


def replayed(step: Callable[[], Tensor]) -> tuple[float, Tensor, bool]:
    """Median microseconds of a step captured in a graph, its result in float32, and whether replays repeat it."""
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    us = statistics.median(timed(graph.replay, 1, 9))
    first = out.float().clone()
    repeats = True
    for _ in range(5):
        out.zero_()
        graph.replay()
        repeats &= torch.equal(out.float(), first)
    return us, first, repeats


def table(rows: Sequence[Row], chain: Sequence[dict[str, Any]]) -> str:
    """Rows and chain as Markdown tables."""
    lines = ["| shape | M | operator | us | GB/s | TFLOP/s | % of roofline | x bf16 |", "| --- " * 8 + "|"]
    for row in rows:
        name = f"{row.shape} {row.N}x{row.K}"
        if row.us is None:
            lines.append(f"| {name} | {row.M or '-'} | {row.operator} | failed: {row.note} | | | | |")
            continue
        ratio = "" if row.times_bf16 is None else f"{row.times_bf16:.2f}"
        note = f" ({row.note})" if row.note else ""
        lines.append(
            f"| {name} | {row.M} | {row.operator}{note} | {row.us:.2f} | {row.gb_s:.0f} | {row.tflop_s:.1f} "
            f"| {row.roofline_percent:.0f} | {ratio} |"
        )
    if chain:
        lines += ["", "| chain | overlap | us | us per layer | % of roofline | difference | same bits |"]
        lines.append("| --- " * 7 + "|")
    for item in chain:
        lines.append(
            f"| {item['model']} {item['operator']} x {item['layers']} | {'yes' if item['overlap'] else 'no'} "
            f"| {item['us']:.1f} | {item['us'] / item['layers']:.2f} | {item['roofline_percent']:.1f} "
            f"| {item['difference']:.1e} | {'yes' if item['repeats'] and item['finite'] else 'NO'} |"
        )
    return "\n".join(lines) + "\n"


def document(
    ceilings: Ceilings, rows: Sequence[Row], chain: Sequence[dict[str, Any]], facts: dict[str, Any]
) -> dict[str, Any]:
    """All of it, JSON-ready."""
    return {**facts, "ceilings": asdict(ceilings), "rows": [asdict(row) for row in rows], "chain": list(chain)}
