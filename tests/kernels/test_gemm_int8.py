"""LLM.int8() on Hopper's tensor cores: its programs, and on a GPU its numbers with any number of outlier columns."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels.cases import assert_no_worse, normal, run_captured
from kernels.sass import instructions
from onegpu.kernels import reference
from onegpu.kernels.gemm_codes_config import INT8_TOKENS, MAX_SHARED, Config, Shape, configure, shared_bytes, stages

HALVES = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("tokens", INT8_TOKENS)
@pytest.mark.parametrize("warpgroups", [2, 3])
def test_fits_shared_memory(tokens: int, warpgroups: int) -> None:
    shape = Shape(tokens, 8, x_bits=8, warpgroups=warpgroups)
    assert shape.columns == 128
    assert stages(shape) >= 4
    assert shared_bytes(shape) <= MAX_SHARED


def test_configurations() -> None:
    for M in (65, 257, 512, 1024, 4096):
        for N, K in ((4096, 4096), (28672, 4096), (16, 64)):
            config = configure(M, N, K, 132, bits=8, x_bits=8)
            assert config.tokens in INT8_TOKENS
            assert config.splits == 1 or K >= 1024
    assert configure(4096, 28672, 4096, 132, bits=8, x_bits=8).tokens == 128, "many tokens share what is read of W"
    assert configure(256, 4096, 4096, 132, bits=8, x_bits=8).tokens == 64, "no processor may be idle"
    assert configure(128, 4096, 14336, 132, bits=8, x_bits=8) == Config(64, 2), "nor where rows of W are few and long"
    assert configure(512, 6144, 4096, 132, bits=8, x_bits=8) == Config(128, 1, 1, 3), "128 works for 132 processors"


@pytest.mark.slow
@pytest.mark.parametrize("tokens", INT8_TOKENS)
@pytest.mark.parametrize("warpgroups", [2, 3])
@pytest.mark.parametrize("dtype", HALVES)
def test_products_keep_their_sums_in_registers(
    tokens: int, warpgroups: int, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is spilled between the first int8 product and the last one."""
    gemm, nvrtc = pytest.importorskip("onegpu.kernels.gemm_codes"), pytest.importorskip("onegpu.kernels.nvrtc")
    if nvrtc.why_not_nvrtc() is not None:
        pytest.skip(nvrtc.why_not_nvrtc())
    monkeypatch.setenv("ONEGPU_CACHE", str(tmp_path))
    kind = gemm.Kind(tokens, 8, 1, dtype, gated=False, activation=None, x_bits=8, warpgroups=warpgroups)
    nvrtc.compile_source(gemm.source(kind), gemm.ARCHITECTURE)
    (kept,) = (tmp_path / "cuda").glob("gemm_codes-*.cubin")
    names = instructions(kept)
    places = [place for place, name in enumerate(names) if name == "IGMMA"]
    assert len(places) >= 4
    assert not {"LDL", "STL"} & set(names[places[0] : places[-1]])
    assert names.count("HGMMA") == 4 * tokens // (32 if warpgroups == 2 else 16)
    assert names.count("WARPGROUP.DEPBAR") <= len(places)


