from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from onegpu.cli.fit import parse_count
from onegpu.errors import ConfigError

Call = Callable[..., Any]


def test_the_table(call: Call, tiny: Path) -> None:
    result = call("fit", tiny, "--gpu", "RTX 4090", "--context", "128")
    assert result.exit_code == 0, result.output
    for words in ("llama, 2 layers", "context 128, batch 1", "RTX 4090", "nf4+double", "run it: onegpu run"):
        assert words in result.stdout
    assert result.stderr == ""


def test_json(call: Call, tiny: Path) -> None:
    result = call("fit", tiny, "--gpu", "24GiB", "--json", "--kv-dtype", "int8", "-b", 2)
    said = json.loads(result.stdout)
    assert said["kv_dtype"] == "int8"
    assert said["context"] == 256, "the model's longest"
    assert said["fits"] is True
    assert said["gpu"]["memory_bytes"] == 24 << 30
    assert {row["format"] for row in said["formats"]} >= {"16bit", "int8", "nf4", "fp4"}


def test_the_command_it_gives_is_one(call: Call, tiny: Path) -> None:
    command = json.loads(call("fit", tiny, "--gpu", "24GiB", "--json").stdout)["formats"]
    for row in command:
        words = row["command"].replace('"..."', "hi").split()
        assert words[0] == "onegpu"
        result = call(*words[1:], "-n", 2, "--device", "cpu")
        assert result.exit_code == 0, (row["command"], result.output)


def test_what_does_not_fit_is_exit_code_1(call: Call, tiny: Path) -> None:
    result = call("fit", tiny, "--gpu", "400MiB")
    assert result.exit_code == 1
    assert "no format fits" in result.stdout


@pytest.mark.parametrize(("text", "tokens"), [("8192", 8192), ("8k", 8192), ("8K", 8192), ("1m", 1 << 20)])
def test_counts(text: str, tokens: int) -> None:
    assert parse_count(text) == tokens


@pytest.mark.parametrize("text", ["0", "-1", "8kb", "many", ""])
def test_what_is_no_count(text: str) -> None:
    with pytest.raises(ConfigError, match="--context must be a number of tokens, such as 8192 or 8k; got"):
        parse_count(text)


def test_errors_are_told_in_words(call: Call, tiny: Path) -> None:
    unknown = call("fit", tiny, "--gpu", "RTX 490")
    assert unknown.exit_code == 1
    assert unknown.stderr.startswith("error: no GPU called 'RTX 490' is in the table\n\nhint: did you mean 'RTX 4090'")
    missing = call("fit", "nobody/nothing")
    assert missing.exit_code == 1
    assert missing.stderr.startswith("error: no model called 'nobody/nothing'")


def test_torch_is_not_imported_and_it_is_quick(tiny: Path) -> None:
    code = (
        "import atexit, sys\n"
        "names = ('torch', 'transformers', 'triton', 'numba', 'accelerate')\n"
        "atexit.register(lambda: print([name for name in names if name in sys.modules], file=sys.stderr))\n"
        f"sys.argv = ['onegpu', 'fit', {str(tiny)!r}, '--gpu', 'H100']\n"
        "from onegpu.cli import main\nmain()\n"
    )
    begun = time.perf_counter()
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=env, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr.strip() == "[]"
    assert time.perf_counter() - begun < 5, "it takes 0.6 s on an idle machine"
