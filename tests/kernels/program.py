"""Programs beside these tests that compile kernels for GPUs that are not there, or run their PTX on the CPU.

In processes of their own: Triton looks at `TRITON_INTERPRET` when it is imported, and the tests have set it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


def results_of(program: str, *arguments: str) -> list[dict]:
    """The lines of JSON that a program of this folder prints."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name(program)), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
