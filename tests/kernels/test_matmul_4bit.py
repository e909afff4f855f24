"""The 4-bit products on the device: gemv, gemm and dequantize-then-multiply, against float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import linear

from kernels.cases import DTYPES, Weight4bit, assert_no_worse, exact_product, normal, run_captured, weight_4bit
from onegpu.config import BLOCKSIZES
from onegpu.kernels import linear_4bit, slices


@pytest.fixture
def matmul(device: torch.device):
    from onegpu.kernels import matmul_4bit

    return matmul_4bit


def check(
    matmul, device: torch.device, weight: Weight4bit, x: torch.Tensor, bias: torch.Tensor | None, factor: float = 1.5
) -> torch.Tensor:
    """The launcher's result, once it has been found no worse than dequantizing and multiplying in the dtype of x."""
    there = weight.to(device)
    bias_there = None if bias is None else bias.to(device)
    y = matmul.linear_4bit(x.to(device), there.packed, there.absmax, bias_there, *there.args).cpu()
    plain = linear(x, weight.dense(x.dtype), None if bias is None else bias.to(x.dtype))
    assert_no_worse(y, plain, exact_product(x, weight.dense(torch.float32), bias), factor)
    return y


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("quant_type", "nested"), [("nf4", False), ("nf4", True), ("fp4", False)])
@pytest.mark.parametrize("M", [1, 4, 5, 65])
@pytest.mark.parametrize(("N", "K"), [(9, 64), (33, 45)])
def test_rows(
    M: int, N: int, K: int, dtype: torch.dtype, quant_type: str, nested: bool, device: torch.device, matmul
) -> None:
    """Every way through, aligned and not; 4, 64 and their successors are where one way hands over to the next."""
    x, bias = normal(M, K, dtype=dtype), normal(N, seed=5, dtype=dtype)
    check(matmul, device, weight_4bit(N, K, quant_type, nested=nested), x, bias)


@pytest.mark.parametrize("M", [2, 6])
@pytest.mark.parametrize(("N", "K"), [(1, 1), (2, 1), (5, 31), (17, 96), (3, 128), (70, 200), (1, 1030)])
def test_awkward_shapes(M: int, N: int, K: int, device: torch.device, matmul) -> None:
    check(matmul, device, weight_4bit(N, K), normal(M, K, dtype=torch.float16), None)


@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("M", [1, 5])
def test_every_blocksize(blocksize: int, M: int, device: torch.device, matmul) -> None:
    for N, K in ((7, 96), (2, blocksize)):
        weight = weight_4bit(N, K, blocksize=blocksize, nested=True)
        check(matmul, device, weight, normal(M, K, dtype=torch.float16), None)


@pytest.mark.parametrize("M", [2, 6, 70])
def test_offsets_of_64_bits(M: int, device: torch.device, matmul, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code for weights of 2**31 elements and more, at a small size."""
    monkeypatch.setattr(matmul, "WIDE_WEIGHT", 1)
    for K in (64, 45):
        weight = weight_4bit(200, K, nested=True)
        check(matmul, device, weight, normal(M, K, dtype=torch.float16), normal(200, dtype=torch.float16))


@pytest.mark.parametrize(("N", "K", "blocksize", "cuts"), [(600, 192, 64, 2), (530, 45, 64, 2), (1100, 31, 512, 2)])
def test_slices_of_scratch_memory(
    N: int, K: int, blocksize: int, cuts: int, device: torch.device, matmul, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slices, "SCRATCH", 256 * K)
    M = 66 if K == 192 else 5
    assert len(slices.row_slices(N, K, blocksize // math.gcd(K, blocksize))) > cuts
    weight = weight_4bit(N, K, blocksize=blocksize, nested=True)
    for bias in (None, normal(N, dtype=torch.float16), normal(N, seed=2)):
        check(matmul, device, weight, normal(M, K, dtype=torch.float16), bias)


@pytest.mark.parametrize("M", [2, 6, 70])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_bias_in_another_dtype(M: int, dtype: torch.dtype, device: torch.device, matmul) -> None:
    check(matmul, device, weight_4bit(16, 64), normal(M, 64, dtype=dtype), normal(16, seed=2))


@pytest.mark.parametrize("M", [2, 6, 70])
def test_ranks_strides_and_nothing(M: int, device: torch.device, matmul) -> None:
    weight = weight_4bit(10, 64).to(device)
    wide = normal(M, 2, 128, dtype=torch.float16).to(device)
    views = (wide[:, :, ::2], wide[:, 1, :64], wide[0, 0, :64], wide.transpose(0, 1)[..., :64], wide[:0, :, :64])
    for x in views:
        y = matmul.linear_4bit(x, weight.packed, weight.absmax, None, *weight.args)
        same = matmul.linear_4bit(x.contiguous(), weight.packed, weight.absmax, None, *weight.args)
        assert y.shape == (*x.shape[:-1], 10)
        assert torch.equal(y, same)


def test_rows_do_not_see_each_other(device: torch.device, matmul) -> None:
    """A NaN stays in its row; one row of many rows' tiles is that row."""
    weight = weight_4bit(24, 64).to(device)
    for M in (4, 16):
        x = normal(M, 64, dtype=torch.float16)
        x[1, 3] = float("nan")
        y = matmul.linear_4bit(x.to(device), weight.packed, weight.absmax, None, *weight.args).cpu()
        assert y[1].isnan().all()
        assert y[[0, *range(2, M)]].isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("N", "K"), [(4096, 4096), (14336, 4096), (4097, 4095)])
