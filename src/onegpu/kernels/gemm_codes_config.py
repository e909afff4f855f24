"""How the many-row kernel of coded weights is cut to a shape: clocks fitted to an H100, no tuning at run time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Final

__all__ = [
    "INT8_TOKENS",
    "MAX_SHARED",
    "TOKENS",
    "TOKENS_OF_THREE",
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
# Where three warpgroups multiply, each has fewer registers.
TOKENS_OF_THREE: Final = (32, 64, 96, 128, 160, 192)
# Where x is codes. For 192 and more registers run out between products and sums; 160 was seldom ahead, and not by much.
INT8_TOKENS: Final = (64, 96, 128)
SPLITS: Final = (1, 2, 3, 4, 6)
# More parts were quicker nowhere.
SPLITS_OF_THREE: Final = (1, 2)
# Of so many tokens at most, two programs have registers enough.
PAIRED: Final = 64
# By warpgroups that multiply: of so many tokens at most, sums and products of a tile both have registers.
FEW_TOKENS: Final = {2: 128, 3: 96}
# Rows of W of a warpgroup.
ROWS: Final = 64


@dataclass(frozen=True, slots=True)
class Clocks:
    """What programs of one kind take: a work, a tile and each of its tokens, adding up parts of K."""

    work: float
    tile: float
    tile_token: float
    meet: float
    meet_token: float


# By bits of W, bits of x, programs of a processor, warpgroups, and whether there are few tokens (always, where x is
# codes); fitted to 2,266 measured configurations of Llama-3.1-8B's four shapes at 16 to 4096 rows. Two programs of a
# processor take turns at what one alone leaves idle. What all choices have in common is not in it: the beginning, and
# W's way from memory.
CLOCKS: Final = {
    (4, 16, 2, 2, True): Clocks(917, 286, 8.41, 2987, 18.0),
    (4, 16, 1, 2, True): Clocks(1418, 257, 3.52, 2721, 12.8),
    (4, 16, 1, 2, False): Clocks(4995, 367, 2.94, 4143, 10.2),
    (4, 16, 1, 3, True): Clocks(2164, 317, 5.02, 1500, 24.7),
    (4, 16, 1, 3, False): Clocks(3725, 191, 6.66, 0, 28.5),
    (8, 16, 2, 2, True): Clocks(5057, 513, 4.68, 2133, 14.8),
    (8, 16, 1, 2, True): Clocks(2261, 368, 1.97, 4814, 15.1),
    (8, 16, 1, 2, False): Clocks(9980, 243, 3.21, 0, 12.2),
    (8, 16, 1, 3, True): Clocks(4383, 432, 3.56, 4325, 7.6),
    (8, 16, 1, 3, False): Clocks(10172, 28, 6.33, 0, 21.2),
    (8, 8, 1, 2, True): Clocks(1292, 310, 2.90, 2119, 27.7),
    (8, 8, 1, 3, True): Clocks(2655, 367, 4.43, 0, 50.4),
}
SHARED_TILE: Final = {4: 1.14, 8: 1.29}


@dataclass(frozen=True, slots=True)
class Config:
    """How a product is cut.

    Attributes:
        tokens: rows of x of a work.
        splits: parts of K, of works that fill no whole round of programs.
        blocks: programs of a processor at a time: 2 hide each other's waits, 1 has more tiles on their way.
        warpgroups: that multiply, 64 rows of W each: 2, or 3, of which only one program fits.
    """

    tokens: int
    splits: int = 1
    blocks: int = 1
    warpgroups: int = 2

    @property
    def rows(self) -> int:
        """Rows of W of a work."""
        return ROWS * self.warpgroups


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
        warpgroups: that multiply.
    """

    tokens: int
    bits: int = 4
    groups: int = 1
    gated: bool = False
    blocks: int = 1
    x_bits: int = 16
    warpgroups: int = 2

    @property
    def rows(self) -> int:
        """Rows of W of a work."""
        return ROWS * self.warpgroups

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
    codes = shape.rows * shape.columns // 8 * shape.bits
    return shape.tokens * 128 + codes + (4 * shape.rows * shape.groups if shape.bits == 4 else 0) + 16


