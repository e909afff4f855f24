"""`onegpu embed MODEL FILE|-`: one vector per line of text, in order."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from onegpu.cli.options import AsJson, Device, Model, RemoteCode
from onegpu.errors import ConfigError, NotFoundError, SaveError

__all__ = ["embed"]


class Pooling(str, Enum):
    """How token vectors become one."""

    mean = "mean"
    cls = "cls"
    last = "last"


def embed(
    model: Model,
    file: Annotated[str, typer.Argument(metavar="FILE", help="Text, one per line, or - for stdin.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="A .npy file [lines, hidden]; else JSON lines on stdout.")
    ] = None,
    pooling: Annotated[
        Pooling | None, typer.Option("--pooling", help="Instead of what the model's own files say.")
    ] = None,
    normalize: Annotated[
        bool | None, typer.Option("--normalize/--no-normalize", help="To length 1, or not; else as the model says.")
    ] = None,
    tokens_per_batch: Annotated[
        int | None, typer.Option("--tokens-per-batch", min=1, help="Real tokens per forward.")
    ] = None,
    device: Device = "auto",
    trust_remote_code: RemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Embed lines of text; the order is kept. An empty line has a vector too."""
    from onegpu.cli.console import print_document, quiet_libraries, say
    from onegpu.cli.models import ModelName, load_config, placement
    from onegpu.encoder import Encoder
    from onegpu.encoder.embed import find_recipe
    from onegpu.encoder.recipe import Recipe

    if out is not None and out.suffix != ".npy":
        raise ConfigError(f"--out must end in .npy; got {out}", "leave it out for JSON lines on stdout")
    name = ModelName.parse(model)
    texts = read_lines(file)
    quiet_libraries()
    load_config(name, trust_remote_code)
    arguments: dict[str, Any] = name.arguments(trust_remote_code)
    if pooling is not None:
        base = find_recipe(name.name, **arguments) or Recipe()
        arguments["recipe"] = Recipe(pooling.value, base.normalize, base.max_length, base.prompt)
    if tokens_per_batch is not None:
        arguments["tokens_per_batch"] = tokens_per_batch
    where = placement(device)
    encoder = Encoder.from_pretrained(name.name, device="cuda" if where == "auto" else where, **arguments)
    say(f"{encoder.recipe.pooling} pooling{', normalised' if encoder.recipe.normalize else ''}, on {encoder.device}")
    vectors = encoder.encode(texts, normalize=normalize, progress=sys.stderr.isatty())
    if out is not None:
        save(out, vectors)
        say(f"{len(texts)} vectors of {vectors.shape[1]} in {out}")
    if as_json:
        recipe = {
            "pooling": encoder.recipe.pooling,
            "normalize": encoder.recipe.normalize if normalize is None else normalize,
        }
        found = {"vectors": [as_list(vector) for vector in vectors]} if out is None else {"out": str(out)}
        print_document({"model": name.name, **recipe, "count": len(texts), "size": int(vectors.shape[1]), **found})
    elif out is None:
        write_lines(vectors)


def read_lines(file: str) -> list[str]:
    """The lines of a file or of stdin, without their ends.

    Raises:
        NotFoundError: no such file.
        ConfigError: not UTF-8.
    """
    try:
        text = sys.stdin.read() if file == "-" else Path(file).expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise NotFoundError(f"can't read {file}: {error.strerror or error}", "- reads stdin") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not UTF-8: {error}") from error
    lines = text.split("\n")
    return [line.removesuffix("\r") for line in (lines[:-1] if lines[-1] == "" else lines)]


def write_lines(vectors: Iterable[Any]) -> None:
    """One JSON list a line on stdout."""
    for vector in vectors:
        sys.stdout.write(json.dumps(as_list(vector)) + "\n")
    sys.stdout.flush()


def as_list(vector: Any) -> list[float]:
    """A vector's numbers, to the digits that float32 has."""
    return [round(float(x), 7) for x in vector]


def save(path: Path, vectors: Any) -> None:
    """A .npy file, whole or not at all.

    Raises:
        SaveError: the disk refused.
    """
    import numpy as np

    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as stream:
            np.save(stream, vectors)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise SaveError(f"can't write {path}: {error.strerror or error}") from error
