"""`fit`: does this model fit this GPU, in which format, for how long a context, and how fast will it be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from onegpu.config import check_choice
from onegpu.errors import ConfigError, UnsupportedError
from onegpu.memory.geometry import Geometry, read_geometry
from onegpu.memory.gpus import Gpu, find_gpu, known_gpus, local_gpu
from onegpu.memory.known import tensors_from_config
from onegpu.memory.report import FitReport, FormatFit
from onegpu.memory.runtime import KV_DTYPES, cache_bytes, loading_bytes, workspace_bytes
from onegpu.memory.source import Source, read_source
from onegpu.memory.speed import tokens_per_second
from onegpu.memory.weights import FORMATS, Weight, bytes_in, read_weights, stored_weights

__all__ = ["fit"]

# Whose products of many rows take 4-bit weights as they are stored.
HOPPER = "9.0"

# Of the formats that fit, the first is recommended: the less is rounded, the better.
PREFERENCE = ("16bit", "int8", "nf4", "nf4+double")
LONGEST_SEARCHED = 1 << 24


def fit(
    name: str,
    *,
    context: int | None = None,
    batch: int = 1,
    gpu: str | Gpu | None = None,
    kv_dtype: str = "16bit",
    revision: str | None = None,
) -> FitReport:
    """Plan a model's memory from its config.json and safetensors headers; no weights are read and torch not imported.

    Args:
        name: a folder, or `org/name` on the Hub.
        context: tokens of prompt and answer together, of a source and of its answer each for an encoder-decoder;
            by default 4096, or the model's longest if that is less.
        batch: sequences at once.
        gpu: a name of the table ("RTX 4090"), a size ("24GiB"), or None for the GPU of this machine.
        kv_dtype: `16bit`, `fp8` or `int8`.
        revision: of a Hub name.

    Raises:
        NotFoundError: no such folder or model.
        CheckpointError: files that are damaged or incomplete.
        ConfigError: an argument or a config that cannot be, an unknown GPU, or a structure whose size cannot be told.
        UnsupportedError: weights stored in a format that is not read here (GPTQ, AWQ, ...).
    """
    check_choice("kv_dtype", kv_dtype, KV_DTYPES)
    for what, value in (("context", context), ("batch", batch)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ConfigError(f"{what} must be a positive number; got {value!r}", f"for example {what}=1")
    device = find_gpu(gpu) if isinstance(gpu, str) else gpu or local_gpu()
    source = read_source(name, revision)
    geometry = read_geometry(source.config)
    weights, formats = weights_of(source)
    notes = list(geometry.notes)
    if context is None:
        context = min(4096, geometry.longest or 4096)
    elif geometry.longest is not None and context > geometry.longest:
        notes.append(f"the model was made for {geometry.longest} tokens; {context} are beyond it")
    planner = Planner(source, geometry, weights, batch, kv_dtype, device, revision)
    rows = [planner.row(format, context) for format in formats]
    fitting = {row.format for row in rows if row.fits}
    order = PREFERENCE if len(formats) > 1 else formats
    if device is not None and device.bandwidth is not None and geometry.kind != "encoder":
        notes.append("tok/s is what the bandwidth allows at batch 1; Python between the tokens can cost more")
    return FitReport(
        model=name,
        structure=structure(geometry),
        origin=source.origin,
        parameters=sum(weight.numel for weight in weights),
        active_parameters=sum(active(weight, geometry) for weight in weights),
        context=context,
        batch=batch,
        kv_dtype=kv_dtype,
        gpu=device,
        formats=rows,
        recommended=next((format for format in order if format in fitting), None),
        notes=notes,
    )


def active(weight: Weight, geometry: Geometry) -> int:
    """The parameters that one token goes through."""
    if weight.role == "experts" and geometry.experts:
        return weight.numel * geometry.chosen // geometry.experts
    return weight.numel


def structure(geometry: Geometry) -> str:
    """A model in one phrase: "llama, 32 layers"."""
    experts = f", {geometry.chosen} of {geometry.experts} experts" if geometry.experts else ""
    return f"{geometry.model_type}, {geometry.layers} layers{experts}"


def weights_of(source: Source) -> tuple[list[Weight], tuple[str, ...]]:
    """The weights, and the formats they can be loaded in: one alone where they are stored quantized."""
    stored = source.config.get("quantization_config")
    if stored:
        check_stored(source, stored)
        assert source.tensors is not None
        return stored_weights(source.tensors, source.config), (stored_format(stored),)
    tensors = source.tensors
    if tensors is None:
        tensors = tensors_from_config(source.config)
    return read_weights(tensors, source.config), FORMATS


def check_stored(source: Source, stored: Mapping[str, Any]) -> None:
    """Refuse what is stored in a format that the loader does not read."""
    method = stored.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in stored else "an unnamed format")
    if method != "bitsandbytes":
        raise UnsupportedError(
            f"{source.name} is stored as {method}, which is not read here",
            "fit the original 16-bit checkpoint, or one in bitsandbytes' 4 or 8 bit",
        )
    if source.tensors is None:
        raise ConfigError(
            f"{source.name} says it is stored as bitsandbytes, but there are no safetensors headers to read",
            "give a folder or a revision with safetensors",
        )


def stored_format(stored: Mapping[str, Any]) -> str:
    """The short name of the format that a stored checkpoint is in."""
    if stored.get("load_in_8bit"):
        return "int8"
    double = "+double" if stored.get("bnb_4bit_use_double_quant") else ""
    return str(stored.get("bnb_4bit_quant_type", "fp4")) + double


class Planner:
    """One model on one GPU: bytes and verdicts for any format and context."""

    def __init__(
        self,
        source: Source,
        geometry: Geometry,
        weights: Sequence[Weight],
        batch: int,
        kv_dtype: str,
        gpu: Gpu | None,
        revision: str | None,
    ) -> None:
        self.source, self.geometry, self.weights = source, geometry, weights
        self.batch, self.kv_dtype, self.gpu = batch, kv_dtype, gpu
        self.target = f"{source.name}@{revision}" if revision else source.name

    def weight_bytes(self, format: str) -> int:
        """Bytes of all weights."""
        return sum(bytes_in(weight, format) for weight in self.weights)

    def needs(self, format: str, context: int) -> tuple[int, int, int]:
        """Weights, cache and workspace; the workspace is no less than what loading needs."""
        cache = cache_bytes(self.geometry, context, self.batch, self.kv_dtype)
        work = workspace_bytes(
            self.geometry,
            self.weights,
            format,
            context,
            self.batch,
            self.kv_dtype,
            decodes_in_place=self.gpu is not None and self.gpu.capability == HOPPER,
        )
        return self.weight_bytes(format), cache, max(work, loading_bytes(self.weights, format) - cache)

    def row(self, format: str, context: int) -> FormatFit:
        """All about one format."""
        weights, cache, work = self.needs(format, context)
        total = weights + cache + work
        smallest = next((gpu.name for gpu in known_gpus() if gpu.free_bytes >= total), None)
        speed = tokens_per_second(
            self.geometry,
            self.weights,
            format,
            context=context,
            kv_dtype=self.kv_dtype,
            bandwidth=self.gpu.bandwidth if self.gpu else None,
        )
        return FormatFit(
            format=format,
            weight_bytes=weights,
            kv_bytes=cache,
            workspace_bytes=work,
            total_bytes=total,
            fits=None if self.gpu is None else total <= self.gpu.free_bytes,
            max_context=self.max_context(format),
            tokens_per_second=None if speed is None else round(speed, 1),
            smallest_gpu=smallest,
            command=self.command(format),
        )

    def max_context(self, format: str) -> int | None:
        """The largest context that fits, no more than the model was made for; 0 where not even one token fits."""
        if self.gpu is None:
            return None
        low, high = 0, self.geometry.longest or LONGEST_SEARCHED
        while low < high:
            middle = (low + high + 1) // 2
            if sum(self.needs(format, middle)) <= self.gpu.free_bytes:
                low = middle
            else:
                high = middle - 1
        return low

    def command(self, format: str) -> str:
        """What to type to run it in this format."""
        if self.geometry.kind == "encoder":
            return f"onegpu embed {self.target} FILE" if format == "16bit" else self.python("AutoModel", format)
        if self.geometry.kind == "encoder-decoder":
            return self.python("AutoModelForSeq2SeqLM", format)
        if self.source.config.get("quantization_config"):
            return f'onegpu run {self.target} "..."'
        kind, _, double = format.partition("+")
        option = "none" if kind == "16bit" else kind
        return f'onegpu run {self.target} "..." --quantization {option}{" --double-quant" if double else ""}'

    def python(self, auto: str, format: str) -> str:
        """The call in Python, where the command line has none."""
        arguments = {
            "16bit": 'dtype="bfloat16"',
            "int8": "load_in_8bit=True",
            "nf4": "load_in_4bit=True",
        }
        kind, _, double = format.partition("+")
        given = arguments.get(format, f'quantization_config=onegpu.QuantConfig("{kind}", double_quant={bool(double)})')
        if self.source.config.get("quantization_config"):
            return f'onegpu.{auto}.from_pretrained("{self.source.name}")'
        return f'onegpu.{auto}.from_pretrained("{self.source.name}", {given})'
