"""The few-row int8 kernel: compiled for each GPU family, its PTX run on a CPU, and run on a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kernels.cases import assert_no_worse, exact_product, normal, run_captured
from kernels.program import results_of
from onegpu.formats import rowwise

ARCHITECTURES = ("75", "80", "86", "89", "90", "120")
# Registers that let three programs of eight warps share a processor at one row, two up to 16; at 32 two of four.
REGISTERS = {1: 80, 8: 128, 16: 128, 32: 200}
REGISTERS_WITH_TAIL = {1: 80, 8: 128, 16: 144, 32: 216}
# What its assembler takes more on the newest.
MORE_REGISTERS = {"120": 8}
# Of a step, by rows of x; an H100 issues 9.5 a weight in the time it reads one, and sustains about half of that.
INSTRUCTIONS = {1: 2.6, 8: 2.7, 16: 3.1, 32: 4.7}
# Turing's step of the tensor core is half as long.
TURING = 0.6
SHARED = 48 * 1024


@pytest.fixture(scope="module")
def compiled() -> list[dict]:
    return results_of("gemv_int8_programs.py", "compile", *ARCHITECTURES)


@pytest.fixture(scope="module")
def ran() -> list[dict]:
    return results_of("gemv_int8_programs.py", "run")


def test_all_codes_are_widened_exactly() -> None:
    """The assembly's own text, run on all 256 codes."""
    asm = pytest.importorskip("onegpu.kernels.asm_int8")
    found = results_of("gemv_int8_programs.py", "widen")
    assert [result["dtype"] for result in found] == ["bf16", "fp16"]
    for result in found:
        unit = asm.UNIT[result["dtype"]]
        assert [value / unit for value in result["codes"]] == list(range(-128, 128))


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_compiles_within_budget(arch: str, compiled: list[dict]) -> None:
    from onegpu.kernels.gemv_int8_config import CONFIGS

    kinds = {(M, c.warps, c.warps_n, c.tiles, c.unroll, c.ahead): c.edges for (M, _), c in CONFIGS.items()}
    mine = [result for result in compiled if result["arch"] == arch]
    edges = sum(kinds.values()) if arch in ("90", "120") else 0
    assert len(mine) == len(kinds) + edges + (8 if arch == "90" else 0)
    assert sum(result["overlap"] == "edges" for result in mine) == edges
    assert not [result for result in mine if "error" in result]
    for result in mine:
        registers = (REGISTERS_WITH_TAIL if result["tail"] else REGISTERS)[result["rows"]]
        assert result["spilled"] == 0, result
        assert result["registers"] <= registers + MORE_REGISTERS.get(arch, 0), result
        assert result["instructions_per_weight"] <= INSTRUCTIONS[result["rows"]] + TURING * (arch == "75"), result


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_weights_are_on_their_way_a_step_ahead(arch: str, compiled: list[dict]) -> None:
    """No load is waited for before the step in front of it is multiplied, and none but weights before the wait.

    With "edges" there is no load before the wait at all. Where x is loaded ahead, nothing that a step needs is loaded
    in it, and the assembler may multiply first: fewer registers, more programs at a time instead.
    """
    for result in compiled:
        if result["arch"] == arch:
            assert result["waited_for"] == [] or result["ahead"], result
            before, wait, after = result["order"].partition("W")
            assert (wait == "W") == (arch in ("90", "120")), result
            if result["overlap"] == "edges":
                assert before == "La", result
            elif wait:
                assert set(before) <= {"w", "s"}, result
            if wait:
                assert "x" in after, result


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_assembly_is_emitted_once(arch: str, compiled: list[dict]) -> None:
    """Triton may copy assembly into a second layout: twice the work, or shared memory declared twice."""
    for result in compiled:
        if result["arch"] == arch:
            assert result["mma"] == result["hmma"] == result["expected_mma"], result
            # From Hopper on, a program has 1 KiB of the system's.
            assert result["shared"] - result["declared"] in (0, 1024), result
            assert result["declared"] <= SHARED, result


@pytest.mark.slow
def test_ptx_gives_the_product(ran: list[dict]) -> None:
    """As exact as rounding the result once, nothing read or written elsewhere, no threads parting."""
    assert len(ran) == 39
    assert not [result for result in ran if "failure" in result]
    for result in ran:
        assert result["error"] <= 1.02 * result["rounding"] + 1e-6, result
        assert result["error"] <= result["plain"], result


