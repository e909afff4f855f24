"""The small-M kernel on tiled 4-bit weights: compiled for each GPU family, its PTX run on a CPU, and run on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import linear

from kernels.cases import Weight4bit, assert_no_worse, exact_product, normal, run_captured, weight_4bit
from kernels.program import results_of
from onegpu.config import BLOCKSIZES
from onegpu.formats import blockwise, tiling

ARCHITECTURES = ("75", "80", "86", "89", "90", "120")
# Registers that let three programs of four warps share a processor; with 32 rows, two of four or one of eight.
REGISTERS = {4: 168, 8: 160, 16: 128}
REGISTERS_32_ROWS = {4: 255, 8: 200}
# With one row, 16 warps hold few bytes each: above this a second program would wait.
HALF_OF_REGISTERS = 64
# Without a loop, where a processor has one program: 8 rows, 16 rows.
REGISTERS_ONCE = {8: 192, 16: 128}
# Of a step, by rows of x; an H100 issues 5.4 a weight in the time it reads one, and sustains about half of that.
INSTRUCTIONS = {1: 2.5, 8: 3.0, 16: 3.2, 32: 5.0}
NESTED_INSTRUCTIONS = 0.2
# Of a program without a loop, all that comes before and after its one step too; by tiles of rows.
INSTRUCTIONS_ONCE = {1: 4.5, 2: 4.0}
# Beyond this Triton would have to ask for more at launch, and it does not know of what the assembly declares.
SHARED = 48 * 1024


@pytest.fixture(scope="module")
def compiled() -> list[dict]:
    return results_of("gemv_4bit_programs.py", "compile", *ARCHITECTURES)


@pytest.fixture(scope="module")
def fitted() -> list[dict]:
    return results_of("gemv_4bit_programs.py", "fitted", "90")


@pytest.fixture(scope="module")
def ran() -> list[dict]:
    return results_of("gemv_4bit_programs.py", "run")


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_compiles_within_budget(arch: str, compiled: list[dict]) -> None:
    mine = [result for result in compiled if result["arch"] == arch]
    assert len(mine) == {"90": 102, "120": 66}.get(arch, 39)
    assert not [result for result in mine if "error" in result]
    for result in mine:
        registers = (REGISTERS_32_ROWS if result["rows"] >= 32 else REGISTERS)[result["config"][0]]
        if result["once"]:
            registers = REGISTERS_ONCE[result["config"][0]]
        if arch == "90" and result["rows"] == 1 and result["config"][0] == 16:
            registers = HALF_OF_REGISTERS
        budget = INSTRUCTIONS_ONCE[result["config"][2]] if result["once"] else INSTRUCTIONS[result["rows"]]
        budget += NESTED_INSTRUCTIONS * result["nested"]
        assert result["spilled"] == 0, result
        assert result["registers"] <= registers, result
        assert result["instructions_per_weight"] <= budget, result


@pytest.mark.slow
def test_what_each_k_makes_of_a_configuration_is_within_budget(fitted: list[dict]) -> None:
    """Shorter steps, fewer warps, guards, a residual: nothing spills, no more registers than for what is measured."""
    assert len(fitted) >= 60
    assert {result["once"] for result in fitted} == {False, True}
    for result in fitted:
        budget = (REGISTERS_ONCE if result["once"] else REGISTERS).get(result["warps"], REGISTERS[4])
        assert result["spilled"] == 0, result
        assert result["registers"] <= budget, result


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_assembly_is_emitted_once(arch: str, compiled: list[dict]) -> None:
    """Triton may copy assembly into a second layout: twice the work, or shared memory declared twice."""
    for result in compiled:
        if result["arch"] == arch:
            assert result["mma"] == result["hmma"] == result["expected_mma"], result
            assert result["tables"] == 1, result
            # From Hopper on, a program has 1 KiB of the system's.
            assert result["shared"] - result["declared"] in (0, 1024), result
            assert result["declared"] <= SHARED, result
            assert (result["waits"] > 0) == (result["overlap"] is not None), result
            assert arch in ("90", "120") or result["overlap"] is None, result


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_without_a_loop_all_of_a_weight_is_asked_for_at_first(arch: str, compiled: list[dict]) -> None:
    mine = [result for result in compiled if result["arch"] == arch and result["once"]]
    assert {result["rows"] for result in mine} == {1, 8, 16}
    for result in mine:
        assert result["codes_first"] == result["config"][2] * result["config"][3], result


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_rounds_of_two_steps_wait_for_no_load_of_their_own(arch: str, compiled: list[dict]) -> None:
    """A step's weights are read when the next step has asked for its own. (With x ahead the assembler may pick.)"""
    mine = [result for result in compiled if result["arch"] == arch and result["twice"]]
    assert {result["rows"] for result in mine} == {1, 8}
    for result in mine:
        assert result["waited_for"] == [] or result["ahead"], result


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["90", "120"])
def test_what_comes_before_the_wait(arch: str, compiled: list[dict]) -> None:
    """With "edges" no load at all: requests to L2 alone, and leave for the next kernel; with "weights" loads alone."""
    mine = [result for result in compiled if result["arch"] == arch and result["overlap"] is not None]
    assert {result["overlap"] for result in mine} == {"edges", "weights"}
    for result in mine:
        before = result["before_wait"]
        if result["overlap"] == "edges":
            tiles = result["config"][2] * result["config"][3]
            # Codes, scales, and factors of nested scales.
            assert before == {"loads": 0, "requests": (3 if result["nested"] else 2) * tiles, "leaves": 1}, result
        else:
            assert before["loads"] > 0, result
            assert before["requests"] == before["leaves"] == 0, result


