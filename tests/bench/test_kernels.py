"""The kernel benchmark without a GPU: what is compared, that each contender multiplies, and the arithmetic of rows."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from onegpu.bench import (
    kernel_chain,
    kernel_errors,
    kernel_experts,
    kernel_peers,
    kernel_products,
    kernel_storage,
    kernel_time,
    kernels,
)
from onegpu.bench.kernel_tables import document, tables
from onegpu.bench.kernel_turns import Turn
from onegpu.bench.kernels import Ceilings, Row, parse_rows, parse_shapes
from onegpu.cli import bench_kernels, build_app
from onegpu.cli.bench_kernels import draw
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


def ten(calls, **how) -> Turn:
    """A turn that took ten microseconds."""
    return Turn(lambda: None, 1, 1, times=[10.0])


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[Row]:
    """All contenders at one shape, without a clock."""

    def check(calls, **how) -> Turn:
        outs = [call().float() for call in calls]
        assert all(torch.equal(out, outs[0]) for out in outs), "the copies are copies"
        return ten(calls)

    monkeypatch.setattr(kernels, "turn_of", check)
    monkeypatch.setattr(kernels, "take_turns", lambda turns: None)
    shapes = {"odd": (48, 1024)}
    return list(kernels.compare_kernels(shapes, [1, 5], CEILINGS, CPU, peers=True, rotation=100_000))


@pytest.fixture
def with_peers(monkeypatch: pytest.MonkeyPatch):
    """Compare cuBLAS and these peers alone, each turn taking ten microseconds."""
    monkeypatch.setattr(kernel_products, "OURS", {})
    monkeypatch.setattr(kernels, "turn_of", ten)
    monkeypatch.setattr(kernels, "take_turns", lambda turns: None)

    def compare(peers, numbers=(1,), shapes=None, progress=lambda _: None) -> list[Row]:
        monkeypatch.setattr(kernel_products, "PEERS", peers)
        shapes = shapes or {"s": (16, 64)}
        return list(kernels.compare_kernels(shapes, numbers, CEILINGS, CPU, peers=True, rotation=1, progress=progress))

    return compare


def right(weight: torch.Tensor) -> kernel_peers.Peer:
    return lambda x: x @ weight.t(), 10**9


def test_every_contender_multiplies(rows: list[Row]) -> None:
    ours = [row for row in rows if row.operator not in kernel_peers.PEERS]
    assert [row.operator for row in ours] == ["bf16 cuBLAS", *kernel_products.OURS] * 2
    assert [row.M for row in ours] == [1] * (len(ours) // 2) + [5] * (len(ours) // 2)
    assert not [row for row in ours if row.us is None]


def test_a_peer_that_is_absent_is_a_row_with_the_reason(with_peers) -> None:
    def absent(weight: torch.Tensor) -> kernel_peers.Peer:
        raise ImportError("No module named 'elsewhere'")

    found = with_peers({"elsewhere": absent})
    assert Row("s", 16, 64, 0, "elsewhere", None, note="ImportError: No module named 'elsewhere'") in found
    assert "| elsewhere | failed: ImportError" in tables(document(CEILINGS, found, {}))


def test_a_peer_that_never_gets_ready_is_given_up(with_peers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_products, "PEER_PATIENCE", 0.05)
    *_, last = with_peers({"tuning": lambda weight: (lambda x: time.sleep(9), 10**9)})
    assert last.us is None
    assert last.note == "TimeoutError: not ready after 0 s"


def test_versions_of_peers() -> None:
    found = kernel_peers.peer_versions()
    assert set(found) == {"bitsandbytes", "torchao", "gemlite"}
    assert found["bitsandbytes"] is None or found["bitsandbytes"][0].isdigit()


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_wrong_product_gets_no_time(with_peers, value: float) -> None:
    *_, last = with_peers({"off": lambda weight: (lambda x: torch.full((len(x), len(weight)), value), 10**9)})
    assert last.us is None
    assert last.note.startswith("wrong: relative error")


def test_a_peer_that_takes_long_leaves_rows_out(with_peers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_products, "PEER_SECONDS", -1.0)
    found = with_peers({"slow": right}, [1, 2])
    assert [(row.operator, row.us) for row in found] == [("bf16 cuBLAS", 10.0), ("slow", None)] * 2
    assert found[-1].note == "left out after -1 s"


def test_time_spent_in_turns_counts(with_peers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_products, "PEER_SECONDS", 5.0)
    monkeypatch.setattr(kernels, "turn_of", lambda calls, **how: Turn(lambda: None, 1, 1, times=[1.0], seconds=3.0))
    found = [row for row in with_peers({"slow": right}, [1, 2, 3]) if row.operator == "slow"]
    assert [row.us for row in found] == [1.0, 1.0, None]


def test_all_operators_of_a_shape_and_number_of_rows_take_turns(with_peers, monkeypatch: pytest.MonkeyPatch) -> None:
    captures: list[bool] = []
    together: list[int] = []

    def turn(calls, *, capture, patience) -> Turn:
        captures.append(capture)
        return ten(calls)

    monkeypatch.setattr(kernels, "turn_of", turn)
    monkeypatch.setattr(kernels, "take_turns", lambda turns: together.append(len(turns)))
    monkeypatch.setattr(kernel_products, "UNCAPTURED", {"waiting"})
    found = with_peers({"peer": right, "waiting": right}, [1, 2], {"a": (16, 64), "b": (32, 64)})
    assert together == [3] * 4
    assert captures == [True, True, False] * 4, "what waits for the host is never captured"
    order = [(row.shape, row.M, row.operator) for row in found]
    names = ("bf16 cuBLAS", "peer", "waiting")
    assert order == [(shape, M, name) for shape in "ab" for M in (1, 2) for name in names]


def test_one_that_fails_in_its_turn(with_peers, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(turns) -> None:
        turns[1].error, turns[1].times = "RuntimeError: gone", []

    monkeypatch.setattr(kernels, "take_turns", broken)
    first, second, third = with_peers({"peer": right, "other": right})
    assert (first.us, second.us, third.us) == (10.0, None, 10.0)
    assert second.note == "RuntimeError: gone"


def test_without_cublas_there_is_no_quotient(with_peers, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(turns) -> None:
        turns[0].error, turns[0].times = "RuntimeError: gone", []

    monkeypatch.setattr(kernels, "take_turns", broken)
    first, second = with_peers({"peer": right})
    assert first.us is None
    assert second.us == 10.0
    assert second.times_bf16 is None


def test_small_memory_takes_a_few_at_a_time(with_peers, monkeypatch: pytest.MonkeyPatch) -> None:
    together: list[int] = []
    said: list[str] = []
    monkeypatch.setattr(kernels, "take_turns", lambda turns: together.append(len(turns)))
    monkeypatch.setattr(kernels, "room_for", lambda *_: 3)
    found = with_peers(dict.fromkeys("abcde", right), [1, 2], progress=said.append)
    assert together == [3, 3, 3, 3, 2, 2]
    assert [row.operator for row in found] == ["bf16 cuBLAS", "a", "b"] * 2 + ["c", "d"] * 2 + ["e"] * 2
    assert {row.times_bf16 for row in found} == {1.0}
    assert said[0] == "s: memory has room for 3 of 6 operators; so many take turns at a time"


def test_room_in_memory() -> None:
    everyone = kernel_products.makers(peers=True)
    largest = 28672, 4096, 4096, kernels.ROTATION
    assert len(kernels.in_groups(everyone, kernels.room_for(*largest, free=math.inf))) == 1
    assert len(kernels.in_groups(everyone, kernels.room_for(*largest, free=75e9))) == 1
    assert kernels.room_for(*largest, free=15e9) < len(everyone)
    assert kernels.room_for(*largest, free=1e9) == 2, "the baseline and one"
    groups = kernels.in_groups(everyone, 2)
    assert [list(group) for group in groups] == [["bf16 cuBLAS", name] for name in everyone if name != "bf16 cuBLAS"]
    assert kernels.in_groups({"bf16 cuBLAS": everyone["bf16 cuBLAS"]}, 5) == [{"bf16 cuBLAS": everyone["bf16 cuBLAS"]}]


def test_what_is_free_has_no_bound_off_a_gpu() -> None:
    assert kernels.free_bytes(CPU) == math.inf


def test_what_a_row_says(rows: list[Row]) -> None:
    row = next(row for row in rows if row.operator == "onegpu nf4, tiled" and row.M == 5)
    num_bytes = 48 * 1024 // 2 + 48 * 16 * 4 + 2 * 5 * (48 + 1024)
    assert row.gb_s == pytest.approx(num_bytes / 10e-6 / 1e9)
    assert row.tflop_s == pytest.approx(2 * 5 * 48 * 1024 / 10e-6 / 1e12)
    assert row.roofline_percent == pytest.approx(100 * num_bytes / 1e12 / 10e-6)
    assert row.times_bf16 == 1.0
    assert (row.us_min, row.us_max) == (10.0, 10.0)


def test_without_a_gpu_the_command_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    result = CliRunner().invoke(build_app(), ["bench", "kernels"])
    assert result.exit_code == 1
    assert "needs a CUDA device" in result.output


@pytest.mark.parametrize("name", ["chart.jpg", "nowhere/chart.png"])
def test_a_chart_that_cannot_be_written_is_refused_first(tmp_path: Path, name: str) -> None:
    result = CliRunner().invoke(build_app(), ["bench", "kernels", "--plot", str(tmp_path / name)])
    assert result.exit_code == 1
    assert "--plot" in result.output


@pytest.mark.parametrize("name", ["chart.png", "chart.svg"])
def test_the_chart_is_written(tmp_path: Path, rows: list[Row], name: str) -> None:
    pytest.importorskip("matplotlib")
    draw(tmp_path / name, document(CEILINGS, rows, {"device": "NVIDIA Foo"}))
    assert (tmp_path / name).read_bytes().lstrip().startswith((b"\x89PNG", b"<svg"))


def test_no_chart_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    draw(tmp_path / "chart.png", document(CEILINGS, [], {}))
    assert not (tmp_path / "chart.png").exists()
    assert "no product was measured" in capsys.readouterr().err


@pytest.fixture
def without_a_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command on a CPU: every call is made, and each takes ten microseconds."""

    def of_calls(calls, **how) -> tuple[float, str]:
        calls[0]()
        return 10.0, ""

    monkeypatch.setattr(bench_kernels, "find_device", lambda: CPU)
    monkeypatch.setattr(kernel_time, "measure_ceilings", lambda device: CEILINGS)
    monkeypatch.setattr(kernels, "turn_of", ten)
    monkeypatch.setattr(kernels, "take_turns", lambda turns: None)
    monkeypatch.setattr(kernel_products, "PEERS", {"bitsandbytes nf4": right})
    monkeypatch.setattr(kernels, "MODELS", {"llama-8b": SMALL})
    monkeypatch.setattr(kernel_products, "copies_of", lambda tensors, rotation: [tuple(tensors)] * 2)
    monkeypatch.setattr(kernel_chain, "replayed", lambda step: (10.0, step().float(), True))
    monkeypatch.setattr(kernel_chain.measure_chain, "__kwdefaults__", {"rows": 1, "layers": 2, "progress": print})
    for module in (kernel_storage, kernel_experts):
        monkeypatch.setattr(module, "median_of_calls", of_calls)
        monkeypatch.setattr(module, "warm_up", lambda calls: None)
    monkeypatch.setattr(kernel_storage, "SHAPE", (16, 128))
    monkeypatch.setattr(
        kernel_experts.measure_experts,
        "__kwdefaults__",
        {"models": {"m": kernel_experts.Experts(4, 2, 16, 64)}, "tokens": (1, 3), "progress": print},
    )


