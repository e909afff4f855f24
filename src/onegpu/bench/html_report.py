"""One HTML file of a benchmark: its tables, its plots, where it was measured, and a block to paste into an issue.

The file stands alone: plots are inline SVG, nothing is fetched, no script runs but the one behind the copy button.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from onegpu.bench import plots
from onegpu.errors import OneGpuError, SaveError, UnsupportedError

__all__ = ["memory_curve", "pasteable", "render", "write"]

CONTEXTS = tuple(1 << power for power in range(8, 18))
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem;
       color: #1c1e21; background: #fff; }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto; font-size: 14px; }
th, td { border: 1px solid #ccd0d5; padding: .3rem .6rem; text-align: left; white-space: nowrap; }
th { background: #f0f2f5; }
svg { max-width: 100%; height: auto; }
pre { background: #f0f2f5; padding: 1rem; overflow-x: auto; }
figure { margin: 1.5rem 0; }
figcaption { font-weight: 600; }
"""
COPY = "navigator.clipboard.writeText(document.getElementById('paste').textContent)"


def write(path: Path, kind: str, document: Mapping[str, Any], tables: str) -> str | None:
    """Write the report of one command; a sentence where it has no plots.

    Args:
        kind: "kernels", "generate", "encode" or "load".
        document: what the command prints with --json.
        tables: what it prints without, Markdown.

    Raises:
        SaveError: the file cannot be written.
    """
    figures, note = drawn(kind, with_memory(kind, document))
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(render(kind, document, tables, figures, note), encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise SaveError(f"can't write the report {path}: {error.strerror or error}") from error
    return note


def drawn(kind: str, document: Mapping[str, Any]) -> tuple[dict[str, str], str | None]:
    """The plots as SVG by title, or none and the reason."""
    try:
        return {title: plots.svg(figure) for title, figure in plots.charts(kind, document).items()}, None
    except UnsupportedError as error:
        return {}, f"{error.message}: {error.hint}"


def render(kind: str, document: Mapping[str, Any], tables: str, figures: Mapping[str, str], note: str | None) -> str:
    """The page."""
    title = f"onegpu bench {kind}" + (f" {document['model']}" if document.get("model") else "")
    body = [f"<h1>{html.escape(title)}</h1>", f"<p>{html.escape(str(document.get('device', '')))}</p>"]
    body += ["<h2>Results</h2>", *(table_of(lines) for lines in markdown_tables(tables))]
    if figures or note:
        body.append("<h2>Plots</h2>")
    body += [
        f"<figure><figcaption>{html.escape(name)}</figcaption>{drawing}</figure>" for name, drawing in figures.items()
    ]
    if note:
        body.append(f"<p>{html.escape(note)}</p>")
    body += ["<h2>Where it was measured</h2>", table_of([["", ""], *([k, v] for k, v in facts(document))])]
    body += [
        "<h2>Ready to paste</h2>",
        f'<p><button onclick="{COPY}">copy</button></p>',
        f'<pre id="paste">{html.escape(pasteable(title, document, tables))}</pre>',
    ]
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n' + "\n".join(body) + "\n</body></html>\n"


def pasteable(title: str, document: Mapping[str, Any], tables: str) -> str:
    """The tables and the environment as Markdown."""
    width = max((len(key) for key, _ in facts(document)), default=0)
    lines = [f"{key:<{width}}  {value}" for key, value in facts(document)]
    return "\n".join([f"### {title}", "", tables.strip(), "", "```", *lines, "```", ""])


def facts(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    """All of a document that is one value, and the versions, each as a name and a text."""
    flat: dict[str, Any] = {}
    for key, value in document.items():
        if isinstance(value, Mapping) and key in ("versions", "ceilings"):
            flat |= value
        elif not isinstance(value, (Mapping, list, tuple)):
            flat[key] = value
    return [(key, fact(key, value)) for key, value in flat.items()]


def fact(name: str, value: object) -> str:
    """One value as text, what was measured of the device in the units people know."""
    if isinstance(value, float) and name.endswith("bandwidth"):
        return f"{value / 1e9:.0f} GB/s"
    if isinstance(value, float) and name.endswith("flops"):
        return f"{value / 1e12:.1f} TFLOP/s"
    return "none" if value is None else str(value)


def markdown_tables(text: str) -> Iterator[list[list[str]]]:
    """Each table of a Markdown text as rows of cells, the head first."""
    table: list[list[str]] = []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
            if any(set(cell) - set("-: ") for cell in cells) or not table:
                table.append(cells)
        elif table:
            yield table
            table = []


def table_of(rows: list[list[str]]) -> str:
    """Rows of cells as an HTML table; a head of empty cells is left out."""

    def line(cells: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    head = line(rows[0], "th") if any(rows[0]) else ""
    return f"<table>{head}{''.join(line(cells, 'td') for cells in rows[1:])}</table>"


def with_memory(kind: str, document: Mapping[str, Any]) -> Mapping[str, Any]:
    """A document with the planned memory of a known shape of random weights; any other as it is."""
    from onegpu.memory.shapes import SHAPES

    shape = SHAPES.get(str(document.get("model"))) if kind == "generate" and document.get("random") else None
    if shape is None or document.get("memory"):
        return document
    formats = list(dict.fromkeys(row["format"] for row in document["rows"]))
    with TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(dict(shape)), encoding="utf-8")
        return {**document, "memory": memory_curve(folder, formats)}


def memory_curve(model: str, formats: list[str]) -> list[dict[str, Any]]:
    """Planned bytes of a model by format and context, for the chart; nothing where it cannot be planned.

    Each row: `format`, `context`, `bytes` (weights, cache and workspace at batch 1).
    """
    from onegpu.memory import fit

    rows = []
    try:
        longest = fit(model, gpu="1TiB", context=1).formats[0].max_context or CONTEXTS[-1]
        for context in [each for each in CONTEXTS if each <= longest]:
            for row in fit(model, gpu="1TiB", context=context).formats:
                if row.format in formats:
                    rows.append({"format": row.format, "context": context, "bytes": row.total_bytes})
    except OneGpuError:
        return []
    return rows
