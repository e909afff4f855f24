"""How the few-row int8 kernel is cut to a shape, and where it is the kernel to take."""

from __future__ import annotations

from dataclasses import replace

from onegpu.kernels.gemv_4bit_config import Config

__all__ = ["CONFIGS", "MAX_ROWS", "MOST_ROWS", "configure", "is_even_k"]

MAX_ROWS = 32
# Up to so many rows this kernel is taken where `gemm_8bit` runs too. Measured with the table below: from 17 rows on
# that one is quicker at each of its shapes, at 16 at none.
MOST_ROWS = 16

# By rows of x (1, up to 8, 16, 32) and shape of W: `wide` from N = 16384 on, else `deep` from K = 8192 on, else
# `narrow` up to N = 4096, else `small`. Measured on an H100 (132 processors, Triton 3.6) at Llama-3.1-8B's shapes,
# weights rotated over 0.7 GB; those of 32 rows serve where `gemm_8bit` does not run.
CONFIGS = {
    (1, "narrow"): Config(8, 1, 1, 2),
    (1, "small"): Config(8, 1, 1, 2, edges=True),
    (1, "wide"): Config(8, 1, 1, 2, edges=True),
    (1, "deep"): Config(8, 1, 1, 2),
    (8, "narrow"): Config(8, 1, 1, 2, edges=True),
    (8, "small"): Config(8, 1, 1, 2, per_sm=2),
    (8, "wide"): Config(8, 1, 1, 2, per_sm=2, edges=True),
    (8, "deep"): Config(8, 1, 1, 2, edges=True),
    (16, "narrow"): Config(8, 1, 1, 2, ahead=False, edges=True),
    (16, "small"): Config(4, 1, 1, 2, ahead=False, edges=True),
    (16, "wide"): Config(4, 2, 1, 2, ahead=False, per_sm=4, edges=True),
    (16, "deep"): Config(8, 1, 1, 2, ahead=False, edges=True),
    (32, "narrow"): Config(4, 1, 1, 2, ahead=False),
    (32, "small"): Config(4, 1, 1, 1, ahead=False),
    (32, "wide"): Config(4, 1, 1, 1, ahead=False, per_sm=4),
    (32, "deep"): Config(8, 1, 1, 1, ahead=False),
}


def configure(M: int, N: int, K: int, gated: bool = False) -> Config:
    """The configuration for M <= `MAX_ROWS` rows of x and a weight [N, K]; `gated` needs an even number of tiles."""
    rows = next(limit for limit in (1, 8, 16, 32) if limit >= M)
    shape = "wide" if N >= 16384 else "deep" if K >= 8192 else "narrow" if N <= 4096 else "small"
    config = CONFIGS[rows, shape]
    if gated and config.tiles % 2:
        config = replace(config, tiles=2 * config.tiles, unroll=max(1, config.unroll // 2))
    return config.fitted(K)


def is_even_k(config: Config, K: int) -> bool:
    """Whether steps divide K, so that no load needs a guard."""
    return K % 64 == 0 and config.is_even_k(K)
