"""The kernel benchmark without a GPU: what is compared, that each contender multiplies, and the arithmetic of rows."""

from __future__ import annotations

import json
import math

import pytest
import torch
from typer.testing import CliRunner

from onegpu.bench import kernel_peers, kernels
from onegpu.bench.kernels import Ceilings, Row, parse_rows, parse_shapes, table
from onegpu.cli import build_app
from onegpu.errors import ConfigError

CPU = torch.device("cpu")
CEILINGS = Ceilings(read_bandwidth=1e12, flops=1e14)


def test_shapes_and_rows() -> None:
    assert parse_shapes("llama-8b")["down"] == (4096, 14336)
    assert parse_shapes("96, 64") == {"96x64": (96, 64)}
    assert parse_rows("1, 4,32") == [1, 4, 32]
    for wrong in ("llama", "96", "96,x", "0,64"):
        with pytest.raises(ConfigError, match="--shapes must be one of llama-8b"):
            parse_shapes(wrong)
    for wrong in ("", "1,,2", "0", "-1", "a"):
        with pytest.raises(ConfigError, match="--m must be numbers"):
            parse_rows(wrong)


def test_the_roofline_is_the_slower_of_reading_and_multiplying() -> None:
    assert CEILINGS.seconds(2e12, 1e14) == 2.0
    assert CEILINGS.seconds(1e12, 3e14) == 3.0


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[Row]:
    """All contenders at one shape; each product is held to the weight instead of being timed."""
    expected: dict[int, torch.Tensor] = {}

    def check(products, x) -> tuple[float, str]:
        outs = [product(x).float() for product in products]
        reference = expected.setdefault(len(x), outs[0])
        for out in outs:
            error = float((out - reference).norm() / reference.norm())
            assert error < 0.15, error  # what 4 bits cost
        return 10.0, ""

    monkeypatch.setattr(kernels, "median_time", check)
    shapes = {"odd": (48, 1024)}
    return list(kernels.compare_kernels(shapes, [1, 5], CEILINGS, CPU, peers=True, rotation=100_000))


def test_every_contender_multiplies(rows: list[Row]) -> None:
    ours = [row for row in rows if row.operator not in kernel_peers.PEERS]
    assert [row.operator for row in ours] == [name for name in ("bf16 cuBLAS", *kernels.OURS) for _ in range(2)]
    assert not [row for row in ours if row.us is None]


def test_a_peer_that_is_absent_is_a_row_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(weight: torch.Tensor) -> kernel_peers.Peer:
        raise ImportError("No module named 'elsewhere'")

    monkeypatch.setattr(kernels, "PEERS", {"elsewhere": absent})
    monkeypatch.setattr(kernels, "OURS", {})
    monkeypatch.setattr(kernels, "median_time", lambda products, x: (1.0, ""))
    found = list(kernels.compare_kernels({"s": (16, 64)}, [1], CEILINGS, CPU, peers=True, rotation=1))
    assert found[-1] == Row("s", 16, 64, 0, "elsewhere", None, note="ImportError: No module named 'elsewhere'")
    assert "| elsewhere | failed: ImportError" in table(found, [])


def test_what_a_row_says(rows: list[Row]) -> None:
    row = next(row for row in rows if row.operator == "onegpu nf4, tiled" and row.M == 5)
    num_bytes = 48 * 1024 // 2 + 48 * 16 * 4 + 2 * 5 * (48 + 1024)
    assert row.gb_s == pytest.approx(num_bytes / 10e-6 / 1e9)
    assert row.tflop_s == pytest.approx(2 * 5 * 48 * 1024 / 10e-6 / 1e12)
    assert row.roofline_percent == pytest.approx(100 * num_bytes / 1e12 / 10e-6)
    assert row.times_bf16 == 1.0


def test_weights_are_copied_until_the_rotation_is_reached() -> None:
    tensors = [torch.zeros(600, dtype=torch.uint8), torch.zeros(100, dtype=torch.float32)]
    copies = kernels.copies_of(tensors, 4500)
    assert len(copies) == math.ceil(4500 / 1000)
    assert len({copy[0].data_ptr() for copy in copies}) == len(copies)
    assert len(kernels.copies_of(tensors, 1)) == 2


@pytest.mark.parametrize("nested", [False, True])
def test_a_chain_keeps_its_size(nested: bool) -> None:
    shapes = {"qkv": (192, 128), "o": (128, 128), "gate_up": (512, 128), "down": (128, 256)}
    layers = kernels.random_layers(shapes, nested, 8, CPU)
    y = kernels.chain_step(layers, shapes, False, torch.randn(1, 128).to(torch.bfloat16))
    assert y.shape == (1, 128)
    assert 0.01 < float(y.float().square().mean().sqrt()) < 100


def test_table_and_document(rows: list[Row]) -> None:
    chain = [
        {"model": "m", "operator": "o", "layers": 2, "overlap": True, "us": 10.0, "roofline_percent": 80.0}
        | {"difference": 0.0, "finite": True, "repeats": True}
    ]
    text = table(rows, chain)
    assert text.count("\n| odd 48x1024 |") == len(rows)
    assert "| m o x 2 | yes | 10.0 | 5.00 | 80.0 | 0.0e+00 | yes |" in text
    whole = kernels.document(CEILINGS, rows, chain, {"device": "d"})
    assert json.loads(json.dumps(whole))["ceilings"]["flops"] == 1e14


def test_without_a_gpu_the_command_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    result = CliRunner().invoke(build_app(), ["bench", "kernels"])
    assert result.exit_code == 1
    assert "needs a CUDA device" in result.output


@pytest.mark.gpu
def test_a_small_run_from_start_to_end() -> None:
    arguments = ["bench", "kernels", "--shapes", "2048,4096", "--m", "1,9", "--rotate", "0.6", "--no-chain"]
    result = CliRunner().invoke(build_app(), arguments)
    assert result.exit_code == 0
    whole = json.loads(result.stdout.strip().splitlines()[-1])
    assert len(whole["rows"]) == 2 * (1 + len(kernels.OURS))
    assert not [row for row in whole["rows"] if row["us"] is None]
