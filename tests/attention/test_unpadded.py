"""There and back, and the sizes a captured graph needs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from onegpu.attention.unpadded import PendingBatch, RelativeBias, UnpaddedBatch, pad_input, unpad_input
from onegpu.encoder.buckets import bucket_of, sequence_bucket, token_bucket
from onegpu.errors import ArgumentError


def same(a: UnpaddedBatch, b: UnpaddedBatch) -> bool:
    arrays = ("indices", "positions", "cu_seqlens")
    facts = ("batch_size", "seqlen", "total", "max_seqlen", "has_holes", "has_first", "lengths")
    return all(torch.equal(getattr(a, n), getattr(b, n)) for n in arrays) and all(
        getattr(a, n) == getattr(b, n) for n in facts
    )


masks = st.integers(1, 6).flatmap(
    lambda B: st.integers(1, 9).flatmap(
        lambda S: st.lists(st.lists(st.booleans(), min_size=S, max_size=S), min_size=B, max_size=B)
    )
)


@given(masks)
@settings(max_examples=200, deadline=None)
def test_there_and_back(rows: list[list[bool]]) -> None:
    mask = torch.tensor(rows)
    batch = UnpaddedBatch.from_mask(mask)
    hidden = torch.randn(*mask.shape, 3)
    tokens = unpad_input(hidden, batch)
    assert tokens.shape == (1, int(mask.sum()), 3)
    assert torch.equal(pad_input(tokens, batch), hidden * mask[..., None])
    lengths = mask.sum(1).sort(descending=True).values.tolist()
    assert batch.lengths == tuple(lengths)
    assert batch.cu_seqlens.tolist() == [0, *torch.tensor(lengths).cumsum(0).tolist()]
    assert batch.max_seqlen == max(lengths)
    assert batch.has_first == all(row[0] for row in rows)
    assert batch.has_holes == any("10" in "".join("01"[x] for x in row).strip("0") for row in rows)
    # Tokens of one row stand together, in their order, each at its own column.
    for start, end in zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True):
        places = batch.indices[start:end]
        assert (places // mask.shape[1]).unique().numel() <= 1
        assert bool((places[1:] > places[:-1]).all())
        assert torch.equal(batch.positions[start:end].long(), places % mask.shape[1])


@given(st.lists(st.integers(0, 7), min_size=1, max_size=6))
@settings(max_examples=100, deadline=None)
def test_lengths_say_the_same_as_a_mask(lengths: list[int]) -> None:
    mask = torch.arange(7)[None] < torch.tensor(lengths)[:, None]
    assert same(UnpaddedBatch.from_lengths(lengths, 7), UnpaddedBatch.from_mask(mask))


@given(st.lists(st.integers(0, 40), min_size=1, max_size=20).filter(any))
@settings(max_examples=100, deadline=None)
def test_buckets_hold_their_batch(lengths: list[int]) -> None:
    batch = UnpaddedBatch.from_lengths(lengths, 40)
    large = bucket_of(batch)
    tokens = large.indices.numel()
    assert tokens == token_bucket(batch.total) == large.positions.numel()
    assert large.cu_seqlens.numel() == sequence_bucket(len(lengths)) + 1
    ends = large.cu_seqlens
    assert ends[: len(lengths) + 1].tolist() == batch.cu_seqlens.tolist()
    assert bool((ends[len(lengths) + 1 :] == tokens).all())
    assert int((ends[1:] - ends[:-1]).max()) <= large.max_seqlen
    assert large.total == batch.total
    hidden = torch.randn(len(lengths), 40, 2)
    kept = hidden * (torch.arange(40)[None] < torch.tensor(lengths)[:, None])[..., None]
    assert torch.equal(pad_input(unpad_input(hidden, large), large), kept)


def test_bucket_sizes() -> None:
    sizes = [token_bucket(n) for n in (1, 32, 33, 64, 65, 513, 2049, 8300, 16385)]
    assert sizes == [32, 32, 64, 64, 128, 640, 2176, 8320, 16640]
    assert all(token_bucket(n) - n < max(64, n // 4) for n in range(1, 20000, 7))
    assert [sequence_bucket(n) for n in (1, 2, 15, 16, 64)] == [2, 4, 16, 32, 80]


def test_what_does_not_fit_is_refused() -> None:
    batch = UnpaddedBatch.from_lengths([3, 1], 4)
    with pytest.raises(ArgumentError, match=r"expected \[2, 4, ...\], the shape of the batch; got \[2, 5, 3\]"):
        unpad_input(torch.zeros(2, 5, 3), batch)
    with pytest.raises(ArgumentError, match=r"expected \[1, 4, ...\], the batch's tokens; got \[1, 5, 3\]"):
        pad_input(torch.zeros(1, 5, 3), batch)
    with pytest.raises(ArgumentError, match="does not hold a batch of 4 tokens"):
        batch.bucket(3, 4, 4)
    with pytest.raises(ArgumentError, match="does not hold"):
        batch.bucket(8, 2, 8)
    with pytest.raises(ArgumentError, match="from 0 to seqlen 4"):
        UnpaddedBatch.from_lengths([5], 4)
    with pytest.raises(ArgumentError, match="from 0 to seqlen 4"):
        UnpaddedBatch.from_lengths([], 4)
    with pytest.raises(ArgumentError, match="on the device only"):
        bucket_of(batch).groups()


def test_groups() -> None:
    batch = UnpaddedBatch.from_lengths([2, 4, 0, 4, 2, 1], 4)
    assert batch.groups() == [(0, 2, 4), (8, 2, 2), (12, 1, 1)]


def test_odd_values_are_counted() -> None:
    mask = torch.ones(2, 3, dtype=torch.bool)
    assert not PendingBatch.of(mask, torch.zeros(2, 3)).has_odd_values()
    assert PendingBatch.of(mask, torch.tensor([[False, True, False]] * 2)).has_odd_values()


def test_bias_by_distance() -> None:
    dense = torch.randn(1, 2, 5, 5)
    for i in range(5):
        for j in range(5):
            dense[0, :, i, j] = dense[0, :, max(i - j, 0), max(j - i, 0)]
    row, column = dense[0, :, 0], dense[0, :, :, 0]
    bias = RelativeBias(torch.cat([column.flip(1)[:, :-1], row], 1), lambda: dense)
    assert bias.span == 5
    assert torch.equal(bias.square(5), dense)
    assert bias.square(3) is bias.square(3)
    places: Tensor = torch.tensor([0, 3, 4])
    assert torch.equal(bias.at(places), dense[:, :, places][..., places])


@pytest.mark.gpu
def test_on_a_device() -> None:
    mask = torch.rand(9, 33) > 0.4
    here, there = UnpaddedBatch.from_mask(mask), UnpaddedBatch.from_mask(mask.cuda())
    assert there.lengths is None
    for name in ("total", "max_seqlen", "has_holes", "has_first"):
        assert getattr(here, name) == getattr(there, name)
    hidden = torch.randn(9, 33, 2)
    tokens = unpad_input(hidden.cuda(), there)
    assert torch.equal(tokens[0].cpu(), hidden[mask])
    assert torch.equal(pad_input(tokens, there).cpu(), hidden * mask[..., None])
    assert there.cu_seqlens.tolist() == [0, *mask.sum(1).cumsum(0).tolist()]
