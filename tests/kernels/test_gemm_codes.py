"""The many-row product of coded weights on Hopper: its programs, its configurations, and on a GPU its numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from kernels.cases import Weight4bit, assert_no_worse, exact_product, normal, run_captured, weight_4bit
from kernels.sass import instructions
from onegpu.config import BLOCKSIZES
from onegpu.formats import tiling
from onegpu.kernels.gemm_codes_config import (
    MAX_SHARED,
    PAIRED,
    TOKENS,
    TOKENS_OF_THREE,
    Config,
    Shape,
    configure,
    scales_sums,
    shared_bytes,
    stages,
)
from onegpu.kernels.tail import apply_tail

HALVES = (torch.bfloat16, torch.float16)


def tiled_args(weight: Weight4bit) -> tuple[Tensor, Tensor]:
    return (
        tiling.tile_codes(weight.packed, *weight.shape),
        tiling.tile_scales(weight.absmax, *weight.shape, weight.blocksize),
    )


# Tokens, programs of a processor, and warpgroups that multiply.
CUTS = [(tokens, blocks, 2) for tokens in TOKENS for blocks in (1, 2) if blocks == 1 or tokens <= PAIRED]
CUTS += [(tokens, 1, 3) for tokens in TOKENS_OF_THREE]


@pytest.mark.parametrize(("tokens", "blocks", "warpgroups"), CUTS)
@pytest.mark.parametrize(("bits", "groups"), [(4, 1), (4, 2), (8, 1)])
@pytest.mark.parametrize("gated", [False, True])
def test_fits_shared_memory(tokens: int, blocks: int, warpgroups: int, bits: int, groups: int, gated: bool) -> None:
    if gated and warpgroups == 3:
        pytest.skip("gates and what they multiply are two halves")
    shape = Shape(tokens, bits, groups, gated, blocks, warpgroups=warpgroups)
    assert stages(shape) >= 3
    # Each program takes 1 KiB more for the system.
    assert blocks * (shared_bytes(shape) + 1024) <= MAX_SHARED + 1024


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("gated", [False, True])
def test_configurations_fit_the_shape(bits: int, gated: bool) -> None:
    for M in (1, 33, 64, 100, 128, 192, 256, 512, 1000, 4096):
        for N, K in ((4096, 4096), (28672, 4096), (4096, 14336), (16, 64), (17, 256)):
            config = configure(M, N, K, 132, bits=bits, gated=gated)
            assert config.tokens < 2 * M or config.tokens == TOKENS[0]
            assert 1 <= config.splits <= max(1, K // 256)
            assert (config.tokens, config.blocks, config.warpgroups) in CUTS
            assert not gated or config.warpgroups == 2
    assert configure(64, 4096, 4096, 132, bits=bits, gated=gated).splits > 1, "32 works leave most processors idle"


def test_three_warpgroups_where_they_fill_the_processors() -> None:
    assert configure(512, 6144, 4096, 132) == Config(128, 1, 1, 3), "128 works for 132 processors, 96 of 256 tokens"
    assert configure(2048, 28672, 4096, 132).tokens == 256, "many works: what is decoded serves most tokens"


# Table look-ups, or pairs that are widened, of one tile.
DECODING = {4: ("IDP", 16), 8: ("HFMA2", 16)}


@pytest.mark.slow
@pytest.mark.parametrize(("tokens", "blocks", "warpgroups"), CUTS)
@pytest.mark.parametrize(
    ("bits", "groups", "gated", "dtype"),
    [(4, 1, False, HALVES[0]), (4, 2, True, HALVES[1]), (8, 1, False, HALVES[0]), (8, 1, True, HALVES[0])],
)
def test_compiles_without_spills(
    tokens: int,
    blocks: int,
    warpgroups: int,
    bits: int,
    groups: int,
    gated: bool,
    dtype: torch.dtype,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gemm, nvrtc = pytest.importorskip("onegpu.kernels.gemm_codes"), pytest.importorskip("onegpu.kernels.nvrtc")
    gated = gated and warpgroups == 2
    if nvrtc.why_not_nvrtc() is not None:
        pytest.skip(nvrtc.why_not_nvrtc())
    monkeypatch.setenv("ONEGPU_CACHE", str(tmp_path))
    kind = gemm.Kind(
        tokens, bits, groups, dtype, gated, "silu" if gated else None, blocks, warpgroups=warpgroups
    )  # fmt: skip
    made = gemm.source(kind)
    code = nvrtc.compile_source(made, gemm.ARCHITECTURE)
    (kept,) = (tmp_path / "cuda").glob("gemm_codes-*.cubin")
    assert kept.read_bytes() == code
    assert nvrtc.compile_source(made, gemm.ARCHITECTURE) == code, "the second time from the cache folder"
    names = instructions(kept)
    assert not {"LDL", "STL"} & set(names)
    # Twice in the loop and once before it, and where products are queued once more for a work's first tile.
    queued = blocks == 1 and not scales_sums(kind.shape) and (bits == 4 or tokens <= 160 or warpgroups == 3)
    name, each = DECODING[bits]
    assert names.count(name) == (4 if queued else 3) * each
    # ptxas waits for each product where it cannot follow which are on their way.
    products = names.count("HGMMA")
    assert products >= 8
    assert names.count("WARPGROUP.DEPBAR") * 3 <= products


@pytest.fixture
def gemm():
    module = pytest.importorskip("onegpu.kernels.gemm_codes")
    reason = module.why_not_gemm(torch.device("cuda"), torch.bfloat16)
    if reason is not None:
        pytest.skip(reason)
    return module


def run(gemm, weight: Weight4bit, x: Tensor, bias: Tensor | None = None, **options) -> Tensor:
    device = torch.device("cuda")
    there = weight.to(device)
    width = weight.shape[0] // 2 if options.get("gated") else weight.shape[0]
    y = torch.full((x.shape[0], width), float("nan"), dtype=x.dtype, device=device)
    nested = there.nested or None
    residual = options.pop("residual", None)
    gemm.gemm_4bit(
        y,
        x.to(device),
        *(t.to(device) for t in tiled_args(there)),
        None if bias is None else bias.to(device),
        weight.quant_type,
        weight.blocksize,
        nested,
        residual=None if residual is None else residual.to(device),
        **options,
    )
    return y.cpu()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("N", "K"), [(1, 64), (33, 192), (128, 128), (200, 320), (272, 1024)])
def test_product(gemm, N: int, K: int, nested: bool, dtype: torch.dtype) -> None:
    weight = weight_4bit(N, K, nested=nested)
    for M in (1, 7, 33, 64, 100, 257):
        x = normal(M, K, dtype=dtype)
        for bias in (None, normal(N, dtype=dtype), normal(N)):
            y = run(gemm, weight, x, bias)
            plain = linear(x, weight.dense(dtype), None if bias is None else bias.to(dtype))
            assert_no_worse(y, plain, exact_product(x, weight.dense(torch.float32), bias))


@pytest.mark.gpu
@pytest.mark.parametrize(("tokens", "blocks", "warpgroups"), CUTS)
@pytest.mark.parametrize("splits", [1, 2, 3])
def test_every_configuration_gives_the_same(gemm, tokens: int, blocks: int, warpgroups: int, splits: int) -> None:
    """Each weight equals the dequantized one, so only the order of float32 sums is left."""
    weight = weight_4bit(208, 1024)
    x = normal(300, 1024, dtype=torch.bfloat16)
    y = run(gemm, weight, x, config=Config(tokens, splits, blocks, warpgroups))
    exact = exact_product(x, weight.dense(torch.bfloat16), None)
    error = (y.double() - exact).abs().max() / exact.abs().max()
    assert error < 2**-8
    again = run(gemm, weight, x, config=Config(tokens, splits, blocks, warpgroups))
    assert torch.equal(y, again)


@pytest.mark.gpu
@pytest.mark.parametrize("config", [Config(32, 1), Config(32, 3), Config(64, 4, 2), Config(32, 5), Config(96, 3, 1, 3)])
def test_more_works_than_programs(gemm, config: Config) -> None:
    """Whole works first, then cut ones by the same programs."""
    weight = weight_4bit(400, 512)
    x = normal(2001, 512, dtype=torch.bfloat16)
    y = run(gemm, weight, x, config=config)
    there = x.cuda()
    exact = exact_product(x, weight.dense(torch.float32), None)
    assert_no_worse(y, linear(there, weight.dense(x.dtype).cuda()).cpu(), exact)
    assert torch.equal(y, run(gemm, weight, x, config=config))


@pytest.mark.gpu
def test_counters_are_left_as_they_were(gemm) -> None:
    """Who comes last counts up and puts back: no launch may see what another one left."""
    from onegpu.kernels.tickets import tickets_of

    weight = weight_4bit(400, 1024)
    for M in (40, 500):
        run(gemm, weight, normal(M, 1024, dtype=torch.bfloat16), config=Config(64, 4))
    torch.cuda.synchronize()
    assert not tickets_of(torch.device("cuda", torch.cuda.current_device())).counters.any()


@pytest.mark.gpu
def test_rows_do_not_depend_on_their_neighbours(gemm) -> None:
    weight = weight_4bit(144, 512)
    x = normal(300, 512, dtype=torch.bfloat16)
    whole = run(gemm, weight, x, config=Config(128))
    part = run(gemm, weight, x[37:170], config=Config(128))
    assert torch.equal(whole[37:170], part)


@pytest.mark.gpu
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_every_blocksize(gemm, blocksize: int, quant_type: str) -> None:
    K = max(320 // blocksize * blocksize, blocksize)
    K = K if K % 64 == 0 else 64 * K
    weight = weight_4bit(40, K, quant_type, blocksize)
    x = normal(65, K, dtype=torch.float16)
    for splits in (1, 2):
        y = run(gemm, weight, x, config=Config(96, splits))
        assert_no_worse(y, linear(x, weight.dense(x.dtype)), exact_product(x, weight.dense(torch.float32), None))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("activation", [None, "silu", "gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("N", [96, 224])
def test_tails(gemm, N: int, gated: bool, activation: str | None, dtype: torch.dtype) -> None:
    if gated and activation is None:
        pytest.skip("a gate has an activation")
    weight = weight_4bit(N, 256)
    x, bias = normal(77, 256, dtype=dtype), normal(N, seed=1, dtype=dtype)
    for residual in (None, normal(77, N // 2 if gated else N, seed=2, dtype=dtype)):
        exact = apply_tail(
            exact_product(x, weight.dense(torch.float32), bias), residual, activation, gated, torch.float64
        )
        plain = apply_tail(linear(x, weight.dense(dtype), bias).float(), residual, activation, gated, dtype)
        for config in (Config(64), Config(64, 3, 2), Config(96, 2)):
            y = run(gemm, weight, x, bias, residual=residual, activation=activation, gated=gated, config=config)
            assert_no_worse(y, plain, exact)


@pytest.mark.gpu
@pytest.mark.parametrize("config", [Config(64), Config(64, 4), Config(64, 4, 2)])
def test_captured(gemm, config: Config) -> None:
    device = torch.device("cuda")
    weight = weight_4bit(160, 1024).to(device)
    tiles = tuple(t.to(device) for t in tiled_args(weight))
    x = normal(70, 1024, dtype=torch.bfloat16).to(device)
    y = torch.empty(70, 160, dtype=torch.bfloat16, device=device)
    other = normal(70, 1024, seed=5, dtype=torch.bfloat16).to(device)

    def call(rows: Tensor = x) -> Tensor:
        gemm.gemm_4bit(y, rows, *tiles, None, "nf4", 64, config=config)
        return y

    captured = run_captured(call, lambda: x.copy_(other)).clone()
    assert torch.equal(captured, call(other))


@pytest.mark.gpu
def test_strided_rows_and_a_pitch_of_its_own(gemm) -> None:
    """Rows of x far apart, y and residual not on 16 bytes."""
    weight = weight_4bit(50, 128)
    wide = normal(90, 304, dtype=torch.bfloat16)
    x = wide[:, 8:136]
    residual = normal(90, 50, dtype=torch.bfloat16)
    y = run(gemm, weight, wide.cuda()[:, 8:136], residual=residual)
    exact = exact_product(x, weight.dense(torch.float32), None) + residual.double()
    assert_no_worse(y, linear(x, weight.dense(x.dtype)) + residual, exact)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("N", "K"), [(1, 64), (34, 192), (200, 336), (272, 1024)])
@pytest.mark.parametrize("gated", [False, True])
def test_rows_of_int8(gemm, N: int, K: int, gated: bool, dtype: torch.dtype) -> None:
    if gated and N % 2:
        pytest.skip("two halves")
    generator = torch.Generator().manual_seed(N)
    codes = torch.randint(-127, 128, (N, K), generator=generator, dtype=torch.int8)
    stats, bias = torch.rand(N, generator=generator) + 0.5, normal(N, dtype=dtype)
    weight = codes.double() * stats.double()[:, None] / 127
    activation = "silu" if gated else None
    for M in (17, 33, 100, 257):
        x = normal(M, K, dtype=dtype)
        residual = normal(M, N // 2 if gated else N, seed=2, dtype=dtype)
        exact = apply_tail(exact_product(x, weight, bias), residual, activation, gated, torch.float64)
        plain = apply_tail(linear(x, weight.to(dtype), bias).float(), residual, activation, gated, dtype)
        for config in (None, Config(64, 2), Config(32, 3, 2), Config(160, 1)):
            y = torch.full(exact.shape, float("nan"), dtype=dtype, device="cuda")
            there = [t.cuda() for t in (x, codes, stats, bias)]
            gemm.gemm_8bit(y, *there, residual=residual.cuda(), activation=activation, gated=gated, config=config)
            assert_no_worse(y.cpu(), plain, exact)
