from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from onegpu.diagnosis import Finding

Call = Callable[..., Any]


def test_a_healthy_machine_is_exit_code_0(call: Call, tiny: Path) -> None:
    result = call("doctor", "--model", tiny)
    assert result.exit_code == 0, result.output
    for words in ("packages", "linear_4bit", "torch_varlen", f"{tiny} on ", "next token"):
        assert words in result.stdout
    assert result.stdout.endswith("\nhealthy\n")


def test_json(call: Call) -> None:
    said = json.loads(call("doctor", "--json").stdout)
    assert said["healthy"] is True
    assert {finding["subject"] for finding in said["sections"]["packages"]} >= {"torch", "transformers", "triton"}


def test_an_unhealthy_machine_is_exit_code_1(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onegpu.diagnosis.checkup.look_at_gpus", lambda: [Finding("gpu", "problem", "no", "yes")])
    result = call("doctor")
    assert result.exit_code == 1
    assert result.stdout.endswith("not healthy: 1 problem\n")


def test_no_such_model(call: Call) -> None:
    result = call("doctor", "--model", "/no/such/folder")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: no folder /no/such/folder")


def test_env_can_be_pasted(call: Call) -> None:
    import torch

    result = call("env")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert (lines[0], lines[-1]) == ("```", "```")
    facts = dict(line.split(maxsplit=1) for line in lines[1:-1])
    # A CUDA wheel may leave its local part (+cu130) out of its metadata.
    assert facts["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert set(facts) >= {"device", "system", "python", "cuda", "driver", "transformers", "llvmlite"}


def test_env_as_json(call: Call) -> None:
    said = json.loads(call("env", "--json").stdout)
    assert said["versions"]["onegpu"]
    assert "device" in said