SMALL = {"qkv": (192, 128), "o": (128, 128), "gate_up": (512, 128), "down": (128, 256)}


def test_all_of_it_in_one_run(without_a_clock: None, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    result = CliRunner().invoke(
        build_app(), ["bench", "kernels", "--peers", "--m", "1,8", "--rotate", "0.6", "--out", str(out)]
    )
    assert result.exit_code == 0, result.output
    whole = json.loads(result.stdout.strip().splitlines()[-1])
    assert whole == json.loads(out.read_text())
    assert len(whole["rows"]) == 4 * 2 * (2 + len(kernel_products.OURS))
    assert [row["shape"] for row in whole["rows"][:: 2 * (2 + len(kernel_products.OURS))]] == list(SMALL), "by shape"
    assert not [row for name in ("rows", "chain", "storage") for row in whole[name] if row["us"] is None]
    assert len(whole["chain"]) == 4
    assert {row["operator"] for row in whole["experts"] if row["us"]} >= {"bf16 loop", "onegpu nf4", "onegpu int8"}
    assert {row["best_peer"] for row in whole["goals"]} == {"bitsandbytes nf4", None}
    assert "gemlite" in whole["versions"]
    assert "| goals | M |" in result.stdout


def test_errors_alone(without_a_clock: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_errors, "ODD_SHAPES", {"odd": (31, 67)})
    result = CliRunner().invoke(build_app(), ["bench", "kernels", "--errors", "--m", "1,2048", "--json"])
    assert result.exit_code == 0, result.output
    whole = json.loads(result.stdout)
    assert whole["rows"] == whole["chain"] == []
    assert {row["M"] for row in whole["errors"]} == {1}
    assert {row["shape"] for row in whole["errors"]} == {*SMALL, "odd"}


@pytest.mark.gpu
def test_a_small_run_from_start_to_end() -> None:
    arguments = ["bench", "kernels", "--shapes", "2048,4096", "--m", "1,9", "--rotate", "0.6", "--no-chain"]
    result = CliRunner().invoke(build_app(), arguments)
    assert result.exit_code == 0
    whole = json.loads(result.stdout.strip().splitlines()[-1])
    assert len(whole["rows"]) == 2 * (1 + len(kernel_products.OURS))
    assert not [row for row in whole["rows"] if row["us"] is None]
    assert not [row for row in whole["rows"] if not row["us_min"] <= row["us"] <= row["us_max"]]
    assert [row["times_bf16"] for row in whole["rows"] if row["operator"] == "bf16 cuBLAS"] == [1.0, 1.0]
