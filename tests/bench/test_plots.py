from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from bench_results import GENERATE, KERNELS, LOAD, RESULTS, TITLES
from onegpu.bench import plots
from onegpu.errors import ConfigError, NotFoundError, UnsupportedError

pytest.importorskip("matplotlib")


def texts(made: Any) -> list[str]:
    """All words of a chart, read from its SVG."""
    root = ElementTree.fromstring(plots.svg(made))
    return ["".join(element.itertext()).strip() for element in root.iter() if element.tag.endswith("}text")]


@pytest.mark.parametrize("kind", RESULTS)
def test_each_kind_has_its_charts(kind: str) -> None:
    assert plots.kind_of(RESULTS[kind]) == kind
    made = plots.charts(kind, RESULTS[kind])
    assert list(made) == TITLES[kind]
    for figure in made.values():
        assert len(texts(figure)) > 5


def test_the_roofline_is_that_of_the_device() -> None:
    (axes,) = plots.charts("kernels", KERNELS)["Roofline"].axes
    (roof,) = axes.lines
    xs, ys = roof.get_data()
    assert max(ys) == pytest.approx(800)
    assert ys[0] == pytest.approx(xs[0] * 3.1)
    points = [tuple(point) for drawn in axes.collections for point in drawn.get_offsets()]
    assert len(points) == 3, "a row that failed is no point"
    first = KERNELS["rows"][0]
    assert points[0] == pytest.approx((1e3 * first["tflop_s"] / first["gb_s"], first["tflop_s"]))


def test_speed_is_drawn_over_batch() -> None:
    (axes,) = plots.charts("generate", GENERATE)["Tokens per second against batch"].axes
    drawn = {line.get_label(): [tuple(point) for point in line.get_xydata()] for line in axes.lines}
    assert drawn == {"nf4": [(1, 150), (8, 900)], "16bit": [(1, 80)]}


def test_memory_is_drawn_over_context_planned_and_measured() -> None:
    (axes,) = plots.charts("generate", GENERATE)["Memory against context"].axes
    (planned,) = axes.lines
    assert planned.get_label() == "nf4, planned"
    assert planned.get_xydata()[-1] == pytest.approx((2048, 5.25))
    assert [tuple(drawn.get_offsets()[0]) for drawn in axes.collections] == [(256, 6)] * 3


def test_bars_carry_their_figures() -> None:
    said = texts(plots.charts("load", LOAD)["Memory to load"])
    assert {"925", "950", "2,650", "weights", "peak while loading", "nf4", "16bit"} <= set(said)


def test_what_was_not_measured_is_left_out() -> None:
    failed = GENERATE | {"rows": [row for row in GENERATE["rows"] if row["error"]], "memory": []}
    assert plots.charts("generate", failed) == {}
    on_cpu = LOAD | {"rows": [row | {"peak_bytes": None} for row in LOAD["rows"]]}
    assert "peak while loading" not in texts(plots.charts("load", on_cpu)["Memory to load"])


@pytest.mark.parametrize("document", [{}, {"rows": []}, {"rows": [{"perplexity": 1}]}])
def test_another_document_is_refused(document: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="this is no result of `onegpu bench`") as caught:
        plots.kind_of(document)
    assert caught.value.hint == "save one with --json"


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match="plots need matplotlib, which is not installed"):
        plots.charts("load", LOAD)


def test_the_same_svg_each_time() -> None:
    first, again = (plots.svg(plots.charts("load", LOAD)["Time to load"]) for _ in range(2))
    assert first == again


def test_files_of_saved_results(tmp_path: Path) -> None:
    for kind, document in RESULTS.items():
        (tmp_path / f"{kind}.json").write_text(json.dumps(document))
    plots.main([*(str(tmp_path / f"{kind}.json") for kind in RESULTS), "--out", str(tmp_path / "charts")])
    made = sorted(path.name for path in (tmp_path / "charts").iterdir())
    assert made == [
        "encode-encoding--random.png",
        "encode-encoding--sorted.png",
        "generate-memory-against-context.png",
        "generate-share-of-the-memory-bandwidth.png",
        "generate-tokens-per-second-against-batch.png",
        "kernels-roofline.png",
        "load-memory-to-load.png",
        "load-time-to-load.png",
    ]
    for path in (tmp_path / "charts").iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")


def test_a_file_that_is_no_result(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ConfigError, match=r"a\.json is not JSON: Expecting"):
        plots.main([str(tmp_path / "a.json")])
    with pytest.raises(NotFoundError, match="can't read"):
        plots.main([str(tmp_path / "b.json")])
