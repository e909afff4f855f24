"""A tiny checkpoint for the command's tests, made once, and a way to call the command."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from onegpu.cli import build_app
from tiny_checkpoint import save_tiny


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def tiny_plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "plain", chat=False)


@pytest.fixture
def call() -> Callable[..., Any]:
    """Call the command in this process: `call("run", folder, "hi", stdin="...")`."""

    def invoke(*arguments: object, stdin: str | None = None) -> Any:
        return CliRunner().invoke(build_app(), [str(argument) for argument in arguments], input=stdin)

    return invoke
