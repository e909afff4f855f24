"""What the kernels are to reach on an H100, and what a run reached: against bfloat16, the roofline and other packages.

A goal is a number for one operator, product and number of rows, of the model "llama-8b": percent of the roofline, or
times the speed of cuBLAS in bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

__all__ = ["STORAGE_PERCENT", "goal_table", "goals_of"]

NF4: Final = "onegpu nf4, tiled"
FP4: Final = "onegpu fp4, tiled"
INT8: Final = "onegpu int8, outliers"
# Percent of the roofline at one row.
ROOFLINE: Final = {
    (NF4, "gate_up"): 82, (NF4, "down"): 72, (NF4, "qkv"): 62, (NF4, "o"): 48,
    (FP4, "gate_up"): 82, (FP4, "down"): 72, (FP4, "qkv"): 62, (FP4, "o"): 48,
    (INT8, "gate_up"): 80,
}  # fmt: skip
# Times bfloat16 by rows of x: the joined gate and up, and the others.
TIMES_NF4: Final = {
    8: (3.0, 2.5), 16: (2.5, 2.1), 32: (1.8, 1.4), 64: (1.2, 1.2), 128: (1.0, 1.0), 192: (1.0, 1.0),
    256: (0.8, 0.8), 512: (0.8, 0.8), 1024: (0.92, 0.92), 2048: (0.92, 0.92), 4096: (0.92, 0.92),
}  # fmt: skip
TIMES_INT8: Final = (1.5, 1.0)  # up to 16 rows, and above
INT8_FEW_ROWS: Final = 16
INT8_LARGEST: Final = 1.2  # 28672 x 4096 at 4096 rows
CHAIN_PERCENT: Final = 80
STORAGE_PERCENT: Final = 70
FORMATS: Final = {"nf4": "4 bit", "fp4": "4 bit", "int4": "4 bit", "int8": "8 bit", "bf16": "16 bit"}


def roofline_goal(row: Mapping[str, Any]) -> float | None:
    """Percent that this row is to reach, or None."""
    return ROOFLINE.get((row["operator"], row["shape"])) if row["M"] == 1 else None


def speed_goal(row: Mapping[str, Any]) -> float | None:
    """Times bfloat16 that this row is to reach, or None."""
    M, is_widest = row["M"], row["shape"] == "gate_up"
    if row["operator"] == NF4 and M in TIMES_NF4:
        return TIMES_NF4[M][0 if is_widest else 1]
    if row["operator"] == INT8:
        if M == 4096 and is_widest:
            return INT8_LARGEST
        return TIMES_INT8[0 if M <= INT8_FEW_ROWS else 1]
    return None


def width_of(operator: str) -> str:
    """The bits of an operator's weights, so that like is held against like."""
    return next((bits for name, bits in FORMATS.items() if name in operator), "")


def goals_of(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each of our rows that was measured: what it is to reach, the best other package, and whether it is met.

    The others are those of the same width; of ours, NF4, FP4 and int8 in the form that models use are held to them.
    """
    found = []
    for row in rows:
        if row["us"] is None or row["operator"] not in (NF4, FP4, INT8):
            continue
        others = [
            other
            for other in rows
            if other["us"] and (other["shape"], other["M"]) == (row["shape"], row["M"]) and is_peer(other["operator"])
            and width_of(other["operator"]) == width_of(row["operator"])
        ]  # fmt: skip
        best = min(others, key=lambda other: times_of(row, other), default=None)
        percent, times = roofline_goal(row), speed_goal(row)
        times_best = None if best is None else times_of(row, best)
        checks = [
            None if percent is None else row["roofline_percent"] >= percent,
            None if times is None or row["times_bf16"] is None else row["times_bf16"] >= times,
            None if times_best is None else times_best > 1,
        ]
        found.append(
            {key: row[key] for key in ("shape", "N", "K", "M", "operator", "us", "roofline_percent", "times_bf16")}
            | {"roofline_goal": percent, "bf16_goal": times, "best_peer": best and best["operator"]}
            | {"times_best_peer": times_best, "met": all(check for check in checks if check is not None)}
        )
    return found


def times_of(row: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """How many times as fast a row is as another.

    By what both are to the library, which is taken in the same rounds: a card's clock moves by 10 % within seconds.
    """
    if row["times_bf16"] and other["times_bf16"]:
        return float(row["times_bf16"] / other["times_bf16"])
    return float(other["us"] / row["us"])


def is_peer(operator: str) -> bool:
    return not operator.startswith(("onegpu", "bf16"))


def goal_table(document: Mapping[str, Any]) -> Iterator[str]:
    """Markdown lines: products, then what is said of the chain and of storage in a row each."""
    rows = goals_of(document["rows"])
    if rows:
        yield "| goals | M | operator | us | % of roofline | goal | x bf16 | goal | best other | x best | met |"
        yield "| --- " * 11 + "|"
    for row in rows:
        yield (
            f"| {row['shape']} {row['N']}x{row['K']} | {row['M']} | {row['operator']} | {row['us']:.2f} "
            f"| {row['roofline_percent']:.0f} | {number(row['roofline_goal'], 0)} | {number(row['times_bf16'], 2)} "
            f"| {number(row['bf16_goal'], 2)} | {row['best_peer'] or ''} | {number(row['times_best_peer'], 2)} "
            f"| {'yes' if row['met'] else 'NO'} |"
        )
    lines = [*chain_lines(document.get("chain") or []), *storage_lines(document.get("storage") or [])]
    if lines:
        yield ""
        yield "| goals | measured | goal | met |"
        yield "| --- " * 4 + "|"
        for name, measured, goal, met in lines:
            yield f"| {name} | {measured} | {goal} | {'yes' if met else 'NO'} |"


def number(value: float | None, places: int) -> str:
    return "" if value is None else f"{value:.{places}f}"


def chain_lines(chain: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str, str, bool]]:
    overlapped = {row["operator"]: row for row in chain if row["overlap"] and row["us"]}
    for operator, row in overlapped.items():
        share = row["roofline_percent"]
        if "double" not in operator:
            yield f"chain {operator}", f"{share:.1f} % of the roofline", f"{CHAIN_PERCENT} %", share >= CHAIN_PERCENT
    plain = next((row for name, row in overlapped.items() if "double" not in name), None)
    double = next((row for name, row in overlapped.items() if "double" in name), None)
    if plain and double:
        yield "chain, double / plain time", f"{double['us'] / plain['us']:.3f}", "1.0", double["us"] <= plain["us"]


def storage_lines(storage: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str, str, bool]]:
    for row in storage:
        if row["us"] and "search" not in row["task"]:
            met = row["percent"] >= STORAGE_PERCENT
            yield row["task"], f"{row['percent']:.0f} % of the read bandwidth", f"{STORAGE_PERCENT} %", met
