"""`onegpu bench encode [MODEL]`: encoders with and without padding, as a share of the matrix-product limit."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer

from onegpu.cli.options import AsJson, Device, RemoteCode, ReportFile

__all__ = ["encode"]

COMMON = (
    "the of and to in is that for it as was with be by on not he his but at are this have from or had an they "
    "which one you were all her she there would their we him been has when who will no more if out so up said "
    "what its about than into them can only other time new some could these two may first then do any like my "
    "now over such our man me even most made after also did many off before must well back through years where"
)


def encode(
    model: Annotated[
        str,
        typer.Argument(
            metavar="[MODEL]", help="bert-base, bert-large or minilm-l6 (random weights), a folder, a name."
        ),
    ] = "bert-base",
    texts: Annotated[int, typer.Option("--texts", min=1)] = 512,
    batch: Annotated[int, typer.Option("--batch", min=1)] = 64,
    mean: Annotated[float, typer.Option("--mean", min=1.0, help="Mean of the log-normal lengths, tokens.")] = 130.0,
    longest: Annotated[int, typer.Option("--longest", min=1, help="Longest text, tokens.")] = 512,
    dtype: Annotated[str, typer.Option("--dtype", help="auto: float16 on a GPU, float32 on a CPU.")] = "auto",
    runs: Annotated[int, typer.Option("--runs", min=1)] = 5,
    peers: Annotated[bool, typer.Option("--peers", help="Also torch.compile and torch's nested tensors.")] = False,
    variants: Annotated[bool, typer.Option("--variants", help="Also ours with each part switched off.")] = False,
    gaps: Annotated[bool, typer.Option("--gaps", help="Also how long the GPU worked, by its own clock.")] = False,
    single: Annotated[int, typer.Option("--single", min=0, help="Also one text of so many tokens; 0 for none.")] = 32,
    profile: Annotated[bool, typer.Option("--profile", help="Also where the GPU's time goes, by kernel.")] = False,
    strings: Annotated[
        str | None, typer.Option("--strings", metavar="FOLDER", help="Also from strings, beside sentence-transformers.")
    ] = None,
    string_texts: Annotated[int, typer.Option("--string-texts", min=1)] = 4096,
    device: Device = "auto",
    trust_remote_code: RemoteCode = False,
    report: ReportFile = None,
    as_json: AsJson = False,
) -> None:
    """Real tokens per second of an encoder, in random and in sorted order; contenders take turns."""
    import torch

    from onegpu.bench.encode import (
        compare_order,
        compare_strings,
        draw_lengths,
        kernel_table,
        make_texts,
        matmul_flops,
    )
    from onegpu.bench.environment import environment
    from onegpu.cli.console import quiet_libraries, say
    from onegpu.cli.models import placement
    from onegpu.cli.report import check_report, deliver
    from onegpu.encoder import EncoderOptions

    check_report(report)
    where = placement(device)
    target = torch.device("cuda" if where == "auto" else where)
    quiet_libraries()
    loaded = load(model, dtype, target, trust_remote_code)
    flops = matmul_flops(next(loaded.parameters()).dtype, target)
    say(f"one large matrix product: {flops / 1e12:.3f} TFLOP/s")
    lengths = draw_lengths(texts, mean, longest)
    vocabulary = loaded.config.vocab_size
    sets = {
        "random": make_texts(lengths, batch, vocabulary, target),
        "sorted": make_texts(sorted(lengths), batch, vocabulary, target),
    }
    rows = compare_order(loaded, sets, flops, runs=runs, variants=variants, peers=peers, gaps=gaps, progress=say)
    if single:
        one = {f"one of {single}": make_texts([single] * 20, 1, vocabulary, target)}
        rows += compare_order(loaded, one, flops, runs=runs, variants=variants, peers=peers, gaps=gaps, progress=say)
    tables = []
    if profile and target.type == "cuda":
        for options in (EncoderOptions(), EncoderOptions(fuse_activation="epilogue")):
            tables.append(kernel_table(loaded, sets["random"].batches[0], options))
    from_strings = compare_strings(strings, words(string_texts, mean), target, runs, say) if strings else []
    measured = [asdict(row) for row in rows]
    embedded = [asdict(row) for row in from_strings]
    facts = environment(target)
    document = {
        "model": model,
        **facts,
        "matmul_flops": flops,
        "tokens": sum(lengths),
        "rows": measured,
        "strings": embedded,
    }
    for found in tables:
        say(found)
    deliver("encode", document, table(measured) + strings_table(embedded), as_json=as_json, report=report)
    if not as_json:
        say(f"{facts['device']}; {texts} texts, {batch} a batch, median of {runs}")


def load(name: str, dtype: str, device: Any, trust_remote_code: bool) -> Any:
    """A random model of a known shape, or a real one."""
    import torch

    from onegpu.bench.encode import SHAPES, random_model
    from onegpu.cli.models import ModelName, load_config
    from onegpu.config import check_choice

    check_choice("--dtype", dtype, ("auto", "float16", "bfloat16", "float32"))
    chosen = torch.float16 if device.type == "cuda" else torch.float32
    if dtype != "auto":
        chosen = getattr(torch, dtype)
    if name in SHAPES:
        return random_model(name, chosen, device)
    from transformers import AutoModel

    parsed = ModelName.parse(name)
    load_config(parsed, trust_remote_code)
    arguments = parsed.arguments(trust_remote_code)
    return AutoModel.from_pretrained(parsed.name, dtype=chosen, **arguments).to(device).eval()


def words(count: int, mean: float) -> list[str]:
    """Texts of common words with log-normal lengths, the same each time."""
    import random

    from onegpu.bench.encode import draw_lengths

    draw = random.Random(0)
    return [" ".join(draw.choices(COMMON.split(), k=length)) for length in draw_lengths(count, mean, 512)]


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| contender | order | padding | ms | slowest - fastest | real tok/s | of the limit | host, ms | kernels, ms "
        "| difference |",
        "| --- " * 10 + "|",
    ]
    for row in rows:
        difference = row["largest_difference"]
        lines.append(
            f"| {row['contender']} | {row['order']} | {row['padding']:.0%} | {row['milliseconds']:.2f} "
            f"| {row['slowest']:.2f} - {row['fastest']:.2f} | {row['tokens_per_second']:,.0f} | {row['share']:.1%} "
            f"| {row['host_ms']:.2f} | {'' if row['kernel_ms'] is None else format(row['kernel_ms'], '.2f')} "
            f"| {'' if difference is None else f'{difference:.1e}'} |"
        )
    return "\n".join(lines) + "\n"


def strings_table(rows: list[dict[str, Any]]) -> str:
    """The rows from strings to vectors as a Markdown table; nothing for none."""
    if not rows:
        return ""
    lines = ["", "| from strings | s | texts/s | smallest cosine |", "| --- " * 4 + "|"]
    for row in rows:
        lines.append(
            f"| {row['contender']} | {row['seconds']:.2f} | {row['texts_per_second']:,.0f} "
            f"| {row['smallest_cosine']:.6f} |"
        )
    return "\n".join(lines) + "\n"
