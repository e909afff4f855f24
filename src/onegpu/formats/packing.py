"""Two 4-bit codes to a byte: element 2k in the high nibble of byte k, element 2k + 1 in the low one."""

from __future__ import annotations

import torch
from torch import Tensor

from onegpu.errors import ArgumentError

__all__ = ["pack", "packed_bytes", "unpack"]


def packed_bytes(n: int) -> int:
    """Bytes that `n` codes take: ceil(n / 2)."""
    return (n + 1) // 2


def pack(codes: Tensor, pad: int) -> Tensor:
    """Pack codes 0..15, uint8 [n], into uint8 [ceil(n / 2)]; `pad` fills the last low nibble of an odd `n`.

    Raises:
        ArgumentError: `codes` is not a flat uint8 tensor, or `pad` is no code.
    """
    _check_flat("codes", codes)
    if not 0 <= pad <= 15:
        raise ArgumentError(f"pad must be a code from 0 to 15; got {pad}")
    if codes.numel() % 2:
        codes = torch.cat([codes, codes.new_full((1,), pad)])
    return codes[0::2].bitwise_left_shift(4).bitwise_or_(codes[1::2])


def unpack(packed: Tensor, n: int) -> Tensor:
    """The first `n` codes of uint8 [ceil(n / 2)]: uint8 [n].

    Raises:
        ArgumentError: `packed` is not a flat uint8 tensor, or its length is not that of `n` codes.
    """
    _check_flat("packed", packed)
    if n < 0 or packed.numel() != packed_bytes(n):
        raise ArgumentError(f"packed must have {packed_bytes(max(n, 0))} bytes for {n} codes; got {packed.numel()}")
    return torch.stack([packed.bitwise_right_shift(4), packed.bitwise_and(15)], dim=1).view(-1)[:n]


def _check_flat(name: str, tensor: Tensor) -> None:
    if tensor.dtype != torch.uint8 or tensor.dim() != 1:
        raise ArgumentError(f"{name} must be a flat uint8 tensor; got {tensor.dtype} of shape {list(tensor.shape)}")
