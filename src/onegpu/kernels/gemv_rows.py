# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""y = tail(x @ W.T) for W in rows, 16 bit or int8, and up to 64 rows of x: bound by reading W once.

    one_row_kernel   one row of x: products and sums in the lanes that loaded the weights, one sum over lanes at the end
    rows_kernel      up to 64 rows: tensor cores, with W as the left operand, so that few rows of x waste little

Both keep the tail in registers (`onegpu.kernels.tail`); a program of a gated product has the same rows of gate and up.
Sums are float32, and their order depends on the shape of W and on the bucket of M (`BUCKETS`) alone: within a bucket a
row's result does not depend on the other rows, nor on how many there are.

One row: the weights of step i + 1 are asked for before those of step i are used, all of them in 16-byte loads, so that
a lane always has some in flight. More rows: asynchronous copies into shared memory, `num_stages` deep.

With `OVERLAP` (compute capability 9.0 and up) a kernel begins while the one before it still runs: it fetches its first
weights, and only then waits; x, residual and y are touched after. So whatever wrote W must have finished before the
kernel in front of this one began to let others start.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from onegpu.formats.rowwise import INVERSE_127
from onegpu.kernels.launch import NO_CONTRACTION, on_device_of, shared_bytes
from onegpu.kernels.overlap import ask_for, overlaps
from onegpu.kernels.tail_device import activate

__all__ = ["BUCKETS", "CONFIGS", "MAX_ROWS", "Config", "bucket_of", "configure", "constants", "multiply"]

BUCKETS: Final = (1, 8, 16, 32, 64)
MAX_ROWS: Final = BUCKETS[-1]
INVERSE_127_32 = tl.constexpr(INVERSE_127)


@triton.jit
def load_weights(pointers, k, limit, EVEN_K: tl.constexpr):
    """A tile of W, which one program reads once; zeros from column `limit` on, where nothing is read."""
    if EVEN_K:
        # All columns or none: one comparison, where `k` would cost one each.
        k = k * 0
    return tl.load(pointers, mask=(k < limit)[None, :], other=0, eviction_policy="evict_first")


@triton.jit
def finish(
    t,  # float32 [BLOCK_N] or [BLOCK_N, BLOCK_M]: x @ W.T for rows n
    up,  # the same for rows N_OUT + n if GATED
    n,  # of a shape that broadcasts to t's, as are the two offsets and the mask
    at_residual,
    at_y,
    mask,
    N_OUT,
    stats_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,
    SCALED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
):
    """The tail: scale, bias, activation, residual, one rounding."""
    if SCALED:
        t *= tl.load(stats_ptr + n) * INVERSE_127_32
    if HAS_BIAS:
        t += tl.load(bias_ptr + n).to(tl.float32)
    t = activate(t, ACTIVATION)
    if GATED:
        if SCALED:
            up *= tl.load(stats_ptr + N_OUT + n) * INVERSE_127_32
        if HAS_BIAS:
            up += tl.load(bias_ptr + N_OUT + n).to(tl.float32)
        t *= up
    if HAS_RESIDUAL:
        t += tl.load(residual_ptr + at_residual, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + at_y, t.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["N_OUT"])