@pytest.mark.slow
def test_ptx_gives_the_product(ran: list[dict]) -> None:
    """No worse than dequantizing and multiplying, nothing read or written elsewhere, no threads parting."""
    assert len(ran) == 116
    assert not [result for result in ran if "failure" in result]
    for result in ran:
        assert result["error"] <= 1.1 * result["plain"], result
        assert result["largest"] < 0.01, result


@pytest.mark.slow
def test_sharing_scales_and_doing_without_a_loop_change_no_bit(ran: list[dict]) -> None:
    mine = [result for result in ran if "plain_bits" in result]
    assert len(mine) == 35
    for result in mine:
        assert result["bits"] == result["plain_bits"], result


def test_the_table_is_closer_to_the_codebook_than_rounding_it() -> None:
    asm = pytest.importorskip("onegpu.kernels.asm_4bit")
    for (quant_type, dtype), scale in asm.TABLE_SCALE.items():
        code = torch.tensor(asm.CODEBOOK[quant_type], dtype=torch.float64)
        rounded = (code.to(asm.DTYPE[dtype]).double() - code).square().sum().sqrt()
        ours = (asm.table_values(quant_type, dtype) / scale - code).square().sum().sqrt()
        assert ours < 0.8 * rounded
        assert (asm.table_values(quant_type, dtype)[code == 0] == 0).all()


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("M", [1, 2, 8, 9, 16, 17, 32])
@pytest.mark.parametrize(("N", "K"), [(4096, 4096), (28672, 4096), (4096, 14336), (9728, 2560), (1024, 64), (16, 192)])
def test_configurations_cover_the_weight(M: int, N: int, K: int, overlap: bool) -> None:
    gemv = pytest.importorskip("onegpu.kernels.gemv_4bit_config")
    config = gemv.configure(M, N, K, overlap)
    groups = -(-N // (16 * config.tiles * config.warps_n))
    for processors in (1, 40, 132):
        assert 1 <= config.grid(N, processors) <= groups
    assert config.warps % config.warps_n == 0
    if K % 1024 == 0:
        assert config.is_even_k(K)


CHOICES = [(overlap, nested) for overlap in (False, True) for nested in (False, True)]


@pytest.mark.parametrize(("overlap", "nested"), CHOICES)
@pytest.mark.parametrize("M", [1, 2, 8, 9, 16, 32])
@pytest.mark.parametrize("N", [1000, 1024, 1040, 4096, 6144, 8192, 28672])
def test_what_stands_instead_does_so_where_it_was_measured(N: int, M: int, overlap: bool, nested: bool) -> None:
    """Elsewhere what stands for all other products too: neither guards nor a loop of shorter steps were measured."""
    gemv = pytest.importorskip("onegpu.kernels.gemv_4bit_config")
    rows = next(limit for limit in (1, 8, 16, 32) if limit >= M)
    base = {(False, False): gemv.ALONE, (True, False): gemv.OVERLAPPED}
    base |= {(False, True): gemv.ALONE_NESTED, (True, True): gemv.OVERLAPPED_NESTED}
    table = gemv.INSTEAD[overlap, nested]
    for K in range(64, 16385, 64):
        deep = K >= 8192
        shape = "wide" if N >= 16384 else "deep" if deep else "narrow" if N <= 4096 else "small"
        finer = {"wide": "wide", "deep": "deep" if N <= 4096 else "large", "small": "small"}.get(shape, "narrow")
        if shape == "narrow" and N <= 1024 and (rows, "short") in table:
            finer = "short"
        config = gemv.configure(M, N, K, overlap, nested=nested)
        special = table.get((rows, finer))
        first, guarded = gemv.GUARDED.get((rows, shape), (0, None))
        plain_alone = not (overlap or nested)
        if special is not None and not special.once and special.is_even_k(K):
            assert config == special, K
        elif special is not None and special.once and K in (256, 512, 1024, 2048, 4096):
            assert config == special.fitted(K), K
            assert config.holds(K), K
            assert config.is_even_k(K), K
        elif plain_alone and guarded is not None and first <= K <= 4096:
            assert config == guarded, K
            assert config.holds(K), K
        else:
            plain = base[overlap, nested][rows, shape]
            # Four tiles would not leave room for nested scales.
            plain = replace(plain, tiles=min(plain.tiles, 2)) if nested else plain
            assert config == plain.fitted(K), K
            assert not config.once, K


@pytest.mark.parametrize(("overlap", "nested"), CHOICES)
@pytest.mark.parametrize("N", [1024, 4096, 6144, 8192, 28672])
def test_gated_products_keep_to_what_all_have(N: int, overlap: bool, nested: bool) -> None:
    gemv = pytest.importorskip("onegpu.kernels.gemv_4bit_config")
    for M in (1, 8, 16, 32):
        for K in range(64, 16385, 64):
            config = gemv.configure(M, N, K, overlap, gated=True, nested=nested)
            assert not config.once, K
            assert not config.shares, K
            assert config.tiles % 2 == 0, K


def test_what_stands_instead_fits_the_shapes_it_was_measured_at() -> None:
    gemv = pytest.importorskip("onegpu.kernels.gemv_4bit_config")
    measured = {"short": (1024, 4096), "narrow": (4096, 4096), "small": (6144, 4096), "wide": (28672, 4096)}
    measured |= {"deep": (4096, 14336), "large": (8192, 8192)}
    for (overlap, nested), table in gemv.INSTEAD.items():
        for (rows, shape), config in table.items():
            assert gemv.configure(rows, *measured[shape], overlap, nested=nested) == config, (rows, shape)
            # Of a step that is all of K, in a loop more registers would be needed.
            assert config.once == config.holds(measured[shape][1]), (rows, shape)
    for (rows, _), (first, config) in gemv.GUARDED.items():
        assert gemv.configure(rows, first, first, overlap=False) == config
        assert gemv.configure(rows, first, first - 64, overlap=False) != config


def test_which_kernels_overlap() -> None:
    """ "weights" where the caller allows it, else "edges" where that was found to pay; neither on older GPUs."""
    gemv = pytest.importorskip("onegpu.kernels.gemv_4bit")
    config = gemv.Config(4, 1, 1, 4)
    kinds = {
        (config, False): None,
        (config, True): "weights",
        (replace(config, edges=True), False): "edges",
        (replace(config, edges=True), True): "weights",
        (replace(config, edges=True, overlaps=False), True): "edges",
        (replace(config, overlaps=False), True): None,
    }
    for (kind, overlap), expected in kinds.items():
        for capability in ((8, 9), (9, 0), (12, 0)):
            wanted = expected if capability >= (9, 0) else None
            settings = gemv.constants(
                kind, 1, 4096, "nf4", 64, nested=False, has_bias=False, overlap=overlap, capability=capability
            )
            assert settings["OVERLAP"] == wanted
            assert settings["launch_pdl"] == (wanted is not None)
    assert all(gemv.configure(1, N, K, overlap=False).edges for N, K in ((64, 64), (28672, 4096), (4096, 14336)))
    # Lost in a chain when it overlapped: it stays out. At 16 rows its edges alone were quicker than its weights.
    out = gemv.configure(8, 6144, 4096, overlap=True, nested=True)
    assert out.overlap(True, (9, 0)) is None
    assert gemv.configure(16, 6144, 4096, overlap=True).overlap(True, (9, 0)) == "edges"


# From here on a GPU.


def tiled(weight: Weight4bit) -> tuple[torch.Tensor, torch.Tensor]:
    codes = tiling.tile_codes(weight.packed, *weight.shape)
    return codes, tiling.tile_scales(weight.absmax, *weight.shape, weight.blocksize)


def needs_gemv(dtype: torch.dtype) -> None:
    from onegpu.kernels.gemv_4bit import why_not_gemv

    reason = why_not_gemv(torch.device("cuda", torch.cuda.current_device()), dtype)
    if reason is not None:
        pytest.skip(reason)


def product(
    x: torch.Tensor, weight: Weight4bit, bias: torch.Tensor | None, overlap: bool = False
) -> Callable[[], torch.Tensor]:
    """A call of the operator; all tensors are on the GPU."""
    from onegpu.kernels.tiled_ops import linear_4bit_tiled

    codes, scales = tiled(weight)
    torch.cuda.synchronize()
    return lambda: linear_4bit_tiled(x, codes, scales, bias, *weight.args, overlap=overlap)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "quant_type", "nested"),
    [
        (torch.bfloat16, "nf4", False),
        (torch.bfloat16, "fp4", True),
        (torch.float16, "nf4", True),
        (torch.float16, "fp4", False),
    ],
)
@pytest.mark.parametrize(("N", "K"), [(4096, 4096), (2560, 9728), (28672, 4096), (1000, 1472), (33, 64), (4096, 14336)])
def test_real_and_odd_shapes(N: int, K: int, dtype: torch.dtype, quant_type: str, nested: bool) -> None:
    """Every number of rows, and the ways past 32 rows."""
    needs_gemv(dtype)
    from onegpu.kernels.tiled_ops import linear_4bit_tiled

    weight = weight_4bit(N, K, quant_type, nested=nested, device="cuda")
    x, bias = normal(129, K, dtype=dtype, device="cuda"), normal(N, seed=2, dtype=dtype, device="cuda")
    exact = exact_product(x, weight.dense(torch.float32), bias)
    dense = weight.dense(dtype)
    codes, scales = tiled(weight)
    for M in (*range(1, 34), 64, 97, 129):
        y = linear_4bit_tiled(x[:M], codes, scales, bias, *weight.args)
        assert_no_worse(y, linear(x[:M], dense, bias), exact[:M], factor=1.1, what=f"at {M} rows")


