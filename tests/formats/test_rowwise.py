from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from formats.vectors import HASHES, cases, hash_id, made, sha256, tensors
from onegpu.errors import ArgumentError
from onegpu.formats import rowwise
from onegpu.formats.rowwise import INVERSE_127, dequantize_rows, quantize_rows


@pytest.mark.parametrize("case", cases("int8_weight"))
def test_weight_bits(case: dict[str, Any]) -> None:
    codes, row_stats, outlier_cols = quantize_rows(tensors()[case["input"]["tensor"]])
    assert sha256(codes) == case["CB"]["sha256"]
    assert sha256(row_stats) == case["SCB"]["sha256"]
    assert not bool(outlier_cols.any())
    assert sha256(dequantize_rows(codes, row_stats, torch.float32)) == case["dequant_fp32"]["sha256"]
    ran = case["cuda_run"]
    assert torch.equal(codes, tensors()[ran["CB"]["tensor"]])
    assert torch.equal(row_stats, tensors()[ran["SCB"]["tensor"]])


@pytest.mark.parametrize("case", HASHES["int8_weight"], ids=hash_id)
def test_hashes_of_weights(case: dict[str, Any]) -> None:
    codes, row_stats, _ = quantize_rows(made(case))
    assert sha256(codes) == case["codes"]
    assert sha256(row_stats) == case["row_stats"]


@pytest.mark.parametrize("case", HASHES["int8_activation"], ids=lambda case: f"{case['input']}_{case['threshold']}")
def test_hashes_of_activations(case: dict[str, Any]) -> None:
    codes, row_stats, outlier_cols = quantize_rows(tensors()[case["input"]], case["threshold"])
    assert sha256(codes) == case["codes"]
    assert sha256(row_stats) == case["row_stats"]
    assert outlier_cols.nonzero().view(-1).tolist() == case["outlier_cols"]


def test_half_way_goes_to_even() -> None:
    codes, row_stats, _ = quantize_rows(torch.tensor([[127.0, 0.5, 1.5, 2.5, 126.5]]))
    assert codes.tolist() == [[127, 0, 2, 2, 126]]
    assert row_stats.tolist() == [127]


def test_outlier_elements_do_not_scale_their_row_but_their_column_mates_do() -> None:
    x = torch.tensor([[7.0, 1, 2, 3], [5, 0.5, 0.25, 1]])
    codes, row_stats, outlier_cols = quantize_rows(x, threshold=6.0)
    assert row_stats.tolist() == [3, 5]
    assert codes.tolist() == [[0, 42, 85, 127], [0, 13, 6, 25]]
    assert outlier_cols.tolist() == [True, False, False, False]


def test_the_threshold_is_met_after_the_cast_and_counts_when_equal() -> None:
    x = torch.tensor([[6.0, 5.996, 5.9999, -6.0, 1.0]])
    assert quantize_rows(x, 6.0).outlier_cols.tolist() == [True, False, True, True, False]


def test_values_beyond_float16_saturate() -> None:
    codes, row_stats, _ = quantize_rows(torch.tensor([[1e6, -65504.0, float("inf"), 100.0]]))
    assert row_stats.tolist() == [65504]
    assert codes.tolist() == [[127, -127, 127, 0]]
    assert quantize_rows(torch.tensor([[1e6, 1.0]]), 6.0).outlier_cols.tolist() == [True, False]


def test_nan_shows_in_the_row_stat_only() -> None:
    codes, row_stats, _ = quantize_rows(torch.tensor([[float("nan"), 1.0], [2.0, 1.0]]))
    assert bool(row_stats[0].isnan())
    assert codes.tolist() == [[0, 0], [127, 64]]


@settings(max_examples=60, deadline=None)
@given(
    M=st.integers(0, 9),
    K=st.integers(0, 70),
    threshold=st.sampled_from([0.0, 1.5, 3.0]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    chunk=st.sampled_from([1, 100, 2**20]),
    seed=st.integers(0, 2**31),
)
def test_any_shape(M: int, K: int, threshold: float, dtype: torch.dtype, chunk: int, seed: int) -> None:
    x = torch.randn(M, K, generator=torch.Generator().manual_seed(seed)).to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rowwise, "CHUNK", chunk)
        codes, row_stats, outlier_cols = quantize_rows(x, threshold)
        back = dequantize_rows(codes, row_stats, torch.float32)
    a = x.half().float().numpy()
    outlier = np.abs(a) >= threshold if threshold else np.zeros_like(a, dtype=bool)
    assert outlier_cols.tolist() == outlier.any(axis=0).tolist()
    assert codes.shape == (M, K)
    for row in range(M):
        counted = np.where(outlier[row], np.float32(0), a[row])
        stat = np.abs(counted).max(initial=np.float32(0))
        assert float(row_stats[row]) == stat
        scale = np.float32(1) / stat * np.float32(127) if stat else np.float32(0)
        expected = np.where(outlier.any(axis=0), 0, np.rint(counted * scale))
        assert codes[row].tolist() == expected.tolist()
        product = codes[row].float().numpy() * stat * np.float32(INVERSE_127)
        assert back[row].tolist() == product.tolist()
    assert torch.equal(dequantize_rows(codes, row_stats, torch.bfloat16), back.bfloat16())


def test_error_is_half_a_step() -> None:
    x = torch.randn(31, 257).half()
    codes, row_stats, _ = quantize_rows(x)
    error = (dequantize_rows(codes, row_stats, torch.float32) - x.float()).abs()
    assert bool((error <= row_stats[:, None] / 254 * (1 + 1e-5)).all())


def test_refusals() -> None:
    x = torch.randn(4, 8)
    with pytest.raises(
        ArgumentError, match=r"x must be a floating-point matrix \[M, K\]; got torch.float32 of shape \[8\]"
    ):
        quantize_rows(x[0])
    with pytest.raises(ArgumentError, match=r"x must be a floating-point matrix .*; got torch.int64"):
        quantize_rows(x.long())
    for threshold in (-1.0, float("nan")):
        with pytest.raises(ArgumentError, match=f"threshold must not be negative; got {threshold}"):
            quantize_rows(x, threshold)
    codes, row_stats, _ = quantize_rows(x)
    with pytest.raises(ArgumentError, match=r"codes must be int8 \[M, K\]; got torch.float32"):
        dequantize_rows(x, row_stats, torch.float32)
    with pytest.raises(ArgumentError, match=r"row_stats must be float32 \[4\]; got torch.float32 of shape \[3\]"):
        dequantize_rows(codes, row_stats[:3], torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("threshold", [0.0, 2.0])
def test_a_gpu_agrees_without_waiting(threshold: float) -> None:
    x = torch.randn(37, 300).half()
    on_gpu = x.cuda()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = quantize_rows(on_gpu, threshold)
        back = dequantize_rows(got.codes, got.row_stats, torch.float32)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    expected = quantize_rows(x, threshold)
    for ours, theirs in zip(got, expected, strict=True):
        assert torch.equal(ours.cpu(), theirs)
    assert torch.equal(back.cpu(), dequantize_rows(expected.codes, expected.row_stats, torch.float32))
