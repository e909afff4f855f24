"""Every code block of the README and of the guides runs; the Chinese pages have the same code as the English ones."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest

from pages import ROOT, Block, blocks, commands, is_met, run

DOCS = ROOT / "docs"
ENGLISH = sorted(page for page in DOCS.rglob("*.md") if "zh" not in page.parts and "reference" not in page.parts)
CHINESE = {page: DOCS / page.relative_to(DOCS / "zh") for page in sorted((DOCS / "zh").rglob("*.md"))}
CHINESE[ROOT / "README.zh.md"] = ROOT / "README.md"
NEEDS_TRANSLATION = [DOCS / "index.md", DOCS / "guide-2023.md", *sorted((DOCS / "guides").glob("*.md"))]


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def meaning(block: Block) -> object:
    """The code without its comments."""
    if block.language == "python":
        return ast.dump(ast.parse(block.code))
    return [shlex.join(command) for command in commands(block)] if block.language == "sh" else None


@pytest.mark.parametrize("page", [ROOT / "README.md", *ENGLISH], ids=name)
def test_every_block_runs(page: Path, workplace: Path) -> None:
    found = blocks(page)
    ran = run(found)
    assert ran == sum(is_met(block.need) for block in found if block.language in ("python", "sh"))


@pytest.mark.parametrize("page", CHINESE, ids=name)
def test_chinese_pages_have_the_code_of_the_english_ones(page: Path) -> None:
    """The same statements and commands in the same order, so that what runs there runs here."""
    mine, theirs = (
        [each for each in blocks(one) if each.language in ("python", "sh")] for one in (page, CHINESE[page])
    )
    assert [(meaning(block), block.need) for block in mine] == [(meaning(block), block.need) for block in theirs]


@pytest.mark.parametrize("page", NEEDS_TRANSLATION, ids=name)
def test_every_guide_is_there_in_chinese(page: Path) -> None:
    translated = DOCS / "zh" / page.relative_to(DOCS)
    assert translated in CHINESE
    text = translated.read_text(encoding="utf-8")
    assert sum("\u4e00" <= letter <= "\u9fff" for letter in text) > 200
    assert text.count("\n## ") == page.read_text(encoding="utf-8").count("\n## ")


@pytest.mark.parametrize("page", [ROOT / "README.md", *ENGLISH, *CHINESE], ids=name)
def test_no_block_is_passed_over(page: Path) -> None:
    """Each fence was collected, its language is one that runs or is text, and each comment above one was read."""
    text = page.read_text(encoding="utf-8")
    found = blocks(page)
    fences = [line for line in text.splitlines() if line.lstrip("> ").startswith("```")]
    assert len(fences) == 2 * len(found)
    assert {block.language for block in found} <= {"python", "sh", "text", "json"}
    directives = [line for line in text.splitlines() if line.startswith(("<!-- needs", "<!-- exit"))]
    assert len(directives) == sum((block.need is not None) + (block.exit_code != 0) for block in found)
    assert "~~~" not in text


@pytest.mark.parametrize("page", [page for page in CHINESE if page.name != "README.zh.md"], ids=name)
def test_chinese_pages_have_the_parts_of_the_english_ones(page: Path) -> None:
    """As many headings of each level, rows of tables, items of lists, and pictures; README.zh.md is a shorter one."""
    prose = [
        re.sub(r"^```.*?^```$", "", one.read_text(encoding="utf-8"), flags=re.M | re.S) for one in (page, CHINESE[page])
    ]
    parts = ("# ", "## ", "### ", "|", "- ", "![")
    mine, theirs = ([sum(line.startswith(part) for line in text.splitlines()) for part in parts] for text in prose)
    assert dict(zip(parts, mine, strict=True)) == dict(zip(parts, theirs, strict=True))


def test_there_is_much_to_run() -> None:
    found = [block for page in ENGLISH for block in blocks(page) if block.language in ("python", "sh")]
    assert len(found) > 40
    assert sum(block.need is None for block in found) > 0.8 * len(found)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("```python\nimport onegpu\nonegpu.optimise(1)\n```\n", "onegpu.optimise does not exist"),
        ("```python\nimport onegpu\nonegpu.fit('a', gpus=2)\n```\n", "takes no"),
        ("```python\nimport onegpu\nonegpu.AutoModel.from_pretrained('a', load_in_3bit=True)\n```\n", "load_in_3bit"),
        ("```python\nassert 1 == 2, 'three'\n```\n", "three"),
        ("```sh\nonegpu run Qwen/Qwen3-8B hi --quantisation nf4\n```\n", "No such option"),
        ("<!-- needs: gpu -->\n```sh\nonegpu bench kernels --mm 1\n```\n", "No such option"),
        ("```sh\nonegpu walk Qwen/Qwen3-8B\n```\n", "no command 'walk'"),
        ("```sh\nonegpu run no/model hi\n```\n", "ended with 1"),
        ("<!-- exit: 1 -->\n```sh\nonegpu version\n```\n", "ended with 0"),
        ("```sh\nmake coffee\n```\n", "no such target"),
        ('```sh\npip install ".[gpu]"\n```\n', "no such extra"),
        ("```sh\nrm -r .\n```\n", "a command that no test knows"),
    ],
)
def test_a_wrong_block_is_seen(text: str, words: str, workplace: Path) -> None:
    (workplace / "page.md").write_text(text)
    with pytest.raises(AssertionError, match=words):
        run(blocks(workplace / "page.md"))
