"""The operator on tiled weights as torch sees it, and the portable way through it, dequantizing tiles."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear

from kernels.cases import DTYPES, Weight4bit, assert_no_worse, exact_product, normal, weight_4bit
from onegpu.config import BLOCKSIZES
from onegpu.errors import ArgumentError, ConfigError
from onegpu.formats import tiling
from onegpu.kernels import linear_4bit, slices
from onegpu.kernels.tail import apply_tail
from onegpu.kernels.tiled_ops import linear_4bit_tiled


def tiled_args(weight: Weight4bit) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        tiling.tile_codes(weight.packed, *weight.shape),
        tiling.tile_scales(weight.absmax, *weight.shape, weight.blocksize),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nested", [False, True])
def test_is_linear_4bit_of_the_same_weight(dtype: torch.dtype, nested: bool) -> None:
    weight = weight_4bit(21, 128, "fp4", nested=nested)
    bias = normal(21)
    for shape in ((128,), (0, 128), (5, 128), (2, 3, 128)):
        x = normal(*shape, dtype=dtype)
        y = linear_4bit_tiled(x, *tiled_args(weight), bias, *weight.args)
        expected = linear_4bit(x, weight.packed, weight.absmax, bias, *weight.args)
        torch.testing.assert_close(y, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("nested", [False, True])
def test_opcheck(nested: bool) -> None:
    weight = weight_4bit(17, 64, nested=nested)
    x, bias = normal(3, 64).requires_grad_(), normal(17).requires_grad_()
    args = (x, *tiled_args(weight), bias, *weight.args)
    torch.library.opcheck(torch.ops.onegpu.linear_4bit_tiled.default, args)


@pytest.mark.parametrize("nested", [False, True])
def test_gradients(nested: bool) -> None:
    weight = weight_4bit(17, 128, nested=nested)
    x, bias = normal(3, 128).requires_grad_(), normal(17).requires_grad_()
    linear_4bit_tiled(x, *tiled_args(weight), bias, *weight.args).square().sum().backward()
    other, other_bias = x.detach().clone().requires_grad_(), bias.detach().clone().requires_grad_()
    linear(other, weight.dense(torch.float32), other_bias).square().sum().backward()
    torch.testing.assert_close(x.grad, other.grad)
    torch.testing.assert_close(bias.grad, other_bias.grad)


def test_refusals() -> None:
    weight = weight_4bit(17, 64)
    tiled, scales = tiled_args(weight)
    x = normal(2, 64)
    with pytest.raises(ArgumentError, match=r"tiled must be uint8 \[1024\] for a weight of shape \[17, 64\]"):
        linear_4bit_tiled(x, weight.packed, scales, None, *weight.args)
    with pytest.raises(ArgumentError, match=r"absmax must be float32 \[32\].*got float32 \[17\]"):
        linear_4bit_tiled(x, tiled, weight.absmax, None, *weight.args)
    with pytest.raises(ArgumentError, match="in_features 96 is no multiple of 64"):
        linear_4bit_tiled(normal(2, 96), tiled, scales, None, *weight.args)
    with pytest.raises(ArgumentError, match="is no multiple of blocksize 128"):
        linear_4bit_tiled(x, tiled, scales, None, 17, "nf4", 128)
    with pytest.raises(ArgumentError, match="nested_absmax, nested_code and nested_offset go together"):
        linear_4bit_tiled(x, tiled, scales.to(torch.uint8), None, *weight.args, nested_absmax=torch.zeros(1))
    with pytest.raises(ArgumentError, match=r"bias must be floating point \[17\]"):
        linear_4bit_tiled(x, tiled, scales, torch.zeros(16), *weight.args)
    with pytest.raises(ConfigError, match="quant_type"):
        linear_4bit_tiled(x, tiled, scales, None, 17, "nf5", 64)
    with pytest.raises(ArgumentError, match="out_features must be at least 1"):
        linear_4bit_tiled(x, tiled, scales, None, 0, "nf4", 64)


@pytest.fixture
def launcher(device: torch.device):
    from onegpu.kernels import matmul_4bit_tiled

    return matmul_4bit_tiled


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("N", "K"), [(1, 64), (33, 192), (70, 128)])
def test_dequantizing_tiles(
    N: int, K: int, nested: bool, dtype: torch.dtype, device: torch.device, launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In slices of two row tiles, the last one ragged."""
    monkeypatch.setattr(slices, "SCRATCH", 32 * K)
    monkeypatch.setattr(slices, "WHOLE_ROWS", 32)
    assert len(slices.row_slices(N, K)) == -(-N // 32)
    weight = weight_4bit(N, K, nested=nested)
    there = weight.to(device)
    x = normal(100, K, dtype=dtype)
    for bias in (None, normal(N, dtype=dtype), normal(N).double().float()):
        bias_there = None if bias is None else bias.to(device)
        y = launcher.linear_4bit_tiled(x.to(device), *tiled_args(there), bias_there, *there.args).cpu()
        plain = linear(x, weight.dense(dtype), None if bias is None else bias.to(dtype))
        assert_no_worse(y, plain, exact_product(x, weight.dense(torch.float32), bias))


@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_dequantizing_every_blocksize(blocksize: int, device: torch.device, launcher) -> None:
    K = max(64, blocksize)
    weight = weight_4bit(18, K, blocksize=blocksize, nested=True)
    there = weight.to(device)
    x = normal(97, K)
    y = launcher.linear_4bit_tiled(x.to(device), *tiled_args(there), None, *there.args).cpu()
    assert_no_worse(y, linear(x, weight.dense(torch.float32)), exact_product(x, weight.dense(torch.float32), None))


def test_offsets_of_joined_weights() -> None:
    """Two weights with nested scales of their own, joined: each row tile keeps its weight's offset."""
    parts = [weight_4bit(N, 512, nested=True) for N in (32, 48)]
    tiles = [tiling.tile_codes(part.packed, *part.shape) for part in parts]
    scales = [tiling.tile_scales(part.absmax, *part.shape, 64) for part in parts]
    offsets = torch.cat([part.nested[2].repeat(part.shape[0] // 16) for part in parts])
    nested = (torch.cat([part.nested[0] for part in parts]), parts[0].nested[1], offsets)
    x = normal(3, 512).requires_grad_()
    joined = linear_4bit_tiled(x, torch.cat(tiles), torch.cat(scales), None, 80, "nf4", 64, *nested)
    alone = [
        linear_4bit_tiled(x, *pair, None, part.shape[0], "nf4", 64, *part.nested)
        for *pair, part in zip(tiles, scales, parts, strict=True)
    ]
    assert torch.equal(joined, torch.cat(alone, dim=1))
    (mine,) = torch.autograd.grad(joined.sum(), x)
    (theirs,) = torch.autograd.grad(torch.cat(alone, dim=1).sum(), x)
    torch.testing.assert_close(mine, theirs)
    with pytest.raises(ArgumentError, match=r"nested_offset must be float32 \[5\]"):
        linear_4bit_tiled(x, torch.cat(tiles), torch.cat(scales), None, 80, "nf4", 64, *nested[:2], offsets[1:])


@pytest.mark.parametrize(("activation", "gated"), [(None, False), ("silu", True), ("gelu", False)])
@pytest.mark.parametrize("residual", [False, True])
def test_tail_follows_the_product(activation: str | None, gated: bool, residual: bool) -> None:
    weight = weight_4bit(64, 128)
    codes, absmax = tiling.tile_codes(weight.packed, 64, 128), tiling.tile_scales(weight.absmax, 64, 128, 64)
    x = normal(5, 128).requires_grad_()
    added = normal(5, 32 if gated else 64) if residual else None
    tail = {"residual": added, "activation": activation, "gated": gated}
    y = linear_4bit_tiled(x, codes, absmax, None, 64, "nf4", 64, **tail)
    t = linear_4bit_tiled(x, codes, absmax, None, 64, "nf4", 64)
    torch.testing.assert_close(y, apply_tail(t, added, activation, gated, torch.float32))
    with torch.no_grad():
        torch.testing.assert_close(linear_4bit_tiled(x, codes, absmax, None, 64, "nf4", 64, **tail), y)
    assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape
