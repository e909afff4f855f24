from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Call = Callable[..., Any]


def test_eval_prints_the_table(call: Call, tiny: Path) -> None:
    result = call("eval", tiny, "--max-tokens", 200, "--window", 64, "--stride", 32, "--device", "cpu")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].startswith("| format | weights, MiB | perplexity | KL to 16 bit, nats | same first choice |")
    formats = [line.split("|")[1].strip() for line in lines[2:]]
    assert formats == ["16bit", "nf4", "nf4+double", "nf4+search", "fp4", "int8"]
    assert lines[2].split("|")[4].strip() == "-"


def test_eval_orders_the_formats_as_their_errors_do(call: Call, tiny: Path) -> None:
    result = call("eval", tiny, "--max-tokens", 250, "--window", 128, "--stride", 64, "--json", "--device", "cpu")
    said = json.loads(result.stdout)
    rows = {row["format"]: row for row in said["rows"]}
    assert rows["16bit"]["kl"] is None
    assert all(row["tokens"] == 249 for row in rows.values())
    assert 0 < rows["int8"]["kl"] < rows["nf4"]["kl"] < rows["fp4"]["kl"]
    assert rows["nf4"]["weight_bytes"] < rows["int8"]["weight_bytes"]
    assert rows["nf4+search"]["weight_bytes"] == rows["nf4"]["weight_bytes"]
    assert rows["int8"]["weight_bytes"] < rows["16bit"]["weight_bytes"]
    assert said["window"] == 128
    assert said["versions"]["onegpu"]


def test_eval_reads_a_text_of_ones_own(call: Call, tiny: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("hello there")
    options = ("--formats", "16bit", "--json", "--device", "cpu", "--text", text)
    assert json.loads(call("eval", tiny, *options).stdout)["rows"][0]["tokens"] == len("hello there") - 1
    text.write_bytes(b"\xff\xfe")
    assert "is not UTF-8" in call("eval", tiny, *options).stderr
    text.unlink()
    assert "No such file" in call("eval", tiny, *options).stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [(("--stride", 64, "--window", 64), "stride must be"), (("--formats", "nf3"), "format must be one of")],
)
def test_eval_refuses_what_cannot_be(call: Call, tiny: Path, options: tuple[Any, ...], words: str) -> None:
    result = call("eval", tiny, "--device", "cpu", *options)
    assert result.exit_code == 1
    assert words in result.stderr
