"""How the small-M 4-bit kernel is cut to a shape: a table measured on a GPU, no tuning at run time."""

from __future__ import annotations

from dataclasses import dataclass, replace

from onegpu.kernels.overlap import OVERLAP_CAPABILITY

__all__ = [
    "ALONE",
    "ALONE_NESTED",
    "GUARDED",
    "INSTEAD",
    "MAX_ROWS",
    "OVERLAPPED",
    "OVERLAPPED_NESTED",
    "Config",
    "configure",
]

MAX_ROWS = 32


@dataclass(frozen=True, slots=True)
class Config:
    """How one program works, and how many there are."""

    warps: int
    warps_n: int  # side by side along rows of W; the rest split K
    tiles: int  # of 16 rows, of one warp
    unroll: int  # tiles of 64 columns at a time
    ahead: bool = True  # load x a step ahead too, which takes 8 registers for each tile along K and eight rows of x
    per_sm: int = 0  # programs for each processor at most; 0 for one program per row group
    even: bool = False  # fewer programs, so that all have the same number of row groups
    overlaps: bool = True  # may read W while the kernel in front still runs, where the caller allows it
    edges: bool = False  # else begin while that one runs, ask L2 for W, and wait
    twice: bool = False  # two steps in a round of the 4-bit kernel's loop, which takes registers for both
    shares: bool = False  # plain scales of a 4-bit W are loaded by one of four lanes and handed to the others
    once: bool = False  # no loop in the 4-bit kernel, where a step is all of K; `ahead` is then: all of x at once

    def grid(self, N: int, processors: int) -> int:
        """Programs for N rows of W."""
        groups = ceil_div(N, 16 * self.tiles * self.warps_n)
        limit = groups if self.per_sm == 0 else min(groups, self.per_sm * processors)
        return ceil_div(groups, ceil_div(groups, limit)) if self.even else limit

    def overlap(self, allowed: bool, capability: tuple[int, int]) -> str | None:
        """How much of this kernel runs beside the one in front: "weights" are read if `allowed`; its "edges"; None."""
        if capability < OVERLAP_CAPABILITY:
            return None
        if allowed and self.overlaps:
            return "weights"
        return "edges" if self.edges else None

    def is_even_k(self, K: int) -> bool:
        """Whether steps divide K, so that no load needs a guard."""
        return (K // 64) % (self.warps // self.warps_n * self.unroll) == 0

    def holds(self, K: int) -> bool:
        """Whether a program is to have nothing but one step."""
        warps_k = self.warps // self.warps_n
        return self.once and self.per_sm == 0 and ceil_div(K // 64, warps_k * self.unroll) == 1

    def fitted(self, K: int) -> Config:
        """The nearest configuration whose steps divide K; this one if none does."""
        warps = self.warps
        while warps >= max(4, self.warps_n):
            unroll = self.unroll
            while unroll:
                candidate = replace(self, warps=warps, unroll=unroll)
                if candidate.is_even_k(K):
                    return candidate
                unroll //= 2
            warps //= 2
        return self


# By rows of x (1, up to 8, 16, 32) and shape of W: `wide` from N = 16384 on, else `deep` from K = 8192 on, else
# `narrow` up to N = 4096, else `small`. Measured on an H100 (132 processors, Triton 3.6) with `onegpu bench kernels
# --tune`: what counts is bytes in flight, so programs are small and tiles lie along K; deep weights have few rows, so
# 16 warps split K; many rows of x pay for themselves when two to four tiles of W use them. Edges overlap where that was
# quicker in a row of products: 3-12 % (but 6-12 % slower at 8 rows of `narrow` and `deep`, where programs of the next
# kernel gather on few processors). Rounds of two steps were quicker, by 2-5 %, at 8 rows of `wide`, and with nested
# scales below.
ALONE = {
    (1, "narrow"): Config(8, 1, 1, 2, ahead=False, edges=True),
    (1, "small"): Config(8, 1, 1, 2, ahead=False, edges=True),
    (1, "wide"): Config(4, 1, 2, 2, ahead=False, per_sm=4, even=True, edges=True),
    (1, "deep"): Config(16, 1, 1, 2, ahead=False, edges=True),
    (8, "narrow"): Config(4, 1, 1, 4, ahead=False),
    (8, "small"): Config(4, 1, 1, 4, ahead=False, edges=True),
    (8, "wide"): Config(4, 2, 2, 2, edges=True, twice=True),
    (8, "deep"): Config(4, 1, 1, 4, ahead=False),
    (16, "narrow"): Config(4, 1, 1, 2, ahead=False),
    (16, "small"): Config(4, 1, 1, 2, ahead=False),
    (16, "wide"): Config(4, 1, 2, 1, per_sm=4, even=True, edges=True),
    (16, "deep"): Config(8, 1, 1, 2, edges=True),
    (32, "narrow"): Config(8, 1, 2, 1),
    (32, "small"): Config(4, 1, 1, 1),
    (32, "wide"): Config(4, 2, 4, 1, ahead=False),
    (32, "deep"): Config(8, 1, 2, 1),
}
# With OVERLAP two kernels share a processor for a while, so other choices win in a chain of a decoder's products;
# measured in a whole layer: norm, qkv, attention, o + residual, norm, gated product, down + residual, 32 times.
OVERLAPPED = ALONE | {
    (1, "narrow"): Config(16, 1, 1, 2),
    (1, "small"): Config(4, 1, 1, 4, ahead=False),
    (1, "deep"): Config(16, 1, 1, 2),
    (8, "wide"): Config(4, 1, 2, 2, ahead=False, per_sm=4, even=True),
    (8, "deep"): Config(16, 1, 1, 1),
    (32, "wide"): Config(4, 2, 4, 1, ahead=False, overlaps=False),
}
# With nested scales, a chain whose edges alone overlap: 1636 to 1552 us; one that overlaps more: 1450 to 1421 us. At 8
# rows of 6144 x 4096 without edges 9.04 to 8.50 us, and 7.66 with the map of scales stored behind the table.
ALONE_NESTED = ALONE | {
    (1, "narrow"): Config(8, 1, 1, 2, ahead=False, edges=True, twice=True),
    (1, "small"): Config(8, 1, 1, 2, ahead=False, edges=True, twice=True),
    (8, "small"): Config(4, 1, 1, 4, ahead=False),
}
OVERLAPPED_NESTED = OVERLAPPED | {
    (1, "deep"): Config(16, 1, 1, 2, ahead=False),
    (8, "narrow"): Config(4, 1, 1, 4, ahead=False, overlaps=False),
    (8, "small"): Config(4, 1, 1, 4, ahead=False, overlaps=False),
}
# Instead, by `overlap` and whether scales are nested: without a gate, where steps divide K. Times are those of scripts
# that were not kept, as docs/experiments.md has them ("Decoding between products"). `deep` stands for up to
# 4096 rows of W here, `large` for more; `short` for up to 1024 rows of a `narrow` one.
INSTEAD = {
    # Alone, plain scales. One row of 4096 x 4096 5.46 to 5.05 us. Without a loop 4096 x 4096 at 8 and 16 rows 6.48 to
    # 5.73 and 8.19 to 7.04 us, 2048 x 2048 3.84 to 2.77 and 4.90 to 3.27: 128 programs of two tiles have all of W on
    # its way at once and read x half as often; 64 programs of one tile at 16 rows of 1024 x 4096, 4.91 to 3.82. At 6144
    # x 4096 programs without a loop fill one and a half rounds and lose; at one row the loop is quicker. 4096 x 14336
    # at 8 and 16 rows 16.63 to 16.01 and 19.51 to 18.63, both slower than others at 8192 x 8192, where it is 22.61 to
    # 16.81 at 8 rows; 28672 x 4096 at 8 rows 25.57 to 25.18.
    (False, False): {
        (1, "narrow"): Config(16, 1, 1, 2, ahead=False, edges=True),
        (8, "narrow"): Config(16, 1, 2, 4, ahead=False, edges=True, once=True),
        (8, "wide"): Config(4, 2, 2, 2, edges=True, twice=True, shares=True),
        (8, "deep"): Config(8, 1, 1, 4, ahead=False, edges=True, shares=True),
        (8, "large"): Config(4, 1, 1, 4, ahead=False, shares=True),
        (16, "short"): Config(16, 1, 1, 4, edges=True, shares=True, once=True),
        (16, "narrow"): Config(8, 1, 2, 8, ahead=False, edges=True, shares=True, once=True),
        (16, "deep"): Config(16, 1, 2, 1, ahead=False, edges=True, shares=True),
    },
    # A chain of a decoder's products: 1753 to 1679 us at 8 rows, where `narrow` and `small` overlap again too, and 2139
    # to 1921 at 16.
    (True, False): {
        (8, "deep"): Config(8, 1, 1, 4, ahead=False, shares=True),
        (16, "narrow"): Config(16, 1, 2, 4, ahead=False, shares=True, once=True),
        (16, "small"): Config(8, 1, 2, 1, ahead=False, edges=True, overlaps=False, shares=True),
    },
    # Alone, nested scales: one row of 4096 x 4096 6.38 to 5.60 us, of 6144 x 4096 7.12 to 6.84; 4096 x 14336 at 8 and
    # 16 rows 15.52 to 14.78 and 20.11 to 19.39.
    (False, True): {
        (1, "narrow"): Config(16, 1, 1, 2, ahead=False, edges=True),
        (1, "small"): Config(8, 1, 1, 2, edges=True, twice=True),
        (8, "deep"): Config(8, 1, 1, 2, edges=True, twice=True),
        (16, "deep"): Config(16, 1, 2, 1, ahead=False, edges=True),
    },
    # The chain with nested scales: 1700 to 1639 us at 8 rows, 10 of it by `narrow`.
    (True, True): {
        (8, "narrow"): Config(8, 1, 2, 8, ahead=False, once=True),
        (8, "deep"): Config(8, 1, 1, 4, ahead=False),
    },
}
# Alone, plain scales: from which K on no loop pays even where its one step is longer than K. 5.48 to 5.23 us at 8 rows
# of 3072 x 3072, 6.79 to 5.65 and 7.73 to 6.95 at 8 and 16 rows of 3584 x 3584; at 16 rows of 3072 x 3072 it is slower.
GUARDED = {
    (8, "narrow"): (3072, Config(16, 1, 2, 4, ahead=False, edges=True, once=True)),
    (16, "narrow"): (3584, Config(16, 1, 2, 4, ahead=False, edges=True, shares=True, once=True)),
}


def configure(M: int, N: int, K: int, overlap: bool, gated: bool = False, nested: bool = False) -> Config:
    """The configuration for M <= `MAX_ROWS` rows of x and a weight [N, K].

    `gated` needs an even number of tiles; with `nested` scales four tiles would not fit in registers.
    """
    rows = next(limit for limit in (1, 8, 16, 32) if limit >= M)
    shape = "wide" if N >= 16384 else "deep" if K >= 8192 else "narrow" if N <= 4096 else "small"
    config = None if gated else instead(rows, shape, N, K, overlap, nested)
    if config is not None:
        return config
    tables = (ALONE_NESTED, OVERLAPPED_NESTED) if nested else (ALONE, OVERLAPPED)
    config = tables[overlap][rows, shape]
    if gated and config.tiles % 2:
        config = replace(config, tiles=2 * config.tiles, unroll=max(1, config.unroll // 2))
    if nested and config.tiles > 2:
        config = replace(config, tiles=2)
    return config.fitted(K)


def instead(rows: int, shape: str, N: int, K: int, overlap: bool, nested: bool) -> Config | None:
    """What `INSTEAD` and `GUARDED` have for a product without a gate."""
    table = INSTEAD[overlap, nested]
    finer = shape
    if shape == "deep" and N > 4096:
        finer = "large"
    elif shape == "narrow" and N <= 1024 and (rows, "short") in table:
        finer = "short"
    config = table.get((rows, finer))
    if config is not None:
        # For a shorter K a shorter step, if it still is all of K; in a loop, shorter ones were slower.
        config = config.fitted(K) if config.once else config
        if config.is_even_k(K) and (config.holds(K) or not config.once):
            return config
    if not (overlap or nested) and (rows, shape) in GUARDED:
        first, config = GUARDED[rows, shape]
        if first <= K and config.holds(K):
            return config
    return None


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)