@pytest.mark.gpu
@pytest.mark.parametrize("M", [1, 5, 16, 32])
def test_heavy_tails(M: int) -> None:
    """A few columns of x a thousand times larger than the rest, as language models have them, and a common offset."""
    needs_gemv(torch.bfloat16)
    weight = weight_4bit(2048, 4096, device="cuda")
    x = normal(M, 4096, device="cuda") + 0.5
    x[:, ::511] *= 1000
    x = x.to(torch.bfloat16)
    y = product(x, weight, None)()
    exact = exact_product(x, weight.dense(torch.float32), None)
    assert_no_worse(y, linear(x, weight.dense(torch.bfloat16)), exact, factor=1.1)


@pytest.mark.gpu
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("nested", [False, True])
def test_every_blocksize(blocksize: int, nested: bool) -> None:
    needs_gemv(torch.float16)
    weight = weight_4bit(100, 4096, blocksize=blocksize, nested=nested, device="cuda")
    for M in (1, 7, 16, 32, 100):
        x = normal(M, 4096, dtype=torch.float16, device="cuda")
        y = product(x, weight, None)()
        exact = exact_product(x, weight.dense(torch.float32), None)
        assert_no_worse(y, linear(x, weight.dense(torch.float16)), exact, factor=1.1, what=f"at {M} rows")


