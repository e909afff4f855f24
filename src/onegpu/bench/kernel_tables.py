"""The results of the kernel benchmarks: one JSON-ready document, and its Markdown tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from onegpu.bench.kernel_errors import ALLOWED, worst
from onegpu.bench.kernel_goals import goal_table, goals_of
from onegpu.bench.kernel_time import Ceilings
from onegpu.bench.kernels import Row

__all__ = ["document", "tables"]

Items = Sequence[Mapping[str, Any]]


def document(ceilings: Ceilings, rows: Sequence[Row], facts: Mapping[str, Any], **sections: Items) -> dict[str, Any]:
    """All of it, JSON-ready: `rows` of products, then `chain`, `storage`, `experts`, `errors` as far as measured."""
    found = [asdict(row) for row in rows]
    return {**facts, "ceilings": asdict(ceilings), "rows": found, "goals": goals_of(found)} | {
        name: list(items) for name, items in sections.items()
    }


def tables(found: Mapping[str, Any]) -> str:
    """A document as Markdown tables, the goals last."""
    parts = [
        product_lines(found["rows"]),
        chain_lines(found.get("chain") or ()),
        storage_lines(found.get("storage") or ()),
        expert_lines(found.get("experts") or ()),
        error_lines(found.get("errors") or ()),
        goal_table(found),
    ]
    return "\n\n".join(text for text in ("\n".join(part) for part in parts) if text) + "\n"


def head(*names: str) -> Iterator[str]:
    yield "| " + " | ".join(names) + " |"
    yield "| --- " * len(names) + "|"


def product_lines(rows: Items) -> Iterator[str]:
    if rows:
        yield from head("shape", "M", "operator", "us", "GB/s", "TFLOP/s", "% of roofline", "x bf16")
    for row in rows:
        name = f"{row['shape']} {row['N']}x{row['K']}"
        if row["us"] is None:
            yield f"| {name} | {row['M'] or '-'} | {row['operator']} | failed: {row['note']} | | | | |"
            continue
        ratio = "" if row["times_bf16"] is None else f"{row['times_bf16']:.2f}"
        yield (
            f"| {name} | {row['M']} | {named(row['operator'], row['note'])} | {row['us']:.2f} | {row['gb_s']:.0f} "
            f"| {row['tflop_s']:.1f} | {row['roofline_percent']:.0f} | {ratio} |"
        )


def named(operator: str, note: str) -> str:
    return operator + (f" ({note})" if note else "")


def chain_lines(chain: Items) -> Iterator[str]:
    if chain:
        yield from head("chain", "overlap", "us", "us per layer", "% of roofline", "difference", "same bits")
    for item in chain:
        name, overlap = f"{item['model']} {item['operator']} x {item['layers']}", "yes" if item["overlap"] else "no"
        if item["us"] is None:
            yield f"| {name} | {overlap} | failed: {item['note']} | | | | |"
            continue
        same = "yes" if item["repeats"] and item["finite"] else "NO"
        yield (
            f"| {name} | {overlap} | {item['us']:.1f} | {item['us'] / item['layers']:.2f} "
            f"| {item['roofline_percent']:.1f} | {item['difference']:.1e} | {same} |"
        )


def storage_lines(storage: Items) -> Iterator[str]:
    if storage:
        yield from head("storage", "us", "GB/s", "% of read bandwidth")
    for item in storage:
        name = f"{item['task']} {item['N']}x{item['K']}"
        if item["us"] is None:
            yield f"| {name} | failed: {item['note']} | | |"
        else:
            yield f"| {named(name, item['note'])} | {item['us']:.1f} | {item['gb_s']:.0f} | {item['percent']:.0f} |"


def expert_lines(experts: Items) -> Iterator[str]:
    if experts:
        yield from head("experts", "tokens", "operator", "us", "TFLOP/s", "% of roofline", "x bf16 loop")
    for item in experts:
        name = f"{item['model']} {item['experts']}x{item['N']}x{item['K']} top {item['top_k']}"
        if item["us"] is None:
            yield f"| {name} | {item['tokens'] or '-'} | {item['operator']} | failed: {item['note']} | | | |"
            continue
        ratio = "" if item["times_bf16"] is None else f"{item['times_bf16']:.2f}"
        yield (
            f"| {name} | {item['tokens']} | {named(item['operator'], item['note'])} | {item['us']:.1f} "
            f"| {item['tflop_s']:.1f} | {item['roofline_percent']:.0f} | {ratio} |"
        )


def error_lines(errors: Items) -> Iterator[str]:
    """The worst case of each operator and M; the document has them all."""
    if errors:
        yield from head("errors", "M", "error", "dequantized and multiplied", "ratio", "at", "not above")
    for item in worst(errors):
        where = f"{item['shape']} {item['N']}x{item['K']}, {item['inputs']}, {item['dtype']}"
        if item["error"] is None:
            yield f"| {item['operator']} | {item['M'] or '-'} | failed: {item['note']} | | | {where} | NO |"
            continue
        verdict = "yes" if item["ratio"] <= ALLOWED else "NO"
        yield (
            f"| {item['operator']} | {item['M']} | {item['error']:.2e} | {item['allowed']:.2e} "
            f"| {item['ratio']:.3f} | {where} | {verdict} |"
        )
