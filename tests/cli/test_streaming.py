from __future__ import annotations

import pytest
import torch

from onegpu.cli.streaming import TextStream
from tiny_checkpoint import byte_tokenizer


def stream(text: str, chunk: int = 1, prompt: str = "prompt") -> tuple[TextStream, list[str]]:
    tokenizer = byte_tokenizer()
    pieces: list[str] = []
    out = TextStream(tokenizer, pieces.append)
    out.put(torch.tensor([tokenizer(prompt)["input_ids"]]))
    token_ids = tokenizer(text)["input_ids"]
    for begin in range(0, len(token_ids), chunk):
        out.put(torch.tensor(token_ids[begin : begin + chunk]))
    out.end()
    return out, pieces


@pytest.mark.parametrize("chunk", [1, 2, 7])
@pytest.mark.parametrize("text", ["plain words", "naïve café – 日本語 🙂🙂", " leading\n\nlines \n", "", "é"])
def test_the_pieces_are_the_text_and_no_character_is_cut(text: str, chunk: int) -> None:
    out, pieces = stream(text, chunk)
    assert "".join(pieces) == out.text == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert "" not in pieces


def test_each_character_comes_when_it_is_whole() -> None:
    assert stream("a日b")[1] == ["a", "日", "b"]


def test_a_character_that_never_ends_is_shown_as_broken() -> None:
    tokenizer = byte_tokenizer()
    out = TextStream(tokenizer, lambda _: None)
    out.put(torch.tensor([[5]]))
    out.put(torch.tensor(tokenizer("日")["input_ids"][:2]))
    assert out.text == ""
    out.end()
    assert out.text.startswith("\ufffd")


def test_special_tokens_are_not_written() -> None:
    out, _ = stream("end<|end|>")
    assert out.text == "end"
    assert len(out.token_ids) == 4


def test_the_prompt_is_counted_and_not_written() -> None:
    out, _ = stream("ab", prompt="four")
    assert out.timing().prompt_tokens == 4
    assert out.timing().new_tokens == 2
