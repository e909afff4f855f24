"""Residual + LayerNorm in one pass against float64, beside the two passes of plain torch."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import layer_norm

from kernels.cases import DTYPES, assert_no_worse, normal, run_captured
from onegpu.errors import ArgumentError
from onegpu.kernels.encoder_ops import add_layer_norm as operator
from onegpu.kernels.encoder_ops import reference_add_layer_norm


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (3, 5, 31), (9, 384), (2, 768), (2, 1025)])
def test_equal(device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    from onegpu.kernels import norm

    K = shape[-1]
    x, residual = normal(*shape, dtype=dtype), normal(*shape, seed=1, dtype=dtype) * 3 + 1
    weight, bias = normal(K, seed=2, dtype=dtype), normal(K, seed=3, dtype=dtype)
    got = norm.add_layer_norm(*(t.to(device) for t in (x, residual, weight, bias)), 1e-12 if K > 1 else 1e-5).cpu()
    eps = 1e-12 if K > 1 else 1e-5
    exact = layer_norm(x.double() + residual.double(), (K,), weight.double(), bias.double(), eps)
    plain = layer_norm(x + residual, (K,), weight, bias, eps)
    assert_no_worse(got, plain, exact)
    assert_no_worse(reference_add_layer_norm(x, residual, weight, bias, eps), plain, exact)


def test_rows_far_from_zero(device: torch.device) -> None:
    """The variance is that of the centred row: a mean of 1000 costs no digits of it."""
    from onegpu.kernels import norm

    x = normal(4, 64) + 1000
    zero, one = torch.zeros(4, 64), torch.ones(64)
    got = norm.add_layer_norm(*(t.to(device) for t in (x, zero, one, zero[0])), 1e-5).cpu()
    exact = layer_norm(x.double(), (64,), eps=1e-5)
    torch.testing.assert_close(got.double(), exact, rtol=0, atol=2e-3)


def test_no_rows(device: torch.device) -> None:
    from onegpu.kernels import norm

    empty = torch.empty(0, 8, device=device)
    assert norm.add_layer_norm(empty, empty, torch.ones(8, device=device), torch.ones(8, device=device), 0.1).shape == (
        0,
        8,
    )


def test_what_does_not_fit_is_refused() -> None:
    x = normal(2, 8)
    with pytest.raises(ArgumentError, match="one shape and floating dtype"):
        operator(x, x.half(), x[0], x[0], 1e-5)
    with pytest.raises(ArgumentError, match=r"weight and bias must be \[K\]"):
        operator(x, x, x[0, :3], x[0], 1e-5)


@pytest.mark.gpu
def test_captured() -> None:
    x = normal(16, 768, dtype=torch.float16).cuda()
    other, weight = normal(16, 768, seed=1).half().cuda(), torch.ones(768).half().cuda()
    out = run_captured(lambda: operator(x, x, weight, weight, 1e-12), lambda: x.copy_(other))
    want = reference_add_layer_norm(other, other, weight, weight, 1e-12)
    torch.testing.assert_close(out, want, rtol=2e-3, atol=2e-3)
