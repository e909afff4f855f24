"""The sentences of doctor that need a machine which is not here: each by its words, with its cure."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement

from onegpu.diagnosis import machine
from onegpu.diagnosis.checkup import look_at_sdpa, measured
from onegpu.diagnosis.machine import against, look_at_driver, look_at_gpu, look_at_triton, look_at_versions
from onegpu.diagnosis.measure import judged
from onegpu.diagnosis.measure import measure as measure_gpu
from onegpu.diagnosis.model import look_at_model
from onegpu.diagnosis.operators import look_at_operator

CPU = torch.device("cpu")
ONE = torch.ones(2)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of compute capability 12.0 with 24 GiB, of which 16 MiB are free, under a torch built for 9.0."""
    properties = SimpleNamespace(name="NVIDIA Foo", major=12, minor=0)
    monkeypatch.setattr("torch.version.hip", None)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda index: properties)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (12, 0))
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (16 << 20, 24 << 30))
    monkeypatch.setattr("torch.cuda.get_arch_list", lambda: ["sm_80", "sm_90"])


@pytest.mark.usefixtures("card")
def test_a_gpu_that_torch_was_not_built_for() -> None:
    found = look_at_gpu(0)
    assert found.is_problem
    assert found.text == (
        "NVIDIA Foo, 24.0 GiB (0.0 free), compute capability 12.0; torch was built for sm_80 sm_90 only, "
        "so its kernels do not start"
    )
    assert found.cure == machine.INSTALL_CUDA + " with the newest CUDA"
    assert machine.INSTALL_CUDA == "install a torch build for CUDA: https://pytorch.org/get-started/locally"


@pytest.mark.usefixtures("card")
def test_a_gpu_that_torch_was_built_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.get_arch_list", lambda: ["sm_120"])
    found = look_at_gpu(0)
    assert found.state == "ok"
    assert found.text.endswith("compute capability 12.0")


@pytest.mark.usefixtures("card")
def test_a_full_gpu_cannot_be_measured() -> None:
    (found,) = measure_gpu(0)
    assert (found.state, found.text) == ("note", "too little free memory to measure")
    assert found.cure == "close what uses the GPU"


def test_nothing_to_measure() -> None:
    (found,) = measured([])
    assert (found.state, found.text) == ("note", "there is no GPU to measure")


def test_a_slow_gpu_is_looked_at_with_the_drivers_tool() -> None:
    found = judged("gpu 0", "NVIDIA H100 80GB HBM3", 3.0e12, 100e12)
    assert found.state == "note"
    expected = "look at clocks, power limit and other processes: nvidia-smi -q -d CLOCK,POWER,PERFORMANCE"
    assert found.cure == expected


def test_a_driver_that_torch_does_not_see() -> None:
    hidden = list(look_at_driver("550.1", "13.0", 0))[-1]
    assert hidden.cure.startswith("update the driver, look at CUDA_VISIBLE_DEVICES, or install a torch build for CUDA")
    wrong_build = list(look_at_driver("550.1", None, 0))[-1]
    assert wrong_build.text.endswith("is a build for the CPU, though there is a GPU")
    assert wrong_build.cure == machine.INSTALL_CUDA
    nothing = list(look_at_driver(None, None, 0))[-1]
    assert nothing.text == "no NVIDIA driver here; everything runs on the CPU"


def test_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    assert against(Requirement("rich>=13"), None).cure == 'pip install "rich>=13"'
    (other,) = look_at_triton(["triton==3.6.0"], "3.5.0", "13.0")
    assert other.text.endswith("was built for triton==3.6.0")
    assert other.cure == 'pip install "triton==3.6.0"'
    (missing,) = look_at_triton([], None, "13.0")
    assert missing.cure.startswith("pip install triton (Linux) or triton-windows; without it the torch reference runs")
    monkeypatch.setattr(machine, "installed", lambda name: None)
    said = {found.subject: found for found in look_at_versions()}
    assert said["bitsandbytes"].state == "note"
    assert said["bitsandbytes"].text == "not installed, and not needed"
    assert said["onegpu"].text == "not installed as a package"


@pytest.mark.parametrize(
    ("kernel", "cure"),
    [
        ("torch reference, since the package triton is not installed", "pip install triton"),
        (
            "torch reference, since compute capability 7.0 is below 7.5",
            "the reference is right and slower; a GPU from Turing on runs the kernels",
        ),
        ("torch reference; `pip install llvmlite` gives a faster one", "pip install llvmlite"),
        ("Triton", ""),
    ],
)
def test_an_operators_cure(kernel: str, cure: str) -> None:
    found = look_at_operator("linear_4bit", lambda: (ONE, ONE), kernel)
    assert found.cure == cure
    assert found.state == ("note" if cure else "ok")
    assert found.text == f"runs: {kernel}"


def test_an_operator_that_raises_says_where_to_tell() -> None:
    def broken() -> Any:
        raise RuntimeError("no\nmore")

    found = look_at_operator("linear_4bit", broken, "Triton")
    assert found.text == "does not run (Triton): no"
    assert found.cure == "run `onegpu --debug doctor`; it is worth an issue, with `onegpu env` in it"


@pytest.fixture
def nothing_allowed() -> Any:
    from onegpu.attention.sdp_kernel import sdp_kernel

    with sdp_kernel(enable_flash=False, enable_math=False, enable_mem_efficient=False, enable_cudnn=True):
        yield


@pytest.mark.usefixtures("nothing_allowed")
def test_no_attention_at_all_is_a_problem() -> None:
    config = {
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 100,
        "intermediate_size": 128,
    }
    said = {found.subject: found for found in look_at_model(config, CPU)}
    assert said["prompt"].is_problem
    assert said["prompt"].text == "no attention kernel can run: is switched off"
    assert "enable_math_sdp(True)" in said["prompt"].cure
    last = look_at_sdpa(CPU)[-1]
    assert last.is_problem
    assert last.text == "torch can run none of them"
