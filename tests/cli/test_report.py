from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Call = Callable[..., Any]
ENCODE = ["bench", "encode", "minilm-l6", "--texts", 4, "--batch", 2, "--longest", 16, "--runs", 1, "--single", 0]


@pytest.fixture(autouse=True)
def given_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is written down here, not measured: the product that it comes from is large on purpose."""
    monkeypatch.setattr("onegpu.bench.encode.matmul_flops", lambda dtype, device: 1e12)


def test_a_bench_writes_its_page_beside_its_table(call: Call, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    result = call(*ENCODE, "--device", "cpu", "--report", page)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("| contender | order |")
    assert f"report: {page}" in result.stderr
    text = page.read_text(encoding="utf-8")
    assert "<h1>onegpu bench encode minilm-l6</h1>" in text
    pasted = text.partition('<pre id="paste">')[2].partition("</pre>")[0]
    assert result.stdout.strip().splitlines()[2] in pasted, "the same row"
    assert "transformers" in pasted


def test_json_stays_alone_on_stdout(call: Call, tmp_path: Path) -> None:
    result = call(*ENCODE, "--device", "cpu", "--json", "--report", tmp_path / "report.html")
    assert json.loads(result.stdout)["rows"]
    assert (tmp_path / "report.html").is_file()


@pytest.mark.parametrize(
    ("name", "words"),
    [("report.pdf", "--report must end in .html; got"), ("no/such/report.html", "--report: there is no folder")],
)
def test_a_place_that_cannot_be_is_refused_before_anything_runs(
    call: Call, tmp_path: Path, name: str, words: str
) -> None:
    result = call(*ENCODE, "--report", tmp_path / name)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: {words}")
    assert "warming up" not in result.stderr


def test_generate_plans_its_memory_for_the_page(call: Call, tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    page = tmp_path / "report.html"
    options = ["--formats", "nf4", "--runs", 1, "--prompt", 4, "--new", 4, "--batch", "1,2", "--device", "cpu"]
    result = call("bench", "generate", tiny, *options, "--report", page)
    assert result.exit_code == 0, result.output
    text = page.read_text(encoding="utf-8")
    for title in ("Tokens per second against batch", "Ready to paste"):
        assert title in text


def test_load_writes_its_page(call: Call, tiny: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    result = call("bench", "load", tiny, "--formats", "nf4", "--runs", 1, "--device", "cpu", "--report", page)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("| format | weights, MiB | load, s |")
    assert "onegpu bench load" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("command", ["encode", "kernels", "load", "generate"])
def test_every_bench_has_the_option(call: Call, command: str) -> None:
    assert "--report" in call("bench", command, "--help").stdout