@pytest.mark.parametrize("outliers", [0, 1, 5, 33, 64, 70, 250, 256, 300, 320])
@pytest.mark.parametrize("dtype", HALVES)
def test_columns_side_by_side(dtype: torch.dtype, outliers: int, device: torch.device) -> None:
    """Zeros fill their last tile, and codes of x are cleared in all of them, those beyond the tiles too."""
    module = pytest.importorskip("onegpu.kernels.gemm_int8")
    wide = normal(130, 352).to(dtype).to(device)
    x, codes = wide[:, 16:336], torch.randint(-127, 128, (70, 336), dtype=torch.int8)[:, :320].to(device)
    x_codes = torch.randint(1, 128, (130, 320), dtype=torch.int8).to(device)
    before = x_codes.clone()
    columns = torch.randperm(320, generator=torch.Generator().manual_seed(outliers)).to(device, torch.int32)
    count = torch.tensor([outliers], dtype=torch.int32, device=device)
    x_out, codes_out = module.gather_columns(x, x_codes, codes, columns, count)
    listed = columns[:outliers].long()
    tiles = min(-(-outliers // 64) * 64, module.CAPACITY)
    for out, source in ((x_out, x), (codes_out, codes)):
        assert out.shape == (source.shape[0], module.CAPACITY)
        assert torch.equal(out[:, : min(outliers, module.CAPACITY)], source[:, listed[: module.CAPACITY]])
        assert not out[:, outliers:tiles].any()
    assert torch.equal(x_codes, without(before, listed))


@pytest.fixture
def gemm():
    module = pytest.importorskip("onegpu.kernels.gemm_int8")
    codes = torch.empty(16, 64, dtype=torch.int8, device="cuda")
    reason = module.why_not_int8(torch.empty(1, 64, dtype=torch.bfloat16, device="cuda"), codes)
    if reason is not None:
        pytest.skip(reason)
    return module


def on_gpu(*shape: int, seed: int = 0) -> Tensor:
    return normal(*shape, seed=seed, device="cuda")


def quantized(x: Tensor, outliers: int) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Codes and scales of x without its first `outliers` columns of a random order, and the list of these.

    The columns left out have codes all the same, which the product takes out.
    """
    K = x.shape[1]
    order = torch.randperm(K, generator=torch.Generator().manual_seed(K)).to(x.device, torch.int32)
    kept = x.float()
    kept[:, order[:outliers].long()] = 0.0
    stats = kept.abs().amax(1)
    codes = torch.round(x.float() * (127.0 / stats.clamp(min=1e-30))[:, None]).clamp(-127, 127).to(torch.int8)
    return codes, stats, (order, torch.tensor([outliers], dtype=torch.int32, device=x.device))


def without(codes: Tensor, columns: Tensor) -> Tensor:
    """A copy with code 0 in some columns."""
    return codes.clone().index_fill_(1, columns, 0)


def exact_result(
    x: Tensor, x_codes: Tensor, stats: Tensor, codes: Tensor, row_stats: Tensor, columns: Tensor
) -> Tensor:
    """In float64, of the same codes."""
    weight = codes.double() * row_stats.double()[:, None] / 127
    whole = (x_codes.double() * stats.double()[:, None] / 127) @ weight.T
    return whole + x[:, columns].double() @ weight[:, columns].T


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("outliers", [None, 0, 1, 64, 70, 256, 300])
@pytest.mark.parametrize(("N", "K"), [(1, 208), (34, 192), (200, 336), (272, 1024), (130, 5120)])
def test_product(gemm, N: int, K: int, outliers: int | None, dtype: torch.dtype) -> None:
    generator = torch.Generator("cuda").manual_seed(N)
    codes = torch.randint(-127, 128, (N, K), generator=generator, dtype=torch.int8, device="cuda")
    row_stats, bias = on_gpu(N).abs() + 0.5, on_gpu(N, seed=1).to(dtype)
    for M in (1, 33, 300):
        x = on_gpu(M, K, seed=M).to(dtype)
        number = min(outliers or 0, K)
        x_codes, stats, listed = quantized(x, number)
        columns = listed[0][:number].long()
        cleared = without(x_codes, columns)
        exact = exact_result(x, cleared, stats, codes, row_stats, columns) + bias.double()
        whole = reference.int8_product(cleared, codes).float() * stats[:, None] * row_stats / 127**2
        plain = whole + (x[:, columns].float() @ codes[:, columns].float().T) * row_stats / 127 + bias.float()
        cuts = [Config(tokens, 1, 1, warpgroups) for tokens in INT8_TOKENS for warpgroups in (2, 3)]
        for config in (None, *cuts, Config(64, 2), Config(128, 2, 1, 3)):
            y = torch.full((M, N), float("nan"), dtype=dtype, device="cuda")
            given = None if outliers is None else listed
            given_codes = x_codes.clone()
            gemm.gemm_int8(y, x, given_codes, stats, codes, row_stats, bias, given, config)
            assert_no_worse(y, plain.to(dtype), exact)
            assert torch.equal(given_codes, cleared)


@pytest.mark.gpu
def test_rows_apart_and_rows_of_codes_apart(gemm) -> None:
    wide, wide_codes = on_gpu(300, 512).half(), torch.randint(-127, 128, (96, 512), dtype=torch.int8, device="cuda")
    x, codes = wide[:, 16:272], wide_codes[:, 16:272]
    row_stats = on_gpu(96).abs()
    x_codes, stats, listed = quantized(x, 140)
    y, same = (torch.empty(300, 96, dtype=x.dtype, device="cuda") for _ in range(2))
    gemm.gemm_int8(y, x, x_codes, stats, codes, row_stats, None, listed)
    gemm.gemm_int8(same, x.contiguous(), x_codes, stats, codes.contiguous(), row_stats, None, listed)
    assert torch.equal(y, same)


@pytest.mark.gpu
def test_captured_with_other_outliers(gemm) -> None:
    """How many columns there are is read by each replay."""
    codes = torch.randint(-127, 128, (300, 384), dtype=torch.int8, device="cuda")
    x, row_stats = on_gpu(400, 384).bfloat16(), on_gpu(300).abs()
    x_codes, stats, (order, count) = quantized(x, 3)
    y = torch.empty(400, 300, dtype=x.dtype, device="cuda")
    other = quantized(x, 300)

    def call() -> Tensor:
        gemm.gemm_int8(y, x, x_codes, stats, codes, row_stats, None, (order, count))
        return y

    def change() -> None:
        x_codes.copy_(other[0])
        stats.copy_(other[1])
        count.copy_(other[2][1])

    captured = run_captured(call, change).clone()
    assert torch.equal(captured, call())
    cleared = without(x_codes, order[:300].long())
    exact = exact_result(x, cleared, stats, codes, row_stats, order[:300].long())
    assert float((captured.double() - exact).abs().max()) <= 2**-7 * float(exact.abs().max())
