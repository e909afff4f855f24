"""Shell completion, and where data and talk go, for every command there is."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from onegpu.cli import build_app


def commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, child in getattr(command, "commands", {}).items():
        yield from commands(child, (*path, name)) if hasattr(child, "commands") else [((*path, name), child)]


COMMANDS = dict(commands(typer.main.get_command(build_app())))


def completed(words: str) -> list[str]:
    """What bash is offered after these words."""
    env = os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[2] / "src"),
        "_ONEGPU_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split(" ")) - 1),
    }
    command = [sys.executable, "-m", "onegpu.cli"]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    return result.stdout.split()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("onegpu be", {"bench"}),
        ("onegpu bench ", {"generate", "load", "encode", "kernels"}),
        ("onegpu run m p --quantization ", {"nf4", "fp4", "int8", "none"}),
        ("onegpu fit m --kv", {"--kv-dtype"}),
    ],
)
def test_bash_is_offered(words: str, offered: set[str]) -> None:
    assert set(completed(words)) == offered


def test_every_command_says_what_it_does() -> None:
    assert len(COMMANDS) > 12
    for path, command in COMMANDS.items():
        assert command.help, path
        for option in command.params:
            if option.param_type_name == "option" and option.name != "help":
                assert all(name.startswith("-") for name in option.opts)


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_command_gives_json(path: tuple[str, ...]) -> None:
    assert "--json" in {name for option in COMMANDS[path].params for name in option.opts}


@pytest.mark.parametrize(("shell", "file"), [("bash", ".bashrc"), ("zsh", ".zshrc")])
def test_completion_installs_itself(tmp_path: Path, shell: str, file: str) -> None:
    """`onegpu --install-completion` leaves a line in the shell's own file, which names a script that calls us."""
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2] / "src"), "HOME": str(tmp_path)}
    env["_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION"] = "1"  # else the shell above us is meant
    command = [sys.executable, "-m", "onegpu.cli", "--install-completion", shell]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / file).is_file()
    written = "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    assert "_ONEGPU_COMPLETE" in written


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_wrong_usage_has_its_own_exit_code(path: tuple[str, ...]) -> None:
    result = CliRunner().invoke(build_app(), [*path, "--no-such-option"])
    assert result.exit_code == 2
    assert "No such option" in result.stderr
    assert result.stdout == ""
