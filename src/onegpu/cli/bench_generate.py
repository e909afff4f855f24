"""`onegpu bench generate MODEL`: writing speed beside plain Transformers and bitsandbytes, as a share of the limit."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from onegpu.cli.options import AsJson, Device, RemoteCode, ReportFile

if TYPE_CHECKING:
    import torch

    from onegpu.bench.contenders import Contender
    from onegpu.bench.generate import GenerateRow

__all__ = ["generate"]

FORMATS = "nf4,int8,16bit"
KV = ("16bit", "int8", "fp8")


def generate(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A Hub name, name@revision, or a folder; with --random also llama-3.1-8b and others."
        ),
    ],
    formats: Annotated[
        str, typer.Option("--formats", help="nf4, nf4+double, fp4, int8, 16bit, fp32; transformers, bitsandbytes:nf4.")
    ] = FORMATS,
    peers: Annotated[
        bool,
        typer.Option("--peers", help="Add plain Transformers, the same with static cache and compile, bitsandbytes."),
    ] = False,
    batch: Annotated[str, typer.Option("--batch", help="Batch sizes, separated by commas.")] = "1",
    prompt_tokens: Annotated[int, typer.Option("--prompt", "--prompt-tokens", "--context", min=1)] = 128,
    max_new_tokens: Annotated[int, typer.Option("--new", "--max-new-tokens", "-n", min=2)] = 128,
    kv: Annotated[str, typer.Option("--kv", help="Keys and values of ours: 16bit, int8 or fp8.")] = "16bit",
    random: Annotated[
        bool, typer.Option("--random", help="Random weights: MODEL is a known shape or a folder with a config.json.")
    ] = False,
    cold: Annotated[
        bool, typer.Option("--cold", help="Begin without compiled kernels; of several formats the first is cold.")
    ] = False,
    runs: Annotated[int, typer.Option("--runs", min=1, help="Rounds measured, after those to warm up.")] = 5,
    device: Device = "auto",
    trust_remote_code: RemoteCode = False,
    report: ReportFile = None,
    as_json: AsJson = False,
) -> None:
    """First token, time per token, tokens per second, share of the memory bandwidth and peak memory, greedy.

    Ready: from loaded weights to the first token. On a GPU each model is alone in memory; on a CPU all are in memory at
    once and take turns.
    """
    from contextlib import nullcontext

    from onegpu.bench.environment import environment
    from onegpu.bench.generate import measure_entrants, parse_entrants
    from onegpu.bench.kernel_cache import empty_caches
    from onegpu.cli.console import quiet_libraries, say
    from onegpu.cli.report import check_report, deliver
    from onegpu.config import check_choice

    check_choice("--kv", kv, KV)
    check_report(report)
    entrants = parse_entrants(formats, peers)
    batches = parse_batches(batch)
    quiet_libraries()
    target = device_of(device)
    load, prompts, limit = (of_random if random else of_checkpoint)(model, target, device, trust_remote_code)
    check_context(prompt_tokens, max_new_tokens, limit)
    bandwidth = read_bandwidth(target)
    if bandwidth is not None:
        say(f"this device reads {bandwidth / 1e9:.0f} GB/s")
    with empty_caches() if cold else nullcontext():
        rows = measure_entrants(
            entrants,
            load,
            partial(prompts, length=prompt_tokens),
            batches,
            max_new_tokens=max_new_tokens,
            runs=runs,
            kv=kv,
            in_turns=target.type != "cuda",
            bandwidth=bandwidth,
            progress=say,
        )
    facts = environment(target)
    document: dict[str, Any] = {"model": model, "random": random, **facts, "read_bandwidth": bandwidth}
    document["rows"] = [asdict(row) for row in rows]
    if report is not None and not random:
        from onegpu.bench.html_report import memory_curve

        document["memory"] = memory_curve(model, [row.format for row in rows])
    deliver("generate", document, table(rows), as_json=as_json, report=report)
    if not as_json:
        for row in rows:
            if row.path:
                say(f"{row.format}, batch {row.batch}: {row.path}")
        say(f"{facts['device']}; greedy, {prompt_tokens} + {max_new_tokens} tokens, median of {runs}")


def of_random(name: str, device: torch.device, *_: Any) -> tuple[Any, Any, int | None]:
    """How to make a contender's model with random weights, how to make prompts, and the longest context."""
    import torch

    from onegpu.bench.contenders import RIVAL
    from onegpu.bench.generate import random_prompts
    from onegpu.bench.random_model import named_config, random_model

    config = named_config(name)

    def load(contender: Contender) -> Any:
        dtype = torch.float32 if contender.label == "fp32" else torch.bfloat16
        return random_model(config, contender.config, device, dtype, rival=contender.system == RIVAL)

    text = config.get_text_config()

    def prompts(batch: int, length: int) -> torch.Tensor:
        return random_prompts(text.vocab_size, batch, length)

    return load, prompts, getattr(text, "max_position_embeddings", None)


