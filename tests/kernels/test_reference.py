"""The CPU meaning of the products, held to float64 and to small cases worked by hand."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear

from kernels.cases import DTYPES, assert_no_worse, exact_product, normal, weight_4bit
from onegpu.config import BLOCKSIZES
from onegpu.formats import rowwise
from onegpu.kernels import reference
from onegpu.kernels.reference import linear_4bit, linear_8bit, quantize_8bit_rows


def weight_8bit(N: int, K: int, seed: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    codes, row_stats, _ = rowwise.quantize_rows(normal(N, K, seed=seed))
    return codes, row_stats


class TestLinear4bit:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
    @pytest.mark.parametrize(("M", "N", "K"), [(1, 1, 1), (1, 37, 129), (3, 64, 256), (40, 33, 97), (129, 65, 80)])
    def test_no_worse_than_dequantizing(self, dtype: torch.dtype, quant_type: str, M: int, N: int, K: int) -> None:
        weight = weight_4bit(N, K, quant_type, nested=bool(M % 2))
        x, bias = normal(M, K, dtype=dtype), normal(N, seed=3, dtype=dtype)
        y = linear_4bit(x, weight.packed, weight.absmax, bias, *weight.args)
        plain = linear(x, weight.dense(dtype), bias)
        assert_no_worse(y, plain, exact_product(x, weight.dense(torch.float32), bias), factor=1.1)

    @pytest.mark.parametrize("blocksize", BLOCKSIZES)
    @pytest.mark.parametrize("K", [31, 48, 64])
    def test_every_blocksize(self, blocksize: int, K: int, monkeypatch: pytest.MonkeyPatch) -> None:
        # Chunks so small that there are several, each beginning inside the weight.
        monkeypatch.setattr(reference, "CHUNK", 64)
        weight = weight_4bit(300, K, blocksize=blocksize)
        x = normal(2, K)
        y = linear_4bit(x, weight.packed, weight.absmax, None, *weight.args)
        torch.testing.assert_close(y, linear(x, weight.dense(torch.float32)), rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("shape", [(33,), (2, 33), (2, 3, 33), (2, 1, 3, 33), (0, 33), (2, 0, 33)])
    def test_ranks(self, shape: tuple[int, ...]) -> None:
        weight = weight_4bit(5, 33)
        x = normal(*shape)
        y = linear_4bit(x, weight.packed, weight.absmax, torch.ones(5), *weight.args)
        assert y.shape == (*shape[:-1], 5)
        torch.testing.assert_close(y, linear(x, weight.dense(torch.float32), torch.ones(5)), rtol=1e-5, atol=1e-6)

    def test_strided_input(self) -> None:
        weight = weight_4bit(5, 32)
        for x in (
            normal(32, 4).t(),
            normal(4, 64)[:, ::2],
            normal(1, 32).expand(4, 32),
            normal(4, 2, 32).transpose(0, 1),
        ):
            y = linear_4bit(x, weight.packed, weight.absmax, None, *weight.args)
            same = linear_4bit(x.contiguous(), weight.packed, weight.absmax, None, *weight.args)
            torch.testing.assert_close(y, same, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_a_row_alone_and_among_others(self, dtype: torch.dtype) -> None:
        """Sums may be added in another order, never by another rule: within a rounding of the result."""
        weight = weight_4bit(48, 192)
        x = normal(reference.BFLOAT16_ROWS - 1, 192, dtype=dtype)
        together = linear_4bit(x, weight.packed, weight.absmax, None, *weight.args)
        alone = torch.cat([linear_4bit(row[None], weight.packed, weight.absmax, None, *weight.args) for row in x])
        summed = x.double().abs() @ weight.dense(torch.float32).double().abs().T
        # Rounding errors of 192 additions in a row grow about as the root of their number.
        budget = torch.finfo(dtype).eps * together.double().abs() + 2.0**-24 * 192**0.5 * summed
        assert ((alone.double() - together.double()).abs() <= budget).all()
        if dtype != torch.float32:
            assert (alone != together).float().mean() < 0.01

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_bias_dtype_may_differ(self, dtype: torch.dtype) -> None:
        weight = weight_4bit(16, 64)
        x, bias = normal(3, 64, dtype=dtype), normal(16, seed=4)
        y = linear_4bit(x, weight.packed, weight.absmax, bias, *weight.args)
        exact = exact_product(x, weight.dense(torch.float32), bias)
        assert_no_worse(y, exact.to(dtype), exact, factor=1.1)

    def test_infinity_and_nan_come_through(self) -> None:
        weight = weight_4bit(8, 64)
        x = normal(3, 64)
        x[1, 5] = float("nan")
        y = linear_4bit(x, weight.packed, weight.absmax, None, *weight.args)
        assert y[1].isnan().all()
        assert y[[0, 2]].isfinite().all()


class TestInt8Product:
    @pytest.mark.parametrize(
        ("M", "K", "N"), [(19, 1, 8), (1, 1, 1), (1, 13, 257), (17, 33, 65), (5, 4097, 3), (0, 8, 4)]
    )
    @pytest.mark.parametrize("exact", [True, False])
    def test_exact(self, M: int, K: int, N: int, exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        if not exact:
            monkeypatch.setattr(reference, "_int_mm_is_exact", lambda: False)
        generator = torch.Generator().manual_seed(K)
        a, b = (torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator) for shape in ((M, K), (N, K)))
        out = reference.int8_product(a, b)
        assert out.dtype == torch.int32
        assert torch.equal(out.long(), a.long() @ b.long().T)

    @pytest.mark.parametrize("sign", [-1, 1])
    def test_extremes(self, sign: int) -> None:
        a, b = torch.full((3, 5000), 127, dtype=torch.int8), torch.full((4, 5000), 127 * sign, dtype=torch.int8)
        assert torch.equal(reference.int8_product(a, b), torch.full((3, 4), 127 * 127 * 5000 * sign, dtype=torch.int32))


class TestLinear8bit:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("M", "N", "K"), [(1, 1, 1), (1, 33, 129), (7, 16, 80), (40, 9, 257)])
    @pytest.mark.parametrize("threshold", [0.0, 2.0, 6.0])
    def test_definition_in_float64(self, dtype: torch.dtype, M: int, N: int, K: int, threshold: float) -> None:
        codes, row_stats = weight_8bit(N, K)
        x, bias = normal(M, K, dtype=dtype), normal(N, seed=3)
        x[0, K // 2] = 7
        x_codes, x_stats, outlier_cols = quantize_8bit_rows(x, threshold)
        whole = (x_codes.double() @ codes.double().T) * x_stats[:, None].double() * row_stats.double() / 127**2
        outliers = torch.where(outlier_cols, x, 0).double() @ codes.double().T * row_stats.double() / 127
        exact = whole + outliers + bias.double()
        y = linear_8bit(x, codes, row_stats, bias, threshold)
        assert y.dtype == dtype
        # One rounding of the result, and a few of float32 at the size of what was summed.
        magnitude = (
            whole.abs() + torch.where(outlier_cols, x, 0).double().abs() @ codes.double().abs().T * row_stats / 127
        )
        budget = torch.finfo(dtype).eps / 2 * exact.abs() + 2.0**-21 * (magnitude + bias.abs())
        assert ((y.double() - exact).abs() <= budget).all()
        assert bool(outlier_cols.any()) == (threshold > 0)

    def test_by_hand(self) -> None:
        """Rows [7 1 2 3] and [5 .5 .25 1] at threshold 6: column 0 stays out, yet 5 still set its row's scale."""
        x = torch.tensor([[7.0, 1, 2, 3], [5, 0.5, 0.25, 1]])
        codes, row_stats, outlier_cols = quantize_8bit_rows(x, 6.0)
        assert codes.tolist() == [[0, 42, 85, 127], [0, 13, 6, 25]]
        assert row_stats.tolist() == [3, 5]
        assert outlier_cols.tolist() == [True, False, False, False]
        weight = torch.tensor([[127, 0, 0, 127]], dtype=torch.int8)
        y = linear_8bit(x, weight, torch.tensor([2.0]), None, 6.0)
        torch.testing.assert_close(y, torch.tensor([[7 * 2 + 3 * 2.0], [5 * 2 + 25 * 5 / 127 * 2]]))

    def test_outliers_save_the_row(self) -> None:
        codes, row_stats = weight_8bit(32, 128)
        x = normal(4, 128)
        x[:, 17] = 90
        exact = x.double() @ (codes.double() * row_stats.double()[:, None] / 127).T
        with_outliers = (linear_8bit(x, codes, row_stats, None, 6.0) - exact).abs().max()
        without = (linear_8bit(x, codes, row_stats, None) - exact).abs().max()
        assert with_outliers < without / 10

    @pytest.mark.parametrize("shape", [(33,), (2, 3, 33), (2, 1, 3, 33), (0, 33)])
    def test_ranks(self, shape: tuple[int, ...]) -> None:
        codes, row_stats = weight_8bit(5, 33)
        y = linear_8bit(normal(*shape), codes, row_stats, None, 1.0)
        assert y.shape == (*shape[:-1], 5)
        flat = linear_8bit(normal(*shape).reshape(-1, 33), codes, row_stats, None, 1.0)
        assert torch.equal(y.view(-1, 5), flat)

    def test_pieces_of_the_output(self, monkeypatch: pytest.MonkeyPatch) -> None:
        codes, row_stats = weight_8bit(37, 64)
        x, bias = normal(9, 64), normal(37)
        whole = linear_8bit(x, codes, row_stats, bias, 1.0)
        monkeypatch.setattr(reference, "CHUNK", 4)
        torch.testing.assert_close(linear_8bit(x, codes, row_stats, bias, 1.0), whole, rtol=1e-5, atol=1e-5)
