from __future__ import annotations

import pytest
import torch

from onegpu.bench import kernel_chain
from onegpu.bench.kernel_chain import chain_step, measure_chain, random_layers
from onegpu.bench.kernel_time import Ceilings

CPU = torch.device("cpu")
SHAPES = {"qkv": (192, 128), "o": (128, 128), "gate_up": (512, 128), "down": (128, 256)}


@pytest.mark.parametrize("nested", [False, True])
def test_a_chain_keeps_its_size(nested: bool) -> None:
    layers = random_layers(SHAPES, nested, 8, CPU)
    y = chain_step(layers, SHAPES, False, torch.randn(1, 128).to(torch.bfloat16))
    assert y.shape == (1, 128)
    assert 0.01 < float(y.float().square().mean().sqrt()) < 100


def test_each_form_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def replayed(step) -> tuple[float, torch.Tensor, bool]:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise RuntimeError("no luck")
        return 100.0, step().float(), True

    monkeypatch.setattr(kernel_chain, "replayed", replayed)
    found = measure_chain("m", SHAPES, Ceilings(1e9, 1e12), CPU, layers=2)
    assert [(row["operator"], row["overlap"], row["us"]) for row in found] == [
        ("onegpu nf4, tiled", False, 100.0),
        ("onegpu nf4, tiled", True, None),
        ("onegpu nf4+double, tiled", False, 100.0),
        ("onegpu nf4+double, tiled", True, 100.0),
    ]
    assert found[1]["note"] == "RuntimeError: no luck"
    weights = 2 * sum(N * K for N, K in SHAPES.values())
    assert found[0]["roofline_percent"] == pytest.approx(weights * (1 / 2 + 4 / 64) / 1e9 / 100e-6 * 100)
    assert found[3]["difference"] == 0
