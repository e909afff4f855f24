# mypy: allow-untyped-calls
"""Launching `split_attention`: tile sizes, how many units share the keys, and the memory they meet in.

All of it is chosen from shapes and the device, never from lengths, so a launch can be captured and replayed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from onegpu.kernels.kv_rows import require_kv_dtype
from onegpu.kernels.launch import NO_CONTRACTION, SHARED_BYTES, on_device_of, processors, shared_bytes
from onegpu.kernels.overlap import overlaps
from onegpu.kernels.split_attention import split_attention_kernel
from onegpu.kernels.tickets import tickets

__all__ = ["Config", "configure", "constants", "decode_attention", "num_units", "rotary_decode_attention"]


@dataclass(frozen=True, slots=True)
class Config:
    """How one program works, and how many there are."""

    block_n: int  # keys at a time
    warps: int
    stages: int
    min_keys: int  # of a part: fewer are not worth a part of their own
    per_sm: int  # programs for each processor
    chunk_registers: int = 32  # of each thread, for the parts that are added up at a time


def configure(
    G: int, D: int, DV: int, cache_bytes: int, sum_bytes: int, *, hip: bool = False, shared: int = SHARED_BYTES
) -> Config:
    """The configuration for G query heads on a key head; `cache_bytes` and `sum_bytes` of one element of cache and q.

    Keys and values of a tile, twice or three times, are what fills shared memory: 16 KiB of each a tile at D = 128.
    Where `shared` bytes hold three times 128 keys and values (Hopper), that is quicker at every length and batch than
    any smaller tile: 6.9 instead of 7.6 us at 200 keys, 24 instead of 33 us at 8192, 59 instead of 68 us at 32768 (an
    H100, Llama-3.1-8B's heads, one sequence).
    """
    block_d = max(16, triton.next_power_of_2(max(D, DV)))
    if not hip and cache_bytes == sum_bytes == 2 and 2 * 3 * 128 * block_d * cache_bytes <= shared - 16384:
        return Config(128, 8, 3, 256, 1)
    block_n = max(16, min(64, 16384 // (block_d * max(cache_bytes, sum_bytes))))
    if hip:
        # Tiles on their way to shared memory stand in registers there.
        block_n = max(16, block_n // 2 if cache_bytes == sum_bytes else block_n // 4)
    crowded = block_m(G, D, DV) > 32 or block_d * sum_bytes > 512
    return Config(block_n, 8 if crowded else 4, 2, 64, 2)


def block_m(G: int, D: int, DV: int) -> int:
    """Query heads of a tile: the group, unless sums for all of it would not fit in registers."""
    return min(max(16, triton.next_power_of_2(G)), 64 if max(D, DV) <= 128 else 32)


def num_units(config: Config, B: int, heads: int, reachable: int, processors: int) -> int:
    """Second size of the grid: enough to fill the device, two for each sequence so that long ones get more."""
    wanted = max(2 * B, config.per_sm * processors // heads)
    return max(B, min(wanted, B * triton.cdiv(reachable, config.min_keys)))


def constants(
    config: Config, B: int, Hkv: int, G: int, D: int, DV: int, *, precision: str, **flags: Any
) -> dict[str, Any]:
    """Compile-time arguments of the kernel, and `num_warps` and `launch_pdl` beside them."""
    rows = block_m(G, D, DV)
    block_dv = max(16, triton.next_power_of_2(DV))
    block_g = triton.next_power_of_2(min(G, rows))
    return {
        "HKV": Hkv,
        "G": G,
        "D": D,
        "DV": DV,
        "BLOCK_B": triton.next_power_of_2(B),
        "BLOCK_M": rows,
        "BLOCK_N": config.block_n,
        "BLOCK_D": max(16, triton.next_power_of_2(D)),
        "BLOCK_DV": block_dv,
        "BLOCK_G": block_g,
        "CHUNK": max(1, config.chunk_registers * 32 * config.warps // (block_g * block_dv)),
        "STAGES": config.stages,
        "PRECISION": precision,
        "num_warps": config.warps,
        "launch_pdl": flags["OVERLAP"],
        **flags,
    }


def precision_of(dtype: torch.dtype) -> str:
    """How products of float32 are taken: three TF32 ones, about float32's own rounding; 16 bits have one way only."""
    return "tf32x3" if dtype == torch.float32 and torch.version.hip is None else "ieee"


def launch(
    q: Tensor,
    q_strides: Sequence[int],
    B: int,
    Hq: int,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    *,
    overlap: bool,
    config: Config | None,
    units: int | None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
    offset: float = 0.0,
    rotary: bool = False,
    interleaved: bool = False,
) -> Tensor:
    require_kv_dtype(k_cache)
    device = q.device
    _, Hkv, capacity, D = k_cache.shape
    DV = v_cache.shape[3]
    out = torch.empty((B, Hq, DV), dtype=q.dtype, device=device)
    if B == 0:
        return out
    G = Hq // Hkv
    if config is None:
        hip = torch.version.hip is not None
        config = configure(G, D, DV, k_cache.element_size(), q.element_size(), hip=hip, shared=shared_bytes(device))
    heads = Hkv * triton.cdiv(G, block_m(G, D, DV))
    if units is None:
        reachable = capacity if window is None else min(capacity, window)
        units = num_units(config, B, heads, reachable, processors(device))
    rows = min(G, block_m(G, D, DV))
    parts = units * heads * rows
    partial = torch.empty(parts * (DV + 2), dtype=torch.float32, device=device)
    quantized = k_scale is not None and v_scale is not None
    scales = (k_scale, v_scale) if k_scale is not None and v_scale is not None else (partial, partial)
    R = 0 if cos is None else cos.shape[1]
    settings = constants(
        config, B, Hkv, G, D, DV,
        precision=precision_of(q.dtype), R=R, ROTARY=rotary, INTERLEAVED=interleaved,
        HAS_Q_NORM=q_norm is not None, HAS_K_NORM=k_norm is not None, HAS_OFFSET=offset != 0,
        HAS_WINDOW=window is not None, HAS_SOFTCAP=softcap is not None, HAS_SINKS=sinks is not None,
        QUANTIZED=quantized, OVERLAP=overlaps(device, overlap),
    )  # fmt: skip
    with on_device_of(q):
        split_attention_kernel[(heads, units)](
            q,
            k_cache,
            v_cache,
            *scales,
            positions,
            q if sinks is None else sinks.contiguous(),
            q if cos is None else cos,
            q if sin is None else sin,
            q if q_norm is None else q_norm.contiguous(),
            q if k_norm is None else k_norm.contiguous(),
            out,
            partial,
            partial[parts * DV :],
            tickets(B * heads, device),
            *q_strides,
            *k_cache.stride()[:3],
            *v_cache.stride()[:3],
            *(scales[0].stride() if quantized else (0, 0, 0)),
            0 if cos is None else cos.stride(0),
            B,
            units,
            capacity,
            0 if window is None else window,
            config.min_keys,
            scale,
            1.0 if softcap is None else softcap,
            eps,
            offset,
            **settings,
            **NO_CONTRACTION,
        )
    return out


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    overlap: bool = False,
    *,
    config: Config | None = None,
    units: int | None = None,
) -> Tensor:
    """Launch the kernel; arguments as `onegpu.kernels.decode_ops.decode_attention`.

    `config` and `units` stand in for the choice of `configure` and `num_units`.
    """
    q = q if q.stride(2) == 1 else q.contiguous()
    return launch(
        q, q.stride()[:2], q.shape[0], q.shape[1], k_cache, v_cache, positions, scale, window, softcap, sinks,
        k_scale, v_scale, overlap=overlap, config=config, units=units,
    )  # fmt: skip


def rotary_decode_attention(
    qkv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    num_heads: int,
    scale: float,
    interleaved: bool = False,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    norm_eps: float = 1e-6,
    norm_offset: float = 0.0,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    overlap: bool = False,
    *,
    config: Config | None = None,
    units: int | None = None,
) -> Tensor:
    """Launch the kernel; arguments as `onegpu.kernels.decode_ops.rotary_decode_attention`."""
    qkv = qkv if qkv.stride(1) == 1 else qkv.contiguous()
    if cos is not None and sin is not None and (cos.stride() != sin.stride() or cos.stride(1) != 1):
        cos, sin = cos.contiguous(), sin.contiguous()
    out = launch(
        qkv, (qkv.stride(0), 0), qkv.shape[0], num_heads, k_cache, v_cache, positions, scale, window, softcap, sinks,
        k_scale, v_scale, overlap=overlap, config=config, units=units, cos=cos, sin=sin, q_norm=q_norm, k_norm=k_norm,
        eps=norm_eps, offset=norm_offset, rotary=True, interleaved=interleaved,
    )  # fmt: skip
    return out.flatten(1)
