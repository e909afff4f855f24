"""Cuts of a weight's rows, checked by what they are for; no memory is taken and no product made."""

from __future__ import annotations

import math

import pytest

from onegpu.config import BLOCKSIZES
from onegpu.kernels.slices import SCRATCH, WHOLE_ROWS, row_slices


@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize(
    ("N", "K"),
    [
        (1, 1),
        (4096, 14336),
        (28672, 4096),
        (128256, 4096),
        (128257, 4095),
        (4099, 14335),
        (50000, 16383),
        (1021, 200003),
    ],
)
def test_every_row_is_in_one_slice(N: int, K: int, blocksize: int) -> None:
    aligned = blocksize // math.gcd(K, blocksize)
    parts = row_slices(N, K, aligned)
    assert parts[0].start == 0
    assert parts[-1].stop == N
    assert [part.stop for part in parts[:-1]] == [part.start for part in parts[1:]]
    lengths = [part.stop - part.start for part in parts]
    assert min(lengths) > 0
    assert lengths[0] == max(lengths), "scratch memory is as long as the first"
    assert not [part for part in parts if part.start % WHOLE_ROWS], "columns of y that begin on 16 bytes"
    assert not [part for part in parts if part.start * K % blocksize], "on a block of the flat weight"
    unit = math.lcm(WHOLE_ROWS, aligned)
    assert lengths[0] * K <= max(SCRATCH, unit * K)
    assert lengths[0] - lengths[-1] < unit * len(parts), "as equal as whole units are"
    # No fewer slices would do.
    most = max(unit, SCRATCH // K // unit * unit)
    assert len(parts) == 1 or (len(parts) - 1) * most < N


@pytest.mark.parametrize(
    ("N", "K", "lengths"),
    [
        (4096, 14336, [2048, 2048]),
        (28672, 4096, [7168] * 4),
        (8192, 4096, [8192]),
        (8193, 4096, [4352, 3841]),
    ],
)
def test_of_models(N: int, K: int, lengths: list[int]) -> None:
    assert [part.stop - part.start for part in row_slices(N, K)] == lengths