@pytest.mark.gpu
@pytest.mark.parametrize("M", [1, 3, 16, 32])
def test_strided_rows_and_bias_dtypes(M: int) -> None:
    needs_gemv(torch.bfloat16)
    weight = weight_4bit(80, 512).to(torch.device("cuda"))
    wide = normal(M, 1100, dtype=torch.bfloat16).cuda()
    for x in (wide[:, :512], wide[:, 8:520], wide[:, 3:515], wide[:, :1024:2], wide[:, None, :512]):
        for bias in (None, normal(80).cuda(), normal(80).half().cuda()):
            y = product(x, weight, bias)()
            assert y.shape == (*x.shape[:-1], 80)
            assert torch.equal(y, product(x.contiguous(), weight, bias)())


@pytest.mark.gpu
@pytest.mark.parametrize("M", [1, 8, 16, 32])
@pytest.mark.parametrize("nested", [False, True])
def test_captured_and_the_same_each_time(M: int, nested: bool) -> None:
    """No waiting for the device; a replay reads new inputs; a hundred runs give the same bits."""
    needs_gemv(torch.bfloat16)
    weight = weight_4bit(4096, 1024, nested=nested, device="cuda")
    x, other = (normal(M, 1024, seed=seed, dtype=torch.bfloat16, device="cuda") for seed in (1, 2))
    call = product(x, weight, None)
    out = run_captured(call, lambda: x.copy_(other))
    expected = call()
    assert torch.equal(out, expected)
    for _ in range(100):
        assert torch.equal(call(), expected)


