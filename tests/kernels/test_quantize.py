"""The kernel that quantizes to 4 bits against its definition in `onegpu.formats`: the same bytes."""

from __future__ import annotations

import pytest
import torch

from kernels.cases import DTYPES, normal, run_captured
from onegpu.config import BLOCKSIZES
from onegpu.formats import blockwise, codebooks
from onegpu.kernels import quantize_4bit


@pytest.fixture
def quantize(device: torch.device):
    from onegpu.kernels import quantize

    return quantize


class TestQuantize4bit:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
    @pytest.mark.parametrize("shape", [(1, 1), (7, 45), (33, 128), (3, 2, 50)])
    def test_bytes(
        self, dtype: torch.dtype, quant_type: str, shape: tuple[int, ...], device: torch.device, quantize
    ) -> None:
        weight = normal(*shape, dtype=dtype)
        packed, absmax = quantize.quantize_4bit(weight.to(device), quant_type, 64)
        expected = blockwise.quantize_4bit(weight, quant_type, 64)
        assert torch.equal(packed.cpu(), expected[0])
        assert torch.equal(absmax.cpu(), expected[1])

    @pytest.mark.parametrize("blocksize", BLOCKSIZES)
    def test_every_blocksize(self, blocksize: int, device: torch.device, quantize) -> None:
        weight = normal(71, 73)
        packed, absmax = quantize.quantize_4bit(weight.to(device), "nf4", blocksize)
        expected = blockwise.quantize_4bit(weight, "nf4", blocksize)
        assert torch.equal(packed.cpu(), expected[0])
        assert torch.equal(absmax.cpu(), expected[1])

    @pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
    def test_thresholds_and_their_neighbours(self, quant_type: str, device: torch.device, quantize) -> None:
        steps = codebooks.boundaries(quant_type)
        near = [steps, torch.nextafter(steps, torch.tensor(2.0)), torch.nextafter(steps, torch.tensor(-2.0))]
        values = torch.cat([*near, *(-t for t in near), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1.0])])
        blocks = torch.ones(len(values), 32)
        blocks[:, 3] = values
        packed, _ = quantize.quantize_4bit(blocks.to(device), quant_type, 32)
        assert torch.equal(packed.cpu(), blockwise.quantize_4bit(blocks, quant_type, 32)[0])

    @pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
    def test_every_bfloat16(self, quant_type: str, device: torch.device, quantize) -> None:
        """All magnitudes up to one, of either sign, against a largest one in their block: no guess is too far off."""
        values = torch.arange(0x3F80 + 1, dtype=torch.int16).view(torch.bfloat16)
        blocks = torch.ones(-(-2 * len(values) // 63), 64, dtype=torch.bfloat16)
        flat = torch.cat([values, -values, torch.zeros(blocks.shape[0] * 63 - 2 * len(values), dtype=torch.bfloat16)])
        blocks[:, 1:] = flat.view(-1, 63)
        packed, absmax = quantize.quantize_4bit(blocks.to(device), quant_type, 64)
        assert (absmax == 1).all()
        assert torch.equal(packed.cpu(), blockwise.quantize_4bit(blocks, quant_type, 64)[0])

    @pytest.mark.parametrize("n", [2047, 2048, 2049, 4096])
    def test_whole_programs_and_what_is_left(self, n: int, device: torch.device, quantize) -> None:
        weight = normal(n + 64, dtype=torch.bfloat16)[:n]
        packed, absmax = quantize.quantize_4bit(weight.to(device), "nf4", 64)
        expected = blockwise.quantize_4bit(weight, "nf4", 64)
        assert torch.equal(packed.cpu(), expected[0])
        assert torch.equal(absmax.cpu(), expected[1])

    @pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
    @pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
    def test_edges(self, quant_type: str, device: torch.device, quantize) -> None:
        """Zero, tiny, huge and broken blocks."""
        weight = torch.zeros(8, 64)
        weight[1] = 1e-40
        weight[2, 7] = 2.0**-126
        weight[3] = normal(64) * 1e-38
        weight[4] = normal(64).sign() * torch.finfo(torch.float32).max
        weight[5, 3] = float("nan")
        weight[6, 3] = float("inf")
        weight[7] = -normal(64).abs()
        packed, absmax = quantize.quantize_4bit(weight.to(device), quant_type, 64)
        expected = blockwise.quantize_4bit(weight, quant_type, 64)
        assert torch.equal(packed.cpu(), expected[0])
        assert torch.equal(absmax.cpu(), expected[1])

    def test_strided(self, device: torch.device, quantize) -> None:
        weight = normal(64, 40).to(device).t()
        packed, absmax = quantize.quantize_4bit(weight, "nf4", 64)
        expected = blockwise.quantize_4bit(weight.cpu(), "nf4", 64)
        assert torch.equal(packed.cpu(), expected[0])
        assert torch.equal(absmax.cpu(), expected[1])

    def test_empty(self, device: torch.device, quantize) -> None:
        packed, absmax = quantize.quantize_4bit(torch.empty(0, 5, device=device), "nf4", 64)
        assert packed.shape == absmax.shape == (0,)


def squared_errors(
    weight: torch.Tensor, packed: torch.Tensor, absmax: torch.Tensor, quant_type: str, importance: torch.Tensor | None
) -> torch.Tensor:
    """Error of each block of 64 in float64; weight of whole blocks."""
    back = blockwise.dequantize_4bit(packed.cpu(), absmax.cpu(), weight.shape, torch.float32, quant_type, 64)
    error = (back.double() - weight.double()).square()
    return (error if importance is None else error * importance).view(-1, 64).sum(1)


class TestScaleSearch:
    @pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
    @pytest.mark.parametrize("importance", ["none", "columns", "elements"])
    def test_as_good_as_the_definition(self, quant_type: str, importance: str, device: torch.device, quantize) -> None:
        """Sums run in another order, so a near tie may fall the other way; the error may not grow by it."""
        weight = normal(96, 128)
        shape = {"none": None, "columns": (128,), "elements": (96, 128)}[importance]
        importances = None if shape is None else torch.rand(shape, generator=torch.Generator().manual_seed(1))
        there = None if importances is None else importances.to(device)
        packed, absmax = quantize.quantize_4bit(weight.to(device), quant_type, 64, True, there)
        expected = blockwise.quantize_4bit(weight, quant_type, 64, scale_search=True, importance=importances)
        assert (absmax.cpu() != expected[1]).float().mean() <= 0.02
        ours = squared_errors(weight, packed, absmax, quant_type, importances)
        theirs = squared_errors(weight, *expected, quant_type, importances)
        plain = squared_errors(weight, *blockwise.quantize_4bit(weight, quant_type, 64), quant_type, importances)
        torch.testing.assert_close(ours.sum(), theirs.sum(), rtol=1e-4, atol=0)
        assert (ours <= plain * (1 + 1e-5)).all()
        assert ours.sum() < plain.sum() * 0.97

    def test_zero_blocks_and_tails(self, device: torch.device, quantize) -> None:
        weight = normal(1, 150)
        weight[:, 64:128] = 0
        packed, absmax = quantize.quantize_4bit(weight.to(device), "nf4", 64, True)
        expected = blockwise.quantize_4bit(weight, "nf4", 64, scale_search=True)
        assert torch.equal(packed.cpu()[32:64], torch.full((32,), 0x77, dtype=torch.uint8))
        torch.testing.assert_close(absmax.cpu(), expected[1], rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize(
    ("shape", "where"), [((257, 4096), "cpu"), ((4096, 4096), "cuda"), ((14336, 4096), "cuda"), ((4097, 4095), "cuda")]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_real_shapes_4bit(dtype: torch.dtype, shape: tuple[int, int], where: str, quant_type: str) -> None:
    """The definition, evaluated on the CPU and, of large weights, on the GPU."""
    weight = normal(*shape, dtype=dtype, device=where) * 0.02
    packed, absmax = quantize_4bit(weight.cuda(), quant_type, 64)
    expected = blockwise.quantize_4bit(weight, quant_type, 64)
    assert torch.equal(packed.to(where), expected[0])
    assert torch.equal(absmax.to(where), expected[1])
    nested, expected_nested = blockwise.quantize_absmax(absmax), blockwise.quantize_absmax(absmax.cpu())
    # The mean may differ in its last bit; the codes then differ in a few near ties.
    torch.testing.assert_close(nested.offset.cpu(), expected_nested.offset, rtol=2e-7, atol=0)
    assert (nested.codes.cpu() != expected_nested.codes).float().mean() <= 1e-3


@pytest.mark.gpu
def test_more_than_31_bits_of_elements() -> None:
    n = 2**31 + 2**16 + 3
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GiB of free GPU memory")
    weight = torch.empty(n, dtype=torch.bfloat16, device="cuda").normal_()
    packed, absmax = quantize_4bit(weight, "nf4", 64)
    for first, last in ((n - 4099, n), (2**31 - 4096, 2**31 + 4096)):
        first = first // 64 * 64
        expected = blockwise.quantize_4bit(weight[first:last].cpu(), "nf4", 64)
        assert torch.equal(packed[first // 2 : -(-last // 2)].cpu(), expected[0])
        assert torch.equal(absmax[first // 64 : -(-last // 64)].cpu(), expected[1])


@pytest.mark.gpu
@pytest.mark.parametrize("search", [False, True])
def test_captured_and_without_waiting_4bit(search: bool) -> None:
    weight = normal(256, 192).cuda()
    other = normal(256, 192, seed=3).cuda()
    out = run_captured(lambda: quantize_4bit(weight, "nf4", 64, search), lambda: weight.copy_(other))
    for a, b in zip(out, quantize_4bit(other, "nf4", 64, search), strict=True):
        assert torch.equal(a, b)
