"""`onegpu eval MODEL`: what each format costs in quality."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from onegpu.cli.options import AsJson, Device, Model, RemoteCode

__all__ = ["evaluate"]

FORMATS = "16bit,nf4,nf4+double,nf4+search,fp4,int8"


def evaluate(
    model: Model,
    formats: Annotated[
        str, typer.Option("--formats", help="Also fp4+double, nf4+double+search, bitsandbytes:nf4, ...")
    ] = FORMATS,
    text: Annotated[Path | None, typer.Option("--text", help="A UTF-8 text of your own.", dir_okay=False)] = None,
    window: Annotated[int, typer.Option("--window", min=2, help="Tokens the model sees at once.")] = 512,
    stride: Annotated[int, typer.Option("--stride", min=1, help="Tokens the window moves on by.")] = 256,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", min=2, help="Only the text's first tokens.")] = None,
    device: Device = "auto",
    trust_remote_code: RemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Measure perplexity, distance to the 16-bit model and first choices that agree, for each format."""
    from onegpu.bench.contenders import parse_contenders
    from onegpu.bench.environment import environment
    from onegpu.cli.console import print_document, quiet_libraries, say
    from onegpu.cli.models import ModelName, load_tokenizer, placement
    from onegpu.cli.run import to_stdout

    contenders = parse_contenders(formats)
    name = ModelName.parse(model)
    where = placement(device)
    quiet_libraries()
    token_ids = read_tokens(load_tokenizer(name, trust_remote_code), text)[:max_tokens]
    say(f"{token_ids.numel()} tokens, window {window}, stride {stride}")
    rows, reference = score(contenders, name, where, trust_remote_code, token_ids, window, stride)
    if as_json:
        facts = {"model": name.name, "text": str(text or "alice"), "window": window, "stride": stride}
        print_document({**facts, **environment(reference.device), "rows": rows})
    else:
        to_stdout(table(rows))


def read_tokens(tokenizer: Any, text: Path | None) -> Any:
    """Int64 [S] tokens of the file, or of the text that comes with the package.

    Raises:
        NotFoundError, ConfigError
    """
    from onegpu.bench.evaluate import default_text
    from onegpu.errors import ConfigError, NotFoundError

    try:
        words = default_text() if text is None else text.read_text(encoding="utf-8")
    except OSError as error:
        raise NotFoundError(f"--text {text}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"--text {text} is not UTF-8: {error.reason} at byte {error.start}") from error
    return tokenizer(words, return_tensors="pt", verbose=False)["input_ids"][0]


def score(
    contenders: Any, name: Any, where: str, trust_remote_code: bool, token_ids: Any, window: int, stride: int
) -> tuple[list[dict[str, object]], Any]:
    """One row per contender, and the 16-bit model they were held against."""
    from onegpu.bench.contenders import parse_contender
    from onegpu.bench.evaluate import evaluate as measure
    from onegpu.cli.console import say

    arguments = name.arguments(trust_remote_code) | {"device_map": where}
    reference = parse_contender("16bit").load(name.name, **arguments)
    rows = []
    for contender in contenders:
        same = contender.label == "16bit"
        model = reference if same else contender.load(name.name, **arguments)
        quality = measure(model, token_ids, reference=None if same else reference, window=window, stride=stride)
        rows.append({"format": contender.label, **asdict(quality)})
        say(f"{contender.label}: perplexity {quality.perplexity:.3f}")
        del model
    return rows, reference


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = ["| format | weights, MiB | perplexity | KL to 16 bit, nats | same first choice |", "| --- " * 5 + "|"]
    for row in rows:
        kl = "-" if row["kl"] is None else f"{row['kl']:.5f}"
        top1 = "-" if row["top1"] is None else f"{100 * row['top1']:.2f} %"
        lines.append(
            f"| {row['format']} | {row['weight_bytes'] / 2**20:.1f} | {row['perplexity']:.3f} | {kl} | {top1} |"
        )
    return "\n".join(lines) + "\n"
