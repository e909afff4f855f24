"""Attention over joined sequences against float64, beside plain attention in the same dtype."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.cases import DTYPES, assert_no_worse, normal, run_captured
from onegpu.errors import ArgumentError
from onegpu.kernels.encoder_ops import attention_blocks, reference_attention_blocks, reference_varlen_attention
from onegpu.kernels.encoder_ops import varlen_attention as operator
from onegpu.kernels.varlen_config import Tiles, tiles_for

LENGTHS = ((5,), (1, 1, 1), (70, 3, 0, 17), (64, 65, 1), (0, 0))


def bounds(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def columns(lengths: tuple[int, ...], step: int = 1) -> Tensor:
    rows = [torch.arange(length) * step for length in lengths]
    return torch.cat(rows).to(torch.int32)


def oracle(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ends: Tensor,
    at: Tensor,
    scale: float,
    causal: bool,
    window: int | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """One sequence after another, in `dtype` throughout."""
    outs = []
    for start, end in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        x, y, z = (t[start:end].to(dtype).transpose(0, 1) for t in (q, k, v))
        distance = (at[start:end][None] - at[start:end][:, None]).long()
        scores = x @ y.transpose(1, 2) * scale
        if bias is not None:
            scores = scores + bias[:, distance + bias.shape[1] // 2].to(dtype)
        hidden = torch.zeros_like(distance, dtype=torch.bool)
        if causal:
            hidden |= torch.ones_like(hidden).triu(1)
        if window is not None:
            hidden |= distance.abs() > window
        outs.append((scores.masked_fill(hidden, -torch.inf).softmax(-1) @ z).transpose(0, 1))
    return torch.cat(outs)


def check(
    device: torch.device,
    dtype: torch.dtype,
    lengths: tuple[int, ...],
    D: int,
    H: int = 2,
    *,
    causal: bool = False,
    window: int | None = None,
    biased: bool = False,
    step: int = 1,
) -> None:
    from onegpu.kernels import varlen_attention as kernel

    T, span = sum(lengths), max(lengths) * step + 1
    q, k, v = (normal(T, H, D, seed=seed, dtype=dtype) for seed in range(3))
    ends, at = bounds(lengths), columns(lengths, step)
    bias = normal(H, 2 * span - 1, seed=4) if biased else None
    scale = D**-0.5
    args = (ends, at, max(lengths), scale, causal, window, bias)
    there = [t.to(device) if isinstance(t, Tensor) else t for t in args]
    got = kernel.varlen_attention(q.to(device), k.to(device), v.to(device), *there).cpu()
    assert got.shape == q.shape
    if not T:
        return
    exact = oracle(q, k, v, ends, at, scale, causal, window, bias, torch.float64)
    plain = oracle(q, k, v, ends, at, scale, causal, window, bias, dtype)
    # Three TF32 products keep 21 bits of a float32's 24.
    factor = 8.0 if dtype == torch.float32 and device.type == "cuda" else 1.5
    assert_no_worse(got, plain, exact, factor)
    assert_no_worse(reference_varlen_attention(q, k, v, *args), plain, exact)
    # The same sums in the same order, whichever program does them.
    blocks = kernel.attention_blocks(there[0], T, tiles_for(dtype, D, max(lengths)).block_m)
    listed = kernel.varlen_attention(q.to(device), k.to(device), v.to(device), *there, blocks=blocks).cpu()
    assert torch.equal(listed, got)
    tiles = Tiles(16, 16, 4, 2)
    small = kernel.varlen_attention(q.to(device), k.to(device), v.to(device), *there, tiles=tiles).cpu()
    assert_no_worse(small, plain, exact, factor)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_lengths(device: torch.device, dtype: torch.dtype, lengths: tuple[int, ...]) -> None:
    check(device, dtype, lengths, 32)


@pytest.mark.parametrize("D", [8, 24, 64, 80, 96, 128])
def test_head_dims(device: torch.device, D: int) -> None:
    check(device, torch.float32, (33, 7), D, H=1)
    check(device, torch.float16, (33, 7), D, H=1)


@pytest.mark.parametrize("lengths", [(70, 3, 17), (65,)])
def test_causal_window_and_bias(device: torch.device, lengths: tuple[int, ...]) -> None:
    check(device, torch.float32, lengths, 16, causal=True)
    check(device, torch.float32, lengths, 16, window=4)
    check(device, torch.float32, lengths, 16, biased=True)
    check(device, torch.float32, lengths, 16, causal=True, window=9, biased=True)


def test_distances_are_columns(device: torch.device) -> None:
    """Holes: neighbours in the stream may stand far apart in their row."""
    check(device, torch.float32, (20, 7), 16, window=4, biased=True, step=3)


@pytest.mark.parametrize("lengths", [(70, 3, 0, 17, 64), (1,), (0, 0), (5, 5, 5, 700)])
@pytest.mark.parametrize("block_m", [16, 64])
def test_blocks(device: torch.device, lengths: tuple[int, ...], block_m: int) -> None:
    """Every query once, the longest sequences first, and nothing behind the last."""
    from onegpu.kernels import varlen_attention as kernel

    ends, tokens = bounds(lengths), sum(lengths) + 3
    got = kernel.attention_blocks(ends.to(device), tokens, block_m).cpu()
    want = reference_attention_blocks(ends, tokens, block_m)
    assert torch.equal(attention_blocks(ends, tokens, block_m), want)
    used = want[1] > 0
    assert torch.equal(got[:, used], want[:, used])
    assert not bool(got[1, ~used].any())
    seen = [start + row + n for start, length, row in want.T.tolist() for n in range(min(block_m, length - row))]
    assert sorted(seen) == list(range(sum(lengths)))
    assert want[1].tolist() == sorted(want[1].tolist(), reverse=True)


@pytest.mark.parametrize("scale", [-0.5, 0.0])
def test_any_scale(device: torch.device, scale: float) -> None:
    from onegpu.kernels import varlen_attention as kernel

    q, k, v = (normal(20, 2, 16, seed=seed) for seed in range(3))
    args = (bounds((13, 7)), columns((13, 7)))
    got = kernel.varlen_attention(*(t.to(device) for t in (q, k, v, *args)), 13, scale).cpu()
    exact = oracle(q, k, v, *args, scale, False, None, None, torch.float64)
    assert_no_worse(got, oracle(q, k, v, *args, scale, False, None, None, torch.float32), exact, 8.0)


def test_slices_of_one_product(device: torch.device) -> None:
    """Query, key and value as parts of one [T, 3 H D] product need no copy."""
    from onegpu.kernels import varlen_attention as kernel

    joint = normal(12, 3 * 2 * 16).to(device)
    q, k, v = (part.unflatten(1, (2, 16)) for part in joint.chunk(3, dim=1))
    args = [t.to(device) for t in (bounds((5, 7)), columns((5, 7)))]
    got = kernel.varlen_attention(q, k, v, *args, 7, 0.25)
    apart = kernel.varlen_attention(q.contiguous(), k.contiguous(), v.contiguous(), *args, 7, 0.25)
    assert torch.equal(got, apart)


def test_what_does_not_fit_is_refused() -> None:
    q = normal(4, 2, 16)
    ends, at = bounds((4,)), columns((4,))
    with pytest.raises(ArgumentError, match=r"\[T, H, D\], all of one shape"):
        operator(q, q[:3], q, ends, at, 4, 1.0)
    with pytest.raises(ArgumentError, match="at most 128; got 136"):
        wide = normal(4, 2, 136)
        operator(wide, wide, wide, ends, at, 4, 1.0)
    with pytest.raises(ArgumentError, match="int32, positions one per token"):
        operator(q, q, q, ends.long(), at, 4, 1.0)
    with pytest.raises(ArgumentError, match=r"float32 \[H, 2 \* S - 1\]"):
        operator(q, q, q, ends, at, 4, 1.0, bias=normal(2, 8))
    with pytest.raises(ArgumentError, match=r"blocks must be int32 \[3, P\]"):
        operator(q, q, q, ends, at, 4, 1.0, blocks=ends)
    with pytest.raises(ArgumentError, match="at most 4096 sequences"):
        attention_blocks(ends.long(), 4, 64)
    with pytest.raises(ArgumentError, match="block_m at least 1"):
        attention_blocks(ends, 4, 0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_captured(dtype: torch.dtype) -> None:
    q = normal(40, 4, 64, dtype=dtype).cuda()
    ends, at = bounds((20, 20)).cuda(), columns((20, 20)).cuda()
    other = bounds((31, 9)).cuda()
    out = run_captured(lambda: operator(q, q, q, ends, at, 40, 0.125), lambda: ends.copy_(other))
    want = reference_varlen_attention(q.cpu(), q.cpu(), q.cpu(), other.cpu(), at.cpu(), 40, 0.125)
    torch.testing.assert_close(out.cpu(), want, rtol=1e-2, atol=1e-2)
