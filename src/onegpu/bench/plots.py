"""Charts of what `onegpu bench` measured, from its JSON documents.

    kernels    roofline: operations per second over operations per byte, under what the device can read and multiply
    generate   tokens per second against batch; share of the bandwidth; memory against context
    encode     real tokens per second, beside the limit of the matrix products
    load       seconds, and bytes beside the peak on the GPU

    python -m onegpu.bench.plots --out FOLDER RESULT.json ...

writes each chart as FOLDER/RESULT-CHART.png. Needs matplotlib (the extra `bench`).
"""

from __future__ import annotations

import argparse
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from onegpu.errors import ConfigError, NotFoundError, UnsupportedError

__all__ = ["charts", "kind_of", "main", "png", "svg"]

Document = Mapping[str, Any]
SIZE = (7.5, 4.2)  # inches
STYLE = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 10,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "onegpu",
}


def kind_of(document: Document) -> str:
    """Which command a document is from, by what its rows hold.

    Raises:
        ConfigError: from none that is known.
    """
    first: Mapping[str, Any] = next(iter(document.get("rows") or []), {})
    marks = {"kernels": "operator", "generate": "ttft_ms", "encode": "contender", "load": "seconds"}
    for kind, key in marks.items():
        if key in first:
            return kind
    raise ConfigError("this is no result of `onegpu bench`: no rows, or rows of no known kind", "save one with --json")


def charts(kind: str, document: Document) -> dict[str, Any]:
    """Matplotlib figures by title; a chart without data is left out.

    Raises:
        UnsupportedError: matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise UnsupportedError("plots need matplotlib, which is not installed", "pip install matplotlib")
    import matplotlib

    makers = {"kernels": kernel_charts, "generate": generate_charts, "encode": encode_charts, "load": load_charts}
    with matplotlib.rc_context(STYLE):
        return dict(makers[kind](document))


def figure(bars: int | None = None) -> tuple[Any, Any]:
    """An empty figure, without pyplot's list of open ones; as high as so many horizontal bars need."""
    from matplotlib.figure import Figure

    made = Figure(figsize=SIZE if bars is None else (SIZE[0], 1.0 + 0.4 * bars), layout="constrained")
    axes = made.subplots()
    if bars is not None:
        axes.grid(visible=False, axis="y")
    return made, axes


def kernel_charts(document: Document) -> Iterator[tuple[str, Any]]:
    """The roofline chart: our products as discs, other packages' as crosses, plain 16-bit products as squares."""
    import numpy as np

    rows = [row for row in document["rows"] if row["us"] and row["gb_s"] and row["tflop_s"]]
    if not rows:
        return
    read, peak = document["ceilings"]["read_bandwidth"], document["ceilings"]["flops"]
    made, axes = figure()
    intensity = [1e3 * row["tflop_s"] / row["gb_s"] for row in rows]
    xs = np.geomspace(min(intensity) / 2, max(*intensity, 2 * peak / read), 200)
    axes.plot(xs, np.minimum(xs * read, peak) / 1e12, color="black", label="what the device can do")
    for operator in dict.fromkeys(row["operator"] for row in rows):
        own = [(x, row["tflop_s"]) for x, row in zip(intensity, rows, strict=True) if row["operator"] == operator]
        axes.scatter(*zip(*own, strict=True), **marker(operator), label=operator)
    axes.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="TFLOP/s")
    axes.set_title(document.get("device", ""), fontsize=10)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    yield "Roofline", made


def marker(operator: str) -> dict[str, Any]:
    """How the points of an operator look."""
    if operator.startswith("onegpu"):
        return {"marker": "o", "s": 22}
    return (
        {"marker": "s", "s": 26, "color": "black", "alpha": 0.6} if "cuBLAS" in operator else {"marker": "x", "s": 26}
    )


def generate_charts(document: Document) -> Iterator[tuple[str, Any]]:
    """Speed against batch, share of the bandwidth, memory against context."""
    rows = [row for row in document["rows"] if row.get("tokens_per_second")]
    if rows:
        made, axes = figure()
        lines(axes, rows, "batch", "tokens_per_second", 1.0)
        axes.set(xlabel="batch", ylabel="tokens per second", ylim=(0, None))  # linear: twice as high is twice as fast
        axes.set_xticks(sorted({row["batch"] for row in rows}))
        axes.legend(fontsize=8)
        yield "Tokens per second against batch", made
    shares = [row for row in rows if row.get("bandwidth_percent")]
    if shares:
        made, axes = figure(len(shares))
        bars(
            axes,
            [f"{row['format']}, batch {row['batch']}" for row in shares],
            {"": column(shares, "bandwidth_percent")},
        )
        axes.set(xlabel="percent of the measured memory bandwidth", xlim=(0, 100))
        yield "Share of the memory bandwidth", made
    planned = document.get("memory") or []
    measured = [row for row in rows if row.get("peak_bytes")]
    if planned or measured:
        made, axes = figure()
        memory(axes, planned, measured)
        yield "Memory against context", made


