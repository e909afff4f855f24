"""Pages of documentation as programs: their code blocks, run one after another as a reader would type them.

A block of `python` is executed, in one namespace per page. In a block of `sh` each line is a command: `onegpu ...` runs
in this process, `make TARGET`, `pip install` and `python -m MODULE` are looked up. Blocks of other languages are text.

A comment above a block says what it needs:

    <!-- needs: gpu -->        a CUDA device; also `two gpus`, `network`, and `terminal` for commands that wait for keys
    <!-- exit: 1 -->           commands of this block end with that exit code

A block whose need is not met is not run. It must still be valid: Python that compiles and whose names and arguments
exist, commands whose options exist.
"""

from __future__ import annotations

import ast
import inspect
import re
import shlex
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import typer
from typer.testing import CliRunner

import onegpu
from onegpu.cli import build_app

ROOT = Path(__file__).parents[1]
NEEDS = ("gpu", "two gpus", "network", "terminal")
FENCE = re.compile(r"((?:^<!-- [^\n]* -->\n)*)^```(\w+)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
DIRECTIVE = re.compile(r"<!-- (\w+): (.*?) -->")
# What from_pretrained takes beside the arguments in Transformers' own signature.
LOADING = {
    "attn_implementation",
    "device_map",
    "dtype",
    "load_in_4bit",
    "load_in_8bit",
    "max_memory",
    "offload_folder",
    "quantization_config",
    "revision",
    "strict",
    "trust_remote_code",
    "use_safetensors",
}


@dataclass(frozen=True, slots=True)
class Block:
    """One block of code: its page, the line it begins on, its language, what it needs and how its commands end."""

    page: str
    line: int
    language: str
    code: str
    need: str | None = None
    exit_code: int = 0

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """The blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    return [block_of(page, text, found) for found in FENCE.finditer(text)]


def block_of(page: Path, text: str, found: re.Match[str]) -> Block:
    line = text.count("\n", 0, found.start(3)) + 1
    place = page.relative_to(ROOT) if page.is_relative_to(ROOT) else page
    block = Block(place.as_posix(), line, found[2], found[3])
    for name, value in DIRECTIVE.findall(found[1]):
        if name == "needs":
            assert value in NEEDS, f"{block}: needs one of {NEEDS}, not {value!r}"
            block = replace(block, need=value)
        else:
            assert name == "exit", f"{block}: a comment above a block is `needs` or `exit`, not {name!r}"
            block = replace(block, exit_code=int(value))
    return block


def is_met(need: str | None) -> bool:
    """Whether a block with this need can run here. No test has a network or a terminal."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return need is None or (need == "gpu" and count > 0) or (need == "two gpus" and count > 1)


def run(page: list[Block]) -> int:
    """Run a page's blocks in order; how many of them were run."""
    names: dict[str, Any] = {"__name__": "__main__"}
    count = 0
    for block in page:
        check(block)
        if is_met(block.need) and block.language in ("python", "sh"):
            run_python(block, names) if block.language == "python" else run_shell(block)
            count += 1
    return count


def check(block: Block) -> None:
    """What can be told without running it."""
    if block.language == "python":
        check_names(block, ast.parse(block.code))
    elif block.language == "sh":
        for command in commands(block):
            check_command(block, command)


def run_python(block: Block, names: dict[str, Any]) -> None:
    """Execute with the page's own line numbers, so that a traceback points into the page."""
    code = compile("\n" * (block.line - 1) + block.code, str(ROOT / block.page), "exec")
    exec(code, names)


def check_names(block: Block, tree: ast.AST) -> None:
    """Names after `onegpu.` exist, and what is called with keywords has them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "onegpu":
            assert node.attr in onegpu.__all__, f"{block}: onegpu.{node.attr} does not exist"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            check_keywords(block, node.func, [each.arg for each in node.keywords if each.arg])


def check_keywords(block: Block, function: ast.Attribute, keywords: list[str]) -> None:
    if function.attr == "from_pretrained" and ast.unparse(function.value).startswith("onegpu.Auto"):
        known = LOADING
    elif isinstance(function.value, ast.Name) and function.value.id == "onegpu":
        assert function.attr in onegpu.__all__, f"{block}: onegpu.{function.attr} does not exist"
        known = set(inspect.signature(getattr(onegpu, function.attr)).parameters)
    else:
        return
    assert set(keywords) <= known, f"{block}: {ast.unparse(function)} takes no {sorted(set(keywords) - known)}"


def commands(block: Block) -> list[list[str]]:
    """The words of each command, a line ending in a backslash going on in the next."""
    lines = block.code.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def run_shell(block: Block) -> None:
    for command in commands(block):
        if command[0] == "onegpu" or "|" in command:
            run_command(block, command)


def check_command(block: Block, command: list[str]) -> None:
    """A target of the Makefile, an extra of the package, a module, or a command of ours with options that it has."""
    own, _, _ = taken_apart(command)
    if own[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {word for word in own[1:] if "=" not in word} <= set(targets), f"{block}: no such target: {own}"
    elif own[:2] == ["python", "-m"]:
        assert find_spec(own[2]) is not None, f"{block}: no such module: {own[2]}"
    elif own[:2] == ["pip", "install"]:
        known = extras()
        for extra in re.findall(r"\.\[([\w,]+)\]", " ".join(own)):
            assert set(extra.split(",")) <= known, f"{block}: no such extra: {extra}"
    else:
        assert own[0] == "onegpu", f"{block}: a command that no test knows: {own}"
        parse(block, own[1:])


def extras() -> set[str]:
    """The extras of pyproject.toml."""
    text = (ROOT / "pyproject.toml").read_text()
    section = text.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    return set(re.findall(r"^(\w+) = \[", section, re.MULTILINE))


def parse(block: Block, arguments: list[str]) -> None:
    """Follow the command's words to its function and let its own parser read the rest."""
    command, rest = typer.main.get_command(build_app()), list(arguments)
    if rest[0].startswith("-"):
        known = {name for option in command.params for name in option.opts} | {"--help"}
        assert rest[0] in known, f"{block}: onegpu has no option {rest[0]}"
        return
    while getattr(command, "commands", None):
        word = rest.pop(0)
        assert word in command.commands, f"{block}: onegpu has no command {word!r}"
        command = command.commands[word]
    try:
        command.make_context(arguments[0], rest)
    except Exception as error:
        raise AssertionError(f"{block}: onegpu {shlex.join(arguments)}: {error}") from error


def taken_apart(command: list[str]) -> tuple[list[str], list[str], str | None]:
    """A command, the words before its pipe (none without one), and the file that its stdout goes to."""
    own, before, target = command, [], None
    if "|" in own:
        place = own.index("|")
        before, own = own[:place], own[place + 1 :]
        assert before[0] in ("echo", "cat"), f"only echo and cat go before a pipe, not {before[0]}"
    if len(own) > 2 and own[-2] == ">":
        own, target = own[:-2], own[-1]
    return own, before, target


def run_command(block: Block, command: list[str]) -> None:
    """One command of ours in this process."""
    own, before, target = taken_apart(command)
    given = ""
    if before:
        given = Path(before[1]).read_text() if before[0] == "cat" else " ".join(before[1:]) + "\n"
    result = CliRunner().invoke(build_app(), own[1:], input=given)
    said = f"{block}: {shlex.join(own)} ended with {result.exit_code}\n{result.output}"
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise AssertionError(said) from result.exception
    assert result.exit_code == block.exit_code, said
    if target:
        Path(target).write_text(result.stdout)
