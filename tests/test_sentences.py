"""Every sentence of refusal, and every cure, stands in a test by its words: three of them in a row at least."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src/onegpu"
PLACES = ("diagnosis/*.py", "attention/sdpa*.py", "memory/*.py", "reporting.py", "cli/*.py", "bench/[!gkr]*.py")
# The benchmarks of generation and of kernels refuse in their own tests.
FILES = sorted({path for place in PLACES for path in SOURCE.glob(place) if not path.match("cli/bench_[gk]*.py")})
RUN = 3


def text_of(node: ast.AST) -> str:
    """A string, with a gap for each value put into it; empty for anything else."""
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def sentences(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """What is said: the arguments of errors that are raised and of findings, and (reason, cure) of rules."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            parts = node.exc.args
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Finding":
            parts = node.args
        elif isinstance(node, ast.Yield) and isinstance(node.value, ast.Tuple):
            parts = node.value.elts
        else:
            continue
        for part in parts:
            for each in ast.walk(part) if isinstance(part, (ast.BinOp, ast.IfExp)) else [part]:
                if text := text_of(each):
                    yield each.lineno, text  # type: ignore[attr-defined]


def runs(text: str) -> list[str]:
    """Each three words in a row that no value interrupts; none in a text of fewer."""
    parts = [part.split() for part in text.split("…")]
    return [" ".join(words[i : i + RUN]) for words in parts for i in range(len(words) - RUN + 1)]


@cache
def said_by_tests() -> str:
    """All strings of the tests, as they match: without the backslashes of regular expressions."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in sorted((ROOT / "tests").rglob("*.py"))]
    texts = [text_of(node) for tree in trees for node in ast.walk(tree)]
    return "\n".join(re.sub(r"\\(.)", r"\1", text) for text in texts if " " in text)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(SOURCE).as_posix())
def test_each_sentence_is_in_a_test(path: Path) -> None:
    missing = [
        f"{path.name}:{line}: {text}"
        for line, text in sentences(ast.parse(path.read_text(encoding="utf-8")))
        if (found := runs(text)) and not any(words in said_by_tests() for words in found)
    ]
    assert missing == []


def test_there_are_many_and_one_that_no_test_has_is_seen() -> None:
    found = [text for path in FILES for _, text in sentences(ast.parse(path.read_text(encoding="utf-8")))]
    assert len(found) > 150
    unsaid = " ".join(reversed(["mats", "all", "ate"]))  # the other way round, so that it stands nowhere, not even here
    ((_, text),) = sentences(ast.parse("raise ConfigError(f'the {animal} " + unsaid + " of {owner}')"))
    assert unsaid in runs(text)
    assert len(runs(text)) == 2
    assert unsaid not in said_by_tests()
