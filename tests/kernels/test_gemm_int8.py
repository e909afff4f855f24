"""LLM.int8() on Hopper's tensor cores: its programs, and on a GPU its numbers with any number of outlier columns."""

from __future__ import annotations

import contextlib
import ctypes
import re
from importlib import resources
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels.cases import assert_no_worse, normal, run_captured
from kernels.sass import instructions
from onegpu.errors import DeviceError
from onegpu.formats import rowwise
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


def bits_of(columns: Tensor, K: int) -> Tensor:
    """int32 [ceil(K / 32)], a bit for each column, where they are."""
    bits = torch.zeros(-(-K // 32) * 32, dtype=torch.int64, device=columns.device)
    bits[columns.long()] = 1
    return (bits.view(-1, 32) << torch.arange(32, device=columns.device)).sum(1).to(torch.int32)


@pytest.fixture
def module(device: torch.device):
    return pytest.importorskip("onegpu.kernels.gemm_int8")


def assert_gathered(
    module, x: Tensor, x_codes: Tensor, codes: Tensor, bits: Tensor, columns: Tensor
) -> tuple[Tensor, Tensor]:
    """Of the columns, whose bits are 1: as `gather_columns` says; its count and list."""
    before, bits_before, outliers = x_codes.clone(), bits.clone(), len(columns)
    x_out, codes_out, listed, count = module.gather_columns(x, x_codes, codes, bits)
    tiles = min(-(-outliers // 64) * 64, module.CAPACITY)
    for out, source in ((x_out, x), (codes_out, codes)):
        assert out.shape == (source.shape[0], module.CAPACITY)
        assert torch.equal(out[:, : min(outliers, module.CAPACITY)], source[:, columns[: module.CAPACITY]])
        assert not out[:, outliers:tiles].any()
    assert count.tolist() == [outliers]
    assert torch.equal(listed[:outliers].long(), columns)
    assert torch.equal(x_codes, without(before, columns))
    assert torch.equal(bits, bits_before)
    return count, listed


@pytest.mark.parametrize("outliers", [0, 1, 5, 33, 64, 70, 250, 256, 300, 320])
@pytest.mark.parametrize("dtype", HALVES)
def test_columns_side_by_side(dtype: torch.dtype, outliers: int, device: torch.device, module) -> None:
    """Zeros fill their last tile, and codes of x are cleared in all of them, those beyond the tiles too."""
    wide = normal(130, 352).to(dtype).to(device)
    x, codes = wide[:, 16:336], torch.randint(-127, 128, (70, 336), dtype=torch.int8)[:, :320].to(device)
    x_codes = torch.randint(1, 128, (130, 320), dtype=torch.int8).to(device)
    order = torch.randperm(320, generator=torch.Generator().manual_seed(outliers))
    columns = order[:outliers].sort().values.to(device)
    assert_gathered(module, x, x_codes, codes, bits_of(columns, 320), columns)


# More rows than a program has; 128 words, 129, more than are looked through at a time, and what is left of a word.
PLACES = [
    (5, [4]),
    (40, [0, 31, 32, 39]),
    (4096, [0, 31, 32, 63, 64, 4064, 4095]),
    (4112, [0, 63, 64, 95, 96, 4095, 4096, 4111]),
    (16384, [127, 128, 255, 256, 16383]),
    (16400, [0, 16383, 16384, 16399]),
    (28672, [1, 2, 3, *range(1023, 1030), 28640, 28671]),
    (32784, [32767, 32768, 32783]),
    (33000, [*range(0, 7000, 35), *range(32768, 32868)]),
    (33000, [*range(32500, 33000)]),
    (66000, [32768, 65535, 65536]),
]


@pytest.mark.parametrize(("K", "columns"), PLACES)
def test_columns_at_the_edges_of_words(K: int, columns: list[int], device: torch.device, module) -> None:
    x, x_codes = normal(2, K).bfloat16().to(device), torch.ones(2, K, dtype=torch.int8, device=device)
    codes = (torch.arange(3 * K) % 251 - 125).to(torch.int8).view(3, K).to(device)
    there = torch.tensor(columns, device=device)
    assert_gathered(module, x, x_codes, codes, bits_of(there, K), there)


@pytest.mark.parametrize("K", [1, 31, 33, 200, 4100])
@pytest.mark.parametrize("threshold", [1e-9, 1.0, 2.5, 100.0])
def test_columns_of_a_quantized_x(threshold: float, K: int, device: torch.device, module) -> None:
    """Whose bits are what the threshold says: all if it is 0 in float16, and some beyond the last column then."""
    from onegpu.kernels.quantize_rows import quantize_and_mark

    x = normal(3, K).half().to(device)
    codes = torch.randint(-127, 128, (5, K), dtype=torch.int8).to(device)
    x_codes, row_stats, marked = quantize_and_mark(x, threshold)
    bits = marked.clone()
    marked.zero_()
    expected = rowwise.quantize_rows(x, threshold)
    columns = expected.outlier_cols.nonzero()[:, 0]
    assert_gathered(module, x, x_codes, codes, bits, columns)
    assert torch.equal(x_codes, expected.codes)
    assert torch.equal(row_stats, expected.row_stats)


def test_rows_that_lie_too_far_apart(module) -> None:
    """A program counts elements from its first row in 32 bits."""
    x, codes = (torch.empty(1, 16).as_strided((1, 16), (2**25, 1)), torch.empty(1, 16, dtype=torch.int8))
    assert "2**31" in module.why_not_int8(x, codes)
    assert "2**31" in module.why_not_int8(codes.half(), codes.as_strided((1, 16), (2**25, 1)))
    assert "2**31" not in str(module.why_not_int8(codes.half(), codes))


@pytest.fixture
def products(module, monkeypatch: pytest.MonkeyPatch) -> list:
    """What the product would have been launched with; a list that raises, if it has something in it."""
    launched: list = []

    def launch(y: Tensor, *_: object, left_out: object, **__: object) -> None:
        if launched:
            raise DeviceError("the driver refuses")
        launched.append(left_out)

    monkeypatch.setattr(module, "multiply", launch)
    monkeypatch.setattr(module, "map_codes", lambda *_: None)
    return launched


def test_what_the_product_is_given(device: torch.device, module, products: list) -> None:
    """The bits too, which it puts to 0; where it does not begin, they are 0 all the same."""
    x, codes = normal(3, 96).bfloat16().to(device), torch.ones(4, 96, dtype=torch.int8, device=device)
    columns = torch.tensor([2, 31, 64, 95], device=device)
    bits, stats = bits_of(columns, 96), torch.ones(4, device=device)
    y = torch.empty(3, 4, dtype=x.dtype, device=device)
    for is_refused in (False, True):
        x_codes = torch.ones(3, 96, dtype=torch.int8, device=device)
        context = pytest.raises(DeviceError, match="refuses") if is_refused else contextlib.nullcontext()
        with context:
            module.gemm_int8(y, x, x_codes, stats[:3], codes, stats, None, bits)
        assert bool(bits.any()) != is_refused
    (left_out,) = products
    assert left_out.fields()["outlier_bits"] == bits.data_ptr()
    assert left_out.fields()["words"] == 3
    assert left_out.count.tolist() == [4]
    assert torch.equal(left_out.columns[:4].long(), columns)
    assert torch.equal(left_out.outlier_x[:, :4], x[:, columns])


def test_a_gather_that_fails_leaves_no_bits(
    device: torch.device, module, products: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, codes = normal(3, 96).half().to(device), torch.ones(4, 96, dtype=torch.int8, device=device)
    bits = bits_of(torch.tensor([5], device=device), 96)

    def refuse(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "gather_columns", refuse)
    with pytest.raises(KeyboardInterrupt):
        module.gemm_int8(x[:, :4], x, codes[:3], torch.ones(3), codes, torch.ones(4), None, bits)
    assert not bits.any()
    assert not products


def test_a_problem_has_the_fields_of_the_source() -> None:
    """One after another, of the same sizes: the kernel takes them from where they lie."""
    gemm = pytest.importorskip("onegpu.kernels.gemm_codes")
    text = (resources.files("onegpu.kernels") / "cuda" / "gemm_codes.cu").read_text()
    struct = re.search(r"struct Problem \{(.*?)\};", text, re.DOTALL)
    sizes = {"int": ctypes.c_int, "long long": ctypes.c_longlong}
    fields = []
    for declaration in re.sub(r"//.*", "", struct[1]).split(";")[:-1]:
        kind = re.match(r"\s*(?:const )?(long long|signed char|void|char|float4?|int)\b", declaration)
        for name in declaration[kind.end() :].split(","):
            fields.append((name.strip(" *\n"), ctypes.c_void_p if "*" in name else sizes[kind[1]]))
    assert fields == list(gemm.Problem._fields_)


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


def quantized(x: Tensor, outliers: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes and scales of x without its first `outliers` columns of a random order, and these, sorted.

    The columns left out have codes all the same, which the product takes out.
    """
    K = x.shape[1]
    columns = torch.randperm(K, generator=torch.Generator().manual_seed(K))[:outliers].sort().values.to(x.device)
    kept = x.float()
    kept[:, columns] = 0.0
    stats = kept.abs().amax(1)
    codes = torch.round(x.float() * (127.0 / stats.clamp(min=1e-30))[:, None]).clamp(-127, 127).to(torch.int8)
    return codes, stats, columns


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
        x_codes, stats, columns = quantized(x, number)
        cleared = without(x_codes, columns)
        exact = exact_result(x, cleared, stats, codes, row_stats, columns) + bias.double()
        whole = reference.int8_product(cleared, codes).float() * stats[:, None] * row_stats / 127**2
        plain = whole + (x[:, columns].float() @ codes[:, columns].float().T) * row_stats / 127 + bias.float()
        cuts = [Config(tokens, 1, 1, warpgroups) for tokens in INT8_TOKENS for warpgroups in (2, 3)]
        for config in (None, *cuts, Config(64, 2), Config(128, 2, 1, 3)):
            y = torch.full((M, N), float("nan"), dtype=dtype, device="cuda")
            bits = None if outliers is None else bits_of(columns, K)
            given_codes = x_codes.clone()
            gemm.gemm_int8(y, x, given_codes, stats, codes, row_stats, bias, bits, config)
            assert_no_worse(y, plain.to(dtype), exact)
            assert torch.equal(given_codes, cleared)
            assert bits is None or not bits.any()


@pytest.mark.gpu
def test_rows_apart_and_rows_of_codes_apart(gemm) -> None:
    wide, wide_codes = on_gpu(300, 512).half(), torch.randint(-127, 128, (96, 512), dtype=torch.int8, device="cuda")
    x, codes = wide[:, 16:272], wide_codes[:, 16:272]
    row_stats = on_gpu(96).abs()
    x_codes, stats, columns = quantized(x, 140)
    y, same = (torch.empty(300, 96, dtype=x.dtype, device="cuda") for _ in range(2))
    gemm.gemm_int8(y, x, x_codes, stats, codes, row_stats, None, bits_of(columns, 256))
    apart = x_codes, stats, codes.contiguous(), row_stats, None, bits_of(columns, 256)
    gemm.gemm_int8(same, x.contiguous(), *apart)
    assert torch.equal(y, same)


@pytest.mark.gpu
def test_captured_with_other_outliers(gemm) -> None:
    """How many columns there are is read by each replay."""
    codes = torch.randint(-127, 128, (300, 384), dtype=torch.int8, device="cuda")
    x, row_stats = on_gpu(400, 384).bfloat16(), on_gpu(300).abs()
    x_codes, stats, columns = quantized(x, 3)
    wanted = bits_of(columns, 384)
    bits = torch.zeros_like(wanted)
    y = torch.empty(400, 300, dtype=x.dtype, device="cuda")
    other = quantized(x, 300)

    def call() -> Tensor:
        bits.copy_(wanted)
        gemm.gemm_int8(y, x, x_codes, stats, codes, row_stats, None, bits)
        return y

    def change() -> None:
        x_codes.copy_(other[0])
        stats.copy_(other[1])
        wanted.copy_(bits_of(other[2], 384))

    captured = run_captured(call, change).clone()
    assert not bits.any()
    assert torch.equal(captured, call())
    cleared = without(other[0], other[2])
    exact = exact_result(x, cleared, stats, codes, row_stats, other[2])
    assert float((captured.double() - exact).abs().max()) <= 2**-7 * float(exact.abs().max())


@pytest.mark.gpu
@pytest.mark.parametrize(("M", "N", "K"), [(300, 200, 1024), (1100, 96, 4096), (130, 144, 28672), (70, 64, 33024)])
def test_one_after_another(gemm, M: int, N: int, K: int) -> None:
    """Products whose kernels overlap, with other columns each: as one by itself, and no bit is left for the next."""
    from onegpu.kernels.quantize_rows import quantize_and_list, quantize_and_mark
    from onegpu.kernels.tickets import tickets_of

    codes = torch.randint(-127, 128, (N, K), dtype=torch.int8, device="cuda")
    row_stats, inputs = on_gpu(N).abs(), []
    for number in (2, 300, 0, 65, 1000):
        x = on_gpu(M, K, seed=number).clamp_(-5, 5)
        x[number % M, torch.randperm(K, device="cuda")[:number]] = 20.0
        inputs.append(x.bfloat16())
    torch.cuda.synchronize()
    results = []
    for x in inputs:
        y = torch.empty(M, N, dtype=x.dtype, device="cuda")
        x_codes, stats, bits = quantize_and_mark(x, 6.0, lead=True)
        gemm.gemm_int8(y, x, x_codes, stats, codes, row_stats, None, bits)
        results.append((y, x_codes, stats))
    torch.cuda.synchronize()
    assert not tickets_of(torch.empty(0, device="cuda").device).counters.any()
    for x, (y, x_codes, stats) in zip(inputs, results, strict=True):
        listed_codes, listed_stats, (columns, count) = quantize_and_list(x, 6.0)
        columns = columns[: int(count)].long()
        cleared = without(listed_codes, columns)
        assert torch.equal(x_codes, cleared)
        assert torch.equal(stats, listed_stats)
        same = torch.empty_like(y)
        gemm.gemm_int8(same, x, cleared.clone(), stats, codes, row_stats, None, bits_of(columns, K))
        assert torch.equal(y, same)
        exact = exact_result(x, cleared, stats, codes, row_stats, columns)
        assert float((y.double() - exact).abs().max()) <= 2**-7 * float(exact.abs().max())


@pytest.mark.gpu
def test_a_refused_product_leaves_no_bits(gemm, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that the next calls, which count in the same place sooner or later, would take for outliers."""
    from onegpu.kernels.quantize_rows import quantize_and_mark
    from onegpu.kernels.tickets import tickets_of

    x, codes = on_gpu(300, 1024).bfloat16() * 10, torch.ones(64, 1024, dtype=torch.int8, device="cuda")

    def refuse(*_: object, **__: object) -> None:
        raise DeviceError("the driver refuses")

    monkeypatch.setattr("onegpu.kernels.nvrtc.launch", refuse)
    x_codes, stats, bits = quantize_and_mark(x, 6.0, lead=True)
    y = torch.empty(300, 64, dtype=x.dtype, device="cuda")
    with pytest.raises(DeviceError, match="refuses"):
        gemm.gemm_int8(y, x, x_codes, stats, codes, torch.ones(64, device="cuda"), None, bits)
    assert not tickets_of(x.device).counters.any()
