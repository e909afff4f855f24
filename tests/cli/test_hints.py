"""What the command says to do next, beside each refusal, by its words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Call = Callable[..., Any]


@pytest.mark.parametrize(
    ("arguments", "error", "hint"),
    [
        (
            ["run", "TINY", "x", "--device", "gpu"],
            "--device must be auto, cpu, cuda or",
            "leave it out to choose the GPU",
        ),
        (["run", "TINY", "x", "--device", "cuda:99"], "CUDA devices here", "--device cpu runs without one"),
        (["run", "TINY", "x", "-q", "int8", "--double-quant"], "is for 4 bit", "add --quantization nf4"),
        (
            ["run", "BARE", "x", "--device", "cpu"],
            "no tokenizer in",
            "save it beside the weights: tokenizer.save_pretrained",
        ),
        (
            ["run", "PLAIN", "x", "--system", "y", "--device", "cpu"],
            "so it takes one plain prompt and no system message",
            "leave --system out, or use `onegpu run`",
        ),
        (["chat", "PLAIN", "--device", "cpu"], "so it cannot hold a conversation", "use `onegpu run`"),
        (["quantize", "TINY", "out", "-q", "none"], "leaves nothing to do", "choose nf4, fp4 or int8"),
        (["quantize", "TINY", "FILE"], "is a file", "name a folder"),
        (["quantize", "TINY", "TINY"], "is the folder of the model itself", "name another folder"),
        (
            ["embed", "TINY", "FILE", "--out", "a.txt"],
            "--out must end in .npy",
            "leave it out for JSON lines on stdout",
        ),
        (["embed", "TINY", "no.txt"], "can't read no.txt: No such file", "- reads stdin"),
        (["embed", "TINY", "BYTES"], "bytes.txt is not UTF-8: 'utf-8' codec can't decode byte", ""),
        (["eval", "TINY", "--text", "BYTES"], "bytes.txt is not UTF-8: invalid start byte at byte 0", ""),
        (
            ["bench", "load", "TINY", "--report", "a.pdf"],
            "--report must end in .html",
            "for example --report report.html",
        ),
        (["bench", "load", "TINY", "--report", "no/a.html"], "--report: there is no folder", "make it first"),
        (["bench", "load", "TINY", "--formats", ","], "no format given", "for example 16bit,nf4,int8"),
        (["eval", "TINY", "--formats", "16bit+double"], "16bit takes no '+' option; got '16bit+double'", "write 16bit"),
        (
            ["eval", "TINY", "--formats", "bitsandbytes:nf4+search"],
            "has no scale search",
            "write nf4+search for onegpu's",
        ),
        (["eval", "TINY", "--max-tokens", "2", "--text", "ONE"], "the text must have at least 2", "give a longer text"),
        (["eval", "TINY", "--window", "8", "--stride", "8"], "stride must be from 1 to", "window 512, stride 256"),
    ],
)
def test_a_refusal_and_its_cure(
    call: Call,
    tiny: Path,
    tiny_plain: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    error: str,
    hint: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bare").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "bare" / name).symlink_to(tiny / name)
    for name, content in (("file", b"a"), ("bytes.txt", b"\xff\xfe"), ("one.txt", b"a")):
        (tmp_path / name).write_bytes(content)
    places = {"TINY": tiny, "PLAIN": tiny_plain, "BARE": "bare", "FILE": "file", "BYTES": "bytes.txt", "ONE": "one.txt"}
    result = call(*(places.get(word, word) for word in arguments))
    assert result.exit_code == 1, result.output
    said, _, cure = result.stderr.partition("\n\nhint: ")
    assert said.splitlines()[-1].startswith("error: ")
    assert error in said
    assert hint in cure
    assert result.stdout == ""
