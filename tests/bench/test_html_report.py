from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import pytest

from bench_results import GENERATE, RESULTS, TITLES
from onegpu.bench import html_report, plots
from onegpu.bench.html_report import fact, markdown_tables, memory_curve, pasteable, with_memory, write
from onegpu.errors import SaveError
from tiny_checkpoint import save_tiny

TABLES = "| format | tok/s |\n| --- | --- |\n| nf4 | 150 |\n| a <b> | - |\n\n| other |\n| --- |\n| 1 |\n"
VOID = ("meta",)


class Page(HTMLParser):
    """A page's tags, attributes and texts; every tag must be closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())


@pytest.mark.parametrize("kind", RESULTS)
def test_one_file_that_opens_without_a_network(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "report.html"
    assert write(path, kind, RESULTS[kind], TABLES) is None
    page = Page(path.read_text(encoding="utf-8"))
    assert page.tags.count("svg") == len(TITLES[kind])
    assert page.tags.count("table") == 3, "two of results, one of facts"
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    fetched = [value for name, value in page.attributes if not name.startswith("xmlns") and "://" in (value or "")]
    assert fetched == []
    assert all(value.startswith("#") for name, value in page.attributes if name in ("href", "xlink:href") and value)
    for words in (*TITLES[kind], "Ready to paste", "NVIDIA Foo <cuda:0>", "a <b>", "3.11.7"):
        assert words in page.texts, words
    assert not list(tmp_path.glob("*.partial"))


def test_without_matplotlib_there_are_tables_and_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    note = write(tmp_path / "report.html", "generate", GENERATE, TABLES)
    assert note == "plots need matplotlib, which is not installed: pip install matplotlib"
    page = Page((tmp_path / "report.html").read_text())
    assert "svg" not in page.tags
    assert note in page.texts


def test_what_is_pasted_has_the_tables_and_the_facts() -> None:
    text = pasteable("onegpu bench generate org/name", GENERATE, TABLES)
    assert text.startswith("### onegpu bench generate org/name\n\n| format | tok/s |")
    facts = dict(line.split(maxsplit=1) for line in text.split("```")[1].strip().splitlines())
    assert facts["python"] == "3.11.7"
    assert facts["bitsandbytes"] == "none"
    assert facts["device"] == "NVIDIA Foo <cuda:0>"


def test_tables_are_read_cell_by_cell() -> None:
    assert list(markdown_tables(TABLES)) == [
        [["format", "tok/s"], ["nf4", "150"], ["a <b>", "-"]],
        [["other"], ["1"]],
    ]


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(SaveError, match="can't write the report"):
        write(tmp_path / "no" / "report.html", "load", RESULTS["load"], TABLES)


def test_the_memory_curve_is_the_plan(tmp_path: Path) -> None:
    from onegpu.memory import fit

    folder = save_tiny(tmp_path / "model", max_position_embeddings=2048)
    rows = memory_curve(str(folder), ["nf4", "bitsandbytes:nf4"])
    assert [row["context"] for row in rows] == [256, 512, 1024, 2048]
    assert {row["format"] for row in rows} == {"nf4"}
    assert rows[2]["bytes"] == fit(str(folder), context=1024).row("nf4").total_bytes
    assert memory_curve("no/such-model", ["nf4"]) == []


def test_every_kind_is_drawn_by_the_page() -> None:
    assert set(RESULTS) == {"kernels", "generate", "encode", "load"}
    assert html_report.CONTEXTS[0] == 256


def test_a_known_shape_of_random_weights_has_its_planned_memory(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    random = {**GENERATE, "model": "llama-3.2-1b", "random": True, "memory": []}
    assert write(tmp_path / "report.html", "generate", random, TABLES) is None
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "nf4, planned" in text
    unknown = with_memory("generate", random | {"model": "my-folder"})
    assert unknown["memory"] == []
    sizes = [row["bytes"] for row in with_memory("generate", random)["memory"] if row["format"] == "nf4"]
    assert sizes == sorted(sizes)
    assert 2**30 < sizes[0] < 2**31 < sizes[-1]


def test_what_was_measured_of_the_device_has_units() -> None:
    assert fact("read_bandwidth", 3144119085279.8535) == "3144 GB/s"
    assert fact("matmul_flops", 766053779803783.5) == "766.1 TFLOP/s"
    assert fact("read_bandwidth", None) == "none"
    assert fact("threads", 16) == "16"
