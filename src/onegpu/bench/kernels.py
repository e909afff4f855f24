"""The operators measured: time of a call, as a share of what the device can read and multiply.

    weights     rotated over at least `ROTATION` bytes, so that none is in L2 (`kernel_time` says how times are taken)
    roofline    max(bytes / read bandwidth, operations / product speed); bytes are those of the weight as stored, x, y
    turns       at each number of rows all operators take turns, for the card's clock changes with its load and time
                (`kernel_turns`); `times_bf16` is the median over rounds of quotients within one

Operators are made from one weight and stay in memory while a shape is measured; where it has not room for all, so many
at a time as it has, each time with cuBLAS. One that fails is a row with the reason. A call that cannot be captured is
timed as it is, and the row says so.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch
from torch import Tensor

from onegpu.bench.kernel_products import BASELINE, OURS, Contender, Maker, makers, torch_product
from onegpu.bench.kernel_time import (
    Ceilings,
    call_times,
    copies_of,
    first_line,
    measure_ceilings,
    normals,
    time_limit,
    warm_up_products,
)
from onegpu.bench.kernel_turns import Turn, take_turns, turn_of
from onegpu.errors import ConfigError

__all__ = [
    "BASELINE",
    "MODELS",
    "OURS",
    "ROTATION",
    "Ceilings",
    "Row",
    "call_times",
    "compare_kernels",
    "copies_of",
    "measure_ceilings",
    "parse_rows",
    "parse_shapes",
]

# Rows and columns of the products of one layer; q, k, v and gate, up are joined.
MODELS: Final = {
    "llama-8b": {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)},
    "qwen3-4b": {"qkv": (6144, 2560), "o": (2560, 4096), "gate_up": (19456, 2560), "down": (2560, 9728)},
    # One expert.
    "mixtral": {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)},
}
ROTATION: Final = 800_000_000
# Relative error that no right product of 4-bit weights comes near; a time of another is not given.
WRONG: Final = 0.3
# What a graph holds beside x and y, for example slices of dequantized weights.
GRAPH_BYTES: Final = 2**27


@dataclass(frozen=True, slots=True)
class Row:
    """One operator at one shape. `us`, the median over rounds, is None where it failed, and `note` says why.

    `roofline_percent` is of the 16-bit ceilings: products of int8 tensor cores may pass 100. `us_min` and `us_max` are
    those of the quickest and the slowest round.
    """

    shape: str
    N: int
    K: int
    M: int
    operator: str
    us: float | None
    gb_s: float | None = None
    tflop_s: float | None = None
    roofline_percent: float | None = None
    times_bf16: float | None = None
    note: str = ""
    us_min: float | None = None
    us_max: float | None = None


def parse_shapes(text: str) -> dict[str, tuple[int, int]]:
    """A model of `MODELS`, or `N,K`.

    Raises:
        ConfigError: neither.
    """
    if text in MODELS:
        return dict(MODELS[text])
    parts = text.split(",")
    if len(parts) == 2 and all(part.strip().isdigit() and int(part) > 0 for part in parts):
        N, K = (int(part) for part in parts)
        return {f"{N}x{K}": (N, K)}
    raise ConfigError(f"--shapes must be one of {', '.join(MODELS)}, or N,K; got {text!r}", "--shapes 4096,4096")


def parse_rows(text: str) -> list[int]:
    """Numbers of rows of x, separated by commas.

    Raises:
        ConfigError: something else.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ConfigError(f"--m must be numbers separated by commas; got {text!r}", "--m 1,8,32")
    return [int(part) for part in parts]


def activations(M: int, K: int, device: torch.device) -> Tensor:
    """bfloat16 [M, K], normal, with a few columns of outliers."""
    x = normals(M, K, device, seed=M)
    x[:, 5::1024] *= 20
    return x.to(torch.bfloat16)


def compare_kernels(
    shapes: Mapping[str, tuple[int, int]],
    rows: Sequence[int],
    ceilings: Ceilings,
    device: torch.device,
    *,
    peers: bool,
    rotation: int = ROTATION,
    progress: Callable[[str], None] = lambda _: None,
) -> Iterator[Row]:
    """Every operator at every shape and number of rows, in this order; each is made once for a shape."""
    for shape, (N, K) in shapes.items():
        weight = (normals(N, K, device) / math.sqrt(K)).to(torch.bfloat16)
        inputs = [activations(M, K, device) for M in rows]
        everyone = makers(peers)
        room = room_for(N, K, max(rows), rotation, free_bytes(device))
        groups = in_groups(everyone, room)
        if len(groups) > 1:
            progress(
                f"{shape}: memory has room for {int(room)} of {len(everyone)} operators; so many take turns at a time"
            )
        for i, group in enumerate(groups):
            for found in compare_group(shape, group, weight, inputs, ceilings, rotation):
                found = [row for row in found if i == 0 or row.operator != BASELINE]
                if found:
                    progress(f"{shape}, {found[0].M or 'no'} rows: " + "; ".join(map(brief, found)))
                yield from found