def test_real_shapes(N: int, K: int, nested: bool, dtype: torch.dtype) -> None:
    """On either side of every number of rows at which one way hands over to the next."""
    weight = weight_4bit(N, K, nested=nested, device="cuda")
    x, bias = normal(512, K, dtype=dtype, device="cuda"), normal(N, seed=2, dtype=dtype, device="cuda")
    exact = exact_product(x, weight.dense(torch.float32), bias)
    dense = weight.dense(dtype)
    factor = 1.5 if dtype == torch.float32 else 1.1
    for M in (1, 2, 4, 5, 16, 33, 64, 65, 512):
        y = linear_4bit(x[:M], weight.packed, weight.absmax, bias, *weight.args)
        assert_no_worse(y, linear(x[:M], dense, bias), exact[:M], factor, f"at {M} rows")


@pytest.mark.gpu
@pytest.mark.parametrize("M", [1, 16, 80])
def test_more_than_31_bits_of_weights(M: int) -> None:
    if torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("needs 6 GiB of free GPU memory")
    K, N = 16384, 2**17 + 40
    packed = torch.randint(0, 256, (N * K // 2,), dtype=torch.uint8, device="cuda")
    absmax = torch.rand(N * K // 64, device="cuda")
    x = normal(M, K, dtype=torch.bfloat16, device="cuda")
    y = linear_4bit(x, packed, absmax, None, N, "nf4", 64)
    for first, last in ((0, 64), (2**17 - 16, 2**17 + 16), (N - 64, N)):
        part = Weight4bit(
            packed[first * K // 2 : last * K // 2],
            absmax[first * K // 64 : last * K // 64],
            (last - first, K),
            "nf4",
            64,
            (),
        )
        plain = linear(x, part.dense(torch.bfloat16))
        assert_no_worse(y[:, first:last], plain, exact_product(x, part.dense(torch.float32), None))


@pytest.mark.gpu
@pytest.mark.parametrize("M", [1, 16, 80])
@pytest.mark.parametrize("nested", [False, True])
def test_captured_and_without_waiting(M: int, nested: bool) -> None:
    weight = weight_4bit(256, 192, nested=nested).to(torch.device("cuda"))
    x, other = (normal(M, 192, seed=seed, dtype=torch.bfloat16).cuda() for seed in (1, 2))
    bias = normal(256, dtype=torch.bfloat16).cuda()

    def call() -> torch.Tensor:
        return linear_4bit(x, weight.packed, weight.absmax, bias, *weight.args)

    out = run_captured(call, lambda: x.copy_(other))
    assert torch.equal(out, linear_4bit(other, weight.packed, weight.absmax, bias, *weight.args))


@pytest.mark.gpu
def test_on_the_callers_stream() -> None:
    """A launch waits for what the caller queued on its own stream, and not for other streams."""
    weight = weight_4bit(512, 512).to(torch.device("cuda"))
    x = torch.zeros(1, 512, dtype=torch.bfloat16, device="cuda")
    linear_4bit(x, weight.packed, weight.absmax, None, *weight.args)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        x.fill_(1.0)
        y = linear_4bit(x, weight.packed, weight.absmax, None, *weight.args)
    stream.synchronize()
    expected = linear_4bit(torch.ones_like(x), weight.packed, weight.absmax, None, *weight.args)
    assert torch.equal(y, expected)
