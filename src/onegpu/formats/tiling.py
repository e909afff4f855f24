"""4-bit codes and scales in the order in which tensor cores take them, and back: a permutation, nothing is rounded.

A tile is 16 rows by 64 columns, 512 bytes: 16 bytes for each of the 32 lanes of a warp. Lane 4 g + t (g in 0..7,
t in 0..3) holds four words; word j = 2 b + h is its part of the left operand of the j-th `mma.m16n8k16` (PTX ISA,
"Matrix fragments for mma.m16n8k16"), one byte for each register of the fragment:

    byte i = 2 a + r of word j    the codes of row g + 8 r, columns 32 a + 8 t + 4 b + 2 h and the next one

The columns that PTX numbers 16 j + 2 t + 8 a + e are thus these; a sum over columns does not mind their order, and
with this one a lane needs the right operand at columns 8 t .. 8 t + 7 and 32 + 8 t .. 32 + 8 t + 7: two loads of 16
bytes from a row of x in its natural order, which four lanes together make 64 bytes without a gap. The halves of a word
are columns 0..31 and 32..63, so blocks of 32 keep scales of their own. And `ldmatrix` over the four lanes' 16 bytes of
one t gives lane t' of a quad word t' of lane t: columns 8 t + 2 t' of both halves, as products with columns in natural
order want them.

    tiled     uint8 [ceil(N / 16), K / 64, 8 g, 4 t, 2 b, 2 h, 2 a, 2 r], flat; each byte as it is in `packed`
    scales    float32 or uint8 [ceil(N / 16), K / blocksize, 8 g, 2 r], flat

Rows from N up to the next multiple of 16 are zero bytes. Nested scales keep their float32 part as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from onegpu.errors import ArgumentError, UnsupportedError

__all__ = [
    "TILE_COLUMNS",
    "TILE_ROWS",
    "num_tiled_bytes",
    "num_tiled_scales",
    "tile_codes",
    "tile_scales",
    "untile_codes",
    "untile_scales",
    "why_not_tiled",
]

TILE_ROWS = 16
TILE_COLUMNS = 64
# Kernels count in 32-bit words and bits: 2**31 words of eight codes.
LARGEST_WEIGHT = 2**34


def why_not_tiled(out_features: int, in_features: int, blocksize: int) -> str | None:
    """None where a weight [N, K] with this blocksize can be tiled, else the reason in a sentence."""
    if in_features % TILE_COLUMNS:
        return f"in_features {in_features} is no multiple of {TILE_COLUMNS}, so tiles would straddle rows"
    if in_features % blocksize:
        return f"in_features {in_features} is no multiple of blocksize {blocksize}, so blocks straddle rows"
    if out_features * in_features >= LARGEST_WEIGHT:
        return f"{out_features} x {in_features} weights are more than 32-bit offsets reach"
    return None


def num_tiled_bytes(out_features: int, in_features: int) -> int:
    """Bytes of the tiled codes of [N, K]: half a byte for each weight, N padded to a multiple of 16."""
    return _padded(out_features) * in_features // 2


def num_tiled_scales(out_features: int, in_features: int, blocksize: int) -> int:
    """Scales of the tiled [N, K], N padded to a multiple of 16."""
    return _padded(out_features) * (in_features // blocksize)


def tile_codes(packed: Tensor, out_features: int, in_features: int) -> Tensor:
    """Packed codes of a weight [N, K] in tile order.

    Args:
        packed: uint8 [N * K / 2], the even element in the high nibble.

    Returns:
        uint8 [ceil(N / 16) * K * 8].

    Raises:
        ArgumentError: another length or dtype.
        UnsupportedError: K is no multiple of 64 (see `why_not_tiled`).
    """
    _refuse(out_features, in_features, TILE_COLUMNS)
    _check("packed", packed, (torch.uint8,), out_features * in_features // 2)
    rows = pad(packed.view(out_features, in_features // 2), (0, 0, 0, -out_features % TILE_ROWS))
    # [row tile, r, g, column tile, a, t, b, h]
    parts = rows.view(-1, 2, 8, in_features // TILE_COLUMNS, 2, 4, 2, 2)
    return parts.permute(0, 3, 2, 5, 6, 7, 4, 1).contiguous().view(-1)


def untile_codes(tiled: Tensor, out_features: int, in_features: int) -> Tensor:
    """The inverse of `tile_codes`: uint8 [N * K / 2].

    Raises:
        ArgumentError, UnsupportedError: as `tile_codes`.
    """
    _refuse(out_features, in_features, TILE_COLUMNS)
    _check("tiled", tiled, (torch.uint8,), num_tiled_bytes(out_features, in_features))
    parts = tiled.view(-1, in_features // TILE_COLUMNS, 8, 4, 2, 2, 2, 2)
    rows = parts.permute(0, 7, 2, 1, 6, 3, 4, 5).reshape(-1, in_features // 2)
    return rows[:out_features].reshape(-1)


def tile_scales(absmax: Tensor, out_features: int, in_features: int, blocksize: int) -> Tensor:
    """Scales of a weight [N, K], or their 8-bit codes, in the order of its tiles.

    Args:
        absmax: float32 or uint8 [N * K / blocksize].

    Returns:
        [ceil(N / 16) * 16 * K / blocksize] of the same dtype.

    Raises:
        ArgumentError: another length or dtype.
        UnsupportedError: blocks straddle rows (see `why_not_tiled`).
    """
    _refuse(out_features, in_features, blocksize)
    blocks = in_features // blocksize
    _check("absmax", absmax, (torch.float32, torch.uint8), out_features * blocks)
    rows = pad(absmax.view(out_features, blocks), (0, 0, 0, -out_features % TILE_ROWS))
    return rows.view(-1, 2, 8, blocks).permute(0, 3, 2, 1).contiguous().view(-1)


def untile_scales(scales: Tensor, out_features: int, in_features: int, blocksize: int) -> Tensor:
    """The inverse of `tile_scales`: [N * K / blocksize] of the same dtype.

    Raises:
        ArgumentError, UnsupportedError: as `tile_scales`.
    """
    _refuse(out_features, in_features, blocksize)
    blocks = in_features // blocksize
    _check("scales", scales, (torch.float32, torch.uint8), num_tiled_scales(out_features, in_features, blocksize))
    rows = scales.view(-1, blocks, 8, 2).permute(0, 3, 2, 1).reshape(-1, blocks)
    return rows[:out_features].reshape(-1)


def _padded(rows: int) -> int:
    return -(-rows // TILE_ROWS) * TILE_ROWS


def _refuse(out_features: int, in_features: int, blocksize: int) -> None:
    reason = why_not_tiled(out_features, in_features, blocksize)
    if reason is not None:
        raise UnsupportedError(f"a weight of shape [{out_features}, {in_features}] cannot be tiled: {reason}")


def _check(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], length: int) -> None:
    if tensor.dtype not in dtypes or tensor.dim() != 1 or tensor.shape[0] != length:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        got = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
        raise ArgumentError(f"{name} must be {wanted} [{length}]; got {got}")
