"""How fast each way of running a model writes: greedy, the same prompts and the same number of new tokens.

    nf4  nf4+double  fp4  int8  16bit  fp32     ours: `onegpu.optimize(model)`, in that format
    transformers                                plain Transformers in 16 bit
    transformers+static                         the same with a static cache, and on a GPU torch.compile
    bitsandbytes:nf4  bitsandbytes:int8         Transformers over bitsandbytes, where it is installed

Models that are in memory together take turns, run by run, so that a machine that slows down or warms up slows or warms
all of them. The first rounds, in which kernels are compiled and steps captured, are thrown away. A figure is the median
over the others. What fails is told in its row; the others are measured all the same.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from onegpu.bench.contenders import RIVAL, Contender, parse_contender, parse_contenders
from onegpu.bench.kernel_cache import is_cold
from onegpu.bench.measure import Timing, TokenClock, step_bytes, synchronize, weight_bytes
from onegpu.errors import ConfigError

__all__ = [
    "Entrant",
    "GenerateRow",
    "Speed",
    "measure_entrants",
    "measure_speed",
    "parse_entrants",
    "path_of",
    "random_prompts",
    "text_prompts",
]

PLAIN, STATIC = "transformers", "transformers+static"
# Torch compiles a second time when it sees that sizes change.
WARM_UP = {STATIC: 2}


@dataclass(frozen=True, slots=True)
class Entrant:
    """One way to hold and run a model. `system` is "onegpu", "transformers", "transformers+static", "bitsandbytes"."""

    label: str
    system: str
    contender: Contender


@dataclass(frozen=True, slots=True)
class Speed:
    """Medians over `runs` rounds; `slowest` and `fastest` are the decode speeds of the worst and best round.

    `tpot_ms` is the time of a step, which is one token for each of `batch` sequences; `tokens_per_second` counts all
    of them. `first_call_s` is the first round: what a fresh process waits, compiling and capturing included;
    `first_token_s` its first token.
    """

    ttft_ms: float
    tpot_ms: float
    tokens_per_second: float
    slowest: float
    fastest: float
    batch: int
    prompt_tokens: int
    new_tokens: int
    runs: int
    first_call_s: float
    first_token_s: float


@dataclass(frozen=True, slots=True)
class GenerateRow:
    """One entrant at one batch size. Of a failed one only what was known before it failed, and `error`.

    `bytes_per_step` must be read for a step, `bandwidth_percent` is the share of the measured bandwidth at which they
    were; `peak_bytes` the most memory that was allocated on the GPU. `path` says which way generation went.
    `ready_s`, at the first batch size, is the time from loaded weights to the first token: `prepare_s` of it in
    `optimize`. `cold`: no compiled kernel was kept from an earlier run, and no other model was measured before.
    """

    format: str
    system: str
    batch: int
    prompt_tokens: int
    new_tokens: int
    kv: str
    runs: int = 0
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    tokens_per_second: float | None = None
    slowest: float | None = None
    fastest: float | None = None
    first_call_s: float | None = None
    ready_s: float | None = None
    prepare_s: float | None = None
    cold: bool = False
    weight_bytes: int | None = None
    bytes_per_step: int | None = None
    bandwidth_percent: float | None = None
    peak_bytes: int | None = None
    path: str = ""
    error: str = ""


def parse_entrants(labels: str, peers: bool) -> list[Entrant]:
    """Read a comma-separated list of the labels above; `peers` adds whatever each is to be held against.

    Raises:
        ConfigError: an unknown label, with the nearest valid one.
    """
    names = [label.strip() for label in labels.split(",") if label.strip()]
    ours = parse_contenders(",".join(name for name in names if name not in (PLAIN, STATIC)) or "16bit")
    if peers:
        names += [PLAIN, STATIC]
        names += [
            f"{RIVAL}:{each.label.replace('+search', '')}" for each in ours if each.system == "onegpu" and each.config
        ]
    return [parse_entrant(name) for name in dict.fromkeys(names)]


def parse_entrant(label: str) -> Entrant:
    """Read one label."""
    if label in (PLAIN, STATIC):
        return Entrant(label, label, parse_contender("16bit"))
    contender = parse_contender(label)
    return Entrant(label, RIVAL if contender.system == RIVAL else "onegpu", contender)


def text_prompts(tokenizer: Any, text: str, batch: int, length: int) -> torch.Tensor:
    """Int64 [batch, length]: pieces of `text`, which is read round and round.

    Raises:
        ConfigError: the text has no tokens.
    """
    ids = torch.as_tensor(tokenizer(text, return_tensors="pt")["input_ids"])[0]
    if not ids.numel():
        raise ConfigError("the text for the prompts has no tokens", "give another tokenizer or text")
    starts = torch.arange(batch)[:, None] * 37
    return ids[(starts + torch.arange(length)[None, :]) % ids.numel()]


def random_prompts(vocab_size: int, batch: int, length: int) -> torch.Tensor:
    """Int64 [batch, length] of random ids, the same each time; the first few, which mean something, are left out."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(min(10, vocab_size - 1), vocab_size, (batch, length), generator=generator)


