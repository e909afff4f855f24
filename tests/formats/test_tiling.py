"""Tile order: a permutation that can be undone, and the one that tensor cores need."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onegpu.config import BLOCKSIZES
from onegpu.errors import ArgumentError, UnsupportedError
from onegpu.formats import tiling
from onegpu.formats.packing import unpack


def random_bytes(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (n,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 70), st.integers(1, 9), st.integers(0, 2**31))
def test_untile_undoes_tile(N: int, tiles: int, seed: int) -> None:
    K = 64 * tiles
    packed = random_bytes(N * K // 2, seed)
    tiled = tiling.tile_codes(packed, N, K)
    assert tiled.numel() == tiling.num_tiled_bytes(N, K) == -(-N // 16) * 16 * K // 2
    assert torch.equal(tiling.untile_codes(tiled, N, K), packed)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 3), st.sampled_from(BLOCKSIZES), st.booleans())
def test_untile_undoes_tile_of_scales(N: int, multiple: int, blocksize: int, nested: bool) -> None:
    K = multiple * max(64, blocksize)
    m = N * K // blocksize
    absmax = random_bytes(m) if nested else torch.randn(m)
    scales = tiling.tile_scales(absmax, N, K, blocksize)
    assert scales.numel() == tiling.num_tiled_scales(N, K, blocksize)
    assert scales.dtype == absmax.dtype
    assert torch.equal(tiling.untile_scales(scales, N, K, blocksize), absmax)


def test_tile_undoes_untile_where_nothing_is_padded() -> None:
    tiled = random_bytes(32 * 192 // 2)
    assert torch.equal(tiling.tile_codes(tiling.untile_codes(tiled, 32, 192), 32, 192), tiled)


def fragment(lane: int, register: int) -> tuple[int, int]:
    """Row and first column of a register of the left operand of m16n8k16, as the PTX ISA has them."""
    return lane // 4 + 8 * (register & 1), lane % 4 * 2 + 8 * (register >> 1)


def test_lanes_hold_the_operands_of_the_tensor_core() -> None:
    """Steps of 16 x 16 by 16 x 8, put together from lanes' registers alone, give W @ x for x in its natural order."""
    rng = np.random.default_rng(0)
    N, K = 16, 128
    packed = random_bytes(N * K // 2)
    weight = unpack(packed, N * K).view(N, K).numpy().astype(float)
    x = rng.integers(-8, 8, (8, K)).astype(float)
    tiles = tiling.tile_codes(packed, N, K).numpy().reshape(K // 64, 32, 4, 4)
    out = np.zeros((16, 8))
    for tile in range(K // 64):
        # What each lane loads of x: row g, 8 columns from 8 t and 8 from 32 + 8 t.
        lanes = []
        for lane in range(32):
            start = 64 * tile + 8 * (lane % 4)
            lanes.append(np.concatenate([x[lane // 4, start : start + 8], x[lane // 4, start + 32 : start + 40]]))
        for step in range(4):
            left, right = np.full((16, 16), np.nan), np.full((16, 8), np.nan)
            for lane in range(32):
                for register in range(4):
                    row, column = fragment(lane, register)
                    byte = tiles[tile, lane, step, register]
                    left[row, column : column + 2] = byte >> 4, byte & 15
                for register in range(2):
                    first = lane % 4 * 2 + 8 * register
                    pair = 2 * step + 8 * register
                    right[first : first + 2, lane // 4] = lanes[lane][pair : pair + 2]
            out += left @ right
    assert np.array_equal(out, weight @ x.T)


def test_first_halves_of_words_hold_the_first_32_columns() -> None:
    """So that blocks of 32 have scales of their own."""
    packed = torch.zeros(16 * 32, dtype=torch.uint8)
    packed.view(16, 32)[:, :16] = 1
    words = tiling.tile_codes(packed, 16, 64).view(32, 4, 4)
    assert (words[:, :, :2] == 1).all()
    assert (words[:, :, 2:] == 0).all()


def test_a_quad_can_hand_over_columns_in_natural_order() -> None:
    """Word t' of lane t, given to lane t': pair t' of each eight columns, as steps of 16 in order want it."""
    packed = random_bytes(16 * 32)
    rows = packed.view(16, 2, 4, 4)  # [row, a, t, pair]
    tile = tiling.tile_codes(packed, 16, 64).view(8, 4, 4, 2, 2)  # [g, t, word, a, r]
    for lane in range(4):
        handed = tile[:, :, lane]  # [g, t, a, r]
        assert torch.equal(handed.permute(3, 0, 2, 1).reshape(16, 2, 4), rows[:, :, :, lane])


def test_scales_of_rows_g_and_g_plus_8_lie_together() -> None:
    absmax = torch.arange(16 * 3, dtype=torch.float32)
    scales = tiling.tile_scales(absmax, 16, 192, 64).view(3, 8, 2)
    for block in range(3):
        for g in range(8):
            assert scales[block, g].tolist() == [3 * g + block, 3 * (g + 8) + block]


@pytest.mark.parametrize(
    ("N", "K", "blocksize", "reason"),
    [
        (16, 96, 32, "in_features 96 is no multiple of 64"),
        (16, 192, 128, "in_features 192 is no multiple of blocksize 128"),
        (2**20, 2**14, 64, "more than 32-bit offsets reach"),
    ],
)
def test_why_not(N: int, K: int, blocksize: int, reason: str) -> None:
    assert reason in (tiling.why_not_tiled(N, K, blocksize) or "")
    with pytest.raises(UnsupportedError, match=reason):
        tiling.tile_scales(torch.zeros(1), N, K, blocksize)


@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_every_blocksize_can_be_tiled(blocksize: int) -> None:
    assert tiling.why_not_tiled(5, 4096, blocksize) is None


def test_refusals() -> None:
    with pytest.raises(ArgumentError, match=r"packed must be uint8 \[512\]; got uint8 \[511\]"):
        tiling.tile_codes(random_bytes(511), 16, 64)
    with pytest.raises(ArgumentError, match=r"tiled must be uint8 \[512\]; got float32 \[512\]"):
        tiling.untile_codes(torch.zeros(512), 3, 64)
    with pytest.raises(ArgumentError, match=r"absmax must be float32 or uint8 \[3\]; got float64 \[3\]"):
        tiling.tile_scales(torch.zeros(3, dtype=torch.float64), 3, 64, 64)
    with pytest.raises(ArgumentError, match=r"scales must be float32 or uint8 \[16\]; got float32 \[3\]"):
        tiling.untile_scales(torch.zeros(3), 3, 64, 64)