@pytest.mark.parametrize("M", [1, 2, 8, 9, 16, 17, 32])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("N", "K"), [(4096, 4096), (28672, 4096), (4096, 14336), (9728, 2560), (1024, 64), (16, 208)])
def test_configurations_cover_the_weight(M: int, N: int, K: int, gated: bool) -> None:
    gemv = pytest.importorskip("onegpu.kernels.gemv_int8_config")
    config = gemv.configure(M, N, K, gated)
    groups = -(-N // (16 * config.tiles * config.warps_n))
    for processors in (1, 40, 132):
        assert 1 <= config.grid(N, processors) <= groups
    assert config.warps % config.warps_n == 0
    # One row is summed over all warps, in shared memory.
    assert M > 1 or config.warps > config.warps_n == 1
    assert config.tiles % 2 == 0 or not gated
    assert gemv.is_even_k(config, K) or K % 1024


def test_rows_that_it_takes() -> None:
    gemv = pytest.importorskip("onegpu.kernels.gemv_int8")
    codes = torch.zeros(20, 256, dtype=torch.int8)
    assert gemv.why_not_rows(codes) is None
    assert gemv.why_not_rows(codes[3:, 16:96]) is None
    for wrong in (codes[:, :40], codes[:, 8:136], codes.view(-1)[: 18 * 264].view(18, 264), codes.t()):
        assert gemv.why_not_rows(wrong) is not None
    assert "NVIDIA" in gemv.why_not_gemv_int8(torch.device("cpu"), torch.bfloat16)


def test_which_kernels_overlap() -> None:
    """As `gemv_4bit`: "weights" where the caller allows it, else "edges" where the configuration has them."""
    gemv = pytest.importorskip("onegpu.kernels.gemv_int8")
    tail = {"has_bias": False, "has_residual": False, "activation": None, "gated": False}
    for edges, overlap, expected in ((True, False, "edges"), (False, False, None), (True, True, "weights")):
        for capability in ((8, 9), (9, 0), (12, 0)):
            wanted = expected if capability >= (9, 0) else None
            config = replace(gemv.configure(1, 4096, 4096), edges=edges)
            settings = gemv.constants(config, 1, 4096, **tail, overlap=overlap, capability=capability)
            assert settings["OVERLAP"] == wanted
            assert settings["launch_pdl"] == (wanted is not None)


# From here on a GPU.


def needs_gemv(dtype: torch.dtype) -> None:
    from onegpu.kernels.gemv_int8 import why_not_gemv_int8

    reason = why_not_gemv_int8(torch.device("cuda", torch.cuda.current_device()), dtype)
    if reason is not None:
        pytest.skip(reason)


def weight(N: int, K: int) -> tuple[torch.Tensor, torch.Tensor]:
    return rowwise.quantize_rows(normal(N, K, seed=N + K, device="cuda").div_(K**0.5))[:2]


def dense(codes: torch.Tensor, row_stats: torch.Tensor) -> torch.Tensor:
    return codes.double() * row_stats.double()[:, None] / 127


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_code_on_a_gpu(dtype: torch.dtype) -> None:
    """Columns of x with a single one pick codes out; sums of one product are exact."""
    needs_gemv(dtype)
    from onegpu.kernels.gemv_int8 import gemv_int8

    codes = torch.arange(-128, 128, dtype=torch.int8, device="cuda").repeat(32, 1)
    codes = torch.stack([row.roll(i) for i, row in enumerate(codes)])
    stats = torch.full((32,), 127.0, device="cuda")
    for first in range(0, 256, 32):
        x = torch.eye(256, dtype=dtype, device="cuda")[first : first + 32].contiguous()
        for M in (1, 8, 16, 32):
            y = torch.empty(M, 32, dtype=dtype, device="cuda")
            gemv_int8(y, x[:M], codes, stats, None)
            assert torch.equal(y, codes[:, first : first + M].t().to(dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("N", "K"), [(4096, 4096), (2560, 9728), (28672, 4096), (1001, 1472), (33, 16), (4096, 14336), (50, 1040)]
)
def test_real_and_odd_shapes(N: int, K: int, dtype: torch.dtype) -> None:
    """Every number of rows."""
    needs_gemv(dtype)
    from onegpu.kernels.gemv_int8 import gemv_int8

    codes, stats = weight(N, K)
    x, bias = normal(32, K, dtype=dtype, device="cuda"), normal(N, seed=2, device="cuda")
    exact = exact_product(x, dense(codes, stats), bias)
    plain = exact_product(x, dense(codes, stats).to(dtype), bias).to(dtype)
    for M in range(1, 33):
        y = torch.empty(M, N, dtype=dtype, device="cuda")
        gemv_int8(y, x[:M], codes, stats, bias)
        assert_no_worse(y, plain[:M], exact[:M], factor=1.0, what=f"at {M} rows")


@pytest.mark.gpu
@pytest.mark.parametrize("M", [1, 7, 16, 31])
@pytest.mark.parametrize("tail", [{"residual": True}, {"activation": "silu", "gated": True}])
def test_nothing_outside_is_read_or_written(M: int, tail: dict) -> None:
    """Operands lie between bytes of ones (NaNs in x, the residual and scales); the result and those bytes stay."""
    needs_gemv(torch.bfloat16)
    from onegpu.kernels.gemv_int8 import gemv_int8

    rooms = []

    def fenced(tensor: torch.Tensor) -> torch.Tensor:
        bytes_ = tensor.contiguous().view(-1).view(torch.uint8)
        room = torch.full((bytes_.numel() + 8192,), 0xFF, dtype=torch.uint8, device="cuda")
        room[4096:-4096] = bytes_
        rooms.append(room)
        return room[4096:-4096].view(tensor.dtype).view(tensor.shape)

    N, K = 1002, 1488
    width = N // 2 if tail.get("gated") else N
    codes, stats = weight(N, K)
    x, bias = normal(M, K, dtype=torch.bfloat16).cuda(), normal(N, dtype=torch.bfloat16).cuda()
    residual = normal(M, width, seed=3, dtype=torch.bfloat16).cuda() if tail.pop("residual", False) else None
    expected = torch.empty(M, width, dtype=torch.bfloat16, device="cuda")
    gemv_int8(expected, x, codes, stats, bias, residual, **tail)
    y = fenced(torch.zeros(M, width, dtype=torch.bfloat16, device="cuda"))
    other = None if residual is None else fenced(residual)
    gemv_int8(y, fenced(x), fenced(codes), fenced(stats), fenced(bias), other, **tail)
    assert torch.equal(y, expected)
    assert expected.isfinite().all()
    assert (rooms[0][:4096] == 0xFF).all()
    assert (rooms[0][-4096:] == 0xFF).all()


@pytest.mark.gpu
@pytest.mark.parametrize("M", [1, 8, 16, 32])
def test_captured_and_the_same_each_time(M: int) -> None:
    """No waiting for the device; a replay reads new inputs; a hundred runs give the same bits."""
    needs_gemv(torch.bfloat16)
    from onegpu.kernels import linear_8bit_rows

    codes, stats = weight(4096, 1024)
    x, other = (normal(M, 1024, seed=seed, dtype=torch.bfloat16, device="cuda") for seed in (1, 2))

    def call() -> torch.Tensor:
        return linear_8bit_rows(x, codes, stats)

    out = run_captured(call, lambda: x.copy_(other))
    expected = call()
    assert torch.equal(out, expected)
    for _ in range(100):
        assert torch.equal(call(), expected)


@pytest.mark.gpu
@pytest.mark.parametrize(("M", "K"), [(1, 4096), (1, 14336), (8, 4096), (16, 4096)])
def test_overlap_changes_no_bit_and_edges_see_new_weights(M: int, K: int) -> None:
    """W written by a kernel right in front of each product, other weights each time: none sees the ones before."""
    needs_gemv(torch.bfloat16)
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs compute capability 9.0")
    from onegpu.kernels.gemv_int8 import gemv_int8
    from onegpu.kernels.gemv_int8_config import configure

    N = 4096
    weights = [weight(N + 16 * seed, K) for seed in range(3)]
    weights = [(codes[:N], stats[:N]) for codes, stats in weights]
    codes, stats = (torch.empty_like(part) for part in weights[0])
    x = normal(M, K, dtype=torch.bfloat16).cuda()
    warm = torch.zeros_like(x)
    out = torch.empty(12, M, N, dtype=torch.bfloat16, device="cuda")

    def chain(fresh: bool, edges: bool, overlap: bool) -> None:
        config = replace(configure(M, N, K), edges=edges)
        for i in range(12):
            if fresh:
                torch.bitwise_or(weights[i % 3][0], 0, out=codes)
                torch.add(weights[i % 3][1], 0, out=stats)
            held = (codes, stats) if fresh else weights[i % 3]
            # A product that the next one need not wait for, which lets it begin while W may be on its way.
            if i % 2:
                gemv_int8(out[i], warm, *held, None, config=config, overlap=overlap)
            gemv_int8(out[i], x, *held, None, config=config, overlap=overlap)

    results = []
    for fresh, edges, overlap in (
        (True, False, False),
        (True, True, False),
        (False, True, False),
        (False, False, True),
    ):
        chain(fresh, edges, overlap)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            chain(fresh, edges, overlap)
        for _ in range(20):
            out.fill_(float("nan"))
            graph.replay()
            torch.cuda.synchronize()
            results.append(out.clone())
    assert not torch.equal(results[0][0], results[0][1])
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.gpu
@pytest.mark.parametrize("M", [4, 16, 32])
def test_rows_do_not_see_each_other(M: int) -> None:
    needs_gemv(torch.bfloat16)
    from onegpu.kernels.gemv_int8 import gemv_int8

    codes, stats = weight(48, 512)
    x = normal(M, 512, dtype=torch.bfloat16).cuda()
    x[1, 3] = float("nan")
    y = torch.empty(M, 48, dtype=torch.bfloat16, device="cuda")
    gemv_int8(y, x, codes, stats, None)
    assert y[1].isnan().all()
    assert y[[0, *range(2, M)]].isfinite().all()