def measure_entrants(
    entrants: Sequence[Entrant],
    load: Callable[[Contender], Any],
    make_prompts: Callable[[int], torch.Tensor],
    batches: Sequence[int],
    *,
    max_new_tokens: int,
    runs: int,
    kv: str = "16bit",
    in_turns: bool,
    bandwidth: float | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> list[GenerateRow]:
    """Measure every entrant at every batch size.

    Args:
        load: makes the model of a contender, on its device.
        make_prompts: a batch size to int64 [B, S].
        kv: how ours keeps keys and values: "16bit", "int8" or "fp8".
        in_turns: all models are in memory at once; else each is let go before the next is loaded, which gives each
            its own peak of memory.
        bandwidth: bytes a second that the device can read, None where unknown.
    """
    check_counts(max_new_tokens, runs)
    cold = is_cold()
    groups = [list(entrants)] if in_turns else [[entrant] for entrant in entrants]
    rows: list[GenerateRow] = []
    for group in groups:
        models: dict[str, Any] = {}
        failures: dict[str, str] = {}
        took: dict[str, float] = {}
        for entrant in group:
            progress(f"loading {entrant.label}")
            try:
                models[entrant.label], took[entrant.label] = made_ready(load, entrant, kv)
            except Exception as error:
                failures[entrant.label] = told(error)
        sizes = {label: weight_bytes(model) for label, model in models.items()}
        for batch in batches:
            prompt = make_prompts(batch)
            for device in {model.device for model in models.values()}:
                reset_peak(device)
            alive = {label: model for label, model in models.items() if label not in failures}
            speeds = measure_speed(alive, prompt, max_new_tokens=max_new_tokens, runs=runs, progress=progress)
            for entrant in group:
                plain = GenerateRow(
                    format=entrant.label,
                    system=entrant.system,
                    batch=batch,
                    prompt_tokens=prompt.shape[1],
                    new_tokens=max_new_tokens,
                    kv=kv if entrant.system == "onegpu" else "16bit",
                    weight_bytes=sizes.get(entrant.label),
                    cold=cold and entrant is entrants[0] and batch == batches[0],
                )
                speed = speeds.get(entrant.label, failures.get(entrant.label, ""))
                if batch == batches[0] and isinstance(speed, Speed):
                    prepare = took[entrant.label]
                    plain = replace(plain, prepare_s=prepare, ready_s=prepare + speed.first_token_s)
                rows.append(completed(plain, models.get(entrant.label), speed, bandwidth, alone=not in_turns))
            collect()
        models.clear()
        alive = {}
        collect()
    return sorted(rows, key=lambda row: row.batch)


def made_ready(load: Callable[[Contender], Any], entrant: Entrant, kv: str) -> tuple[Any, float]:
    """A model to be measured, and the seconds from its weights being loaded to that."""
    model = load(entrant.contender)
    synchronize(model.device)
    began = time.perf_counter()
    model = prepared(model, entrant, kv)
    synchronize(model.device)
    return model, time.perf_counter() - began


def prepared(model: Any, entrant: Entrant, kv: str) -> Any:
    """Ours is optimized; a static cache is asked for by the generation config; the rest stay as they are."""
    if entrant.system == "onegpu":
        from onegpu.fastpath import optimize

        return optimize(model, kv_cache_dtype=None if kv == "16bit" else kv)
    if entrant.system == STATIC:
        model.generation_config.cache_implementation = "static"
    return model


def completed(row: GenerateRow, model: Any, speed: Speed | str, bandwidth: float | None, *, alone: bool) -> GenerateRow:
    """The row with what was measured, or with its error."""
    if isinstance(speed, str):
        return replace(row, error=speed or "not measured")
    context = row.prompt_tokens + row.new_tokens // 2
    read = step_bytes(model, row.batch, context, row.kv)
    share = None
    if read is not None and bandwidth is not None:
        share = 100 * read / bandwidth / (speed.tpot_ms / 1e3)
    cuda = model.device.type == "cuda"
    return replace(
        row,
        runs=speed.runs,
        ttft_ms=speed.ttft_ms,
        tpot_ms=speed.tpot_ms,
        tokens_per_second=speed.tokens_per_second,
        slowest=speed.slowest,
        fastest=speed.fastest,
        first_call_s=speed.first_call_s,
        bytes_per_step=read,
        bandwidth_percent=share,
        peak_bytes=torch.cuda.max_memory_allocated(model.device) if cuda and alone else None,
        path=path_of(model),
    )


def path_of(model: Any) -> str:
    """Which way the optimized model generated, as its report says it."""
    from onegpu.decoder import decoder_report

    report = decoder_report(model)
    return "" if report is None else "; ".join(report.lines())


def measure_speed(
    models: Mapping[str, Any],
    prompt: torch.Tensor,
    *,
    max_new_tokens: int,
    runs: int,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Speed | str]:
    """Time `generate` of each model on prompt [B, S], in turns; a sentence in place of the speed of one that failed.

    Raises:
        ConfigError: fewer than one run or two new tokens (one token has no decode speed).
    """
    check_counts(max_new_tokens, runs)
    timings: dict[str, list[Timing]] = {label: [] for label in models}
    first: dict[str, tuple[float, float]] = {}
    failed: dict[str, Speed | str] = {}
    for turn in range(runs + 1):
        for label, model in models.items():
            if label in failed:
                continue
            try:
                began = time.perf_counter()
                timing = timed_generate(model, prompt, max_new_tokens)
                first.setdefault(label, (time.perf_counter() - began, timing.ttft_ms / 1e3))
                for _ in range(WARM_UP.get(label, 1) - 1 if turn == 0 else 0):
                    timed_generate(model, prompt, max_new_tokens)
            except Exception as error:
                failed[label] = told(error)
                progress(f"{label}: {failed[label]}")
                collect()
                continue
            if turn > 0:
                timings[label].append(timing)
            speed = prompt.shape[0] * (timing.tokens_per_second or 0)
            progress(f"round {turn} of {runs}: {label} {speed:.1f} tok/s at batch {prompt.shape[0]}")
    return {
        label: failed[label] if label in failed else summary(rows, prompt.shape[0], *first[label])
        for label, rows in timings.items()
    }


def check_counts(max_new_tokens: int, runs: int) -> None:
    """Refuse what gives no speed."""
    if runs < 1 or max_new_tokens < 2:
        raise ConfigError(
            f"at least 1 run of 2 new tokens is needed; got {runs} of {max_new_tokens}", "--runs 5 --new 64"
        )


def timed_generate(model: Any, prompt: torch.Tensor, max_new_tokens: int) -> Timing:
    """One greedy generation of exactly `max_new_tokens` tokens: the end token does not end it. Times of a step."""
    device = model.device
    inputs = prompt.to(device)
    plain = model.generation_config
    endless = type(plain)(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=0,
        cache_implementation=getattr(plain, "cache_implementation", None),
    )
    synchronize(device)
    clock = TokenClock(started=time.perf_counter())
    try:
        model.generation_config = endless
        model.generate(inputs, attention_mask=torch.ones_like(inputs), streamer=clock)
    finally:
        model.generation_config = plain
    # Each step brings one token for each sequence, at one time.
    steps = clock.times[:: prompt.shape[0]]
    return Timing(
        prompt_tokens=prompt.shape[1],
        new_tokens=len(steps),
        ttft_ms=(steps[0] - clock.started) * 1e3,
        decode_ms=(steps[-1] - steps[0]) * 1e3,
    )


def summary(timings: Sequence[Timing], batch: int, first_call_s: float, first_token_s: float) -> Speed:
    """The medians of several rounds."""
    speeds = [batch * (timing.tokens_per_second or 0.0) for timing in timings]
    return Speed(
        ttft_ms=statistics.median(timing.ttft_ms for timing in timings),
        tpot_ms=statistics.median(timing.tpot_ms or 0.0 for timing in timings),
        tokens_per_second=statistics.median(speeds),
        slowest=min(speeds),
        fastest=max(speeds),
        batch=batch,
        prompt_tokens=timings[0].prompt_tokens,
        new_tokens=timings[0].new_tokens,
        runs=len(timings),
        first_call_s=first_call_s,
        first_token_s=first_token_s,
    )


def told(error: Exception) -> str:
    """An error in one line."""
    line = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {line}"[:300]


def reset_peak(device: torch.device) -> None:
    """Count the peak of memory from here."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def collect() -> None:
    """Let go of what nobody holds any more, on the GPU too."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