def scales_sums(shape: Shape) -> bool:
    """Whether scales multiply sums of a tile's columns: cheaper up to so many tokens, and more exact."""
    return shape.bits == 4 and shape.tokens <= FEW_TOKENS[shape.warpgroups] and shape.groups == 1


def stages(shape: Shape) -> int:
    """Tiles on their way at a time."""
    shared = (MAX_SHARED - 1024) // 2 if shape.blocks == 2 else MAX_SHARED
    return min(MOST_STAGES, (shared - fixed_bytes(shape)) // stage_bytes(shape))


def fixed_bytes(shape: Shape) -> int:
    """Shared memory beside the stages: table, results on their way out, scales of 8-bit codes, who comes last."""
    table = TABLE if shape.bits == 4 else 0
    sides = 4 * (shape.rows + (shape.tokens if shape.x_bits == 8 else 0)) if shape.bits == 8 else 0
    return table + shape.warpgroups * BUFFERS * leaving(shape) * PITCH + (HANDED if shape.gated else 0) + sides + LAST


def leaving(shape: Shape) -> int:
    """Tokens that leave at a time."""
    return 64 if shape.tokens % 64 == 0 and shape.tokens >= 128 and not shape.gated and shape.x_bits == 16 else 32


def shared_bytes(shape: Shape) -> int:
    """Shared memory of a program."""
    return fixed_bytes(shape) + stages(shape) * stage_bytes(shape)


@lru_cache(maxsize=4096)
def configure(
    M: int, N: int, K: int, processors: int, *, bits: int = 4, x_bits: int = 16, gated: bool = False
) -> Config:
    """The configuration for M rows of x and a weight [N, K] of codes of `bits`.

    Args:
        x_bits: 16, or 8 where x is codes as well.
        gated: half of W's rows gate the others, which two warpgroups hold.
    """
    tiles = ceil_div(K * x_bits, 1024)
    cuts = [
        config
        for config in (choices_of_codes() if x_bits == 8 else choices())
        if (config.tokens < 2 * M or config.tokens == min(TOKENS if x_bits == 16 else INT8_TOKENS))
        and (config.splits == 1 or 4 * config.splits <= tiles)
        and not (gated and config.warpgroups == 3)
    ]
    return min(cuts, key=lambda config: clocks(config, M, N, tiles, processors, bits, x_bits))


@cache
def choices() -> tuple[Config, ...]:
    """All configurations, of x in 16 bit."""
    two = [
        Config(tokens, splits, blocks)
        for tokens in TOKENS
        for blocks in (1, 2)
        if blocks == 1 or tokens <= PAIRED
        for splits in SPLITS
    ]
    return *two, *(Config(tokens, splits, 1, 3) for tokens in TOKENS_OF_THREE for splits in SPLITS_OF_THREE)


@cache
def choices_of_codes() -> tuple[Config, ...]:
    """All configurations where x is codes."""
    two = [Config(tokens, splits) for tokens in INT8_TOKENS for splits in (1, 2)]
    return *two, *(Config(tokens, 1, 1, 3) for tokens in INT8_TOKENS)


def clocks(config: Config, M: int, N: int, tiles: int, processors: int, bits: int, x_bits: int) -> float:
    """What a configuration is expected to take, of so many tiles along K."""
    few = x_bits == 8 or config.tokens <= FEW_TOKENS[config.warpgroups]
    kind = CLOCKS[bits, x_bits, config.blocks, config.warpgroups, few]
    room = config.blocks * processors
    rounds, rest = divmod(ceil_div(M, config.tokens) * ceil_div(N, config.rows), room)
    tile = kind.tile + kind.tile_token * config.tokens
    shared = tile * SHARED_TILE[bits] if config.blocks == 2 else tile
    total = rounds * (tiles * shared + kind.work)
    if rest:
        parts = rest * config.splits
        meet = kind.meet + kind.meet_token * config.tokens * config.splits if config.splits > 1 else 0
        each = ceil_div(tiles, config.splits) * (shared if min(parts, room) > processors else tile)
        total += ceil_div(parts, room) * (each + kind.work + meet)
    return total


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)
