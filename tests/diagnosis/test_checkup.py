"""The whole page: healthy here, and unhealthy where an operator is broken; one model's attention; measured figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from onegpu.attention.varlen import VarlenSpec
from onegpu.diagnosis import Finding, doctor
from onegpu.diagnosis.measure import judged
from onegpu.diagnosis.measure import measure as measure_gpu
from onegpu.diagnosis.model import look_at_model
from onegpu.diagnosis.more_operators import many_rows_trials
from onegpu.diagnosis.operators import look_at_attention, look_at_many_rows, look_at_operator, look_at_operators
from onegpu.errors import ConfigError

CPU = torch.device("cpu")
LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
}


def test_this_machine_is_healthy() -> None:
    found = doctor()
    assert found.is_healthy, str(found)
    assert str(found).endswith("healthy")
    assert found.to_dict()["healthy"] is True
    assert json.dumps(found.to_dict())


def test_every_operator_runs_on_a_cpu() -> None:
    said = list(look_at_operators(CPU))
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("onegpu::")}
    assert {f"onegpu::{found.subject}" for found in said} == registered
    assert all(found.text.startswith("runs: ") for found in said)


@pytest.mark.gpu
def test_every_operator_runs_on_a_gpu() -> None:
    said = list(look_at_operators(torch.device("cuda", torch.cuda.current_device())))
    assert [found for found in said if found.is_problem] == []


def test_many_rows_are_right_whatever_runs_them() -> None:
    for got, expected in (trial() for trial in many_rows_trials(CPU, torch.float32).values()):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_many_rows_say_what_runs_them() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    for found in look_at_many_rows(device):
        assert found.text == "runs: CUDA C++ for this card" or found.text.startswith(
            "runs: Triton and the vendor's library; a quicker kernel "
        )


def test_an_operator_that_raises_is_a_problem() -> None:
    def broken() -> Any:
        raise RuntimeError("no kernel image is available\nmore")

    found = look_at_operator("linear_4bit", broken, "Triton")
    assert found.is_problem
    assert found.text == "does not run (Triton): no kernel image is available"


@pytest.mark.parametrize("wrong", [1.5, float("nan")])
def test_an_operator_that_is_wrong_is_a_problem(wrong: float) -> None:
    one = torch.ones(2)
    found = look_at_operator("linear_4bit", lambda: (one * wrong, one), "Triton")
    assert found.is_problem
    assert found.text.startswith("gives wrong numbers (Triton)")


def test_a_slower_kernel_is_noted_with_its_cure() -> None:
    one = torch.ones(2)
    found = look_at_operator("linear_4bit", lambda: (one, one), "torch reference; the package triton is not installed")
    assert (found.state, found.cure) == ("note", "pip install triton")


def test_a_problem_makes_the_machine_unhealthy(monkeypatch: pytest.MonkeyPatch) -> None:
    bad = [Finding("gpu", "problem", "is on fire", "water")]
    monkeypatch.setattr("onegpu.diagnosis.checkup.look_at_gpus", lambda: bad)
    found = doctor()
    assert found.problems == bad
    assert str(found).endswith("not healthy: 1 problem")
    assert "-> water" in str(found)


def test_attention_on_a_cpu() -> None:
    said = {found.subject: found for found in look_at_attention(VarlenSpec(CPU, torch.bfloat16, 64))}
    assert said["torch_varlen"].text == "needs a CUDA device, the tokens are on cpu"
    assert said["grouped"].text == "needs the lengths on the host, and they are on the device"
    assert said["padded"].state == "ok"


def subjects(config: dict[str, Any]) -> dict[str, Finding]:
    return {found.subject: found for found in look_at_model(config, CPU)}


def test_a_decoder() -> None:
    said = subjects(LLAMA | {"torch_dtype": "float16"})
    assert said["model"].text == "llama, 2 layers, 4 heads of 16, in float16"
    assert said["prompt"].text == said["next token"].text == "torch takes flash"
    assert "prompt beyond the window" not in said
    assert "prompt beyond the window" in subjects(LLAMA | {"sliding_window": 8})


def test_an_encoder() -> None:
    said = subjects(LLAMA | {"model_type": "bert"})
    assert said["texts with padding"].state == "ok"
    assert said["grouped"].text == "can run"


def test_an_odd_head_dim() -> None:
    said = subjects(LLAMA | {"head_dim": 20})
    assert "a head dim of 20 is no multiple of 8" in said["head dim"].text


def test_a_switched_off_flash_is_explained() -> None:
    torch.backends.cuda.enable_flash_sdp(False)
    try:
        said = subjects(LLAMA)
    finally:
        torch.backends.cuda.enable_flash_sdp(True)
    assert said["prompt"].text == "torch takes math; flash is switched off"
    assert "enable_flash_sdp(True)" in said["prompt"].cure


def test_a_model_by_its_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert f"{tmp_path} on " in str(doctor(str(tmp_path)))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="does not say its number of layers"):
        doctor(str(tmp_path))


def test_nothing_to_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert doctor(measure=True).sections["speed"][0].text == "there is no GPU to measure"


def test_figures_beside_the_datasheet() -> None:
    good = judged("gpu 0", "NVIDIA H100 80GB HBM3", 3.0e12, 700e12)
    assert good.state == "ok"
    assert "3000 GB/s copying, 700 TFLOP/s in 16-bit products: 90% and 71% of the datasheet of H100" in good.text
    slow = judged("gpu 0", "NVIDIA H100 80GB HBM3", 1.0e12, 700e12)
    assert slow.state == "note"
    assert "nvidia-smi" in slow.cure
    assert judged("gpu 0", "Foo 9", 1e12, 1e12).state == "ok"


@pytest.mark.gpu
def test_measured_figures_are_plausible() -> None:
    (found,) = measure_gpu(0)
    assert "GB/s copying" in found.text
