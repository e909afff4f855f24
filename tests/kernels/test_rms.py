"""RMSNorm in one pass against float64, and bit for bit against the rounding that models have."""

from __future__ import annotations

import pytest
import torch

from kernels.cases import DTYPES, normal, run_captured
from onegpu.errors import ArgumentError
from onegpu.kernels import rms_norm as operator
from onegpu.kernels.decode_products import reference_rms_norm


def exact(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> torch.Tensor:
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * (weight.double() + offset)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (3, 5, 31), (100, 128), (70, 5), (2, 1025), (1, 33000)])
def test_against_float64(device: torch.device, dtype: torch.dtype, offset: float, shape: tuple[int, ...]) -> None:
    from onegpu.kernels import rms

    x, weight = normal(*shape, dtype=dtype) * 3, normal(shape[-1], seed=2, dtype=dtype)
    expected = exact(x, weight, 1e-5, offset)
    # Two roundings without an offset, one with.
    tolerance = (2 if offset == 0 else 1) * torch.finfo(dtype).eps / 2 * 1.01 + 1e-6
    for y in (
        rms.rms_norm(x.to(device), weight.to(device), 1e-5, offset).cpu(),
        reference_rms_norm(x, weight, 1e-5, offset),
    ):
        assert y.dtype == dtype
        torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=1e-7)


def test_rounds_as_models_do() -> None:
    """Llama rounds what it multiplies with the weight; Gemma multiplies in float32."""
    x, weight = normal(40, 64).bfloat16(), normal(64, seed=1).bfloat16()
    normalized = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    assert torch.equal(operator(x, weight, 1e-6), weight * normalized.bfloat16())
    assert torch.equal(operator(x, weight, 1e-6, 1.0), (normalized * (1.0 + weight.float())).bfloat16())


def test_strides_and_nothing(device: torch.device) -> None:
    from onegpu.kernels import rms

    wide, weight = normal(6, 4, 48).to(device), normal(24, seed=1).to(device)
    for x in (wide[..., :24], wide[..., ::2], wide.transpose(0, 1)[..., 24:], wide[:0, :, :24], wide[1, 1, :24]):
        y = rms.rms_norm(x, weight, 1e-6)
        assert y.shape == x.shape
        assert torch.equal(y, rms.rms_norm(x.contiguous(), weight, 1e-6))


def test_what_does_not_fit_is_refused() -> None:
    x = normal(2, 8)
    with pytest.raises(ArgumentError, match=r"weight must be \[8\].*got \[7\]"):
        operator(x, x[0, :7], 1e-5)
    with pytest.raises(ArgumentError, match="eps must not be negative"):
        operator(x, x[0], -1.0)
    with pytest.raises(ArgumentError, match="x must be bfloat16"):
        operator(x.double(), x[0], 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("overlap", [False, True])
def test_captured(overlap: bool) -> None:
    x, other = normal(16, 4096).bfloat16().cuda(), normal(16, 4096, seed=1).bfloat16().cuda()
    weight = normal(4096, seed=2).bfloat16().cuda()
    out = run_captured(lambda: operator(x + 0, weight, 1e-6, overlap=overlap), lambda: x.copy_(other))
    expected = reference_rms_norm(other, weight, 1e-6)
    torch.testing.assert_close(out, expected, rtol=2**-7, atol=0)
