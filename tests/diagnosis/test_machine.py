"""What is said of drivers, versions and builds that do not fit together."""

from __future__ import annotations

import pytest
import torch
from packaging.requirements import Requirement

from onegpu.diagnosis.machine import (
    against,
    is_built_for,
    look_at_driver,
    look_at_gpus,
    look_at_triton,
    look_at_versions,
)


def test_an_old_version_is_a_problem_with_its_cure() -> None:
    found = against(Requirement("transformers>=5.17,<6"), "4.57.1")
    assert found.is_problem
    assert found.text == "4.57.1 is installed, <6,>=5.17 is needed"
    assert found.cure == 'pip install "transformers<6,>=5.17"'


def test_a_missing_package_is_a_problem() -> None:
    found = against(Requirement("accelerate>=1.1"), None)
    assert found.is_problem
    assert found.text == "is not installed"


@pytest.mark.parametrize("version", ["2.13.0+cpu", "2.11.0+cu130", "2.14.1", "2.11.0rc1"])
def test_a_build_is_told_by_its_base_version(version: str) -> None:
    assert not against(Requirement("torch>=2.11"), version).is_problem


def test_what_is_installed_here_fits() -> None:
    assert [found.subject for found in look_at_versions() if found.is_problem] == []


@pytest.mark.parametrize(
    ("wanted", "found", "accelerator", "state", "words"),
    [
        (["triton==3.6.0"], "3.6.0", "13.0", "ok", "3.6.0"),
        (["triton==3.6.0"], "3.5.0", "13.0", "note", "was built for triton==3.6.0"),
        ([], None, "13.0", "problem", "our GPU kernels are written in it"),
        ([], None, None, "note", "a CPU needs none"),
        (["numpy"], "3.9.0", None, "ok", "3.9.0"),
    ],
)
def test_triton_beside_torch(
    wanted: list[str], found: str | None, accelerator: str | None, state: str, words: str
) -> None:
    (said,) = look_at_triton(wanted, found, accelerator)
    assert said.state == state
    assert words in said.text


@pytest.mark.parametrize(
    ("driver", "accelerator", "count", "problems", "words"),
    [
        (None, None, 0, 0, "no NVIDIA driver here"),
        ("570.1", "13.0", 1, 0, "570.1"),
        (None, "6.4", 1, 0, ""),
        ("570.1", None, 0, 1, "is a build for the CPU, though there is a GPU"),
        ("470.1", "13.0", 0, 1, "sees no GPU under driver 470.1"),
    ],
)
def test_driver_and_build(driver: str | None, accelerator: str | None, count: int, problems: int, words: str) -> None:
    said = list(look_at_driver(driver, accelerator, count))
    assert sum(found.is_problem for found in said) == problems
    assert words in (said[-1].text if said else "")
    assert all(found.cure for found in said if found.is_problem)


@pytest.mark.parametrize(
    ("capability", "built", "expected"),
    [
        ((8, 0), ["sm_80", "sm_90"], True),
        ((8, 9), ["sm_80"], True),
        ((7, 5), ["sm_80"], False),
        ((12, 0), ["sm_90", "sm_100"], False),
        ((12, 0), ["sm_90", "compute_90"], True),
        ((12, 0), ["sm_120"], True),
        ((9, 0), ["sm_90a"], True),
        ((9, 0), [], False),
    ],
)
def test_whether_torch_was_built_for_a_gpu(capability: tuple[int, int], built: list[str], expected: bool) -> None:
    assert is_built_for(capability, built) is expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_machine_without_a_gpu_is_no_problem() -> None:
    assert not any(found.is_problem for found in look_at_gpus())


@pytest.mark.gpu
def test_the_gpu_is_described() -> None:
    said = [found for found in look_at_gpus() if found.subject == "gpu 0"]
    assert said
    assert "compute capability" in said[0].text
    assert not said[0].is_problem
