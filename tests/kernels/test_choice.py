"""What a report says of the kernel that runs an operator."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from onegpu.kernels import cpu_4bit, kernel_for
from onegpu.kernels.ops import why_not_triton

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int]]]:
    """A GPU of the compute capability that the test puts into the list."""
    capability = [(9, 0)]
    monkeypatch.setattr("torch.version.hip", None)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability[0])
    why_not_triton.cache_clear()
    yield capability
    why_not_triton.cache_clear()


def test_a_gpu_runs_triton(card: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert kernel_for("linear_4bit", CUDA) == kernel_for("linear_8bit", CUDA) == "Triton"


def test_an_old_gpu_runs_the_reference(card: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    card[0] = (7, 5)
    assert kernel_for("linear_4bit", CUDA) == "Triton"
    for operator in ("linear_8bit", "decode_attention", "append_kv", "rotary_decode_attention"):
        assert kernel_for(operator, CUDA) == "torch reference, since compute capability 7.5 is below 8.0"
    why_not_triton.cache_clear()
    card[0] = (7, 0)
    assert kernel_for("linear_4bit", CUDA) == "torch reference, since compute capability 7.0 is below 7.5"


def test_a_gpu_without_triton(card: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert kernel_for("linear_4bit", CUDA) == "torch reference, since the package triton is not installed"


def test_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernel_for("linear_8bit", CPU) == "torch reference"
    monkeypatch.setattr(cpu_4bit, "available", lambda: False)
    assert kernel_for("linear_4bit", CPU) == "torch reference; `pip install llvmlite` gives a faster one"
    monkeypatch.setattr(cpu_4bit, "available", lambda: True)
    monkeypatch.setattr(cpu_4bit, "form_name", lambda: "avx2")
    monkeypatch.setattr(cpu_4bit, "max_rows", lambda: 64)
    assert kernel_for("linear_4bit", CPU) == "compiled by LLVM (avx2) up to 64 rows, torch above"
