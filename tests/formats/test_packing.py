from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from onegpu.errors import ArgumentError
from onegpu.formats.packing import pack, packed_bytes, unpack


def test_the_even_element_is_high() -> None:
    assert pack(torch.tensor([15, 0, 1, 2], dtype=torch.uint8), pad=0).tolist() == [0xF0, 0x12]


def test_an_odd_length_is_padded() -> None:
    assert pack(torch.tensor([3], dtype=torch.uint8), pad=7).tolist() == [0x37]


@given(st.lists(st.integers(0, 15), max_size=65), st.integers(0, 15))
def test_unpack_undoes_pack(codes: list[int], pad: int) -> None:
    packed = pack(torch.tensor(codes, dtype=torch.uint8), pad)
    assert packed.numel() == packed_bytes(len(codes)) == (len(codes) + 1) // 2
    assert unpack(packed, len(codes)).tolist() == codes
    if len(codes) % 2:
        assert int(packed[-1]) & 15 == pad


@given(st.binary(max_size=40))
def test_pack_undoes_unpack(data: bytes) -> None:
    packed = torch.tensor(list(data), dtype=torch.uint8)
    assert pack(unpack(packed, 2 * len(data)), 0).tolist() == list(data)


def test_refusals() -> None:
    codes = torch.zeros(4, dtype=torch.uint8)
    with pytest.raises(ArgumentError, match=r"codes must be a flat uint8 tensor; got torch.int64 of shape \[4\]"):
        pack(codes.long(), 0)
    with pytest.raises(ArgumentError, match=r"codes must be a flat uint8 tensor; got torch.uint8 of shape \[2, 2\]"):
        pack(codes.view(2, 2), 0)
    with pytest.raises(ArgumentError, match="pad must be a code from 0 to 15; got 16"):
        pack(codes, 16)
    with pytest.raises(ArgumentError, match="packed must have 2 bytes for 3 codes; got 4"):
        unpack(codes, 3)
    with pytest.raises(ArgumentError, match="packed must have 0 bytes for -1 codes; got 4"):
        unpack(codes, -1)