def one_row_kernel(
    x_ptr,  # [M, K]
    stride_xm,
    weight_ptr,  # [N, K], 16 bit or int8; N is N_OUT, twice that if GATED
    stride_wn,
    stats_ptr,  # float32 [N], read if SCALED
    bias_ptr,  # [N], read if HAS_BIAS
    residual_ptr,  # [M, N_OUT], read if HAS_RESIDUAL
    stride_rm,
    y_ptr,  # [M, N_OUT]
    M,
    N_OUT,
    K,
    SCALED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    OVERLAP: tl.constexpr,
    EVEN_K: tl.constexpr,  # K is a multiple of BLOCK_K
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One row of x a program; with more rows, programs of the same rows of W follow each other and meet it in L2."""
    m = (tl.program_id(0) % M).to(tl.int64)
    n = tl.program_id(0) // M * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.minimum(n, N_OUT - 1).to(tl.int64)
    # Lanes hold the same 8 columns of x as of W: 16 bytes of one, and 8 or 16 of the other, never exchanged.
    k = tl.max_contiguous(tl.arange(0, BLOCK_K), 8)
    x_ptrs = x_ptr + m * stride_xm + k
    pointers = weight_ptr + row[:, None] * stride_wn + k[None, :]
    up_pointers = pointers + tl.cast(N_OUT, tl.int64) * stride_wn
    tile = load_weights(pointers, k, K, EVEN_K)
    up_tile = tile
    if GATED:
        up_tile = load_weights(up_pointers, k, K, EVEN_K)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    x = tl.load(x_ptrs, mask=k < K, other=0.0)
    sums = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    up_sums = sums
    for start in range(BLOCK_K, K + BLOCK_K, BLOCK_K):
        limit = K - start
        next_x = tl.load(x_ptrs + start, mask=k < limit, other=0.0)
        next_tile = load_weights(pointers + start, k, limit, EVEN_K)
        next_up = next_tile
        if GATED:
            next_up = load_weights(up_pointers + start, k, limit, EVEN_K)
        wide = tl.broadcast_to(x.to(tl.float32)[None, :], (BLOCK_N, BLOCK_K))
        sums = tl.fma(tile.to(tl.float32), wide, sums)
        if GATED:
            up_sums = tl.fma(up_tile.to(tl.float32), wide, up_sums)
        x = next_x
        tile = next_tile
        up_tile = next_up
    t = tl.sum(sums, axis=1)
    up = t
    if GATED:
        up = tl.sum(up_sums, axis=1)
    finish(
        t, up, row, m * stride_rm + n, m * N_OUT + n, n < N_OUT, N_OUT, stats_ptr, bias_ptr, residual_ptr, y_ptr,
        SCALED, HAS_BIAS, HAS_RESIDUAL, ACTIVATION, GATED,
    )  # fmt: skip


@triton.jit(do_not_specialize=["M", "N_OUT"])
def rows_kernel(
    x_ptr,  # [M, K]
    stride_xm,
    weight_ptr,  # [N, K], 16 bit or int8; N is N_OUT, twice that if GATED
    stride_wn,
    stats_ptr,  # float32 [N], read if SCALED
    bias_ptr,  # [N], read if HAS_BIAS
    residual_ptr,  # [M, N_OUT], read if HAS_RESIDUAL
    stride_rm,
    y_ptr,  # [M, N_OUT]
    M,
    N_OUT,
    K,
    SCALED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    OVERLAP: tl.constexpr,
    EVEN_K: tl.constexpr,  # K is a multiple of BLOCK_K
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    AHEAD: tl.constexpr,  # steps that L2 fetches before the wait if OVERLAP
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.minimum(n, N_OUT - 1).to(tl.int64)
    m = tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    up_rows = tl.cast(N_OUT, tl.int64) * stride_wn
    if OVERLAP:
        LINE: tl.constexpr = 128 // (weight_ptr.dtype.element_ty.primitive_bitwidth // 8)
        LINES: tl.constexpr = max(1, BLOCK_K // LINE)
        for step in tl.static_range(AHEAD):
            first = tl.minimum(step * BLOCK_K + tl.arange(0, LINES) * LINE, K - 1)
            lines = weight_ptr + row[:, None] * stride_wn + first[None, :]
            ask_for(lines)
            if GATED:
                ask_for(lines + up_rows)
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    x_ptrs = x_ptr + m.to(tl.int64)[:, None] * stride_xm + k[None, :]
    pointers = weight_ptr + row[:, None] * stride_wn + k[None, :]
    up_pointers = pointers + up_rows
    sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    up_sums = sums
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs + start, mask=(m < M)[:, None], other=0.0)
            tile = tl.load(pointers + start, eviction_policy="evict_first")
        else:
            inside = (k < K - start)[None, :]
            x = tl.load(x_ptrs + start, mask=(m < M)[:, None] & inside, other=0.0)
            tile = tl.load(pointers + start, mask=inside, other=0, eviction_policy="evict_first")
        sums = tl.dot(tile.to(x.dtype), tl.trans(x), sums)
        if GATED:
            if EVEN_K:
                up_tile = tl.load(up_pointers + start, eviction_policy="evict_first")
            else:
                up_tile = tl.load(up_pointers + start, mask=inside, other=0, eviction_policy="evict_first")
            up_sums = tl.dot(up_tile.to(x.dtype), tl.trans(x), up_sums)
    mask = (n < N_OUT)[:, None] & (m < M)[None, :]
    m = m.to(tl.int64)[None, :]
    finish(
        sums, up_sums, row[:, None], m * stride_rm + n[:, None], m * N_OUT + n[:, None], mask, N_OUT, stats_ptr,
        bias_ptr, residual_ptr, y_ptr, SCALED, HAS_BIAS, HAS_RESIDUAL, ACTIVATION, GATED,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Config:
    """How a program works."""

    block_n: int  # rows of W; half as many of gate and of up
    block_k: int
    warps: int
    stages: int = 0  # 0 for `one_row_kernel`

    def fitted(self, M: int, K: int, weight_bytes: int, shared: int, *, gated: bool = False) -> Config:
        """This one, made smaller where K is, where `shared` bytes of shared memory do not hold its stages, or where
        the pointers of gate and up take too many registers.
        """
        least = 32 if self.stages else 8
        most = 256 if gated and self.stages else self.block_k
        block_k = max(least, min(self.block_k, most, triton.next_power_of_2(K)))
        stages = self.stages
        step = block_k * (self.block_n * weight_bytes + max(bucket_of(M), 8) * 2)
        while stages > 2 and stages * step > shared:
            stages -= 1
        while self.stages and stages * step > shared:
            block_k, step = block_k // 2, step // 2
        return replace(self, block_k=block_k, stages=stages)


# By bytes of a weight, bucket of M, and shape of W: `deep` from K = 8192 on, else `wide` from N = 16384 on, else
# `narrow` up to N = 4096, else `small`. Measured on an H100 (Triton 3.6) at Llama-3.1-8B's shapes, weights rotated over
# 0.8 GB.
CONFIGS: Final[dict[tuple[int, int, str], Config]] = {
    (2, 1, "narrow"): Config(2, 2048, 8),
    (2, 1, "small"): Config(8, 1024, 4),
    (2, 1, "wide"): Config(2, 2048, 8),
    (2, 1, "deep"): Config(2, 1024, 4),
    (2, 8, "narrow"): Config(32, 512, 2, 4),
    (2, 8, "small"): Config(64, 128, 4, 6),
    (2, 8, "wide"): Config(32, 512, 2, 4),
    (2, 8, "deep"): Config(32, 512, 2, 4),
    (2, 16, "narrow"): Config(64, 128, 4, 6),
    (2, 16, "small"): Config(64, 256, 4, 3),
    (2, 16, "wide"): Config(64, 128, 4, 6),
    (2, 16, "deep"): Config(64, 256, 4, 5),
    (2, 32, "narrow"): Config(64, 128, 4, 6),
    (2, 32, "small"): Config(64, 128, 4, 6),
    (2, 32, "wide"): Config(128, 128, 8, 3),
    (2, 32, "deep"): Config(64, 128, 4, 6),
    (2, 64, "narrow"): Config(64, 128, 4, 6),
    (2, 64, "small"): Config(64, 128, 4, 6),
    (2, 64, "wide"): Config(128, 128, 8, 3),
    (2, 64, "deep"): Config(64, 128, 4, 6),
    (1, 1, "narrow"): Config(4, 512, 4),
    (1, 1, "small"): Config(4, 512, 2),
    (1, 1, "wide"): Config(2, 1024, 4),
    (1, 1, "deep"): Config(2, 2048, 8),
    (1, 8, "narrow"): Config(32, 256, 2, 5),
    (1, 8, "small"): Config(32, 256, 2, 5),
    (1, 8, "wide"): Config(32, 256, 2, 5),
    (1, 8, "deep"): Config(32, 256, 2, 5),
    (1, 16, "narrow"): Config(16, 512, 2, 4),
    (1, 16, "small"): Config(32, 512, 2, 4),
    (1, 16, "wide"): Config(64, 128, 2, 4),
    (1, 16, "deep"): Config(16, 512, 2, 4),
    (1, 32, "narrow"): Config(16, 256, 1, 5),
    (1, 32, "small"): Config(64, 256, 4, 3),
    (1, 32, "wide"): Config(64, 128, 2, 4),
    (1, 32, "deep"): Config(16, 256, 1, 5),
    (1, 64, "narrow"): Config(64, 256, 4, 3),
    (1, 64, "small"): Config(64, 256, 4, 3),
    (1, 64, "wide"): Config(128, 128, 8, 3),
    (1, 64, "deep"): Config(64, 256, 4, 3),
}
# AMD's compiler spills registers where one or two waves have a tile.
AMD: Final = Config(64, 64, 4, 2)


def bucket_of(M: int) -> int:
    """The number of rows that kernels for M of them are made for."""
    return next(bucket for bucket in BUCKETS if bucket >= M)


def configure(M: int, N: int, K: int, weight_bytes: int) -> Config:
    """The configuration for M <= MAX_ROWS rows of x and a weight [N, K]."""
    if torch.version.hip is not None and M > 1:
        return AMD
    shape = "deep" if K >= 8192 else "wide" if N >= 16384 else "narrow" if N <= 4096 else "small"
    return CONFIGS[weight_bytes, bucket_of(M), shape]


def constants(
    config: Config,
    M: int,
    K: int,
    *,
    scaled: bool,
    has_bias: bool,
    has_residual: bool,
    activation: str | None,
    gated: bool,
    overlap: bool,
) -> dict[str, Any]:
    """Compile-time arguments of the kernel of a fitted configuration, and launch settings beside them."""
    block_n, block_k = config.block_n, config.block_k
    if gated and (config.stages == 0 or block_n > 16):
        block_n = max(1, block_n // 2)
    elif gated:
        block_k = max(32, block_k // 2)
    settings: dict[str, Any] = {
        "SCALED": scaled,
        "HAS_BIAS": has_bias,
        "HAS_RESIDUAL": has_residual,
        "ACTIVATION": activation,
        "GATED": gated,
        "OVERLAP": overlap,
        "EVEN_K": K % block_k == 0,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "num_warps": config.warps,
    }
    if overlap:
        settings["launch_pdl"] = True
    if config.stages:
        settings |= {"BLOCK_M": max(8, bucket_of(M)), "AHEAD": config.stages - 1, "num_stages": config.stages}
    return settings


def multiply(
    y: Tensor,
    rows: Tensor,
    weight: Tensor,
    row_stats: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    gated: bool,
    *,
    overlap: bool = False,
    config: Config | None = None,
) -> None:
    """Write tail(rows @ W.T) into y.

    Args:
        y: [M, N], or [M, N/2] if gated; contiguous, in the dtype of `rows`, M from 1 to `MAX_ROWS`, or any M with a
            configuration for `one_row_kernel`.
        rows: [M, K], bfloat16 or float16, elements of a row side by side.
        weight: [N, K] in that dtype, or int8 codes with `row_stats`; elements of a row side by side.
        bias: [N], contiguous; or None.
        residual: as y, elements of a row side by side; or None.
        overlap: begin before the kernel in front has ended (see the top of this file).
        config: instead of `configure`'s choice.
    """
    M, K = rows.shape
    N_OUT = y.shape[1]
    config = configure(M, weight.shape[0], K, weight.element_size()) if config is None else config
    config = config.fitted(min(M, MAX_ROWS), K, weight.element_size(), shared_bytes(rows.device), gated=gated)
    settings = constants(
        config,
        min(M, MAX_ROWS),
        K,
        scaled=row_stats is not None,
        has_bias=bias is not None,
        has_residual=residual is not None,
        activation=activation,
        gated=gated,
        overlap=overlaps(rows.device, overlap),
    )
    kernel = rows_kernel if config.stages else one_row_kernel
    programs = triton.cdiv(N_OUT, settings["BLOCK_N"]) * (1 if config.stages else M)
    with on_device_of(rows):
        kernel[(programs,)](
            rows,
            rows.stride(0),
            weight,
            weight.stride(0),
            y if row_stats is None else row_stats,
            y if bias is None else bias,
            y if residual is None else residual,
            0 if residual is None else residual.stride(0),
            y,
            M,
            N_OUT,
            K,
            **settings,
            **NO_CONTRACTION,
        )
