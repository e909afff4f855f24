from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from onegpu.bench.environment import PACKAGES

Call = Callable[..., Any]
HEAVY = ("torch", "transformers", "triton", "numba", "numpy", "fastapi")
# A refusal that comes at once: planning needs no torch.
UNKNOWN = ("fit", "/no/such/folder", "--gpu", "24GiB")


def run(*arguments: str, code: str | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    command = [sys.executable, *(("-c", code) if code else ("-m", "onegpu.cli")), *arguments]
    source = str(Path(__file__).parents[2] / "src")
    path = os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH"))))
    clean = {key: value for key, value in os.environ.items() if not key.startswith("ONEGPU_")}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=clean | {"PYTHONPATH": path} | env, check=False
    )


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["bench", "generate", "--help"], ["version"]])
def test_help_is_quick_because_it_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import atexit, sys, time\n"
        f"atexit.register(lambda: print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr))\n"
        "atexit.register(lambda: print(time.process_time(), file=sys.stderr))\n"
        f"sys.argv = ['onegpu', *{arguments!r}]\n"
        "from onegpu.cli import main\nmain()\n"
    )
    seconds = []
    for _ in range(3):
        result = run(code=code)
        assert result.returncode == 0, result.stderr
        elapsed, heavy = result.stderr.split("\n", 1)
        assert heavy.strip() == "[]"
        seconds.append(float(elapsed))
    assert min(seconds) < 0.5, "processor time, so that a busy machine does not count"


def test_no_command_is_help() -> None:
    result = run()
    assert "quantize" in result.stdout + result.stderr


def test_an_error_of_ours_has_no_traceback_unless_asked() -> None:
    plain = run("run", "/no/such/folder", "hi")
    assert plain.returncode == 1
    assert plain.stderr == "error: no folder /no/such/folder\n\nhint: a Hub name has the form org/name\n"
    assert plain.stdout == ""
    for shown in (
        run("--debug", *UNKNOWN),
        run(*UNKNOWN, ONEGPU_DEBUG="1"),
    ):
        assert shown.returncode == 1
        assert "Traceback" in shown.stderr
        assert "NotFoundError" in shown.stderr


def test_an_unexpected_error_is_told_in_one_line() -> None:
    code = (
        "import sys\nimport onegpu.cli.version, onegpu.bench.environment as place\n"
        "def broken(): raise RuntimeError('the cat\\nate it')\n"
        "place.versions = broken\n"
        "sys.argv = ['onegpu', 'version']\n"
        "from onegpu.cli import main\nmain()\n"
    )
    result = run(code=code)
    assert result.returncode == 1
    assert result.stderr.startswith("error: RuntimeError: the cat\n\nhint: ")


@pytest.mark.parametrize("kind", ["MemoryError", "torch.OutOfMemoryError"])
def test_out_of_memory_says_what_needs_less(call: Call, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    import torch

    def full() -> dict[str, str]:
        raise (MemoryError if kind == "MemoryError" else torch.OutOfMemoryError)("CUDA out of memory.\nmore")

    monkeypatch.setattr("onegpu.bench.environment.versions", full)
    result = call("version")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: out of memory: CUDA out of memory.\n\nhint: a smaller --quantization")


def test_a_variable_sets_an_option(tiny: Path) -> None:
    result = run("run", str(tiny), "hi", "--json", ONEGPU_RUN_MAX_NEW_TOKENS="3", ONEGPU_RUN_QUANTIZATION="int8")
    assert result.returncode == 0, result.stderr
    said = json.loads(result.stdout)
    assert said["new_tokens"] <= 3
    assert said["format"] == "int8"


def test_color_only_where_it_is_wanted() -> None:
    loud = {"FORCE_COLOR": "1", "TERM": "xterm-256color"}
    assert "\x1b[" in run(*UNKNOWN, **loud).stderr
    assert "\x1b[3" not in run(*UNKNOWN, NO_COLOR="1", **loud).stderr


def test_a_reader_that_goes_away_is_no_error(tiny: Path) -> None:
    source = str(Path(__file__).parents[2] / "src")
    command = f"{sys.executable} -m onegpu.cli run {tiny} hi -q none -n 64 --device cpu | head -c 1"
    result = subprocess.run(
        ["bash", "-c", command],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": source},
        check=False,
    )
    assert "Traceback" not in result.stderr
    assert "error:" not in result.stderr


def test_version_names_what_it_stands_on(call: Call) -> None:
    said = json.loads(call("version", "--json").stdout)
    assert set(said) == {"python", *PACKAGES}
    lines = call("version").stdout.splitlines()
    assert lines[0].split() == ["onegpu", said["onegpu"]]
    assert len(lines) == len(said)
