"""Grouped products of fused experts, from one token to thousands, against bfloat16 experts.

    bf16 loop       one product for each chosen expert on its tokens, gathered beforehand: what a module does that
                    already knows, on the host, who goes where
    bf16 grouped    PyTorch's own grouped product, pairs sorted beforehand; where this PyTorch has it

Tokens choose their experts at random, in `ROUTINGS` ways, and each call has the next of them, so that few experts'
weights do not stay in L2. Ours sort within the call; the others have that done before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

from onegpu.bench.kernel_time import Ceilings, first_line, median_of_calls, normals, warm_up

__all__ = ["MODELS", "TOKENS", "Experts", "measure_experts"]

TOKENS: Final = (1, 4, 16, 64, 256, 1024, 4096)
ROUTINGS: Final = 12
BASELINE: Final = "bf16 loop"


@dataclass(frozen=True, slots=True)
class Experts:
    """A stack of `num_experts` weights [N, K], of which each token chooses `top_k`."""

    num_experts: int
    top_k: int
    N: int
    K: int


MODELS: Final = {
    "mixtral gate_up": Experts(8, 2, 28672, 4096),
    "mixtral down": Experts(8, 2, 4096, 14336),
    "qwen3-moe gate_up": Experts(128, 8, 1536, 2048),
    "qwen3-moe down": Experts(128, 8, 2048, 768),
}
# From x [T, K] and the routings, ids [T, top_k] each, to one call for each routing.
Calls = list[Callable[[], Any]]


def measure_experts(
    ceilings: Ceilings,
    device: torch.device,
    *,
    models: Mapping[str, Experts] = MODELS,
    tokens: Sequence[int] = TOKENS,
    progress: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """One row for each stack, operator and number of tokens: `us`, `roofline_percent`, `times_bf16` of the loop.

    The roofline counts the weights of the experts that were chosen, on average over the routings.
    """
    results = []
    for model, experts in models.items():
        base: dict[int, float] = {}
        drawn = {T: routings(experts, T) for T in tokens}
        for operator, prepare in operators():
            try:
                make, weight_bytes = prepare(experts, device)
                calls = {T: make(normals(T, experts.K, device, seed=T).to(torch.bfloat16), drawn[T]) for T in tokens}
                if operator.startswith("onegpu"):
                    warm_up([each[0] for each in calls.values()])
            except Exception as error:  # one that is not there is a row, not the end
                results.append(failed(model, experts, 0, operator, error))
                continue
            for T in tokens:
                try:
                    with torch.no_grad():
                        us, note = median_of_calls(calls[T])
                except Exception as error:
                    results.append(failed(model, experts, T, operator, error))
                    continue
                if operator == BASELINE:
                    base[T] = us
                results.append(
                    row(model, experts, T, operator, us, note, weight_bytes * chosen(drawn[T]), ceilings)
                    | {"times_bf16": base[T] / us if T in base else None}
                )
            del make, calls
            mine = [each for each in results if each["model"] == model and each["operator"] == operator and each["us"]]
            progress(f"{model} {operator}: " + ", ".join(f"{each['tokens']}: {each['us']:.1f} us" for each in mine))
            torch.cuda.empty_cache()
    return results


def routings(experts: Experts, T: int) -> list[Tensor]:
    """int64 [T, top_k] on the CPU, several: different experts for each token, all alike in number over the calls."""
    generator = torch.Generator().manual_seed(T)
    found = []
    for _ in range(ROUTINGS):
        scores = torch.rand(T, experts.num_experts, generator=generator)
        found.append(scores.topk(experts.top_k, dim=1).indices)
    return found


def chosen(drawn: Sequence[Tensor]) -> float:
    """How many experts a routing uses, on average."""
    return sum(int(ids.view(-1).bincount().count_nonzero()) for ids in drawn) / len(drawn)


def row(
    model: str, experts: Experts, T: int, operator: str, us: float, note: str, weight_bytes: float, ceilings: Ceilings
) -> dict[str, Any]:
    pairs = T * experts.top_k
    num_bytes = weight_bytes + 2 * (T * experts.K + pairs * experts.N)
    operations = 2 * pairs * experts.N * experts.K
    return {
        "model": model, "experts": experts.num_experts, "top_k": experts.top_k, "N": experts.N, "K": experts.K,
        "tokens": T, "operator": operator, "us": us, "gb_s": num_bytes / us / 1e3, "tflop_s": operations / us / 1e6,
        "roofline_percent": 100 * ceilings.seconds(num_bytes, operations) / (us / 1e6), "note": note,
    }  # fmt: skip


def failed(model: str, experts: Experts, T: int, operator: str, error: Exception) -> dict[str, Any]:
    return {
        "model": model, "experts": experts.num_experts, "top_k": experts.top_k, "N": experts.N, "K": experts.K,
        "tokens": T, "operator": operator, "us": None, "times_bf16": None, "note": first_line(error),
    }  # fmt: skip


Maker = Callable[[Tensor, Sequence[Tensor]], Calls]


def operators() -> Iterator[tuple[str, Callable[[Experts, torch.device], tuple[Maker, int]]]]:
    """Contenders by name, the baseline first: each builds its weights, and gives their bytes for one expert."""
    yield BASELINE, prepare_loop
    yield "bf16 grouped", prepare_grouped
    yield "onegpu nf4", partial(prepare_4bit, nested=False)
    yield "onegpu nf4+double", partial(prepare_4bit, nested=True)
    yield "onegpu int8", prepare_8bit


def dense(experts: Experts, device: torch.device) -> Tensor:
    """bfloat16 [E, N, K]."""
    weight = normals(experts.num_experts * experts.N, experts.K, device)
    weight = (weight / math.sqrt(experts.K)).to(torch.bfloat16)
    return weight.view(experts.num_experts, experts.N, experts.K)


def prepare_loop(experts: Experts, device: torch.device) -> tuple[Maker, int]:
    weight = dense(experts, device)

    def multiply(parts: Sequence[tuple[int, Tensor]]) -> list[Tensor]:
        return [torch.mm(x, weight[expert].t()) for expert, x in parts]

    def make(x: Tensor, drawn: Sequence[Tensor]) -> Calls:
        return [partial(multiply, list(tokens_by_expert(x, ids))) for ids in drawn]

    return make, 2 * experts.N * experts.K


def tokens_by_expert(x: Tensor, ids: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Each chosen expert and the rows of x that chose it."""
    top_k = ids.shape[1]
    order = ids.view(-1).argsort(stable=True)
    rows = x[(order // top_k).to(x.device)]
    counts = ids.view(-1).bincount().tolist()
    start = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, rows[start : start + count]
        start += count


def prepare_grouped(experts: Experts, device: torch.device) -> tuple[Maker, int]:
    product: Callable[..., Tensor] = torch._grouped_mm
    weight = dense(experts, device).transpose(1, 2)

    def make(x: Tensor, drawn: Sequence[Tensor]) -> Calls:
        calls: Calls = []
        for ids in drawn:
            parts = dict(tokens_by_expert(x, ids))
            counts = torch.tensor([len(parts.get(expert, ())) for expert in range(experts.num_experts)])
            ends = counts.cumsum(0).to(device, torch.int32)
            calls.append(partial(product, torch.cat(list(parts.values())), weight, offs=ends))
        return calls

    return make, 2 * experts.N * experts.K


def prepare_4bit(experts: Experts, device: torch.device, nested: bool) -> tuple[Maker, int]:
    from onegpu.formats import quantize_absmax
    from onegpu.kernels import quantize_4bit
    from onegpu.kernels.experts_ops import experts_4bit

    packed, absmax = quantize_4bit(dense(experts, device), "nf4", 64)
    rest: tuple[Tensor, ...] = ()
    if nested:
        absmax, *more = quantize_absmax(absmax)
        rest = tuple(more)
    E, N = experts.num_experts, experts.N

    def make(x: Tensor, drawn: Sequence[Tensor]) -> Calls:
        there = [ids.to(device) for ids in drawn]
        return [partial(experts_4bit, x, ids, packed, absmax, E, N, "nf4", 64, *rest) for ids in there]

    return make, (packed.nbytes + absmax.nbytes + sum(tensor.nbytes for tensor in rest)) // E


def prepare_8bit(experts: Experts, device: torch.device) -> tuple[Maker, int]:
    from onegpu.kernels import quantize_8bit_rows
    from onegpu.kernels.experts_ops import experts_8bit

    E, N, K = experts.num_experts, experts.N, experts.K
    codes, row_stats, _ = quantize_8bit_rows(dense(experts, device).view(E * N, K))
    codes, row_stats = codes.view(E, N, K), row_stats.view(E, N)

    def make(x: Tensor, drawn: Sequence[Tensor]) -> Calls:
        there = [ids.to(device) for ids in drawn]
        return [partial(experts_8bit, x, ids, codes, row_stats) for ids in there]

    return make, (codes.nbytes + row_stats.nbytes) // E