def needs_overlap() -> None:
    needs_gemv(torch.bfloat16)
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs compute capability 9.0")


@pytest.mark.gpu
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("M", "N", "K"),
    [
        (1, 4096, 4096),
        (1, 4096, 14336),
        (8, 4096, 4096),
        (8, 6144, 4096),
        (8, 4096, 8192),
        (16, 4096, 4096),
        (16, 4096, 8192),
    ],
)
def test_edges_may_overlap_what_writes_the_weight(M: int, N: int, K: int, nested: bool) -> None:
    """W is written right in front of each product, other weights each time: no product sees the ones before."""
    needs_overlap()
    from onegpu.kernels.gemv_4bit import gemv_4bit
    from onegpu.kernels.gemv_4bit_config import configure

    config = configure(M, N, K, overlap=False, nested=nested)
    assert config.edges or nested
    weights = [weight_4bit(N, K + 64 * seed, nested=nested, device="cuda") for seed in range(3)]
    parts = []
    for weight in weights:
        packed, absmax = weight.packed[: N * K // 2], weight.absmax[: N * K // 64]
        factors = (weight.nested[0][: N * K // 64 // 256], *weight.nested[1:]) if nested else ()
        parts.append((*tiled(Weight4bit(packed, absmax, (N, K), "nf4", 64, factors)), *factors))
    held = [torch.empty_like(part) for part in parts[0]]
    x = normal(M, K, dtype=torch.bfloat16).cuda()
    warm = torch.zeros_like(x)
    out = torch.empty(12, M, N, dtype=torch.bfloat16, device="cuda")

    def write(to: torch.Tensor, source: torch.Tensor) -> None:
        """By a kernel, which `copy_` would not be."""
        if to.dtype == torch.uint8:
            torch.bitwise_or(source, 0, out=to)
        else:
            torch.add(source, 0, out=to)

    def product(y: torch.Tensor, rows: torch.Tensor, edges: bool) -> None:
        factors = (held[2], held[3], held[4]) if nested else None
        kind = replace(config, edges=edges)
        gemv_4bit(y, rows, held[0], held[1], None, "nf4", 64, factors, config=kind)

    def chain(edges: bool) -> None:
        for i in range(12):
            for to, source in zip(held, parts[i % 3], strict=True):
                write(to, source)
            # Every other time a product lies between, which lets the next one begin while W may be on its way.
            if i % 2:
                product(out[i], warm, edges)
            product(out[i], x, edges)

    results = []
    for edges in (False, True):
        chain(edges)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            chain(edges)
        for _ in range(20):
            out.fill_(float("nan"))
            graph.replay()
            torch.cuda.synchronize()
            results.append(out.clone())
    assert not torch.equal(results[0][0], results[0][1])
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.gpu
@pytest.mark.parametrize("M", [1, 8, 16, 32])
def test_overlap_changes_no_bit(M: int) -> None:
    """24 products in one graph, each reading the one before: one configuration, the same bits with overlap."""
    needs_overlap()
    from onegpu.kernels.gemv_4bit import gemv_4bit
    from onegpu.kernels.gemv_4bit_config import configure

    N = K = 4096
    weights = [weight_4bit(N, K + 64 * seed, device="cuda") for seed in (0, 1)]
    weights = [Weight4bit(w.packed[: N * K // 2], w.absmax[: N * K // 64], (N, K), "nf4", 64, ()) for w in weights]
    parts = [tiled(weight) for weight in weights]
    start = normal(M, K, dtype=torch.bfloat16).cuda()
    plain = configure(M, N, K, overlap=True)

    def chain(overlap: bool, edges: bool) -> Callable[[], torch.Tensor]:
        config = replace(plain, edges=edges, overlaps=True)
        buffers = [torch.empty(M, N, dtype=torch.bfloat16, device="cuda") for _ in range(3)]

        def call() -> torch.Tensor:
            x = start
            for i in range(24):
                y = buffers[i % 3]
                gemv_4bit(y, x, *parts[i % 2], None, "nf4", 64, overlap=overlap, config=config)
                x = y
            return x

        return call

    outs = []
    for overlap, edges in ((False, False), (False, True), (True, False)):
        call = chain(overlap, edges)
        call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = call()
        for _ in range(50):
            out.fill_(float("nan"))
            graph.replay()
            torch.cuda.synchronize()
            outs.append(out.clone())
    assert outs[0].isfinite().all()
    assert all(torch.equal(out, outs[0]) for out in outs)


@pytest.mark.gpu
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("M", [1, 8, 13, 16])
@pytest.mark.parametrize(("N", "K"), [(4096, 4096), (1000, 3584)])
def test_neither_shared_scales_nor_doing_without_a_loop_change_a_bit(N: int, K: int, M: int, nested: bool) -> None:
    """Nor does the kernel in front that still runs; what warps leave where the table was is theirs alone."""
    needs_overlap()
    from onegpu.kernels.gemv_4bit import gemv_4bit
    from onegpu.kernels.gemv_4bit_config import Config

    weight = weight_4bit(N, K, nested=nested, device="cuda")
    codes, scales = tiled(weight)
    x, residual = normal(M, K, dtype=torch.bfloat16).cuda(), normal(M, N, dtype=torch.bfloat16).cuda()
    for plain in (Config(4, 1, 1, 4), Config(16, 1, 2, 4, ahead=False), Config(8, 1, 1, 8, ahead=False)):
        out = torch.empty(200, M, N, dtype=torch.bfloat16, device="cuda")
        gemv_4bit(out[0], x, codes, scales, None, "nf4", 64, weight.nested or None, residual=residual, config=plain)
        for once, edges in ((False, False), (True, False), (True, True)):
            config = replace(plain, shares=True, once=once, edges=edges)
            for y in out[1:]:
                gemv_4bit(y, x, codes, scales, None, "nf4", 64, weight.nested or None, residual=residual, config=config)
            assert (out == out[:1]).all(), config


@pytest.mark.gpu
@pytest.mark.parametrize("M", [1, 7, 16, 31])
@pytest.mark.parametrize("nested", [False, True])
def test_nothing_outside_is_read_or_written(M: int, nested: bool) -> None:
    """Operands lie between bytes of ones (NaNs, or codes of the largest value); the result and those bytes stay."""
    needs_gemv(torch.bfloat16)
    from onegpu.kernels.gemv_4bit import gemv_4bit

    N, K = 1000, 1472
    weight = weight_4bit(N, K, nested=nested, device="cuda")

    rooms = []

    def fenced(tensor: torch.Tensor) -> torch.Tensor:
        bytes_ = tensor.contiguous().view(-1).view(torch.uint8)
        room = torch.full((bytes_.numel() + 8192,), 0xFF, dtype=torch.uint8, device="cuda")
        room[4096:-4096] = bytes_
        rooms.append(room)
        return room[4096:-4096].view(tensor.dtype).view(tensor.shape)

    codes, scales = tiled(weight)
    x, bias = normal(M, K, dtype=torch.bfloat16).cuda(), normal(N, dtype=torch.bfloat16).cuda()
    expected = torch.empty(M, N, dtype=torch.bfloat16, device="cuda")
    plain_nested = weight.nested or None
    gemv_4bit(expected, x, codes, scales, bias, "nf4", 64, plain_nested)
    y = fenced(torch.zeros(M, N, dtype=torch.bfloat16, device="cuda"))
    fenced_nested = tuple(fenced(t) if t.dim() else t for t in weight.nested) or None
    gemv_4bit(y, fenced(x), fenced(codes), fenced(scales), fenced(bias), "nf4", 64, fenced_nested)
    assert torch.equal(y, expected)
    assert (rooms[0][:4096] == 0xFF).all()
    assert (rooms[0][-4096:] == 0xFF).all()


@pytest.mark.gpu
def test_rows_do_not_see_each_other() -> None:
    needs_gemv(torch.bfloat16)
    weight = weight_4bit(48, 512).to(torch.device("cuda"))
    for M in (4, 16, 32):
        x = normal(M, 512, dtype=torch.bfloat16).cuda()
        x[1, 3] = float("nan")
        y = product(x, weight, None)()
        assert y[1].isnan().all()
        assert y[[0, *range(2, M)]].isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize(("N", "K"), [(28672, 4096), (6144, 4096), (4096, 14336), (96, 192)])
@pytest.mark.parametrize("nested", [False, True])
def test_tail_on_a_gpu(N: int, K: int, nested: bool) -> None:
    """Activation, gate and residual at a decoder's shapes, kernels overlapping and not."""
    needs_gemv(torch.bfloat16)
    from onegpu.kernels.tail import apply_tail
    from onegpu.kernels.tiled_ops import linear_4bit_tiled

    generator = torch.Generator("cuda").manual_seed(N + K)
    packed, absmax = blockwise.quantize_4bit(torch.randn(N, K, generator=generator, device="cuda"), "nf4", 64)
    scales = blockwise.quantize_absmax(absmax) if nested else (absmax,)
    weight = Weight4bit(packed, scales[0], (N, K), "nf4", 64, tuple(scales[1:]))
    codes, tiles = tiled(weight)
    rows = normal(128, K, dtype=torch.bfloat16, device="cuda")
    exact = exact_product(rows, weight.dense(torch.float32), None).float()
    for M in (1, 3, 8, 16, 32, 50, 128):
        x, t = rows[:M], exact[:M]
        for activation, gated, has_residual in (("silu", True, False), (None, False, True), ("gelu", False, True)):
            added = (M, N // 2 if gated else N)
            residual = normal(*added, dtype=torch.bfloat16, device="cuda") if has_residual else None
            expected = apply_tail(t, residual, activation, gated, torch.float32)
            tail = {"residual": residual, "activation": activation, "gated": gated}
            for overlap in (False, True):
                y = linear_4bit_tiled(x, codes, tiles, None, *weight.args, **tail, overlap=overlap)
                error = float((y.float() - expected).norm() / expected.norm())
                assert error < 0.01, (M, activation, gated, has_residual, overlap)
