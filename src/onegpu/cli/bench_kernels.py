"""`onegpu bench kernels`: the quantized products, as a share of what this GPU can read and multiply."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from onegpu.cli.options import AsJson, ReportFile

__all__ = ["kernels"]


def kernels(
    shapes: Annotated[str, typer.Option("--shapes", help="llama-8b, qwen3-4b, mixtral, or N,K.")] = "llama-8b",
    rows: Annotated[str, typer.Option("--m", help="Rows of x, separated by commas.")] = "1,4,8,16,32",
    peers: Annotated[bool, typer.Option("--peers", help="Also what other packages have, where installed.")] = False,
    chain: Annotated[bool, typer.Option("--chain/--no-chain", help="Also a decode step's products in a row.")] = True,
    tune: Annotated[bool, typer.Option("--tune", help="Compare configurations instead; for developers.")] = False,
    rotate: Annotated[float, typer.Option("--rotate", min=0.6, help="GB of weights to go around.")] = 0.8,
    out: Annotated[Path | None, typer.Option("--out", help="Write the JSON document there too.")] = None,
    report: ReportFile = None,
    as_json: AsJson = False,
) -> None:
    """Time of each operator, GB/s, TFLOP/s and percent of the roofline. The last line of the table is JSON."""
    import torch

    from onegpu.bench.environment import environment
    from onegpu.bench.kernels import (
        MODELS,
        compare_kernels,
        document,
        measure_ceilings,
        measure_chain,
        parse_rows,
        parse_shapes,
        table,
    )
    from onegpu.cli.console import print_document, say
    from onegpu.cli.report import check_report, deliver
    from onegpu.cli.run import to_stdout
    from onegpu.errors import DeviceError

    check_report(report)
    chosen, numbers = parse_shapes(shapes), parse_rows(rows)
    if not torch.cuda.is_available():
        raise DeviceError("`bench kernels` needs a CUDA device; there is none")
    device = torch.device("cuda", torch.cuda.current_device())
    ceilings = measure_ceilings(device)
    say(f"read {ceilings.read_bandwidth / 1e12:.2f} TB/s, bfloat16 product {ceilings.flops / 1e12:.0f} TFLOP/s")
    facts: dict[str, Any] = environment(device)
    rotation = int(rotate * 1e9)
    if tune:
        from onegpu.bench.kernel_tuning import tune_alone, tune_chain

        found: dict[str, Any] = {**facts, "alone": tune_alone(chosen, numbers, ceilings, device, say, rotation)}
        if chain and shapes in MODELS:
            found["chain"] = tune_chain(shapes, ceilings, device, say)
        write(out, found)
        print_document(found)
        return
    # The chain first: a peer that fails while it is captured can leave torch's random numbers unusable.
    steps = measure_chain(shapes, ceilings, device) if chain and shapes in MODELS else []
    results = list(compare_kernels(chosen, numbers, ceilings, device, peers=peers, rotation=rotation, progress=say))
    whole = document(ceilings, results, steps, facts)
    write(out, whole)
    deliver("kernels", whole, table(results, steps), as_json=as_json, report=report)
    if not as_json:
        to_stdout(json.dumps(whole) + "\n")


def write(path: Path | None, found: dict[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