def memory(axes: Any, planned: Sequence[Mapping[str, Any]], measured: Sequence[Mapping[str, Any]]) -> None:
    """A line of planned bytes for each format, and a cross for each peak that was measured."""
    lines(axes, planned, "context", "bytes", 2.0**-30)
    colors = {line.get_label(): line.get_color() for line in axes.lines}
    for line in axes.lines:
        line.set_label(f"{line.get_label()}, planned")
    for row in measured:
        axes.scatter(
            row["prompt_tokens"] + row["new_tokens"],
            row["peak_bytes"] / 2**30,
            marker="x",
            color=colors.setdefault(row["format"], f"C{len(colors)}"),
            label=f"{row['format']}, batch {row['batch']}, measured",
        )
    # Each step to the right is twice the context: from a short question to a whole book.
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    axes.set(xlabel="context, tokens", ylabel="GiB")
    axes.margins(y=0.1)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)


def encode_charts(document: Document) -> Iterator[tuple[str, Any]]:
    """Real tokens per second of each contender, by the order of the texts."""
    rows = document["rows"]
    for order in dict.fromkeys(row["order"] for row in rows):
        own = [row for row in rows if row["order"] == order]
        made, axes = figure(len(own) + 1)
        bars(axes, column(own, "contender"), {"": column(own, "tokens_per_second")})
        limits = [row["tokens_per_second"] / row["share"] for row in own if row.get("share")]
        if limits:
            axes.axvline(max(limits), color="black", linestyle="--", label="limit of the matrix products")
            made.legend(fontsize=8, loc="outside upper right")
        axes.set(xlabel="real tokens per second")
        yield f"Encoding, {order}", made


def load_charts(document: Document) -> Iterator[tuple[str, Any]]:
    """Seconds to load; bytes of the weights and the peak while loading."""
    rows = document["rows"]
    made, axes = figure(len(rows))
    bars(axes, column(rows, "format"), {"": column(rows, "seconds")})
    axes.set(xlabel="seconds to load")
    yield "Time to load", made
    sizes = {"weights": [row["weight_bytes"] / 2**20 for row in rows]}
    if all(row["peak_bytes"] for row in rows):
        sizes["peak while loading"] = [row["peak_bytes"] / 2**20 for row in rows]
    made, axes = figure(len(sizes) * len(rows))
    bars(axes, column(rows, "format"), sizes)
    axes.set(xlabel="MiB")
    yield "Memory to load", made


def column(rows: Sequence[Mapping[str, Any]], name: str) -> list[Any]:
    """One value of each row."""
    return [row[name] for row in rows]


def lines(axes: Any, rows: Sequence[Mapping[str, Any]], x: str, y: str, scale: float) -> None:
    """One line for each format, its points in the order of x."""
    for label in dict.fromkeys(column(rows, "format")):
        own = sorted((row[x], row[y] * scale) for row in rows if row["format"] == label)
        axes.plot(*zip(*own, strict=True), marker="o", markersize=4, label=label)


def bars(axes: Any, labels: Sequence[str], groups: Mapping[str, Sequence[float]]) -> None:
    """Horizontal bars, the first row on top, each with its figure."""
    height = 0.8 / len(groups)
    for index, (name, values) in enumerate(groups.items()):
        places = [place + (index - (len(groups) - 1) / 2) * height for place in range(len(values))]
        drawn = axes.barh(places, values, height=height, label=name or None)
        axes.bar_label(
            drawn, labels=[f"{value:,.3g}" if value < 1000 else f"{value:,.0f}" for value in values], padding=3
        )
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    if len(groups) > 1:
        axes.legend(fontsize=8)


def svg(made: Any) -> str:
    """A figure as an <svg> element, to stand within a page."""
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context(STYLE):
        made.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    return re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)


def png(made: Any, path: Path) -> None:
    """A figure as a PNG file."""
    made.savefig(path, format="png", dpi=150, metadata={"Software": None})


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw the charts of saved results.

    Raises:
        NotFoundError: a file that is not there.
        ConfigError: a file that is no result.
    """
    parser = argparse.ArgumentParser(prog="python -m onegpu.bench.plots", description="Charts of onegpu bench, as PNG.")
    parser.add_argument("results", nargs="+", type=Path, help="JSON documents that `onegpu bench ... --json` printed")
    parser.add_argument("--out", type=Path, default=Path(), help="folder for the PNG files")
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    for path in given.results:
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise NotFoundError(f"can't read {path}: {error.strerror or error}") from error
        except ValueError as error:
            raise ConfigError(f"{path} is not JSON: {error}") from error
        for title, made in charts(kind_of(document), document).items():
            name = "".join(letter if letter.isalnum() else "-" for letter in title.lower()).strip("-")
            png(made, given.out / f"{path.stem}-{name}.png")


if __name__ == "__main__":
    main()
