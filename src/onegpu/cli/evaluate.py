"""`onegpu eval MODEL`: what each format costs in quality. An encoder is measured by its embeddings."""

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
    text: Annotated[
        Path | None,
        typer.Option("--text", help="A UTF-8 text of your own; for an encoder one text a line.", dir_okay=False),
    ] = None,
    window: Annotated[int, typer.Option("--window", min=2, help="Tokens the model sees at once; not for encoders.")] = (
        512
    ),
    stride: Annotated[int, typer.Option("--stride", min=1, help="Tokens the window moves on by.")] = 256,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", min=2, help="Only the text's first tokens.")] = None,
    device: Device = "auto",
    trust_remote_code: RemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Measure perplexity, distance to the 16-bit model and first choices that agree, for each format.

    For an encoder: the cosine between its embeddings and those in 16 bit, and nearest neighbours that agree.
    """
    from onegpu.bench.contenders import parse_contenders
    from onegpu.bench.environment import environment
    from onegpu.cli.console import print_document, quiet_libraries, say
    from onegpu.cli.evaluate_encoder import is_encoder, likeness_table, score_encoder
    from onegpu.cli.models import ModelName, load_config, load_tokenizer, placement
    from onegpu.cli.run import to_stdout

    contenders = parse_contenders(formats)
    name = ModelName.parse(model)
    where = placement(device)
    quiet_libraries()
    config = load_config(name, trust_remote_code)
    tokenizer = load_tokenizer(name, trust_remote_code)
    facts: dict[str, object] = {"model": name.name, "text": str(text or "alice")}
    if is_encoder(config):
        words = read_text(text)
        rows, reference = score_encoder(contenders, name, where, trust_remote_code, tokenizer, words, max_tokens)
        shown = likeness_table(rows)
    else:
        token_ids = tokens_of(tokenizer, read_text(text))[:max_tokens]
        say(f"{token_ids.numel()} tokens, window {window}, stride {stride}")
        rows, reference = score(contenders, name, where, trust_remote_code, token_ids, window, stride)
        facts |= {"window": window, "stride": stride}
        shown = table(rows)
    if as_json:
        print_document({**facts, **environment(reference.device), "rows": rows})
    else:
        to_stdout(shown)


def read_text(path: Path | None) -> str:
    """The file's text, or the one that comes with the package.

    Raises:
        NotFoundError, ConfigError
    """
    from onegpu.bench.evaluate import default_text
    from onegpu.errors import ConfigError, NotFoundError

    try:
        return default_text() if path is None else path.read_text(encoding="utf-8")
    except OSError as error:
        raise NotFoundError(f"--text {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"--text {path} is not UTF-8: {error.reason} at byte {error.start}") from error


def tokens_of(tokenizer: Any, words: str) -> Any:
    """Int64 [S]."""
    return tokenizer(words, return_tensors="pt", verbose=False)["input_ids"][0]


def score(
    contenders: Any, name: Any, where: str, trust_remote_code: bool, token_ids: Any, window: int, stride: int
) -> tuple[list[dict[str, object]], Any]:
    """One row per contender, and the 16-bit model they were held against."""
    from onegpu.bench.contenders import parse_contender
    from onegpu.bench.evaluate import evaluate as measure
    from onegpu.cli.console import progress_bar, say

    arguments = name.arguments(trust_remote_code) | {"device_map": where}
    reference = parse_contender("16bit").load(name.name, **arguments)
    rows = []
    with progress_bar(len(contenders) * (token_ids.numel() - 1), "tokens") as bar:
        for contender in contenders:
            same = contender.label == "16bit"
            model = reference if same else contender.load(name.name, **arguments)
            bar.set_description(contender.label)
            quality = measure(
                model,
                token_ids,
                reference=None if same else reference,
                window=window,
                stride=stride,
                progress=bar.update,
            )
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
