from __future__ import annotations

import math
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from formats.vectors import HASHES, cases, hash_id, made, pool, sha256, tensors
from onegpu.config import BLOCKSIZES
from onegpu.errors import ArgumentError, CheckpointError, ConfigError
from onegpu.formats import blockwise
from onegpu.formats.blockwise import (
    NestedAbsmax,
    check_finite,
    dequantize_4bit,
    dequantize_absmax,
    num_blocks,
    quantize_4bit,
    quantize_absmax,
    quantize_dynamic,
)
from onegpu.formats.codebooks import FP4_BOUNDARIES, NF4_BOUNDARIES, codebook, dynamic_map
from onegpu.formats.packing import unpack

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# The format's one free choice: bitsandbytes writes nibble 7 into an all-zero NF4 block on a CPU, 0 on CUDA.
ZERO_BLOCKS = ("edge/zeros_nf4", "edge/zeros_partial_nf4")


# --- against the recorded vectors ---


@pytest.mark.parametrize("case", cases("quantize_4bit", "quantize_4bit_edge"))
def test_bytes_follow_the_gpu_rule(case: dict[str, Any]) -> None:
    packed, absmax = quantize_4bit(tensors()[case["input"]["tensor"]], case["quant_type"], case["blocksize"])
    expected = case["packed"] if case["id"] in ZERO_BLOCKS else case["packed_gpu_rule"]
    assert sha256(packed) == expected["sha256"]
    assert sha256(absmax) == case.get("absmax_gpu_rule", case["absmax"])["sha256"]


@pytest.mark.parametrize("case", [c for c in cases("quantize_4bit", "quantize_4bit_edge") if "cuda_run" in c.values[0]])
def test_bytes_against_an_h100_run(case: dict[str, Any]) -> None:
    """CUDA's reciprocal is approximate: a value on a threshold may fall to the other side."""
    n = math.prod(case["input"]["shape"])
    packed, absmax = quantize_4bit(tensors()[case["input"]["tensor"]], case["quant_type"], case["blocksize"])
    ran = tensors()[case["cuda_run"]["packed"]["tensor"]].view(-1)
    assert torch.equal(absmax, tensors()[case["cuda_run"]["absmax"]["tensor"]])
    if case["id"] in ZERO_BLOCKS:
        assert packed.tolist() == [0x77] * len(packed)
        return
    differ = int((unpack(packed, n) != unpack(ran, n)).sum())
    assert differ <= (4 if "thresholds" in case["id"] else 1)


