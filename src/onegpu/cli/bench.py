"""`onegpu bench`: what each command of the family measures, and the time that loading takes."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer

from onegpu.cli.bench_encode import encode
from onegpu.cli.bench_generate import generate
from onegpu.cli.bench_kernels import kernels
from onegpu.cli.options import AsJson, Device, Model, RemoteCode, ReportFile

__all__ = ["build_app"]

LOADS = "nf4,nf4+double,nf4+search,int8,16bit"
PEERS = "bitsandbytes:nf4"


def build_app() -> typer.Typer:
    """The `bench` family."""
    app = typer.Typer(no_args_is_help=True, help="Measure speed on this machine.")
    app.callback()(family)
    app.command("generate")(generate)
    app.command("load")(load_times)
    app.command("encode")(encode)
    app.command("kernels")(kernels)
    return app


def family() -> None:
    """Measure speed on this machine."""


def load_times(
    model: Model,
    formats: Annotated[str, typer.Option("--formats", help="What to compare; see `onegpu eval --help`.")] = LOADS,
    peers: Annotated[bool, typer.Option("--peers", help=f"Add {PEERS}, if bitsandbytes is installed.")] = False,
    runs: Annotated[int, typer.Option("--runs", min=1, help="Rounds measured, after one to warm up.")] = 3,
    device: Device = "auto",
    trust_remote_code: RemoteCode = False,
    report: ReportFile = None,
    as_json: AsJson = False,
) -> None:
    """Seconds to load, and the peak of GPU memory while loading. Models are loaded in turns and deleted."""
    from functools import partial

    from onegpu.bench.contenders import parse_contenders
    from onegpu.bench.environment import environment
    from onegpu.bench.load import measure_load
    from onegpu.cli.console import quiet_libraries, say
    from onegpu.cli.models import ModelName, placement
    from onegpu.cli.report import check_report, deliver

    check_report(report)
    contenders = parse_contenders(f"{formats},{PEERS}" if peers else formats)
    name = ModelName.parse(model)
    quiet_libraries()
    arguments = name.arguments(trust_remote_code) | {"device_map": placement(device)}
    loaders = {each.label: partial(each.load, name.name, **arguments) for each in contenders}
    times = measure_load(loaders, runs=runs, progress=say)
    rows = [{"format": label, **asdict(row)} for label, row in times.items()]
    document = {"model": name.name, **environment(torch_device(device)), "rows": rows}
    deliver("load", document, load_table(rows), as_json=as_json, report=report)


def load_table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = ["| format | weights, MiB | load, s | fastest - slowest | peak on the GPU, MiB |", "| --- " * 5 + "|"]
    for row in rows:
        peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}"
        lines.append(
            f"| {row['format']} | {row['weight_bytes'] / 2**20:.1f} | {row['seconds']:.2f} "
            f"| {row['fastest']:.2f} - {row['slowest']:.2f} | {peak} |"
        )
    return "\n".join(lines) + "\n"


def torch_device(device: str) -> Any:
    """The torch device that `--device` means."""
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)
