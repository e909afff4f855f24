"""What the README shows can be typed: its commands parse, its Python names exist."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

import onegpu
from onegpu.cli import build_app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


COMMANDS = [
    shlex.split(line, comments=True)[1:]
    for block in blocks("sh")
    for line in block.splitlines()
    if line.startswith("onegpu ")
]
TARGETS = sorted(set(re.findall(r"\bmake ([a-z-]+)", README)))


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_each_command_is_understood(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a network no model is found, which is found out only after every argument was understood."""
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(build_app(), arguments)
    if arguments[0] in ("version", "doctor"):
        assert result.exit_code == 0, result.output
    else:
        assert result.exit_code == 1, result.output
        assert result.stderr.startswith(("error: no model called", "error: no folder", "error: can't read texts.txt"))
    assert not list(tmp_path.iterdir())


def test_there_are_commands_to_check() -> None:
    assert {arguments[0] for arguments in COMMANDS} >= {"run", "chat", "quantize", "eval", "bench", "version"}


@pytest.mark.parametrize("block", blocks("python"))
def test_each_name_of_ours_exists(block: str) -> None:
    names = [
        node.attr
        for node in ast.walk(ast.parse(block))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "onegpu"
    ]
    assert names
    assert set(names) <= set(onegpu.__all__)


def test_each_name_in_the_prose_exists() -> None:
    names = set(re.findall(r"onegpu\.([A-Za-z_]+)\(", README))
    assert names <= set(onegpu.__all__)


@pytest.mark.parametrize("target", TARGETS)
def test_each_target_is_in_the_makefile(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