def of_checkpoint(model: str, _: torch.device, device: str, trust_remote_code: bool) -> tuple[Any, Any, int | None]:
    """The same for a model that can be loaded."""
    from onegpu.bench.evaluate import default_text
    from onegpu.bench.generate import text_prompts
    from onegpu.cli.models import ModelName, load_config, load_tokenizer, placement

    name = ModelName.parse(model)
    config = load_config(name, trust_remote_code)
    tokenizer = load_tokenizer(name, trust_remote_code)
    arguments = name.arguments(trust_remote_code) | {"device_map": placement(device)}

    def load(contender: Contender) -> Any:
        return contender.load(name.name, **arguments)

    def prompts(batch: int, length: int) -> torch.Tensor:
        return text_prompts(tokenizer, default_text(), batch, length)

    return load, prompts, getattr(config.get_text_config(), "max_position_embeddings", None)


def parse_batches(text: str) -> list[int]:
    """Batch sizes, each once.

    Raises:
        ConfigError: something else than whole numbers of at least 1.
    """
    from onegpu.errors import ConfigError

    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ConfigError(f"--batch must be numbers separated by commas; got {text!r}", "--batch 1,8")
    return list(dict.fromkeys(map(int, parts)))


def check_context(prompt_tokens: int, max_new_tokens: int, limit: int | None) -> None:
    """Refuse what is longer than the model reads.

    Raises:
        ConfigError: it is.
    """
    from onegpu.errors import ConfigError

    if limit is not None and prompt_tokens + max_new_tokens > limit:
        raise ConfigError(
            f"{prompt_tokens} + {max_new_tokens} tokens are asked for; the model reads {limit}",
            "lower --prompt or --new",
        )


def device_of(device: str) -> torch.device:
    """The torch device that `--device` means.

    Raises:
        ConfigError, DeviceError: as `onegpu.cli.models.placement`.
    """
    import torch

    from onegpu.cli.models import placement

    where = placement(device)
    found = torch.device("cuda" if where == "auto" else where)
    return torch.device("cuda", torch.cuda.current_device()) if found.type == "cuda" and found.index is None else found


def read_bandwidth(device: torch.device) -> float | None:
    """Bytes a second that a kernel which only reads gets from the GPU's memory, measured; None on a CPU."""
    if device.type != "cuda":
        return None
    import torch

    from onegpu.bench.generate import collect
    from onegpu.bench.kernels import measure_ceilings

    with torch.cuda.device(device):
        found = measure_ceilings(device).read_bandwidth
    collect()
    return found


def table(rows: list[GenerateRow]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| format | batch | weights, MiB | first token, ms | ms per token | tok/s | slowest - fastest "
        "| of the bandwidth | peak, MiB | first call, s | ready, s |",
        "| --- " * 11 + "|",
    ]
    for row in rows:
        if row.error:
            lines.append(f"| {row.format} | {row.batch} | {row.error.replace('|', '/')} |" + " |" * 8)
            continue
        lines.append(
            f"| {row.format} | {row.batch} | {mebibytes(row.weight_bytes)} | {row.ttft_ms:.1f} | {row.tpot_ms:.3f} "
            f"| {row.tokens_per_second:.1f} | {row.slowest:.1f} - {row.fastest:.1f} "
            f"| {'-' if row.bandwidth_percent is None else f'{row.bandwidth_percent:.1f} %'} "
            f"| {mebibytes(row.peak_bytes)} | {row.first_call_s:.1f} | {ready(row)} |"
        )
    return "\n".join(lines) + "\n"


def ready(row: GenerateRow) -> str:
    """From loaded weights to the first token, and whether kernels had to be compiled; a dash after the first batch."""
    return "-" if row.ready_s is None else f"{row.ready_s:.2f}{', cold' if row.cold else ''}"


def mebibytes(size: int | None) -> str:
    """A number of MiB, or a dash."""
    return "-" if size is None else f"{size / 2**20:.1f}"
