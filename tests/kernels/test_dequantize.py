"""The dequantizing kernel against its definition, bit for bit."""

from __future__ import annotations

import pytest
import torch

from kernels.cases import DTYPES, normal, run_captured, weight_4bit
from onegpu.config import BLOCKSIZES
from onegpu.kernels import dequantize_4bit, quantize_4bit


def launch(weight, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    from onegpu.kernels import dequantize

    there = weight.to(device)
    return dequantize.dequantize_4bit(
        there.packed, there.absmax, there.shape, dtype, there.quant_type, there.blocksize, *there.nested
    ).cpu()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (7, 45), (33, 128)])
def test_bits(dtype: torch.dtype, quant_type: str, nested: bool, shape: tuple[int, int], device: torch.device) -> None:
    weight = weight_4bit(*shape, quant_type, nested=nested)
    out = launch(weight, dtype, device)
    assert out.dtype == dtype
    assert torch.equal(out, weight.dense(dtype))


@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("nested", [False, True])
def test_every_blocksize(blocksize: int, nested: bool, device: torch.device) -> None:
    weight = weight_4bit(61, 83, blocksize=blocksize, nested=nested)
    assert torch.equal(launch(weight, torch.float32, device), weight.dense(torch.float32))


def test_nested_scales_are_rounded_twice(device: torch.device) -> None:
    """Enough scales that a fused multiply-add would show: it differs from product-then-sum in several of these."""
    weight = weight_4bit(512, 64, nested=True)
    codes, (absmax, code, offset) = weight.absmax, weight.nested
    product = code[codes.long()].double() * absmax.repeat_interleave(256)[: len(codes)].double()
    fused = (product + offset.double()).float()
    twice = product.float() + offset
    assert (fused != twice).sum() > 10
    assert torch.equal(launch(weight, torch.float32, device), weight.dense(torch.float32))


def test_slices(device: torch.device) -> None:
    """From a block inside the weight on, into memory of its own."""
    from onegpu.kernels import dequantize
    from onegpu.kernels import launch as shared

    weight = weight_4bit(5, 100, nested=True).to(device)
    whole = weight.dense(torch.float16).view(-1)
    scales = shared.nested_arguments(weight.absmax, *weight.nested)
    for first, n in ((1, 436), (3, 64), (7, 52), (2, 1), (0, 0)):
        out = torch.full((n + 3,), 9.0, dtype=torch.float16, device=device)
        dequantize.dequantize_blocks(out, weight.packed, scales, first=first, n=n, quant_type="nf4", blocksize=64)
        assert torch.equal(out[:n], whole[first * 64 : first * 64 + n])
        assert (out[n:] == 9).all()


def test_empty(device: torch.device) -> None:
    none = torch.empty(0, dtype=torch.uint8, device=device)
    out = dequantize_4bit(none, torch.empty(0, device=device), (0, 8), torch.bfloat16, "nf4", 64)
    assert out.shape == (0, 8)


@pytest.mark.gpu
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("shape", "where"), [((257, 4096), "cpu"), ((4096, 4096), "cuda"), ((14336, 4096), "cuda"), ((4097, 4095), "cuda")]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_real_shapes(dtype: torch.dtype, shape: tuple[int, int], where: str, nested: bool, quant_type: str) -> None:
    """The definition, evaluated on the CPU and, of large weights, on the GPU."""
    weight = weight_4bit(*shape, quant_type, nested=nested, device=where)
    there = weight.to(torch.device("cuda"))
    out = dequantize_4bit(there.packed, there.absmax, shape, dtype, quant_type, 64, *there.nested)
    assert torch.equal(out.to(where), weight.dense(dtype))


@pytest.mark.gpu
def test_more_than_31_bits_of_elements() -> None:
    n, blocksize, tail = 2**31 + 2**16 + 3, 64, 2**20 + 3
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free GPU memory")
    packed = torch.randint(0, 256, ((n + 1) // 2,), dtype=torch.uint8, device="cuda")
    absmax = torch.rand(-(-n // blocksize), device="cuda")
    out = dequantize_4bit(packed, absmax, (n,), torch.bfloat16, "nf4", blocksize)
    start = (n - tail) // blocksize * blocksize
    for first, last in ((start, n), (2**31 - 4096, 2**31 + 4096), (0, 4096)):
        part = dequantize_4bit(
            packed[first // 2 : -(-last // 2)].cpu(),
            absmax[first // blocksize : -(-last // blocksize)].cpu(),
            (last - first,),
            torch.bfloat16,
            "nf4",
            blocksize,
        )
        assert torch.equal(out[first:last].cpu(), part)


@pytest.mark.gpu
def test_captured_and_without_waiting() -> None:
    weight = weight_4bit(256, 192, nested=True).to(torch.device("cuda"))
    args = (weight.packed, weight.absmax, weight.shape, torch.bfloat16, "nf4", 64, *weight.nested)
    before = dequantize_4bit(*args)
    other = quantize_4bit(normal(256, 192, seed=9).cuda(), "nf4", 64)[0]
    out = run_captured(lambda: dequantize_4bit(*args), lambda: weight.packed.copy_(other))
    assert not torch.equal(out, before)
    assert torch.equal(out, dequantize_4bit(*args))
