"""Where a weight's rows are cut: one slice at a time is dequantized to scratch memory and multiplied by a library."""

from __future__ import annotations

import math
from typing import Final

__all__ = ["SCRATCH", "row_slices"]

# Dequantized weights at a time: 64 MiB in 16 bit, which `onegpu.memory` plans for.
SCRATCH: Final = 2**25
# A slice begins at a column of y: on 16 bytes for the library's quick kernels, and full tiles of theirs.
WHOLE_ROWS: Final = 256


def row_slices(N: int, K: int, aligned: int = 1) -> list[slice]:
    """Rows of W [N, K] to be dequantized at a time, in order; the first slice is the longest.

    One slice where it takes no more than 64 MiB in 16 bit, else slices as equal as they can be, each beginning at a
    multiple of 256 rows.

    Args:
        aligned: every slice begins at a multiple of so many rows, which may take more scratch memory.
    """
    most = SCRATCH // K
    if most >= N:
        return [slice(0, N)]
    unit = math.lcm(WHOLE_ROWS, aligned)
    count = math.ceil(N / max(unit, most // unit * unit))
    step = math.ceil(N / count / unit) * unit
    return [slice(first, min(first + step, N)) for first in range(0, N, step)]