@pytest.mark.parametrize("case", cases("quantize_4bit"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantized_bits(case: dict[str, Any], dtype: torch.dtype) -> None:
    stored = tensors()[case["packed"]["tensor"]].view(-1)
    absmax = tensors()[case["absmax"]["tensor"]]
    expected = case["dequant"][str(dtype).removeprefix("torch.")]
    got = dequantize_4bit(stored, absmax, expected["shape"], dtype, case["quant_type"], case["blocksize"])
    assert sha256(got) == expected["sha256"]


@pytest.mark.parametrize("case", HASHES["quantize_4bit"], ids=hash_id)
def test_hashes_of_4bit(case: dict[str, Any]) -> None:
    packed, absmax = quantize_4bit(made(case), case["quant_type"], case["blocksize"])
    assert sha256(packed) == case["packed"]
    if "absmax" in case:
        assert sha256(absmax) == case["absmax"]


@pytest.mark.parametrize("case", HASHES["double_quant"], ids=hash_id)
def test_hashes_of_nested_scales(case: dict[str, Any]) -> None:
    """With the recorded offset: its own sum ran in another order, and may be one unit in the last place off ours."""
    _, absmax = quantize_4bit(made(case), case["quant_type"], case["blocksize"])
    offset = torch.tensor(np.array([int(case["offset_bits"], 16)], dtype=np.uint32).view(np.float32)[0])
    codes, scale = quantize_dynamic(absmax - offset, dynamic_map(), 256)
    if len(absmax) > 1:
        assert sha256(codes) == case["codes"]
    else:
        # A lone scale leaves nothing after the mean: bitsandbytes records code 0 of it, we the code of zero.
        assert codes.tolist() == [127]
    assert sha256(scale) == case["nested_absmax"]
    assert sha256(dequantize_absmax(NestedAbsmax(codes, scale, dynamic_map(), offset))) == case["absmax"]
    ours = quantize_absmax(absmax)
    assert torch.nextafter(ours.offset, offset) == offset
    assert sha256(ours.offset) == sha256(absmax.double().mean().float())


@pytest.mark.parametrize("case", cases("double_quant"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantized_bits_from_nested_scales(case: dict[str, Any], dtype: torch.dtype) -> None:
    named = tensors()
    packed, _ = quantize_4bit(made(case["input"]), case["quant_type"], case["blocksize"])
    nested = NestedAbsmax(
        named[case["absmax_u8_exact"]["tensor"]],
        named[case["nested_absmax"]["tensor"]],
        dynamic_map(),
        named[case["offset"]["tensor"]].view(()),
    )
    absmax = dequantize_absmax(nested)
    assert torch.equal(absmax, named[case["absmax_reconstructed_from_exact"]["tensor"]])
    expected = case["dequant_from_exact"][str(dtype).removeprefix("torch.")]
    got = dequantize_4bit(packed, absmax, expected["shape"], dtype, case["quant_type"], case["blocksize"])
    assert sha256(got) == expected["sha256"]


@pytest.mark.parametrize("case", HASHES["blockwise_8bit"], ids=lambda case: f"{case['elements']}_{case['blocksize']}")
def test_hashes_of_8bit_blocks(case: dict[str, Any]) -> None:
    start = case["pool_offset"]
    values = torch.from_numpy(pool()[start : start + case["elements"]] * np.float32(0.01))
    values[::97] = 0
    codes, absmax = quantize_dynamic(values, dynamic_map(), case["blocksize"])
    assert sha256(codes) == case["codes"]
    assert sha256(absmax) == case["absmax"]


# --- the rule itself ---


def by_hand(weight: Tensor, quant_type: str, blocksize: int) -> tuple[list[int], list[float]]:
    """The definition, one element at a time in numpy."""
    flat = weight.float().reshape(-1).numpy()
    codes: list[int] = []
    scales: list[float] = []
    for start in range(0, len(flat), blocksize):
        block = flat[start : start + blocksize]
        absmax = np.abs(block).max()
        scales.append(float(absmax))
        inverse = np.float32(1) / absmax if absmax > 0 else np.float32(0)
        for value in block:
            t = value * inverse
            if quant_type == "nf4":
                codes.append(sum(bool(t > np.float32(edge)) for edge in NF4_BOUNDARIES))
            else:
                size = sum(bool(abs(t) > np.float32(edge)) for edge in FP4_BOUNDARIES)
                codes.append([0, 1, 6, 7, 4, 5, 2, 3][size] + (8 if t < 0 else 0))
    return codes, scales


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(0, 13), min_size=1, max_size=3),
    quant_type=st.sampled_from(["nf4", "fp4"]),
    blocksize=st.sampled_from(BLOCKSIZES[:4]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_any_shape(shape: list[int], quant_type: str, blocksize: int, dtype: torch.dtype, seed: int) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    n = weight.numel()
    packed, absmax = quantize_4bit(weight, quant_type, blocksize)
    codes, scales = by_hand(weight, quant_type, blocksize)
    assert unpack(packed, n).tolist() == codes
    assert absmax.tolist() == scales
    if n % 2:
        assert int(packed[-1]) & 15 == (7 if quant_type == "nf4" else 0)
    back = dequantize_4bit(packed, absmax, shape, torch.float32, quant_type, blocksize)
    expected = codebook(quant_type)[codes] * absmax.repeat_interleave(blocksize)[:n]
    assert back.shape == weight.shape
    assert torch.equal(back.reshape(-1), expected)
    for rounded in (torch.float16, torch.bfloat16):
        again = dequantize_4bit(packed, absmax, shape, rounded, quant_type, blocksize)
        assert torch.equal(again, back.to(rounded))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("n", [1, 2, 4095, 4096, 4097, 12289])
def test_chunks_do_not_show(quant_type: str, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(n)
    whole = quantize_4bit(weight, quant_type, 64)
    restored = dequantize_4bit(*whole, (n,), torch.bfloat16, quant_type, 64)
    monkeypatch.setattr(blockwise, "CHUNK", 4096)
    parts = quantize_4bit(weight, quant_type, 64)
    assert torch.equal(whole[0], parts[0])
    assert torch.equal(whole[1], parts[1])
    assert torch.equal(restored, dequantize_4bit(*parts, (n,), torch.bfloat16, quant_type, 64))


def test_a_strided_weight_is_read_in_logical_order() -> None:
    weight = torch.randn(48, 80)
    expected = quantize_4bit(weight.t().contiguous(), "nf4", 64)
    got = quantize_4bit(weight.t(), "nf4", 64)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


@pytest.mark.parametrize(("quant_type", "byte"), [("nf4", 0x77), ("fp4", 0x00)])
def test_a_zero_block_is_plain_zero(quant_type: str, byte: int) -> None:
    weight = torch.zeros(2, 80)
    weight[0, 3] = 1.0
    packed, absmax = quantize_4bit(weight, quant_type, 64)
    assert absmax.tolist() == [1, 0, 0]
    assert packed[32:].tolist() == [byte] * 48
    assert torch.equal(dequantize_4bit(packed, absmax, (2, 80), torch.float32, quant_type, 64), weight)


def test_a_subnormal_block_counts_as_zero() -> None:
    packed, absmax = quantize_4bit(torch.full((64,), 1e-39), "nf4", 64)
    assert absmax.tolist() == [0]
    assert packed.tolist() == [0x77] * 32


def test_two_elements_keep_their_shape() -> None:
    packed, absmax = quantize_4bit(torch.tensor([[1.0], [-1.0]]), "nf4", 64)
    assert dequantize_4bit(packed, absmax, (2, 1), torch.float32, "nf4", 64).tolist() == [[1.0], [-1.0]]


def test_a_gradient_is_not_followed() -> None:
    packed, absmax = quantize_4bit(torch.randn(4, 64, requires_grad=True), "nf4", 64)
    assert not absmax.requires_grad
    assert packed.numel() == 128


MEMORY = """
import resource, torch
from onegpu.formats.blockwise import dequantize_4bit, quantize_4bit

def peak_mib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

quantize_4bit(torch.ones(2**10), "nf4", 64)
weight = torch.ones(2**25, dtype=torch.bfloat16)  # 64 MiB; 128 as float32
before = peak_mib()
packed, absmax = quantize_4bit(weight, "nf4", 64)  # 18 MiB
quantized = peak_mib()
back = dequantize_4bit(packed, absmax, weight.shape, torch.bfloat16, "nf4", 64)  # 64 MiB
print(quantized - before - 18, peak_mib() - quantized - 64)
"""


def test_temporaries_stay_small() -> None:
    """Beyond input and output, what is needed is a few chunks, however large the tensor."""
    # One thread, so that a busy machine does not make it wait for the other.
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True, timeout=120, env=env
    )
    extras = [float(extra) for extra in run.stdout.split()]
    assert max(extras) < 48


# --- nested scales ---


def test_nested_scales_of_one_block_reconstruct_exactly() -> None:
    nested = quantize_absmax(torch.tensor([0.3]))
    assert nested.codes.tolist() == [127]
    assert nested.absmax.tolist() == [0]
    assert dequantize_absmax(nested).tolist() == torch.tensor([0.3]).tolist()


def test_no_scales_at_all() -> None:
    nested = quantize_absmax(torch.empty(0))
    assert dequantize_absmax(nested).shape == (0,)
    assert nested.offset == 0


def test_a_midpoint_takes_the_even_entry() -> None:
    table = dynamic_map()
    middles = (table[1:] + table[:-1]) * 0.5
    # An entry of one in each block keeps its scale at one, so that the rest arrive exactly.
    values = torch.cat([torch.ones(1), middles])
    codes, absmax = quantize_dynamic(values, table, 256)
    assert absmax.tolist() == [1]
    got = codes[1:].int()
    assert bool((got % 2 == 0).all())
    assert torch.equal(got // 2 * 2, (torch.arange(255, dtype=torch.int32) + 1) // 2 * 2)


@settings(max_examples=40, deadline=None)
@given(m=st.integers(1, 700), seed=st.integers(0, 2**31))
def test_nested_scales_are_the_nearest_entries(m: int, seed: int) -> None:
    absmax = torch.rand(m, generator=torch.Generator().manual_seed(seed)) + 0.01
    nested = quantize_absmax(absmax)
    table = nested.code.double()
    scale = nested.absmax.repeat_interleave(256)[:m].double()
    target = (absmax - nested.offset).double() / scale.clamp_min(1e-30)
    best = (target[:, None] - table).abs().min(dim=1).values
    got = (target - table[nested.codes.long()]).abs()
    assert float((got - best).max()) < 1e-6
    assert len(nested.absmax) == num_blocks(m, 256)


# --- refusals ---


def test_refusals() -> None:
    weight = torch.randn(4, 64)
    packed, absmax = quantize_4bit(weight, "nf4", 64)
    with pytest.raises(ArgumentError, match=r"weight must be float32, float16 or bfloat16; got torch.float64"):
        quantize_4bit(weight.double(), "nf4", 64)
    with pytest.raises(ConfigError, match=r"blocksize must be one of 32, 64, .*; got 100"):
        quantize_4bit(weight, "nf4", 100)
    with pytest.raises(ConfigError, match="quant_type must be one of 'nf4', 'fp4'; got 'int8'"):
        quantize_4bit(weight, "int8", 64)
    with pytest.raises(ConfigError, match="importance is of use only with scale_search"):
        quantize_4bit(weight, "nf4", 64, importance=torch.ones(64))
    with pytest.raises(ArgumentError, match=r"importance must be float32 \[64\] or \[4, 64\]; got float32 \[4\]"):
        quantize_4bit(weight, "nf4", 64, scale_search=True, importance=torch.ones(4))
    with pytest.raises(ArgumentError, match=r"importance must be float32 \[64\] .* got float64 \[64\]"):
        quantize_4bit(weight, "nf4", 64, scale_search=True, importance=torch.ones(64).double())
    with pytest.raises(ArgumentError, match=r"packed must be uint8 \[64\]; got uint8 \[128\]"):
        dequantize_4bit(packed, absmax, (2, 64), torch.float32, "nf4", 64)
    with pytest.raises(ArgumentError, match=r"absmax must be float32 \[8\]; got float32 \[4\]"):
        dequantize_4bit(packed, absmax, (4, 64), torch.float32, "nf4", 32)
    with pytest.raises(ArgumentError, match=r"absmax must be float32 \[4\]; got bfloat16 \[4\]"):
        dequantize_4bit(packed, absmax.bfloat16(), (4, 64), torch.float32, "nf4", 64)
    with pytest.raises(ArgumentError, match=r"absmax must be float32 \[4\]; got float32 \[2, 2\]"):
        quantize_absmax(absmax.view(2, 2))
    nested = quantize_absmax(absmax)
    with pytest.raises(ArgumentError, match=r"nested absmax must be float32 \[1\]; got float32 \[2\]"):
        dequantize_absmax(nested._replace(absmax=torch.zeros(2)))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_weight_that_is_not_finite_is_named(bad: float, dtype: torch.dtype) -> None:
    weight = torch.randn(33, 7).to(dtype)
    check_finite(weight, "layer.weight")
    weight[13, 3] = bad
    with pytest.raises(CheckpointError, match=r"tensor 'layer.weight' holds NaN or infinity; expected finite weights"):
        check_finite(weight, "layer.weight")


def test_a_weight_beyond_float16_is_named() -> None:
    weight = torch.tensor([[1.0, -65504.0]])
    check_finite(weight, "w", blockwise.FLOAT16_MAX)
    weight[0, 0] = -70000.0
    check_finite(weight, "w")
    with pytest.raises(CheckpointError, match="tensor 'w' holds a weight of magnitude 70000; expected at most 65504"):
        check_finite(weight, "w", blockwise.FLOAT16_MAX)
    check_finite(torch.empty(0, 5), "empty")


# --- on a GPU ---


@pytest.mark.gpu
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("scale_search", [False, True])
def test_a_gpu_agrees_without_waiting(quant_type: str, scale_search: bool) -> None:
    weight = torch.randn(301, 257)
    on_gpu = weight.cuda()
    expected = quantize_4bit(weight, quant_type, 64, scale_search=scale_search)
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        packed, absmax = quantize_4bit(on_gpu, quant_type, 64, scale_search=scale_search)
        back = dequantize_4bit(packed, absmax, (301, 257), torch.bfloat16, quant_type, 64)
        nested = quantize_absmax(absmax)
        restored = dequantize_absmax(nested)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    same = (absmax.cpu() == expected[1]).float().mean()
    assert float(same) >= (0.999 if scale_search else 1.0)
    if not scale_search:
        assert torch.equal(packed.cpu(), expected[0])
    again = dequantize_4bit(packed.cpu(), absmax.cpu(), (301, 257), torch.bfloat16, quant_type, 64)
    assert torch.equal(back.cpu(), again)
    assert torch.equal(restored.cpu(), dequantize_absmax(NestedAbsmax(*(part.cpu() for part in nested))))
