from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import onegpu.cli.answer
import onegpu.cli.chat
from onegpu.bench.measure import Timing

Call = Callable[..., Any]
OPTIONS = ("-q", "none", "-t", 0, "-n", 6, "--device", "cpu")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[dict[str, str]]]:
    """The conversations the model was asked to go on with; it answers `one`, `two`, ..."""
    conversations: list[list[dict[str, str]]] = []

    def answer(loaded: object, messages: Any, sampling: object, write: Callable[[str], None]) -> Any:
        conversations.append([dict(message) for message in messages])
        text = ("one", "two", "three")[len(conversations) - 1]
        write(text)
        return onegpu.cli.answer.Answer(text, Timing(1, 1, 1.0, 1.0), "stop")

    monkeypatch.setattr(onegpu.cli.answer, "answer", answer)
    return conversations


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_history_grows_and_reset_forgets_it(call: Call, tiny: Path, asked: list[list[dict[str, str]]]) -> None:
    result = call("chat", tiny, *OPTIONS, "--system", "be kind", stdin="a\nb\n/reset\nc\n/exit\nnever\n")
    assert result.exit_code == 0, result.output
    assert result.stdout == "one\ntwo\nthree\n"
    system = turn("system", "be kind")
    assert asked == [
        [system, turn("user", "a")],
        [system, turn("user", "a"), turn("assistant", "one"), turn("user", "b")],
        [system, turn("user", "c")],
    ]


def test_end_of_input_ends_it_and_an_unknown_command_is_explained(
    call: Call, tiny: Path, asked: list[list[dict[str, str]]]
) -> None:
    result = call("chat", tiny, *OPTIONS, stdin="/what\n\n")
    assert result.exit_code == 0
    assert result.stdout == ""
    assert asked == []
    assert result.stderr.count("/reset forgets") == 2


def test_a_real_model_answers(call: Call, tiny: Path) -> None:
    result = call("chat", tiny, *OPTIONS, stdin="hello\n")
    once = call("run", tiny, "hello", *OPTIONS)
    assert result.exit_code == 0, result.output
    assert result.stdout == once.stdout


def test_a_conversation_that_grew_too_long_can_be_reset(call: Call, tiny: Path) -> None:
    result = call("chat", tiny, *OPTIONS, stdin="x" * 300 + "\nhello\n")
    assert result.exit_code == 0, result.output
    assert "/reset starts anew" in result.stderr
    assert len(result.stdout) > 1


def test_a_model_without_a_template_cannot_chat(call: Call, tiny_plain: Path) -> None:
    result = call("chat", tiny_plain, *OPTIONS, stdin="hello\n")
    assert result.exit_code == 1
    assert "has no chat template" in result.stderr


def test_each_answer_is_a_line_of_json(call: Call, tiny: Path) -> None:
    plain = call("chat", tiny, *OPTIONS, stdin="hello\n/reset\nyou\n")
    result = call("chat", tiny, *OPTIONS, "--json", stdin="hello\n/reset\nyou\n")
    assert result.exit_code == 0, result.output
    said = [json.loads(line) for line in result.stdout.splitlines()]
    assert [each["question"] for each in said] == ["hello", "you"]
    assert "".join(each["text"] + "\n" for each in said) == plain.stdout
    assert all(each["new_tokens"] > 0 and each["format"] == "16bit" for each in said)
    assert "tok/s" in result.stderr
