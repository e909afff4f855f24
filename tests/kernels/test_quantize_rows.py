"""Rows to int8 on the device against their definition in `onegpu.formats.rowwise`: the same bytes."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from kernels.cases import DTYPES, normal, run_captured
from onegpu.formats import rowwise
from onegpu.kernels import quantize_8bit_rows

# What becomes infinite in float16 is an outlier, and the interpreter's NumPy says so.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")


@pytest.fixture
def quantize(device: torch.device):
    from onegpu.kernels import quantize_rows

    return quantize_rows


def assert_counters_are_zero(device: torch.device) -> None:
    from onegpu.kernels.tickets import tickets_of

    assert not tickets_of(torch.empty(0, device=device).device).counters.any()


def assert_as_defined(ours: tuple[Tensor, ...], x: Tensor, threshold: float) -> None:
    for a, b in zip(ours, rowwise.quantize_rows(x, threshold), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a.to(b.device), b, rtol=0, atol=0, equal_nan=True)


def columns_of(listed: tuple[Tensor, Tensor]) -> list[int]:
    columns, count = listed
    return columns[: int(count)].tolist()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threshold", [0.0, 1.0, 6.0])
@pytest.mark.parametrize(("M", "K"), [(1, 1), (5, 33), (3, 1100), (2, 16500)])
def test_bytes(dtype: torch.dtype, threshold: float, M: int, K: int, device: torch.device, quantize) -> None:
    x = normal(M, K, dtype=dtype)
    x[0, K // 2] = 6.0
    assert_as_defined(quantize.quantize_8bit_rows(x.to(device), threshold), x, threshold)
    assert_counters_are_zero(device)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_ties_and_edges(device: torch.device, quantize) -> None:
    x = torch.zeros(8, 8)
    x[0] = torch.tensor([127, 0.5, 1.5, 2.5, 126.5, -0.5, -1.5, -126.5])
    x[2, 1] = float("nan")
    x[3, 1] = float("inf")
    x[4] = torch.tensor([1e30, -1e30, 65504, 65519, 65520, 1, 0, -1])
    x[5] = 1e-8
    x[6] = torch.arange(8) * 3e-7 - 1e-6
    x[7] = torch.tensor([6.2e-5, -6.0e-5, 1e-7, 3e-8, 2.9e-8, -8.9e-8, 0, 1e-38])
    for dtype in DTYPES:
        for threshold in (0.0, 5.996, 6.0, 1e9):
            assert_as_defined(quantize.quantize_8bit_rows(x.to(dtype).to(device), threshold), x.to(dtype), threshold)


def test_nan_beside_outliers_in_long_rows(device: torch.device, quantize) -> None:
    x = normal(3, 16500)
    x[1, 16499] = float("nan")
    x[1, 7] = float("-inf")
    x[2, 3] = 9.0
    assert_as_defined(quantize.quantize_8bit_rows(x.to(device), 6.0), x, 6.0)


def test_the_threshold_is_a_float16(device: torch.device, quantize) -> None:
    """5.9995 rounds up to 6 in float16, and 6 itself is an outlier of 6."""
    x = torch.tensor([[5.9995, 6.0, 5.99, -6.0]])
    assert quantize.quantize_8bit_rows(x.to(device), 6.0)[2].tolist() == [True, True, False, True]


@pytest.mark.parametrize("K", [5, 32, 40, 2048, 16500])
def test_every_column_is_an_outlier(K: int, device: torch.device, quantize) -> None:
    """Of a threshold that is 0 in float16 too, which what lies beyond the last column is not below."""
    x = normal(2, K)
    for threshold in (1e-3, 1e-9):
        given = x.sign() * 0.25 if threshold == 1e-3 else x
        assert_as_defined(quantize.quantize_8bit_rows(given.to(device), threshold), given, threshold)
        _, _, listed = quantize.quantize_and_list(given.to(device), threshold)
        assert columns_of(listed) == list(range(K))
    assert_counters_are_zero(device)


def test_strided_and_empty(device: torch.device, quantize) -> None:
    x = normal(40, 12)
    for view in (x.t(), x[:, ::3], x[:0], x[:, :0], x[:, 3:9]):
        for threshold in (0.0, 1.0):
            assert_as_defined(quantize.quantize_8bit_rows(view.to(device), threshold), view, threshold)


@pytest.mark.parametrize(("M", "K"), [(1, 1), (2, 31), (200, 64), (37, 1500), (150, 130), (3, 40000)])
def test_list_of_columns(M: int, K: int, device: torch.device, quantize) -> None:
    """Call after call, with fewer columns and with none; rows beyond the programs, words beyond a step of the list."""
    for wanted in (K, -(-K // 3), min(K, 1), 0):
        x = normal(M, K, seed=wanted).clamp(-5, 5)
        places = torch.randperm(K, generator=torch.Generator().manual_seed(wanted))[:wanted]
        x[torch.arange(wanted) % M, places] = -7.0
        codes, row_stats, listed = quantize.quantize_and_list(x.to(device), 6.0)
        expected = rowwise.quantize_rows(x, 6.0)
        assert columns_of(listed) == places.sort().values.tolist()
        assert torch.equal(row_stats.cpu(), expected.row_stats)
        assert not codes.cpu()[x == -7.0].any()
        kept = ~expected.outlier_cols
        assert torch.equal(codes.cpu()[:, kept], expected.codes[:, kept])
        quantize.clear_columns(codes, *listed)
        assert torch.equal(codes.cpu(), expected.codes)
        assert_counters_are_zero(device)


def test_no_threshold_no_list(device: torch.device, quantize) -> None:
    x = normal(3, 70)
    codes, row_stats, listed = quantize.quantize_and_list(x.to(device), 0.0)
    assert listed is None
    assert torch.equal(codes.cpu(), rowwise.quantize_rows(x).codes)
    assert torch.equal(row_stats.cpu(), rowwise.quantize_rows(x).row_stats)


@pytest.mark.gpu
@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize(
    ("shape", "where"),
    [((4096, 4096), "cuda"), ((257, 14336), "cpu"), ((1, 4095), "cpu"), ((2111, 28672), "cuda"), ((3000, 200), "cuda")],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_real_shapes(dtype: torch.dtype, shape: tuple[int, int], where: str, threshold: float) -> None:
    x = normal(*shape, dtype=dtype, device=where) * 1.7
    assert_as_defined(quantize_8bit_rows(x.cuda(), threshold), x, threshold)
    torch.cuda.synchronize()
    assert_counters_are_zero(torch.device("cuda"))


@pytest.mark.gpu
def test_captured_and_without_waiting() -> None:
    x, other = normal(64, 300).cuda(), normal(64, 300, seed=3).cuda()
    out = run_captured(lambda: quantize_8bit_rows(x, 3.0), lambda: x.copy_(other))
    for a, b in zip(out, quantize_8bit_rows(other, 3.0), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
def test_a_list_in_every_replay(quantize) -> None:
    """Outliers come and go; what one replay marked is gone in the next."""
    x = normal(700, 4096, dtype=torch.bfloat16).cuda().clamp_(-5, 5)
    quantize.quantize_and_list(x, 6.0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _, _, listed = quantize.quantize_and_list(x, 6.0, lead=True)
    for wanted in ([4095, 0, 31, 32], [], list(range(4096)), [77]):
        given = x.clone()
        x[len(wanted) % 700, wanted] = 50.0
        graph.replay()
        torch.cuda.synchronize()
        assert columns_of(listed) == sorted(wanted)
        x.copy_(given)
    assert_counters_are_zero(torch.device("cuda"))


@pytest.mark.gpu
def test_streams_do_not_disturb_each_other(quantize) -> None:
    """Each call has counters of its own."""
    torch.cuda.synchronize()
    wrong: list[int] = []

    def work(seed: int) -> None:
        x = normal(300, 4096, seed=seed, device="cuda").clamp_(-5, 5)
        wanted = list(range(seed, 4096, 97))
        x[5, wanted] = 50.0
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(50):
                _, _, listed = quantize.quantize_and_list(x, 6.0)
                if columns_of(listed) != wanted:
                    wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
