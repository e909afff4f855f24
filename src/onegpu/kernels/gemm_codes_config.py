"""How the many-row kernel of coded weights is cut to a shape: clocks fitted to an H100, no tuning at run time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Final

__all__ = [
    "MAX_SHARED",
    "TOKENS",
    "Config",
    "Shape",
    "blocks",
    "configure",
    "leaving",
    "scales_sums",
    "shared_bytes",
    "stages",
]

# Of Hopper, for one program.
MAX_SHARED: Final = 232448
TABLE: Final = 32768
PITCH: Final = 128
BUFFERS: Final = 3
HANDED: Final = 8192
MOST_STAGES: Final = 8
TOKENS: Final = (32, 64, 96, 128, 160, 192, 224, 256)
SPLITS: Final = (1, 2, 3, 4, 6, 8)
ROWS: Final = 128
# Clocks, fitted to 230 measured configurations of Llama-3.1-8B's four shapes at 32 to 4096 rows: what all begin with;
# what a program's work begins and ends with, and adding up parts of K; a tile of 64 columns, alone on a processor.
START: Final = 2200


@dataclass(frozen=True, slots=True)
class Clocks:
    """What programs of one kind take."""

    work: float
    tile: float
    tile_token: float
    meet: float
    meet_token: float


# By programs of a processor at a time. Two of them take turns at what one alone leaves idle.
CLOCKS: Final = {1: Clocks(5100, 160, 4.25, 4300, 25), 2: Clocks(5700, 208, 6.3, 3400, 33)}
SHARED_TILE: Final = 1.46


@dataclass(frozen=True, slots=True)
class Config:
    """How many rows of x a program takes, and into how many parts K is cut."""

    tokens: int
    splits: int = 1


@dataclass(frozen=True, slots=True)
class Shape:
    """What decides how much shared memory a program takes.

    Attributes:
        tokens: rows of x.
        bits: of a code.
        groups: scales of a row in 64 columns.
        gated: half of W's rows gate the others.
    """

    tokens: int
    bits: int = 4
    groups: int = 1
    gated: bool = False


def stage_bytes(shape: Shape) -> int:
    """Shared memory of one tile of 64 columns: x, codes and scales, and two barriers."""
    return shape.tokens * 128 + ROWS * 8 * shape.bits + (512 * shape.groups if shape.bits == 4 else 0) + 16


def blocks(tokens: int) -> int:
    """Programs of a processor at a time."""
    return 2 if tokens <= 64 else 1


def scales_sums(shape: Shape) -> bool:
    """Whether scales multiply sums of a tile's columns: cheaper up to so many tokens, and more exact."""
    return shape.bits == 4 and shape.tokens <= 128 and shape.groups == 1


def stages(shape: Shape) -> int:
    """Tiles on their way at a time."""
    shared = (MAX_SHARED - 1024) // 2 if blocks(shape.tokens) == 2 else MAX_SHARED
    return min(MOST_STAGES, (shared - fixed_bytes(shape)) // stage_bytes(shape))


def fixed_bytes(shape: Shape) -> int:
    """Shared memory beside the stages: table, results on their way out."""
    table = TABLE if shape.bits == 4 else 0
    return table + 2 * BUFFERS * leaving(shape) * PITCH + (HANDED if shape.gated else 0)


def leaving(shape: Shape) -> int:
    """Tokens that leave at a time."""
    return 64 if shape.tokens % 64 == 0 and shape.tokens >= 128 and not shape.gated else 32


def shared_bytes(shape: Shape) -> int:
    """Shared memory of a program."""
    return fixed_bytes(shape) + stages(shape) * stage_bytes(shape)


@lru_cache(maxsize=4096)
def configure(M: int, N: int, K: int, processors: int) -> Config:
    """The configuration for M rows of x and a weight [N, K]."""
    choices = [
        Config(tokens, splits)
        for tokens in TOKENS
        if tokens < 2 * M or tokens == TOKENS[0]
        for splits in SPLITS
        if splits == 1 or 256 * splits <= K
    ]
    return min(choices, key=lambda config: clocks(config, M, N, K, processors))


def clocks(config: Config, M: int, N: int, K: int, processors: int) -> float:
    """What a configuration is expected to take."""
    together = blocks(config.tokens)
    kind = CLOCKS[together]
    works = ceil_div(M, config.tokens) * ceil_div(N, ROWS) * config.splits
    room = together * in_clusters(processors, config.splits)
    tile = kind.tile + kind.tile_token * config.tokens
    if together == 2 and min(works, room) > processors:
        tile *= SHARED_TILE
    meet = kind.meet + kind.meet_token * config.tokens if config.splits > 1 else 0
    return START + ceil_div(works, room) * (ceil_div(K // 64, config.splits) * tile + kind.work + meet)


def in_clusters(processors: int, size: int) -> int:
    """Processors that clusters of a size can fill: they lie within groups of about 16 processors each."""
    return processors if size <= 2 else processors * 120 // 132 if size <= 6 else processors * 112 // 132


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)
