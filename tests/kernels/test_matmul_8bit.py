"""LLM.int8() on the device against its definition: exact integers, so only the last float32 steps may differ.

Up to 32 rows of 16-bit x, or 256, the definition is that of `linear_8bit_rows`: x is not quantized.
"""

from __future__ import annotations

import functools

import pytest
import torch

from kernels.cases import DTYPES, normal, run_captured
from onegpu.formats import rowwise
from onegpu.kernels import linear_8bit, reference
from onegpu.kernels.decode_products import reference_linear_8bit_rows


@pytest.fixture
def matmul(device: torch.device):
    from onegpu.kernels import matmul_8bit

    return matmul_8bit


@functools.lru_cache(maxsize=4)
def weight_8bit(N: int, K: int, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Shared among tests, so nobody may write to it."""
    codes, row_stats, _ = rowwise.quantize_rows(normal(N, K, seed=N, device=device))
    return codes, row_stats


def with_outliers(M: int, K: int, columns: int, dtype: torch.dtype, seed: int = 0, device: str = "cpu") -> torch.Tensor:
    """Normal rows below 5, and `columns` columns that reach 6 to 60 in some row."""
    x = normal(M, K, seed=seed, device=device).clamp(-4.9, 4.9)
    places = torch.randperm(K, generator=torch.Generator().manual_seed(seed))[:columns].to(device)
    rows = torch.arange(columns, device=device) % M
    x[rows, places] = 6 + normal(columns, seed=3, device=device).abs() * 15
    return x.to(dtype)


def assert_close(
    y: torch.Tensor, x: torch.Tensor, codes: torch.Tensor, row_stats: torch.Tensor, bias, threshold
) -> None:
    """Within one rounding of the definition, which is evaluated where x and the weight are.

    The outlier sums alone depend on an order, and are float32.

    Tensor cores cut low bits off as they add, so a sum of hundreds of columns may be off by a few 1e-6 of its size.
    """
    from onegpu.kernels.matmul_8bit import weight_only_rows

    there, codes_there = (x.cuda(), codes.cuda()) if torch.cuda.is_available() else (x, codes)
    if x.dtype != torch.float32 and x.numel() <= weight_only_rows(there, codes_there) * x.shape[-1]:
        expected = reference_linear_8bit_rows(x, codes, row_stats, bias)
    else:
        expected = reference.linear_8bit(x, codes, row_stats, bias, threshold)
    assert y.dtype == expected.dtype
    assert y.shape == expected.shape
    scale = float(expected.double().square().mean().sqrt()) if expected.numel() else 0.0
    eps = torch.finfo(x.dtype).eps
    torch.testing.assert_close(y.to(expected.device), expected, rtol=eps, atol=max(eps / 16, 1e-5) * scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("M", "N", "K"), [(1, 1, 1), (1, 33, 70), (32, 9, 200), (33, 9, 200), (65, 130, 64)])
def test_shapes(
    M: int, N: int, K: int, threshold: float, with_bias: bool, dtype: torch.dtype, device: torch.device, matmul
) -> None:
    codes, row_stats = weight_8bit(N, K)
    x = with_outliers(M, K, min(3, K), dtype)
    bias = normal(N, seed=8, dtype=dtype) if with_bias else None
    there = None if bias is None else bias.to(device)
    y = matmul.linear_8bit(x.to(device), codes.to(device), row_stats.to(device), there, threshold)
    assert_close(y, x, codes, row_stats, bias, threshold)


@pytest.mark.parametrize("columns", [0, 1, 16, 17, 150])
@pytest.mark.parametrize(("M", "dtype"), [(5, torch.float32), *((37, dtype) for dtype in DTYPES)])
def test_any_number_of_outlier_columns(columns: int, M: int, dtype: torch.dtype, device: torch.device, matmul) -> None:
    codes, row_stats = weight_8bit(20, 150)
    x = with_outliers(M, 150, columns, dtype)
    assert int(rowwise.quantize_rows(x, 6.0).outlier_cols.sum()) == columns
    y = matmul.linear_8bit(x.to(device), codes.to(device), row_stats.to(device), None, 6.0)
    assert_close(y, x, codes, row_stats, None, 6.0)


def test_without_outliers_bits_are_the_same(device: torch.device, matmul) -> None:
    """No sums in float32 then: integers, and the same products in the same order."""
    codes, row_stats = weight_8bit(40, 300)
    x = normal(20, 300)
    y = matmul.linear_8bit(x.to(device), codes.to(device), row_stats.to(device), None, 0.0)
    assert torch.equal(y.cpu(), reference.linear_8bit(x, codes, row_stats, None, 0.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_few_rows_are_at_least_as_exact(dtype: torch.dtype, device: torch.device, matmul) -> None:
    """Than the paper's decomposition, with outliers in x; and a row is the same beside other ones."""
    codes, row_stats = weight_8bit(40, 300)
    x = with_outliers(8, 300, 5, dtype)
    exact = x.double() @ (codes.double() * row_stats.double()[:, None] / 127).T
    y = matmul.linear_8bit(x.to(device), codes.to(device), row_stats.to(device), None, 6.0).cpu()
    decomposed = reference.linear_8bit(x, codes, row_stats, None, 6.0)
    assert float((y.double() - exact).std()) < float((decomposed.double() - exact).std())
    calm = with_outliers(8, 300, 0, dtype, seed=1)
    calm[3] = x[3]
    again = matmul.linear_8bit(calm.to(device), codes.to(device), row_stats.to(device), None, 6.0).cpu()
    torch.testing.assert_close(again[3], y[3], rtol=0, atol=0)


def test_ranks_strides_and_nothing(device: torch.device, matmul) -> None:
    codes, row_stats = (t.to(device) for t in weight_8bit(10, 64))
    wide = with_outliers(12, 128, 9, torch.float16).view(6, 2, 128).to(device)
    views = (wide[:, :, ::2], wide[:, 1, :64], wide[0, 0, :64], wide.transpose(0, 1)[..., :64], wide[:0, :, :64])
    for x in views:
        y = matmul.linear_8bit(x, codes, row_stats, None, 6.0)
        assert y.shape == (*x.shape[:-1], 10)
        assert torch.equal(y, matmul.linear_8bit(x.contiguous(), codes, row_stats, None, 6.0))


def test_outliers_of_one_call_are_gone_in_the_next(device: torch.device, matmul) -> None:
    codes, row_stats = weight_8bit(20, 150)
    there = codes.to(device), row_stats.to(device)
    for columns in (150, 40, 3, 0):
        x = with_outliers(50, 150, columns, torch.float32, seed=columns)
        assert_close(matmul.linear_8bit(x.to(device), *there, None, 6.0), x, codes, row_stats, None, 6.0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [0, 7, 300])
@pytest.mark.parametrize(
    ("N", "K", "where"), [(257, 4095, "cpu"), (4096, 4096, "cuda"), (14336, 4096, "cuda"), (4097, 4095, "cuda")]
)
def test_real_shapes(N: int, K: int, where: str, columns: int, dtype: torch.dtype) -> None:
    """The definition, evaluated on the CPU and, of large weights, on the GPU."""
    codes, row_stats = weight_8bit(N, K, where)
    bias = normal(N, seed=8, dtype=dtype, device=where)
    there = [t.cuda() for t in (codes, row_stats, bias)]
    for M in (1, 16, 32, 33, 64, 65, 512):
        x = with_outliers(M, K, columns, dtype, device=where)
        y = linear_8bit(x.cuda(), *there, 6.0)
        assert_close(y, x, codes, row_stats, bias, 6.0)


@pytest.mark.gpu
def test_more_than_31_bits_of_weights() -> None:
    if torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("needs 6 GiB of free GPU memory")
    K, N = 16384, 2**17 + 40
    codes = torch.randint(-127, 128, (N, K), dtype=torch.int8, device="cuda")
    row_stats = torch.rand(N, device="cuda")
    x = with_outliers(3, K, 5, torch.bfloat16)
    y = linear_8bit(x.cuda(), codes, row_stats, None, 6.0)
    for part in (slice(0, 64), slice(2**17 - 16, 2**17 + 16), slice(N - 64, N)):
        assert_close(y[:, part], x, codes[part].cpu(), row_stats[part].cpu(), None, 6.0)


@pytest.mark.gpu
@pytest.mark.parametrize("M", [1, 80])
def test_captured_and_without_waiting(M: int) -> None:
    """The graph is captured with no outlier in sight and replayed with forty."""
    codes, row_stats = (t.cuda() for t in weight_8bit(256, 192))
    x = with_outliers(M, 192, 0, torch.bfloat16).cuda()
    other = with_outliers(M, 192, 40, torch.bfloat16, seed=4).cuda()
    out = run_captured(lambda: linear_8bit(x, codes, row_stats, None, 6.0), lambda: x.copy_(other))
    assert torch.equal(out, linear_8bit(other, codes, row_stats, None, 6.0))
    assert_close(out, other.cpu(), codes.cpu(), row_stats.cpu(), None, 6.0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_int8_captured_with_other_outliers(
    threshold: float, dtype: torch.dtype, matmul, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From few columns to more than come as tiles and back, whatever way the product takes on this card."""
    monkeypatch.setattr(matmul, "weight_only_rows", lambda x, codes: 0)
    codes, row_stats = weight_8bit(528, 1024)
    there = [t.cuda() for t in (codes, row_stats)]
    x = with_outliers(700, 1024, 5, dtype).cuda()
    matmul.linear_8bit(x, *there, None, threshold)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = matmul.linear_8bit(x, *there, None, threshold)
    for columns in (300, 0, 64, 1, 128, 129, 1024, 2):
        other = with_outliers(700, 1024, columns, dtype, seed=columns)
        x.copy_(other)
        graph.replay()
        torch.cuda.synchronize()
        assert_close(out, other, codes, row_stats, None, threshold)
        assert torch.equal(out, matmul.linear_8bit(other.cuda(), *there, None, threshold))
