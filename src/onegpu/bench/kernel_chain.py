"""A decode step's products, 32 layers in one graph, each reading the one before; kernels overlapping or not."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

from onegpu.bench.kernel_time import Ceilings, first_line, normals, replayed, warm_up
from onegpu.formats import tiling

__all__ = ["LAYERS", "Layer", "chain_step", "measure_chain", "random_layers"]

LAYERS: Final = 32
Shapes = dict[str, tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Layer:
    """Tiled weights of one decoder layer, by the name of the product."""

    weights: dict[str, tuple[Tensor, ...]]


def random_layers(shapes: Shapes, nested: bool, count: int, device: torch.device) -> list[Layer]:
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


def chain_step(layers: Sequence[Layer], shapes: Shapes, overlap: bool, x: Tensor) -> Tensor:
    """All products, each on the first columns of the one before."""
    from onegpu.kernels.tiled_ops import linear_4bit_tiled

    for layer in layers:
        for name, (N, K) in shapes.items():
            codes, absmax, *rest = layer.weights[name]
            nested: list[Tensor | None] = [*rest] or [None, None, None]
            scales = nested[0], nested[1], nested[2]
            x = linear_4bit_tiled(x[:, :K], codes, absmax, None, N, "nf4", 64, *scales, overlap=overlap)
    return x


def compile_products(layer: Layer, shapes: Shapes, rows: int, device: torch.device) -> None:
    """Every kernel of the chain, side by side."""
    if device.type != "cuda":
        return
    warm_up(
        [
            partial(chain_step, [layer], {name: shape}, overlap, torch.ones(rows, shape[1], device=device).bfloat16())
            for name, shape in shapes.items()
            for overlap in (False, True)
        ]
    )


def measure_chain(
    model: str,
    shapes: Shapes,
    ceilings: Ceilings,
    device: torch.device,
    *,
    rows: int = 1,
    layers: int = LAYERS,
    progress: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """The products of a step in one graph; microseconds of the whole.

    `difference` is that of the last output from the one without overlap, relative; other configurations sum in
    another order, and 128 bfloat16 roundings in a row carry it on. `repeats` is whether replays give the same bits.
    A form that fails has no `us`, and the reason as `note`.
    """
    results = []
    start = normals(rows, shapes["qkv"][1], device).to(torch.bfloat16)
    for nested in (False, True):
        operator = f"onegpu nf4{'+double' if nested else ''}, tiled"
        built: list[Layer] = []
        reference: Tensor | None = None
        for overlap in (False, True):
            found: dict[str, Any] = {
                "model": model, "operator": operator, "M": rows, "layers": layers, "overlap": overlap,
            }  # fmt: skip
            results.append(found)
            try:
                if not built:
                    built = random_layers(shapes, nested, layers, device)
                    compile_products(built[0], shapes, rows, device)
                num_bytes = sum(t.nbytes for layer in built for weight in layer.weights.values() for t in weight)
                with torch.no_grad():
                    us, first, repeats = replayed(partial(chain_step, built, shapes, overlap, start))
            except Exception as error:  # the rest of the run is of interest too
                found |= {"us": None, "note": first_line(error)}
                continue
            reference = first if reference is None else reference
            found |= {
                "us": us,
                "roofline_percent": 100 * num_bytes / ceilings.read_bandwidth / (us / 1e6),
                "difference": float((first - reference).norm() / reference.norm()),
                "finite": bool(first.isfinite().all()),
                "repeats": repeats,
            }
            progress(f"chain {operator}, overlap {overlap}: {us:.0f} us, {found['roofline_percent']:.1f} %")
        del built
        torch.cuda.empty_cache()
    return results
