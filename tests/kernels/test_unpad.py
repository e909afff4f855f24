"""Places of the real tokens, by both ways, against what a mask says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from onegpu.errors import ArgumentError
from onegpu.kernels.encoder_ops import NO_BOUND, place_tokens, reference_place_tokens


def arrays(capacity: int, bounds: int) -> list[Tensor]:
    """Filled with what nothing leaves behind."""
    long = torch.full((capacity,), -7, dtype=torch.int64)
    return [long, *(torch.full((n,), -7, dtype=torch.int32) for n in (capacity, bounds, 4))]


def masks() -> dict[str, Tensor]:
    torch.manual_seed(0)
    right = torch.arange(9)[None] < torch.tensor([4, 9, 0, 1])[:, None]
    return {
        "right": right,
        "left": right.flip(1),
        "holes": torch.rand(5, 33) > 0.4,
        "none": torch.zeros(2, 3, dtype=torch.bool),
        "all": torch.ones(3, 8, dtype=torch.bool),
        "one": torch.ones(1, 1, dtype=torch.bool),
        "long": torch.rand(3, 1500) > 0.1,
        "strided": torch.rand(7, 5).T > 0.5,
    }


@pytest.mark.parametrize("kind", masks())
def test_places(device: torch.device, kind: str) -> None:
    from onegpu.kernels import unpad

    mask = masks()[kind]
    B = mask.shape[0]
    total, capacity = int(mask.sum()), mask.numel() + 5
    want, there = arrays(capacity, B + 3), [t.to(device) for t in arrays(capacity, B + 3)]
    reference_place_tokens(mask, *want, 4)
    unpad.place_tokens(mask.to(device), *there, 4)
    for got, expected in zip(there, want, strict=True):
        assert torch.equal(got.cpu(), expected)
    indices, positions, bounds, facts = want
    assert torch.equal(indices[:total], mask.flatten().nonzero()[:, 0])
    assert torch.equal(positions[:total], mask.nonzero()[:, 1].int())
    assert indices[total : total + 4].tolist() == [0] * 4
    assert indices[total + 4 :].tolist() == [-7] * (capacity - total - 4)
    assert bounds.tolist() == [0, *mask.sum(1).cumsum(0).tolist(), NO_BOUND, NO_BOUND]
    runs = max(sum(1 for piece in "".join("x" if bit else " " for bit in row).split()) for row in mask.tolist())
    assert facts.tolist() == [total, int(mask.sum(1).max()), runs, int(mask[:, 0].sum())]


def test_more_than_fits(device: torch.device) -> None:
    """Tokens beyond the capacity are left out, and nothing is written behind it."""
    from onegpu.kernels import unpad

    mask = torch.ones(3, 8, dtype=torch.bool)
    room = torch.full((20,), -7, dtype=torch.int64).to(device)
    rest = [t.to(device) for t in arrays(16, 4)[1:]]
    unpad.place_tokens(mask.to(device), room[:16], *rest, 4)
    assert room.tolist() == [*range(16), -7, -7, -7, -7]
    assert rest[2].tolist() == [24, 8, 1, 3]


def test_what_does_not_fit_is_refused() -> None:
    mask = torch.ones(2, 3, dtype=torch.bool)
    indices, positions, bounds, facts = arrays(8, 3)
    with pytest.raises(ArgumentError, match=r"mask must be bool \[B, S\], B from 1 to 4096; got torch.int64"):
        place_tokens(mask.long(), indices, positions, bounds, facts, 0)
    with pytest.raises(ArgumentError, match="indices must be int64"):
        place_tokens(mask, positions, positions, bounds, facts, 0)
    with pytest.raises(ArgumentError, match="at least 3 bounds and 4 facts"):
        place_tokens(mask, indices, positions, bounds[:2], facts, 0)
    with pytest.raises(ArgumentError, match="filler must be at least 0"):
        place_tokens(mask, indices, positions, bounds, facts, -1)
