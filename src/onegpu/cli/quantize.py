"""`onegpu quantize MODEL OUT_DIR`: a checkpoint that loads small, here and in Transformers with bitsandbytes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from onegpu.cli.options import (
    AsJson,
    Device,
    DoubleQuant,
    Model,
    Quantization,
    QuantizationOption,
    RemoteCode,
    ScaleSearch,
    quant_config,
)
from onegpu.errors import ConfigError, SaveError

__all__ = ["quantize"]


def quantize(
    model: Model,
    out_dir: Annotated[Path, typer.Argument(metavar="OUT_DIR", help="A folder that is empty or not there yet.")],
    quantization: QuantizationOption = Quantization.nf4,
    double_quant: DoubleQuant = False,
    scale_search: ScaleSearch = False,
    device: Device = "auto",
    trust_remote_code: RemoteCode = False,
    force: Annotated[bool, typer.Option("--force", help="Replace what is in OUT_DIR.")] = False,
    as_json: AsJson = False,
) -> None:
    """Quantize a model and save it with its tokenizer."""
    from onegpu.bench.environment import versions
    from onegpu.bench.measure import dense_bytes, weight_bytes
    from onegpu.cli.console import print_document, say
    from onegpu.cli.models import ModelName, load

    config = quant_config(quantization, double_quant, scale_search)
    if config is None:
        raise ConfigError("--quantization none leaves nothing to do", "choose nf4, fp4 or int8")
    name = ModelName.parse(model)
    check_target(out_dir, name.name, force)
    loaded = load(name, config, chosen=True, device=device, trust_remote_code=trust_remote_code)
    from onegpu.loading.placement import format_bytes

    begun = time.perf_counter()
    save(loaded.model, loaded.tokenizer, out_dir)
    before, after = dense_bytes(loaded.model.config), sum(path.stat().st_size for path in out_dir.glob("*.safetensors"))
    summary = {
        "model": name.name,
        "revision": name.revision,
        "out_dir": str(out_dir),
        "format": loaded.format,
        "weight_bytes_16bit": before,
        "weight_bytes": weight_bytes(loaded.model),
        "file_bytes": after,
        "load_seconds": round(loaded.load_seconds, 3),
        "save_seconds": round(time.perf_counter() - begun, 3),
        "versions": versions(),
    }
    if as_json:
        print_document(summary)
    say(f"{loaded.format}: {format_bytes(before)} in 16 bit -> {format_bytes(after)} in {out_dir}")


def check_target(out_dir: Path, source: str, force: bool) -> None:
    """Refuse a folder with something in it, and the model's own folder in any case.

    Raises:
        SaveError
    """
    if out_dir.exists() and not out_dir.is_dir():
        raise SaveError(f"{out_dir} is a file", "name a folder")
    if out_dir.is_dir() and Path(source).is_dir() and out_dir.samefile(source):
        raise SaveError(f"OUT_DIR is the folder of the model itself: {out_dir}", "name another folder")
    if out_dir.is_dir() and any(out_dir.iterdir()) and not force:
        raise SaveError(f"{out_dir} is not empty", "name another folder, or add --force to replace what is in it")


def save(model: Any, tokenizer: Any, out_dir: Path) -> None:
    """Save both, all or nothing: a failure leaves OUT_DIR as it was.

    Raises:
        SaveError: the disk refused.
    """
    from onegpu.loading.saving import replace_folder

    with replace_folder(out_dir) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
