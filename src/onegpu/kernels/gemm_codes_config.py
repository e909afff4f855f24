"""How the many-row kernel of coded weights is cut to a shape: clocks fitted to an H100, no tuning at run time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Final

__all__ = [
    "INT8_TOKENS",
    "MAX_SHARED",
    "TOKENS",
    "Config",
    "Shape",
    "configure",
    "least_rows",
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
# Who comes last, and the barriers of scales of 8-bit codes.
LAST: Final = 32
MOST_STAGES: Final = 12
TOKENS: Final = (32, 64, 96, 128, 160, 192, 224, 256)
# Where x is codes. For 192 and more registers run out between products and sums; 160 was seldom ahead, and not by much.
INT8_TOKENS: Final = (64, 96, 128)
INT8_SPLITS: Final = (1, 2)
SPLITS: Final = (1, 2, 3, 4, 6, 8)
# Of so many tokens at most, two programs have registers enough.
PAIRED: Final = 64
ROWS: Final = 128
# Clocks, fitted to 430 measured configurations of Llama-3.1-8B's four shapes at 8 to 4096 rows: what all begin with;
# what a work begins and ends with, and adding up parts of K; a tile, alone on a processor.
START: Final = 3330


@dataclass(frozen=True, slots=True)
class Clocks:
    """What programs of one kind take."""

    work: float
    tile: float
    tile_token: float
    meet: float
    meet_token: float


# By programs of a processor at a time. Two of them take turns at what one alone leaves idle.
CLOCKS: Final = {1: Clocks(1440, 238, 3.92, 3660, 11.8), 2: Clocks(1580, 230, 5.98, 2280, 21.1)}
SHARED_TILE: Final = 1.62
# Where x is codes: 180 configurations of the same shapes at 96 to 4096 rows.
INT8_CLOCKS: Final = Clocks(820, 324, 3.42, 2670, 23.8)


@dataclass(frozen=True, slots=True)
class Config:
    """How a product is cut.

    Attributes:
        tokens: rows of x of a work.
        splits: parts of K, of works that fill no whole round of programs.
        blocks: programs of a processor at a time: 2 hide each other's waits, 1 has more tiles on their way.
    """

    tokens: int
    splits: int = 1
    blocks: int = 1


@dataclass(frozen=True, slots=True)
class Shape:
    """What decides how much shared memory a program takes.

    Attributes:
        tokens: rows of x.
        bits: of a code.
        groups: scales of a row in 64 columns.
        gated: half of W's rows gate the others.
        blocks: programs of a processor at a time.
        x_bits: of x: 16, or 8 where it is codes as well.
    """

    tokens: int
    bits: int = 4
    groups: int = 1
    gated: bool = False
    blocks: int = 1
    x_bits: int = 16

    @property
    def columns(self) -> int:
        """Of a tile: 128 bytes of x."""
        return 1024 // self.x_bits


def least_rows(N: int, K: int, bits: int, *, nested: bool = False) -> int:
    """From so many rows of x on the kernel is quicker for W [N, K] than `gemv_4bit` and `gemv_rows`."""
    # Measured at Llama-3.1-8B's shapes: 16 rows of x are quicker here where W is large, int8 where it is deep. Nested
    # scales cost a kernel more.
    early = K >= 2 * N if bits == 8 else N * K >= 2**25 and not nested
    return 9 if early else 17


def stage_bytes(shape: Shape) -> int:
    """Shared memory of one tile: x, codes and scales, and two barriers."""
    codes = ROWS * shape.columns // 8 * shape.bits
    return shape.tokens * 128 + codes + (512 * shape.groups if shape.bits == 4 else 0) + 16


def scales_sums(shape: Shape) -> bool:
    """Whether scales multiply sums of a tile's columns: cheaper up to so many tokens, and more exact."""
    return shape.bits == 4 and shape.tokens <= 128 and shape.groups == 1


def stages(shape: Shape) -> int:
    """Tiles on their way at a time."""
    shared = (MAX_SHARED - 1024) // 2 if shape.blocks == 2 else MAX_SHARED
    return min(MOST_STAGES, (shared - fixed_bytes(shape)) // stage_bytes(shape))


def fixed_bytes(shape: Shape) -> int:
    """Shared memory beside the stages: table, results on their way out, scales of 8-bit codes, who comes last."""
    table = TABLE if shape.bits == 4 else 0
    sides = 4 * (ROWS + (shape.tokens if shape.x_bits == 8 else 0)) if shape.bits == 8 else 0
    return table + 2 * BUFFERS * leaving(shape) * PITCH + (HANDED if shape.gated else 0) + sides + LAST


def leaving(shape: Shape) -> int:
    """Tokens that leave at a time."""
    return 64 if shape.tokens % 64 == 0 and shape.tokens >= 128 and not shape.gated and shape.x_bits == 16 else 32


def shared_bytes(shape: Shape) -> int:
    """Shared memory of a program."""
    return fixed_bytes(shape) + stages(shape) * stage_bytes(shape)


@lru_cache(maxsize=4096)
def configure(M: int, N: int, K: int, processors: int, x_bits: int = 16) -> Config:
    """The configuration for M rows of x and a weight [N, K]."""
    if x_bits == 8:
        cuts = [
            Config(tokens, splits)
            for tokens in INT8_TOKENS
            for splits in INT8_SPLITS
            if splits == 1 or 512 * splits <= K
        ]
        return min(cuts, key=lambda config: clocks(config, M, N, ceil_div(K, 128), processors, INT8_CLOCKS))
    choices = [
        Config(tokens, splits, blocks)
        for tokens in TOKENS
        if tokens < 2 * M or tokens == TOKENS[0]
        for blocks in (1, 2)
        if blocks == 1 or tokens <= PAIRED
        for splits in SPLITS
        if splits == 1 or 256 * splits <= K
    ]
    return min(choices, key=lambda config: clocks(config, M, N, K // 64, processors, CLOCKS[config.blocks]))


def clocks(config: Config, M: int, N: int, tiles: int, processors: int, kind: Clocks) -> float:
    """What a configuration is expected to take, of so many tiles along K."""
    room = config.blocks * processors
    rounds, rest = divmod(ceil_div(M, config.tokens) * ceil_div(N, ROWS), room)
    tile = kind.tile + kind.tile_token * config.tokens
    shared = tile * SHARED_TILE if config.blocks == 2 else tile
    total = START + rounds * (tiles * shared + kind.work)
    if rest:
        parts = rest * config.splits
        meet = kind.meet + kind.meet_token * config.tokens * config.splits if config.splits > 1 else 0
        each = ceil_div(tiles, config.splits) * (shared if min(parts, room) > processors else tile)
        total += ceil_div(parts, room) * (each + kind.work + meet)
    return total


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)
