"""How the many-row 4-bit kernel is cut to a shape: a count of clocks fitted to an H100, no tuning at run time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Final

__all__ = ["MAX_SHARED", "TOKENS", "Config", "blocks", "configure", "leaving", "scales_sums", "shared_bytes", "stages"]

# Of Hopper, for one program.
MAX_SHARED: Final = 232448
TABLE: Final = 32768
PITCH: Final = 128
HANDED: Final = 8192
MOST_STAGES: Final = 8
TOKENS: Final = (32, 64, 96, 128, 160, 192, 224, 256)
MAX_SPLITS: Final = 8
ROWS: Final = 128
# Clocks of one tile of 64 columns: the tensor cores', for each token; the decoding's; what memory brings for each
# program of the device.
MULTIPLY: Final = 4.0
DECODE: Final = 300
READ: Final = 2.6
# Clocks to begin and end with.
START: Final = 2600
FINISH: Final = 14
MEET: Final = 1500


@dataclass(frozen=True, slots=True)
class Config:
    """How many rows of x a program takes, and into how many parts K is cut."""

    tokens: int
    splits: int = 1


def stage_bytes(tokens: int, groups: int) -> int:
    """Shared memory of one tile: x, codes and scales of 64 columns."""
    return tokens * 128 + 4096 + 512 * groups


def blocks(tokens: int) -> int:
    """Programs of a processor at a time."""
    return 2 if tokens <= 64 else 1


def scales_sums(tokens: int, groups: int) -> bool:
    """Whether scales multiply sums of a tile's columns: cheaper up to so many tokens, and more exact."""
    return tokens <= 128 and groups == 1


def stages(tokens: int, groups: int, gated: bool) -> int:
    """Tiles on their way at a time."""
    shared = (MAX_SHARED - 1024) // 2 if blocks(tokens) == 2 else MAX_SHARED
    return min(MOST_STAGES, (shared - fixed_bytes(tokens, gated)) // (stage_bytes(tokens, groups) + 16))


def fixed_bytes(tokens: int, gated: bool) -> int:
    """Shared memory beside the stages: alignment, table, results on their way out."""
    return 1024 + TABLE + 4 * leaving(tokens, gated) * PITCH + (HANDED if gated else 0)


def leaving(tokens: int, gated: bool) -> int:
    """Tokens that leave at a time."""
    return 64 if tokens % 64 == 0 and tokens >= 128 and not gated else 32


def shared_bytes(tokens: int, groups: int, gated: bool) -> int:
    """Shared memory of a program."""
    return fixed_bytes(tokens, gated) + stages(tokens, groups, gated) * (stage_bytes(tokens, groups) + 16)


@lru_cache(maxsize=4096)
def configure(M: int, N: int, K: int, processors: int) -> Config:
    """The configuration for M rows of x and a weight [N, K]."""
    choices = [
        Config(tokens, splits)
        for tokens in TOKENS
        if tokens < 2 * M or tokens == TOKENS[0]
        for splits in range(1, min(MAX_SPLITS, K // 256 or 1) + 1)
    ]
    return min(choices, key=lambda config: clocks(config, M, N, K, processors))


def clocks(config: Config, M: int, N: int, K: int, processors: int) -> float:
    """What a configuration is expected to take."""
    works = ceil_div(M, config.tokens) * ceil_div(N, ROWS) * config.splits
    waves = ceil_div(works, processors)
    busy = min(works, processors)
    tile = max(MULTIPLY * config.tokens, DECODE, READ * busy)
    steps = ceil_div(K // 64, config.splits)
    finish = FINISH * config.tokens + (MEET + 10 * config.tokens if config.splits > 1 else 0)
    return START + waves * (steps * tile + finish)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)
