"""What is compiled ahead is what the launches find; a launch that is left out in a rehearsal comes in the real run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from onegpu.kernels.compile_ahead import rehearse_and_compile

PROGRAM = Path(__file__).parent / "compile_ahead_program.py"


def test_compiled_once_and_found_by_the_launch(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, str(PROGRAM)], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["off a GPU"] == 0
    assert found["ahead"] == {"kernels": 2, "compiled": 2, "loaded": 2, "launched": 0}
    assert found["then"] == {"compiled": 2, "loaded": 2, "launched": 3}
    assert found["again"] == 0
    assert found["elsewhere"] == 1
    assert found["broken"] == 0
    assert found["ran"] == [1, 2]
    assert found["error"]


def test_interpreted_kernels_are_just_run(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    ran: list[int] = []
    assert rehearse_and_compile(lambda: ran.append(1), torch.device("cpu")).kernels == 0
    assert ran == []


@pytest.mark.gpu
def test_a_product_compiled_ahead_is_right_afterwards() -> None:
    from onegpu.kernels import rms_norm
    from onegpu.kernels.compile_ahead import compile_ahead

    x, weight = torch.randn(3, 1184, device="cuda"), torch.randn(1184, device="cuda")
    results = []
    assert compile_ahead(lambda: results.append(rms_norm(x, weight, 1e-5)), x.device).kernels == 1
    assert compile_ahead(lambda: results.append(rms_norm(x, weight, 1e-5)), x.device).kernels == 0
    expected = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight
    torch.testing.assert_close(results[1], expected)
