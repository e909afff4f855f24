"""How the many-row 4-bit kernel is cut to a shape: a count of clocks fitted to an H100, no tuning at run time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

__all__ = ["MAX_SHARED", "Config", "configure", "shared_bytes", "stages"]

# Of Hopper, for one program.
MAX_SHARED: Final = 232448
TABLE: Final = 32768
STAGING: Final = 2 * 32 * 144
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


def stages(tokens: int, groups: int, gated: bool) -> int:
    """Tiles on their way at a time."""
    return min(MOST_STAGES, (MAX_SHARED - fixed_bytes(gated)) // (stage_bytes(tokens, groups) + 16))


def fixed_bytes(gated: bool) -> int:
    """Shared memory beside the stages: alignment, table, results on their way out, a ticket."""
    return 1024 + TABLE + STAGING + (HANDED if gated else 0) + 16


def shared_bytes(tokens: int, groups: int, gated: bool) -> int:
    """Shared memory of a program."""
    return fixed_bytes(gated) + stages(tokens, groups, gated) * (stage_bytes(tokens, groups) + 16)


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
