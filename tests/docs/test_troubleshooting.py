"""The messages that the troubleshooting pages quote are those of the code, word for word."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from onegpu import errors
from pages import ROOT

PAGES = (ROOT / "docs/guides/troubleshooting.md", ROOT / "docs/zh/guides/troubleshooting.md")
# Words of torch and of Transformers.
FOREIGN = ("No available kernel. Aborting execution.", "unexpected keyword argument 'load_in_4bit'")
GAP = "…"


def quotes(page: Path) -> list[str]:
    return re.findall(r"^> (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)


def strings(tree: ast.AST) -> Iterator[str]:
    """The texts of a file, with a gap for each value put into them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else GAP for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


@cache
def said_by_the_code() -> str:
    files = sorted((ROOT / "src/onegpu").rglob("*.py"))
    return "\n".join(text for path in files for text in strings(ast.parse(path.read_text(encoding="utf-8"))))


def is_said(quote: str) -> bool:
    """Whether the words between the gaps stand in the code, in this order in one text."""
    pattern = r"[^\n]*".join(re.escape(part.strip()) for part in quote.split(GAP))
    return re.search(pattern, said_by_the_code()) is not None


@pytest.mark.parametrize("quote", [quote for quote in quotes(PAGES[0]) if quote not in FOREIGN])
def test_each_message_is_one_of_the_code(quote: str) -> None:
    assert is_said(quote)


def test_a_message_that_nobody_says_is_seen() -> None:
    assert not is_said("the model is on …, an input is under …")


@cache
def raised() -> dict[str, str]:
    """The messages of each kind of error, one to a line; what a function makes to be raised elsewhere counts too."""
    found = dict.fromkeys(errors.__all__, "")
    for path in sorted((ROOT / "src/onegpu").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in found:
                found[node.func.id] += "".join(f"{text}\n" for part in node.args[:1] for text in strings(part))
    return found


@pytest.mark.parametrize("kind", sorted(set(errors.__all__) - {"OneGpuError"}))
def test_every_kind_of_error_has_a_message_on_the_page(kind: str) -> None:
    patterns = [r"[^\n]*".join(re.escape(part.strip()) for part in quote.split(GAP)) for quote in quotes(PAGES[0])]
    assert any(re.search(pattern, raised()[kind]) for pattern in patterns)


def test_both_languages_quote_the_same() -> None:
    assert quotes(PAGES[0]) == quotes(PAGES[1])
    assert len(quotes(PAGES[0])) > 20
