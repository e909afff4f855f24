"""Attention of prompts over joined sequences against float64, beside plain attention in the same dtype."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.cases import DTYPES, assert_no_worse, normal
from onegpu.errors import ArgumentError, DeviceError
from onegpu.kernels.prefill_ops import causal_attention as operator
from onegpu.kernels.prefill_ops import reference_causal_attention


def oracle(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: tuple[tuple[int, ...], tuple[int, ...]],
    scale: float,
    dtype: torch.dtype,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """One sequence after another, in `dtype` throughout."""
    outs = []
    q, k, v = (t.to(dtype).transpose(0, 1) for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[0] // k.shape[0], 0) for t in (k, v))
    ends = [torch.tensor([0, *part]).cumsum(0).tolist() for part in lengths]
    for (start, end), (first, last) in zip(pairwise(ends[0]), pairwise(ends[1]), strict=True):
        Lq, Lk = end - start, last - first
        scores = q[:, start:end] @ k[:, first:last].transpose(1, 2) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        distance = torch.arange(Lk - Lq, Lk)[:, None] - torch.arange(Lk)
        scores = scores.masked_fill((distance < 0) | (distance >= (window or Lk + 1)), -torch.inf)
        if sinks is not None:
            scores = torch.cat((scores, sinks.to(dtype).view(-1, 1, 1).expand(-1, Lq, 1)), -1)
        outs.append((scores.softmax(-1)[..., :Lk] @ v[:, first:last]).transpose(0, 1))
    return torch.cat(outs)


def check(
    device: torch.device,
    dtype: torch.dtype,
    lengths: tuple[tuple[int, ...], tuple[int, ...]],
    Hq: int = 2,
    Hkv: int = 1,
    D: int = 32,
    DV: int | None = None,
    **more: Any,
) -> None:
    from onegpu.kernels import causal_attention as kernel

    Tq, Tk = (sum(part) for part in lengths)
    q, k, v = normal(Tq, Hq, D, dtype=dtype), normal(Tk, Hkv, D, seed=1), normal(Tk, Hkv, DV or D, seed=2)
    k, v = k.to(dtype), v.to(dtype)
    cu = [torch.tensor([0, *part]).cumsum(0).to(torch.int32) for part in lengths]
    rest = (max(lengths[0]), D**-0.5)
    there = {name: t.to(device) if isinstance(t, Tensor) else t for name, t in more.items()}
    got = kernel.causal_attention(*(t.to(device) for t in (q, k, v, *cu)), *rest, **there).cpu()
    exact = oracle(q, k, v, lengths, rest[1], torch.float64, **more)
    plain = oracle(q, k, v, lengths, rest[1], dtype, **more)
    # Three TF32 products keep 21 bits of a float32's 24, and the kernel's tanh is right to a bit of 1.
    factor = 8.0 if dtype == torch.float32 and (device.type == "cuda" or "softcap" in more) else 1.5
    assert_no_worse(got, plain, exact, factor)
    assert_no_worse(reference_causal_attention(q, k, v, *cu, *rest, **more), plain, exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "lengths", [((1,), (1,)), ((70,), (70,)), ((1, 1), (130, 7)), ((64, 0, 65), (64, 3, 129)), ((5, 5), (69, 5))]
)
def test_lengths(device: torch.device, dtype: torch.dtype, lengths: tuple) -> None:
    check(device, dtype, lengths)


@pytest.mark.parametrize(("D", "DV"), [(8, 8), (80, 80), (192, 128), (256, 256), (24, 40)])
def test_head_dims(device: torch.device, D: int, DV: int) -> None:
    check(device, torch.float32, ((33, 3), (33, 9)), D=D, DV=DV)
    check(device, torch.bfloat16, ((33, 3), (33, 9)), D=D, DV=DV)


@pytest.mark.parametrize(
    "more",
    [
        {"window": 1},
        {"window": 40},
        {"softcap": 2.0},
        {"sinks": normal(6, seed=5)},
        {"window": 70, "softcap": 5.0, "sinks": normal(6, seed=5) * 4},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_done_to_scores(device: torch.device, dtype: torch.dtype, more: dict[str, Any]) -> None:
    check(device, dtype, ((70, 9), (150, 9)), Hq=6, Hkv=2, D=16, **more)


def test_opcheck() -> None:
    q, k, v = normal(7, 4, 16), normal(9, 2, 16, seed=1), normal(9, 2, 8, seed=2)
    cu_q, cu_k = torch.tensor([0, 3, 7], dtype=torch.int32), torch.tensor([0, 5, 9], dtype=torch.int32)
    torch.library.opcheck(torch.ops.onegpu.causal_attention.default, (q, k, v, cu_q, cu_k, 4, 0.3, 2, 3.0, normal(4)))


def test_what_does_not_fit_is_refused() -> None:
    q, k = normal(4, 4, 16), normal(4, 2, 16)
    cu = torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(ArgumentError, match=r"\[Tk, Hkv, D\]"):
        operator(q, k[..., :8], k, cu, cu, 4, 1.0)
    with pytest.raises(ArgumentError, match="int32"):
        operator(q, k, k, cu.long(), cu, 4, 1.0)
    with pytest.raises(ArgumentError, match="at most 256; got 264"):
        wide = normal(4, 2, 264)
        operator(wide, wide, wide, cu, cu, 4, 1.0)
    with pytest.raises(DeviceError, match="cu_k is on meta"):
        operator(q, k, k, cu, cu.to("meta"), 4, 1.0)
