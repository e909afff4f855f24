"""What follows a product: against torch's own functions in float64, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from kernels.cases import DTYPES, normal
from onegpu.errors import ArgumentError
from onegpu.kernels.tail import ACTIVATIONS, apply_tail, check_tail, out_features

EXACT = {
    "silu": lambda t: t / (1 + torch.exp(-t)),
    "gelu": lambda t: t / 2 * (1 + torch.erf(t / 2**0.5)),
    "gelu_tanh": lambda t: t / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (t + 0.044715 * t**3))),
    "relu": lambda t: t.clamp(min=0),
    None: lambda t: t,
}


def exact_tail(t: torch.Tensor, residual: torch.Tensor | None, activation: str | None, gated: bool) -> torch.Tensor:
    """The definition in float64."""
    t = t.double()
    half = t.shape[-1] // 2
    t = EXACT[activation](t[..., :half]) * t[..., half:] if gated else EXACT[activation](t)
    return t if residual is None else t + residual.double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize(
    ("activation", "gated"), [(None, False), *((a, g) for a in ACTIVATIONS for g in (False, True))]
)
def test_definition(activation: str | None, gated: bool, with_residual: bool, dtype: torch.dtype) -> None:
    t = normal(3, 5, 14) * 4
    residual = normal(3, 5, out_features(14, gated), seed=1, dtype=dtype) if with_residual else None
    y = apply_tail(t, residual, activation, gated, dtype)
    exact = exact_tail(t, residual, activation, gated)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), exact, rtol=torch.finfo(dtype).eps / 2 + 2e-6, atol=2e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_device(activation: str, gated: bool, scaled: bool, device: torch.device) -> None:
    from onegpu.kernels.tail_device import tail_of

    M, N = 3, 2062
    t, bias, stats = normal(M, N) * 4, normal(N, seed=1), normal(N, seed=2).abs()
    residual = normal(M, 2 * out_features(N, gated), seed=3).half()[:, : out_features(N, gated)]
    y = torch.full((M, out_features(N, gated)), torch.nan, dtype=torch.float16, device=device)
    there = [tensor.to(device) for tensor in (t, bias, stats)]
    tail_of(y, *there[:2], residual.to(device), activation, gated, there[2] if scaled else None, 0.5)
    exact = exact_tail(t.double() * (stats * 0.5 if scaled else 1) + bias, residual, activation, gated)
    torch.testing.assert_close(y.cpu().double(), exact, rtol=2**-11 + 1e-5, atol=1e-5)


def test_far_values(device: torch.device) -> None:
    """Where exp overflows, and NaN."""
    from onegpu.kernels.tail_device import tail_of

    t = torch.tensor([[-1e4, -100.0, -20.0, 0.0, 20.0, 100.0, 1e4, torch.nan]])
    for activation in ACTIVATIONS:
        y = torch.empty(1, 8, device=device)
        tail_of(y, t.to(device), None, None, activation, False)
        expected = {"gelu_tanh": lambda t: F.gelu(t, approximate="tanh")}.get(activation, getattr(F, activation, None))(
            t
        )
        torch.testing.assert_close(y.cpu(), expected, rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"activation": "swish"}, "activation must be None or one of 'silu', .*; got 'swish'"),
        ({"gated": True, "activation": None}, "gated needs an activation"),
        ({"gated": True, "N": 5}, "even number of rows, gate then up; got 5"),
        ({"residual": normal(2, 6)}, r"residual must be torch.float16 \[2, 6\].*got torch.float32 \[2, 6\]"),
        ({"residual": normal(2, 6).half(), "gated": True}, r"residual must be torch.float16 \[2, 3\].*got .* \[2, 6\]"),
    ],
)
def test_refused(changes: dict[str, object], words: str) -> None:
    given = {"N": 6, "residual": None, "activation": "silu", "gated": False, **changes}
    with pytest.raises(ArgumentError, match=words):
        check_tail("op", normal(2, 4).half(), **given)  # type: ignore[arg-type]
