"""Exact GELU, in place and at the end of a product, against float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import gelu

from kernels.cases import DTYPES, assert_no_worse, normal, run_captured
from onegpu.errors import ArgumentError
from onegpu.kernels.encoder_ops import gelu_ as in_place
from onegpu.kernels.encoder_ops import linear_gelu as operator
from onegpu.kernels.encoder_ops import reference_linear_gelu


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 1025), (0, 4)])
def test_in_place(device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    from onegpu.kernels import activation

    x = normal(*shape, dtype=dtype) * 3
    there = x.clone().to(device)
    got = activation.gelu_(there)
    assert got is there
    if x.numel():
        assert_no_worse(got.cpu(), gelu(x), gelu(x.double()))
        here = x.clone()
        assert in_place(here) is here
        assert_no_worse(here, gelu(x), gelu(x.double()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "N", "K"), [(1, 1, 1), (7, 13, 5), (65, 100, 64), (3, 65, 130), (0, 4, 4)])
def test_product(device: torch.device, dtype: torch.dtype, M: int, N: int, K: int) -> None:
    from onegpu.kernels import activation

    x, weight, bias = normal(M, K, dtype=dtype), normal(N, K, seed=1, dtype=dtype), normal(N, seed=2, dtype=dtype)
    got = activation.linear_gelu(*(t.to(device) for t in (x, weight, bias))).cpu()
    assert got.shape == (M, N)
    if not M:
        return
    exact = gelu(x.double() @ weight.double().T + bias.double())
    plain = gelu(x @ weight.T + bias)
    factor = 1.5 if device.type == "cpu" or dtype != torch.float32 else 5000.0  # one TF32 product has 11 bits
    assert_no_worse(got, plain, exact, factor)
    assert_no_worse(reference_linear_gelu(x, weight, bias), plain, exact)


def test_large_rows(device: torch.device) -> None:
    """More than 1024 rows take the large tiles."""
    from onegpu.kernels import activation

    x, weight, bias = normal(1030, 64), normal(96, 64, seed=1), normal(96, seed=2)
    x, weight, bias = x.half(), weight.half(), bias.half()
    got = activation.linear_gelu(*(t.to(device) for t in (x, weight, bias))).cpu()
    exact = gelu(x.double() @ weight.double().T + bias.double())
    assert_no_worse(got, gelu(x @ weight.T + bias), exact)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ArgumentError, match="contiguous"):
        in_place(normal(4, 4).T[:2])
    with pytest.raises(ArgumentError, match=r"expected x \[..., K\]"):
        operator(normal(2, 3), normal(4, 5), normal(4))
    with pytest.raises(ArgumentError, match="one floating dtype"):
        operator(normal(2, 3), normal(4, 3).half(), normal(4))


@pytest.mark.gpu
def test_captured() -> None:
    x, weight, bias = normal(64, 768).half().cuda(), normal(3072, 768).half().cuda() / 28, normal(3072).half().cuda()
    other = normal(64, 768, seed=5).half().cuda()
    out = run_captured(lambda: operator(x, weight, bias), lambda: x.copy_(other))
    torch.testing.assert_close(out, reference_linear_gelu(other, weight, bias), rtol=5e-3, atol=5e-3)
