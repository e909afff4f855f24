"""`onegpu bench kernels`: the quantized products, as a share of what this GPU can read and multiply."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from onegpu.cli.options import AsJson, ReportFile

if TYPE_CHECKING:
    import torch

    from onegpu.bench.kernel_time import Ceilings

__all__ = ["kernels"]

FEW_ROWS = "1,4,8,16,32"
ALL_ROWS = "1,8,16,32,64,128,192,256,512,1024,2048,4096"
# Where float64 takes long, the kernels are no others than at fewer rows.
MOST_ROWS_OF_ERRORS = 1024


def kernels(
    shapes: Annotated[str, typer.Option("--shapes", help="llama-8b, qwen3-4b, mixtral, or N,K.")] = "llama-8b",
    rows: Annotated[
        str | None, typer.Option("--m", help=f"Rows of x, separated by commas. [{FEW_ROWS}; --peers: {ALL_ROWS}]")
    ] = None,
    peers: Annotated[
        bool, typer.Option("--peers", help="Everything below, and other packages' products where installed.")
    ] = False,
    chain: Annotated[bool, typer.Option("--chain/--no-chain", help="Also a decode step's products in a row.")] = True,
    storage: Annotated[
        bool | None, typer.Option("--storage/--no-storage", help="Also quantizing and dequantizing.")
    ] = None,
    experts: Annotated[
        bool | None, typer.Option("--experts/--no-experts", help="Also products of fused experts.")
    ] = None,
    errors: Annotated[bool, typer.Option("--errors", help="Only errors against float64, no times.")] = False,
    tune: Annotated[bool, typer.Option("--tune", help="Compare configurations instead; for developers.")] = False,
    rotate: Annotated[float, typer.Option("--rotate", min=0.6, help="GB of weights to go around.")] = 0.8,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", dir_okay=False, help="The roofline chart, .png or .svg.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Write the JSON document there too.")] = None,
    report: ReportFile = None,
    as_json: AsJson = False,
) -> None:
    """Time of each operator, GB/s, TFLOP/s and percent of the roofline. The last line of the table is JSON."""
    from onegpu.bench.environment import environment
    from onegpu.bench.kernel_peers import peer_versions
    from onegpu.bench.kernel_tables import document, tables
    from onegpu.bench.kernel_time import measure_ceilings
    from onegpu.bench.kernels import MODELS, compare_kernels, parse_rows, parse_shapes
    from onegpu.cli.console import print_document, say
    from onegpu.cli.report import check_report, deliver
    from onegpu.cli.run import to_stdout

    check_report(report)
    check_plot(plot)
    chosen, numbers = parse_shapes(shapes), parse_rows(rows or (ALL_ROWS if peers else FEW_ROWS))
    device = find_device()
    ceilings = measure_ceilings(device)
    say(f"read {ceilings.read_bandwidth / 1e12:.2f} TB/s, bfloat16 product {ceilings.flops / 1e12:.0f} TFLOP/s")
    facts: dict[str, Any] = environment(device)
    if peers:
        facts["versions"] |= peer_versions()
    rotation = int(rotate * 1e9)
    if tune:
        from onegpu.bench.kernel_tuning import tune_alone, tune_chain

        found: dict[str, Any] = {**facts, "alone": tune_alone(chosen, numbers, ceilings, device, say, rotation)}
        if chain and shapes in MODELS:
            found["chain"] = tune_chain(shapes, ceilings, device, say)
        write(out, found)
        print_document(found)
        return
    sections: dict[str, list[dict[str, Any]]] = {"chain": [], "storage": [], "experts": [], "errors": []}
    results = []
    if errors:
        from onegpu.bench.kernel_errors import ODD_SHAPES, measure_errors

        few = [M for M in numbers if M <= MOST_ROWS_OF_ERRORS]
        sections["errors"] = measure_errors(chosen | ODD_SHAPES, few, device, say)
    else:
        wanted = {
            "chain": chain and shapes in MODELS,
            "storage": peers if storage is None else storage,
            "experts": peers if experts is None else experts,
        }
        # Products last, and among them those of other packages: one that goes wrong can take the device with it.
        for name in [name for name, is_wanted in wanted.items() if is_wanted]:
            sections[name] = section(name, shapes, ceilings, device, say)
            write(out, document(ceilings, [], facts, **sections))
        for row in compare_kernels(chosen, numbers, ceilings, device, peers=peers, rotation=rotation, progress=say):
            results.append(row)
            if row.M in (0, numbers[-1]):
                write(out, document(ceilings, results, facts, **sections))
        results.sort(key=lambda row: list(chosen).index(row.shape))
    whole = document(ceilings, results, facts, **sections)
    write(out, whole)
    draw(plot, whole)
    deliver("kernels", whole, tables(whole), as_json=as_json, report=report)
    if not as_json:
        to_stdout(json.dumps(whole) + "\n")


def find_device() -> torch.device:
    """The current GPU.

    Raises:
        DeviceError: there is none.
    """
    import torch

    from onegpu.errors import DeviceError

    if not torch.cuda.is_available():
        raise DeviceError("`bench kernels` needs a CUDA device; there is none")
    return torch.device("cuda", torch.cuda.current_device())


def section(
    name: str, shapes: str, ceilings: Ceilings, device: torch.device, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """What is measured beside the products of a layer, each on its own."""
    if name == "chain":
        from onegpu.bench.kernel_chain import measure_chain
        from onegpu.bench.kernels import MODELS

        return measure_chain(shapes, MODELS[shapes], ceilings, device, progress=say)
    if name == "storage":
        from onegpu.bench.kernel_storage import measure_storage

        return measure_storage(ceilings, device, progress=say)
    from onegpu.bench.kernel_experts import measure_experts

    return measure_experts(ceilings, device, progress=say)


def check_plot(path: Path | None) -> None:
    """Refuse a place for the chart before anything is measured.

    Raises:
        ConfigError: not a .png or .svg file in a folder that is there.
    """
    from onegpu.errors import ConfigError

    if path is None:
        return
    if path.suffix not in (".png", ".svg"):
        raise ConfigError(f"--plot must end in .png or .svg; got {path}", "for example --plot roofline.png")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"--plot: there is no folder {path.absolute().parent}", "make it first")


def draw(path: Path | None, found: Mapping[str, Any]) -> None:
    """Write the roofline chart; only a line of talk where it cannot be drawn, for the times are the result."""
    if path is None:
        return
    from onegpu.bench import plots
    from onegpu.cli.console import say
    from onegpu.errors import UnsupportedError

    try:
        made = plots.charts("kernels", found).get("Roofline")
    except UnsupportedError as error:
        say(f"{error.message}: {error.hint}")
        return
    if made is None:
        say(f"no chart {path}: no product was measured")
    elif path.suffix == ".png":
        plots.png(made, path)
    else:
        path.write_text(plots.svg(made), encoding="utf-8")


def write(path: Path | None, found: Mapping[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
