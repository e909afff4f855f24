"""Configurations of the small-M 4-bit kernel measured against one another, for whoever edits its table.

Not for users: what ships is `onegpu.kernels.gemv_4bit`'s table, and nothing is tuned at run time. Every candidate is
checked against a dequantized product before it is timed, alone at each shape, then for one row inside the chain of a
decoder's products with overlapping kernels, one product's configuration changed at a time.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from typing import Any, Final

import torch

from onegpu.bench.kernel_chain import random_layers
from onegpu.bench.kernel_time import CALLS, Ceilings, call_times, copies_of
from onegpu.bench.kernels import MODELS, ROTATION
from onegpu.formats import blockwise, tiling
from onegpu.kernels import quantize_4bit
from onegpu.kernels.gemv_4bit import constants, gemv_4bit, gemv_4bit_kernel
from onegpu.kernels.gemv_4bit_config import Config, configure
from onegpu.kernels.launch import NO_CONTRACTION, processors

__all__ = ["CANDIDATES", "tune_alone", "tune_chain"]

# Warps, warps along N, tiles of 16 rows, tiles along K, whether x is loaded a step ahead; by rows of x.
CANDIDATES: Final = {
    1: [
        (4, 1, 1, 4, True), (4, 1, 1, 4, False), (4, 1, 1, 2, True), (8, 1, 1, 2, True), (8, 1, 1, 2, False),
        (8, 1, 1, 4, True), (16, 1, 1, 2, True), (16, 1, 1, 2, False), (4, 1, 2, 2, True), (4, 1, 2, 2, False),
        (16, 1, 2, 2, False), (8, 1, 2, 2, True), (16, 1, 1, 1, True), (8, 1, 1, 1, True),
    ],
    8: [
        (4, 1, 1, 4, True), (4, 1, 1, 4, False), (4, 1, 1, 2, True), (4, 1, 2, 2, True), (8, 1, 1, 2, True),
        (16, 1, 1, 2, True), (16, 1, 1, 1, True), (4, 2, 2, 2, True), (8, 1, 2, 1, True),
    ],
    16: [
        (4, 1, 1, 2, True), (4, 1, 1, 2, False), (4, 2, 2, 1, True), (8, 1, 1, 1, True), (8, 1, 1, 2, True),
        (4, 1, 2, 1, True), (8, 2, 2, 1, True), (8, 1, 2, 1, True), (8, 4, 2, 1, True), (4, 4, 2, 1, True),
    ],
    32: [
        (8, 1, 2, 1, True), (8, 1, 2, 1, False), (4, 4, 2, 1, True), (4, 4, 2, 1, False), (4, 4, 4, 1, False),
        (8, 1, 1, 1, True), (4, 1, 1, 1, True), (4, 2, 2, 1, True), (4, 2, 4, 1, False), (8, 2, 2, 1, True),
        (8, 4, 2, 1, True), (4, 1, 2, 1, True),
    ],
}  # fmt: skip
LIMIT = 0.01  # relative error that a right configuration stays far below
PROGRAMS = (0, 2, 3, 4, 6)  # per processor; 0 for as many as there are row groups


def precompile(jobs: Sequence[tuple[Config, int, int, bool]], device: torch.device) -> None:
    """Compile in processes of their own, into Triton's cache: (configuration, M, K, overlap)."""
    workers = min(8, os.cpu_count() or 1, len(jobs))
    parts = [list(jobs[i::workers]) for i in range(workers)]
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(compile_jobs, parts, [device.index or 0] * workers))


def compile_jobs(jobs: Sequence[tuple[Config, int, int, bool]], index: int) -> None:
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    codes = torch.zeros(64, dtype=torch.int32, device=device)
    scales = torch.zeros(64, device=device)
    x = torch.zeros(64, dtype=torch.bfloat16, device=device)
    for config, M, K, overlap in jobs:
        settings = constants(
            config,
            M,
            K,
            "nf4",
            64,
            nested=False,
            has_bias=False,
            overlap=overlap,
            capability=torch.cuda.get_device_capability(device),
        )
        gemv_4bit_kernel.warmup(
            codes, scales, scales, scales, scales, x, K, x, x, x, M, 16, K, grid=(1,), **settings, **NO_CONTRACTION
        )


def variants(M: int, N: int, K: int, device: torch.device) -> list[Config]:
    """Candidates that fit the weight, each with the grids worth trying."""
    rows = next(limit for limit in CANDIDATES if limit >= M)
    found = []
    for kind in CANDIDATES[rows]:
        plain = Config(*kind)
        warps, warps_n, tiles = plain.warps, plain.warps_n, plain.tiles
        if not plain.is_even_k(K) or N % (16 * tiles * warps_n):
            continue
        grids = set()
        for per_sm in PROGRAMS:
            for even in (False, True):
                config = replace(plain, per_sm=per_sm, even=even)
                grid = config.grid(N, processors(device))
                if grid not in grids and warps * grid >= 4 * processors(device):
                    grids.add(grid)
                    found.append(config)
    return found