def free_bytes(device: torch.device) -> float:
    """What tensors can still take; without bound off a GPU."""
    if device.type != "cuda":
        return math.inf
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def room_for(N: int, K: int, M: int, rotation: int, free: float) -> float:
    """How many operators have room at once, two or more: their weights, and a graph for each with its x and y."""
    weight = 2 * N * K
    each = max(2 * weight, rotation + weight) + 4 * M * (N + K) + GRAPH_BYTES
    shared = weight + 16 * M * (N + K)  # of which most is for comparing results
    return max(2.0, (free - shared) / each)


def in_groups(everyone: Mapping[str, Maker], room: float) -> list[dict[str, Maker]]:
    """At most `room` in each, the baseline first; the others as they come."""
    others = [name for name in everyone if name != BASELINE]
    most = int(min(room - 1, max(1, len(others))))
    parts = [others[i : i + most] for i in range(0, len(others), most)] or [[]]
    return [{name: everyone[name] for name in (BASELINE, *part)} for part in parts]


def compare_group(
    shape: str,
    group: Mapping[str, Maker],
    weight: Tensor,
    inputs: Sequence[Tensor],
    ceilings: Ceilings,
    rotation: int,
) -> Iterator[list[Row]]:
    """The rows of each number of rows of x; before them, those of operators that could not be made."""
    N, K = weight.shape
    contenders: dict[str, Contender] = {}
    failed: list[Row] = []
    for operator, make in group.items():
        begun = time.monotonic()
        try:
            contenders[operator] = make(weight, rotation)
        except Exception as error:  # a peer that is absent or fails is a row, not the end
            failed.append(Row(shape, N, K, 0, operator, None, note=first_line(error)))
            continue
        contenders[operator].spent = time.monotonic() - begun
    yield failed
    if weight.is_cuda:
        warm_up_products(
            (operator.partition(",")[0], contenders[operator].products[0], x)
            for operator in contenders
            if operator in OURS
            for x in inputs
        )
    for x in inputs:
        yield compare_at(shape, contenders, x, weight, ceilings)
    contenders.clear()
    if weight.is_cuda:
        try:
            torch.cuda.empty_cache()
        except RuntimeError:  # a kernel went wrong: what comes next says so
            return


def compare_at(
    shape: str, contenders: Mapping[str, Contender], x: Tensor, weight: Tensor, ceilings: Ceilings
) -> list[Row]:
    """One number of rows: whoever multiplies right takes turns."""
    (M, K), N = x.shape, weight.shape[0]
    turns: dict[str, Turn] = {}
    notes: dict[str, str] = {}
    with torch.no_grad():
        for operator, contender in contenders.items():
            if contender.seconds is not None and contender.spent > contender.seconds:
                notes[operator] = f"left out after {contender.seconds:.0f} s"
                continue
            begun = time.monotonic()
            try:
                notes[operator] = why_wrong(contender, x, weight)
                if not notes[operator]:
                    calls = [partial(product, x) for product in contender.products]
                    turns[operator] = turn_of(calls, capture=contender.capture, patience=contender.patience)
            except Exception as error:
                notes[operator] = first_line(error)
            contender.spent += time.monotonic() - begun
        take_turns(list(turns.values()))
    found = []
    for operator, contender in contenders.items():
        turn = turns.get(operator)
        if turn is None or turn.error:
            found.append(Row(shape, N, K, M, operator, None, note=turn.error if turn else notes[operator]))
            continue
        contender.spent += turn.seconds
        found.append(row_of(shape, N, K, M, operator, turn, turns.get(BASELINE), contender.num_bytes, ceilings))
    return found


def why_wrong(contender: Contender, x: Tensor, weight: Tensor) -> str:
    """Empty where the product is about that of the weight as it is.

    Raises:
        TimeoutError: it does not get ready.
    """
    plain = torch_product(weight, x).float()
    with time_limit(contender.patience):
        y = contender.products[-1](x).float()
    error = float((y - plain).norm() / plain.norm())
    return "" if error < WRONG else f"wrong: relative error {error:.2g}"


def row_of(
    shape: str,
    N: int,
    K: int,
    M: int,
    operator: str,
    turn: Turn,
    base: Turn | None,
    weight_bytes: int,
    ceilings: Ceilings,
) -> Row:
    """One row of the table."""
    num_bytes, operations = weight_bytes + 2 * M * (N + K), 2 * M * N * K
    us = turn.us
    return Row(
        shape,
        N,
        K,
        M,
        operator,
        us,
        gb_s=num_bytes / us / 1e3,
        tflop_s=operations / us / 1e6,
        roofline_percent=100 * ceilings.seconds(num_bytes, operations) / (us / 1e6),
        times_bf16=None if base is None else turn.times_as_fast_as(base),
        note=turn.note,
        us_min=min(turn.times),
        us_max=max(turn.times),
    )


def brief(row: Row) -> str:
    """A row in a line of progress: the operator, microseconds, times bf16; or why not."""
    if row.us is None:
        return f"{row.operator}: {row.note}"
    ratio = "" if row.times_bf16 is None else f" {row.times_bf16:.2f}x"
    return f"{row.operator} {row.us:.1f} us {row.roofline_percent:.0f}%{ratio}"
