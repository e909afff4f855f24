"""Every way to compute a prompt's attention gives the same, and says why it can't where it can't."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from onegpu.attention.prefill import (
    PREFILL_BACKENDS,
    PrefillBounds,
    PrefillSpec,
    choose_prefill,
    is_long_square,
    prefill_attention,
)
from onegpu.errors import ArgumentError, UnsupportedError

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)
LENGTHS = [((5,), (5,)), ((1,), (9,)), ((4, 4, 4), (4, 4, 4)), ((3, 0, 7, 7, 1), (8, 2, 7, 9, 1))]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def slow(q: Tensor, k: Tensor, v: Tensor, bounds: PrefillBounds, scale: float, **more: Any) -> Tensor:
    """One query and head after another, in float64."""
    out = torch.zeros(q.shape[0], q.shape[1], v.shape[2], dtype=torch.float64)
    window, softcap, sinks = more.get("window"), more.get("softcap"), more.get("sinks")
    start_q = start_k = 0
    for Lq, Lk in zip(bounds.lengths_q, bounds.lengths_k, strict=True):
        for i in range(Lq):
            end = Lk - Lq + i + 1
            first = 0 if window is None else max(0, end - window)
            for h in range(q.shape[1]):
                head = h // (q.shape[1] // k.shape[1])
                keys, values = (t[start_k + first : start_k + end, head].double() for t in (k, v))
                scores = keys @ q[start_q + i, h].double() * scale
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                if sinks is not None:
                    scores = torch.cat((scores, sinks[h : h + 1].double()))
                out[start_q + i, h] = scores.softmax(0)[: end - first] @ values
        start_q, start_k = start_q + Lq, start_k + Lk
    return out


def exact(q: Tensor, k: Tensor, v: Tensor, bounds: PrefillBounds, scale: float, **more: Any) -> Tensor:
    """As `slow`, one sequence after another, where the tensors are."""
    window, softcap, sinks = more.get("window"), more.get("softcap"), more.get("sinks")
    parts = []
    ends = zip(q.split(bounds.lengths_q), k.split(bounds.lengths_k), v.split(bounds.lengths_k), strict=True)
    for rows, keys, values in ends:
        keys, values = (t.double().repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (keys, values))
        scores = torch.einsum("ihd,jhd->hij", rows.double(), keys) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        places = torch.arange(len(keys), device=q.device)
        age = places[len(keys) - len(rows) :, None] - places
        hidden = age < 0 if window is None else (age < 0) | (age >= window)
        scores = scores.masked_fill(hidden, -torch.inf)
        if sinks is not None:
            scores = torch.cat((scores, sinks.double()[:, None, None].expand(-1, len(rows), 1)), -1)
        parts.append(torch.einsum("hij,jhd->ihd", scores.softmax(-1)[..., : len(keys)], values))
    return torch.cat(parts)


def tensors(bounds: PrefillBounds, Hq: int = 4, Hkv: int = 2, D: int = 16, DV: int = 16) -> tuple[Tensor, ...]:
    Tq, Tk = sum(bounds.lengths_q), sum(bounds.lengths_k)
    return normal(Tq, Hq, D, seed=0), normal(Tk, Hkv, D, seed=1), normal(Tk, Hkv, DV, seed=2)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("name", [None, "sdpa", "plain"])
def test_backends_agree(lengths: tuple, window: int | None, name: str | None) -> None:
    bounds = PrefillBounds.of(*lengths)
    q, k, v = tensors(bounds)
    got = prefill_attention(q, k, v, bounds, 0.3, window, backend=name)
    torch.testing.assert_close(got.double(), slow(q, k, v, bounds, 0.3, window=window), rtol=0, atol=2e-6)


@pytest.mark.parametrize("more", [{"softcap": 1.5}, {"sinks": normal(4, seed=5)}, {"softcap": 9.0, "window": 3}])
def test_soft_cap_and_sinks(more: dict[str, Any]) -> None:
    bounds = PrefillBounds.of(*LENGTHS[-1])
    q, k, v = tensors(bounds, DV=24)
    want = slow(q, k, v, bounds, 0.3, **more)
    torch.testing.assert_close(exact(q, k, v, bounds, 0.3, **more), want, rtol=0, atol=1e-12)
    torch.testing.assert_close(prefill_attention(q, k, v, bounds, 0.3, **more).double(), want, rtol=0, atol=2e-6)


def test_parts_of_a_prompt_are_the_whole() -> None:
    """Two chunks, the second against all keys, give what one prompt gives."""
    whole = PrefillBounds.of((12,), (12,))
    q, k, v = tensors(whole)
    want = prefill_attention(q, k, v, whole, 0.3, 5)
    first = prefill_attention(q[:7], k[:7], v[:7], PrefillBounds.of((7,), (7,)), 0.3, 5)
    second = prefill_attention(q[7:], k, v, PrefillBounds.of((5,), (12,)), 0.3, 5)
    torch.testing.assert_close(torch.cat((first, second)), want, rtol=0, atol=2e-6)


def test_no_query() -> None:
    bounds = PrefillBounds.of((0, 0), (3, 0))
    q, k, v = tensors(bounds)
    assert prefill_attention(q, k, v, bounds, 1.0).shape == (0, 4, 16)


def test_bounds() -> None:
    bounds = PrefillBounds.of((3, 0, 7), (8, 2, 7))
    assert bounds.cu_q.tolist() == [0, 3, 3, 10]
    assert bounds.cu_k.tolist() == [0, 8, 10, 17]
    assert bounds.cu_q.dtype == torch.int32
    assert list(PrefillBounds.of((4, 4, 2), (4, 4, 2)).groups()) == [(0, 0, 2, 4, 4), (8, 8, 1, 2, 2)]
    for lengths in (((), ()), ((1,), (1, 2)), ((3,), (2,)), ((-1,), (2,))):
        with pytest.raises(ArgumentError, match="at least as many keys"):
            PrefillBounds.of(*lengths)


def test_what_does_not_fit_is_refused() -> None:
    bounds = PrefillBounds.of((3,), (3,))
    q, k, v = tensors(bounds)
    for args, words in (
        ((q[:2], k, v, bounds, 1.0), "bounds say 3 queries and 3 keys; got 2 and 3"),
        ((q[:, :3], k, v, bounds, 1.0), "Hq must be a multiple of Hkv; got 3 and 2"),
        ((q, k.half(), v, bounds, 1.0), "one floating dtype"),
        ((q, k, v[:2], bounds, 1.0), r"\[Tk, Hkv, Dv\]"),
        ((q, k, v, bounds, 1.0, 0), "at least 1; got 0"),
        ((q, k, v, bounds, 1.0, None, -1.0), "softcap must be above 0"),
        ((q, k, v, bounds, 1.0, None, None, normal(3, seed=0)), r"sinks must be floating point \[4\]"),
    ):
        with pytest.raises(ArgumentError, match=words):
            prefill_attention(*args)


def test_every_refusal_has_a_reason() -> None:
    half = torch.float16
    reasons = {
        "cudnn": [
            (PrefillSpec(CPU, half, 64, 64), "needs a CUDA device, the tokens are on cpu"),
            (PrefillSpec(CUDA, half, 64, 64, cudnn_allowed=False), "cuDNN's attention is switched off"),
            (PrefillSpec(CUDA, half, 64, 64, has_sinks=True), "neither a soft cap nor sinks"),
            (PrefillSpec(CUDA, torch.float32, 64, 64), "takes float16 and bfloat16, not torch.float32"),
            (PrefillSpec(CUDA, half, 256, 256), "up to 128, keys and values alike, not 256 and 256"),
            (PrefillSpec(CUDA, half, 64, 64), "one whole prompt of at least 20,480 tokens"),
        ],
        "torch_flash": [
            (PrefillSpec(CPU, half, 64, 64), "needs a CUDA device, the tokens are on cpu"),
            (PrefillSpec(CUDA, half, 64, 64, flash_allowed=False), "flash attention is switched off"),
            (PrefillSpec(CUDA, torch.float32, 64, 64), "takes float16 and bfloat16, not torch.float32"),
            (PrefillSpec(CUDA, half, 64, 64, has_softcap=True), "neither a soft cap nor sinks"),
            (PrefillSpec(CUDA, half, 60, 60), "multiples of 8 up to 256"),
            (PrefillSpec(CUDA, half, 192, 128), "keys and values alike, not 192 and 128"),
        ],
        "onegpu_causal": [
            (PrefillSpec(CPU, half, 64, 64), "needs a CUDA device"),
            (PrefillSpec(CUDA, half, 64, 64, flash_allowed=False), "flash attention is switched off"),
            (PrefillSpec(CUDA, half, 264, 64), "head dims up to 256, not 264"),
        ],
        "sdpa": [(PrefillSpec(CPU, half, 64, 64, has_sinks=True), "neither a soft cap nor sinks")],
        "plain": [],
    }
    assert set(reasons) == {backend.name for backend in PREFILL_BACKENDS}
    for backend in PREFILL_BACKENDS:
        for spec, sentence in reasons[backend.name]:
            assert sentence in str(backend.why_not(spec))


def test_what_is_long_and_square() -> None:
    for lengths_q, lengths_k, window, expected in (
        ((20480,), (20480,), None, True),
        ((24000,), (24000,), 24000, True),
        ((24000,), (24000,), 4096, False),
        ((20479,), (20479,), None, False),
        ((20480,), (24000,), None, False),
        ((20480, 20480), (20480, 20480), None, False),
    ):
        assert is_long_square(PrefillBounds.of(lengths_q, lengths_k), window) is expected


def test_choosing() -> None:
    assert choose_prefill(PrefillSpec(CPU, torch.float32, 64, 64)).name == "sdpa"
    assert choose_prefill(PrefillSpec(CPU, torch.float32, 64, 64, has_sinks=True)).name == "plain"
    with pytest.raises(UnsupportedError, match="torch_flash cannot run here: needs a CUDA device"):
        choose_prefill(PrefillSpec(CPU, torch.float32, 64, 64), "torch_flash")
    with pytest.raises(UnsupportedError, match="no prefill attention is called 'flash'"):
        choose_prefill(PrefillSpec(CPU, torch.float32, 64, 64), "flash")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("D", [64, 80, 128, 256])
@pytest.mark.parametrize("lengths", [((300,), (300,)), ((65, 1, 0, 128), (200, 90, 3, 128))])
def test_on_a_device(dtype: torch.dtype, D: int, lengths: tuple) -> None:
    bounds = PrefillBounds.of(*lengths, "cuda")
    q, k, v = (t.to(CUDA, dtype) for t in tensors(bounds, D=D, DV=D))
    limit = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    ran = set()
    for more in ({}, {"window": 40}, {"softcap": 5.0}, {"sinks": normal(4, seed=5).cuda()}):
        want = exact(q, k, v, bounds, 0.1, **more)
        spec = PrefillSpec(CUDA, dtype, D, D, has_softcap="softcap" in more, has_sinks="sinks" in more)
        for backend in PREFILL_BACKENDS:
            if backend.why_not(spec) is None:
                got = prefill_attention(q, k, v, bounds, 0.1, **more, backend=backend.name)
                torch.testing.assert_close(got.double(), want, rtol=0, atol=limit, msg=backend.name)
                ran.add(backend.name)
    assert {"onegpu_causal", "sdpa", "plain"} <= ran


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_long_prompts_by_cudnn(dtype: torch.dtype) -> None:
    """Queries, keys and values that lie in one buffer, as a prompt's do; and torch's switch for it."""
    long = 20500
    bounds = PrefillBounds.of((long,), (long,), "cuda")
    qkv = torch.randn(long, 8, 128, dtype=dtype, device="cuda")
    q, k, v = qkv.split([4, 2, 2], 1)
    spec = PrefillSpec(CUDA, dtype, 128, 128, is_long_square=True)
    want = prefill_attention(q, k, v, bounds, 0.1, backend="torch_flash")
    if PREFILL_BACKENDS[0].why_not(spec) is None:
        assert choose_prefill(spec).name == "cudnn"
        got = prefill_attention(q, k, v, bounds, 0.1)
        assert got.flatten(1).data_ptr() == got.data_ptr()
        limit = 4e-3 if dtype == torch.float16 else 3e-2
        torch.testing.assert_close(got, want, rtol=0, atol=limit)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), pytest.raises(UnsupportedError, match="switched off"):
        prefill_attention(q, k, v, bounds, 0.1, backend="cudnn")


@pytest.mark.gpu
def test_torchs_own_switch_is_honoured() -> None:
    spec = {"device": CUDA, "dtype": torch.float16, "head_dim": 64, "value_dim": 64}
    with sdpa_kernel(SDPBackend.MATH):
        bounds = PrefillBounds.of((4,), (4,), "cuda")
        q, k, v = (t.half().cuda() for t in tensors(bounds, D=64, DV=64))
        with pytest.raises(UnsupportedError, match="flash attention is switched off"):
            prefill_attention(q, k, v, bounds, 1.0, backend="torch_flash")
        prefill_attention(q, k, v, bounds, 1.0)
    assert choose_prefill(PrefillSpec(**spec)).name in ("torch_flash", "onegpu_causal", "sdpa")