def tune_alone(
    shapes: dict[str, tuple[int, int]],
    rows: Sequence[int],
    ceilings: Ceilings,
    device: torch.device,
    progress: Callable[[str], None],
    rotation: int = ROTATION,
) -> list[dict[str, Any]]:
    """The best configurations at each shape and number of rows, quickest first; wrong ones are reported."""
    jobs = {
        (replace(config, per_sm=0, even=False), M, 1024, False)
        for N, K in shapes.values()
        for M in rows
        for config in variants(M, N, K, device)
    }
    progress(f"compiling {len(jobs)} kernels")
    precompile([(config, M, config.warps * config.unroll * 64, overlap) for config, M, _, overlap in jobs], device)
    results = []
    for shape, (N, K) in shapes.items():
        weight = torch.randn(N, K, device=device) / math.sqrt(K)
        packed, absmax = quantize_4bit(weight, "nf4", 64)
        dense = blockwise.dequantize_4bit(packed, absmax, (N, K), torch.float32, "nf4", 64)
        tensors = tiling.tile_codes(packed, N, K), tiling.tile_scales(absmax, N, K, 64)
        del weight, packed, absmax
        copies = copies_of(tensors, rotation)
        floor = ceilings.seconds(sum(t.nbytes for t in tensors), 0) * 1e6
        for M in rows:
            x = torch.randn(M, K, device=device).to(torch.bfloat16)
            exact = x.float() @ dense.T
            y = torch.empty(M, N, dtype=torch.bfloat16, device=device)
            times: list[tuple[float, Config]] = []
            for config in variants(M, N, K, device):
                y.fill_(float("nan"))
                gemv_4bit(y, x, tensors[0], tensors[1], None, "nf4", 64, config=config)
                error = float((y.float() - exact).norm() / exact.norm())
                if not error < LIMIT:
                    progress(f"WRONG {shape} M={M} {config}: error {error}")
                    results.append({"shape": shape, "M": M, "wrong": asdict(config), "error": error})
                    continue
                turns = [copies[i % len(copies)] for i in range(max(CALLS, len(copies)))]
                calls = [partial(gemv_4bit, y, x, c[0], c[1], None, "nf4", 64, config=config) for c in turns]
                times.append((statistics.median(call_times(calls, 5)), config))
            times.sort(key=lambda item: item[0])
            shipped = replace(configure(M, N, K, overlap=False), edges=False)
            for us, config in times[:5]:
                progress(f"{shape} M={M} {us:.2f} us {100 * floor / us:.0f} % {brief(config)}")
            ours = [us for us, config in times if config == shipped]
            progress(f"{shape} M={M} shipped {brief(shipped)}: {ours[0] if ours else float('nan'):.2f} us")
            best = [{"us": us, "percent": 100 * floor / us, **asdict(config)} for us, config in times[:8]]
            results.append({"shape": shape, "M": M, "best": best, "shipped": asdict(shipped)})
    return results


def brief(config: Config) -> str:
    shape = f"{config.warps}w WN{config.warps_n} T{config.tiles} U{config.unroll}"
    shape += "" if config.ahead else " x late"
    return f"{shape} per_sm={config.per_sm}{' even' if config.even else ''}"


def tune_chain(
    model: str, ceilings: Ceilings, device: torch.device, progress: Callable[[str], None], layers: int = 32
) -> dict[str, Any]:
    """Walk from the shipped configurations to better ones inside the chain, one row, kernels overlapping."""
    shapes = MODELS[model]
    built = random_layers(shapes, False, layers, device)
    num_bytes = sum(tensor.nbytes for layer in built for weight in layer.weights.values() for tensor in weight)
    start = torch.randn(1, shapes["qkv"][1], device=device).to(torch.bfloat16)
    outs = {name: torch.empty(1, N, dtype=torch.bfloat16, device=device) for name, (N, _) in shapes.items()}
    kinds = {replace(c, per_sm=0, even=False) for N, K in shapes.values() for c in variants(1, N, K, device)}
    precompile([(config, 1, config.warps * config.unroll * 64, True) for config in kinds], device)

    def step(configs: dict[str, Config]) -> None:
        x = start
        for layer in built:
            for name, (_, K) in shapes.items():
                weight, y, config = layer.weights[name], outs[name], configs[name]
                gemv_4bit(y, x[:, :K], weight[0], weight[1], None, "nf4", 64, overlap=True, config=config)
                x = y

    def measure(configs: dict[str, Config]) -> float:
        return statistics.median(call_times([partial(step, configs)]))

    current = {name: configure(1, N, K, overlap=True) for name, (N, K) in shapes.items()}
    shipped = best = measure(current)
    progress(f"chain, shipped: {shipped:.1f} us")
    for _ in range(2):
        for name in sorted(shapes, key=lambda n: -math.prod(shapes[n])):
            for config in variants(1, *shapes[name], device):
                us = measure({**current, name: config})
                if us < 0.998 * best:
                    best, current = us, {**current, name: config}
                    progress(f"chain {best:.1f} us: {name} {brief(config)}")
    floor = ceilings.seconds(num_bytes, 0) * 1e6
    return {
        "model": model,
        "shipped_us": shipped,
        "best_us": best,
        "percent": 100 * floor / best,
        "best": {name: asdict(config) for name, config in current.items()},
    }
