"""Encoders measured: real tokens per second, as a share of what the matrix products alone would take.

    lengths     drawn once, log-normal; the same texts for everyone, in random order and sorted by length
    limit       floating-point operations of the real tokens / the speed of one large matrix product measured here
    rounds      contenders take turns; the median of their rounds counts

Nobody is given lengths beforehand: a batch is ids and mask on the device, as a tokenizer leaves them.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from onegpu.bench.measure import synchronize
from onegpu.encoder import EncoderOptions, optimize_encoder
from onegpu.errors import ConfigError

__all__ = [
    "SHAPES",
    "EncodeRow",
    "Texts",
    "compare_order",
    "compare_strings",
    "draw_lengths",
    "host_milliseconds",
    "kernel_table",
    "make_texts",
    "matmul_flops",
    "random_model",
    "work_of",
]


def shape_of(hidden: int, layers: int, heads: int, intermediate: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": intermediate,
    }


# Random weights of a known shape: speed does not depend on the values.
SHAPES: Final = {
    "bert-base": shape_of(768, 12, 12, 3072),
    "bert-large": shape_of(1024, 24, 16, 4096),
    "minilm-l6": shape_of(384, 6, 12, 1536),
}
VARIANTS: Final = {
    "onegpu": EncoderOptions(),
    "onegpu, GELU in the product": EncoderOptions(fuse_activation="epilogue"),
    "onegpu, GELU in chunks": EncoderOptions(fuse_activation="chunked"),
    "onegpu, GELU not fused": EncoderOptions(fuse_activation="off"),
    "onegpu, norm not fused": EncoderOptions(fuse_norm=False),
    "onegpu, three QKV products": EncoderOptions(fuse_qkv=False),
    "onegpu, our attention": EncoderOptions(attention="onegpu_varlen"),
    "onegpu, torch's attention": EncoderOptions(attention="torch_varlen"),
    "onegpu, no graphs": EncoderOptions(graphs=False),
    "onegpu, unpadding alone": EncoderOptions(graphs=False, fuse_qkv=False, fuse_norm=False, fuse_activation="off"),
}


@dataclass(frozen=True, slots=True)
class Texts:
    """Batches on the device, and what they hold."""

    batches: list[dict[str, Tensor]]
    lengths: list[int]

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def padding(self) -> float:
        """Share of all positions that is padding."""
        positions = sum(batch["input_ids"].numel() for batch in self.batches)
        return 1 - self.tokens / positions


@dataclass(frozen=True, slots=True)
class EncodeRow:
    """One contender on one order. `share` is of the matrix-product limit; `host_ms` is one batch's time to launch.

    `kernel_ms` is the time of a round in which the device worked at all; the rest of it, it waited for the host.
    """

    contender: str
    order: str
    milliseconds: float
    slowest: float
    fastest: float
    tokens_per_second: float
    share: float
    padding: float
    host_ms: float
    largest_difference: float | None = None
    kernel_ms: float | None = None


def random_model(shape: str, dtype: torch.dtype, device: torch.device) -> Any:
    """A BERT of a known shape with random weights.

    Raises:
        ConfigError: an unknown shape.
    """
    from transformers import BertConfig, BertModel

    if shape not in SHAPES:
        raise ConfigError(f"no shape is called {shape!r}", f"use a folder, a Hub name or one of {', '.join(SHAPES)}")
    torch.manual_seed(0)
    model = BertModel(BertConfig(**SHAPES[shape], attn_implementation="sdpa"))
    return model.to(device=device, dtype=dtype).eval()


def draw_lengths(count: int, mean: float, longest: int, seed: int = 0) -> list[int]:
    """Log-normal lengths from 8 to `longest` whose mean before clipping is `mean`."""
    sigma = 0.8
    drawn = np.random.default_rng(seed).lognormal(np.log(mean) - sigma**2 / 2, sigma, count)
    return [int(length) for length in np.clip(drawn, min(8, longest), longest)]


def make_texts(lengths: Sequence[int], batch: int, vocabulary: int, device: torch.device) -> Texts:
    """Random ids, padded to the longest of each batch."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for start in range(0, len(lengths), batch):
        some = torch.tensor(lengths[start : start + batch])
        mask = (torch.arange(int(some.max()))[None] < some[:, None]).long()
        ids = torch.randint(5, vocabulary, mask.shape, generator=generator) * mask
        batches.append({"input_ids": ids.to(device), "attention_mask": mask.to(device)})
    return Texts(batches, list(lengths))


def work_of(model: Any, lengths: Sequence[int]) -> float:
    """Floating-point operations of the layers for real tokens: products with weights, and attention's two."""
    from onegpu.encoder.find import find_stacks

    total = 0.0
    for found in find_stacks(model):
        linears = [m for layer in found.layers for m in layer.modules() if isinstance(m, nn.Linear)]
        total += 2.0 * sum(m.in_features * m.out_features for m in linears) * sum(lengths)
        total += 4.0 * model.config.hidden_size * len(found.layers) * sum(length**2 for length in lengths)
    return total


def matmul_flops(dtype: torch.dtype, device: torch.device) -> float:
    """Operations per second of one large matrix product: the best of five."""
    size = 8192 if device.type == "cuda" else 2048
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    times = []
    for _ in range(6):
        synchronize(device)
        begun = time.perf_counter()
        for _ in range(4):
            a @ b
        synchronize(device)
        times.append((time.perf_counter() - begun) / 4)
    return 2 * size**3 / min(times[1:])


Contender = Callable[[dict[str, Tensor]], Tensor]


def take_turns(
    contenders: dict[str, Contender], sets: dict[str, Texts], device: torch.device, runs: int, warm_up: int
) -> dict[tuple[str, str], list[float]]:
    """Seconds of each round of each contender over each set."""
    times: dict[tuple[str, str], list[float]] = {(name, order): [] for name in contenders for order in sets}
    with torch.inference_mode():
        for turn in range(warm_up + runs):
            for name, forward in contenders.items():
                for order, texts in sets.items():
                    synchronize(device)
                    begun = time.perf_counter()
                    for batch in texts.batches:
                        forward(batch)
                    synchronize(device)
                    if turn >= warm_up:
                        times[name, order].append(time.perf_counter() - begun)
    return times


def forward_of(model: Any) -> Contender:
    return lambda batch: model(**batch).last_hidden_state


def optimized_copy(model: Any, options: EncoderOptions) -> Any:
    """A copy of the model with our encoder: contenders take turns, so each needs its own."""
    copied = copy.deepcopy(model)
    optimize_encoder(copied, options)
    return copied


def make_contenders(model: Any, variants: bool, peers: bool, progress: Callable[[str], None]) -> dict[str, Contender]:
    """Everyone who takes part, by name; a peer that can't be made is said and left out."""
    contenders = {"transformers sdpa": forward_of(model)}
    # On a CPU nothing is captured or fused, so that there is one variant.
    chosen = VARIANTS if variants and next(model.parameters()).is_cuda else {"onegpu": EncoderOptions()}
    for name, options in chosen.items():
        contenders[name] = forward_of(optimized_copy(model, options))
    if peers:
        for name, make in (("torch.compile", compiled), ("torch nested tensors", nested)):
            try:
                contenders[name] = make(model)
            except Exception as error:  # a peer that fails is a line, not the end
                progress(f"{name}: {type(error).__name__}: {str(error).splitlines()[0]}")
    return contenders


def compare_order(
    model: Any,
    sets: dict[str, Texts],
    flops: float,
    *,
    runs: int = 5,
    warm_up: int | None = None,
    variants: bool = False,
    peers: bool = False,
    gaps: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> list[EncodeRow]:
    """Plain Transformers, ours, with `peers` theirs, over each set of texts; with `gaps` also how long kernels ran."""
    device = next(model.parameters()).device
    if warm_up is None:
        # A graph is captured the second time its size comes.
        warm_up = 3 if device.type == "cuda" else 1
    contenders = make_contenders(model, variants, peers, progress)
    first = next(iter(sets.values())).batches[0]
    want = valid_states(contenders["transformers sdpa"], first)
    differences: dict[str, float | None] = {}
    for name, forward in contenders.items():
        progress(f"warming up {name}")
        begun = time.perf_counter()
        take_turns({name: forward}, sets, device, 0, warm_up)
        same = name != "torch nested tensors"  # its weights are its own
        differences[name] = (
            float((valid_states(forward, first) - want).abs().max() / want.abs().max()) if same else None
        )
        progress(f"  ready after {time.perf_counter() - begun:.1f} s")
    times = take_turns(contenders, sets, device, runs, 0)
    rows = []
    for (name, order), measured in times.items():
        texts = sets[order]
        limit = work_of(model, texts.lengths) / flops
        host = host_milliseconds(contenders[name], texts.batches[0], device)
        row = row_of(name, order, measured, texts, limit, host)
        kernels = kernel_milliseconds(contenders[name], texts.batches) if gaps and device.type == "cuda" else None
        rows.append(replace(row, largest_difference=differences[name], kernel_ms=kernels))
    return rows


def row_of(name: str, order: str, times: list[float], texts: Texts, limit: float, host: float) -> EncodeRow:
    median = statistics.median(times)
    return EncodeRow(
        contender=name,
        order=order,
        milliseconds=median * 1e3,
        slowest=max(times) * 1e3,
        fastest=min(times) * 1e3,
        tokens_per_second=texts.tokens / median,
        share=limit / median,
        padding=texts.padding,
        host_ms=host,
    )


def valid_states(forward: Contender, batch: dict[str, Tensor]) -> Tensor:
    """Hidden states of the real tokens, float32."""
    with torch.inference_mode():
        return forward(batch)[batch["attention_mask"].bool()].float()


def host_milliseconds(forward: Contender, batch: dict[str, Tensor], device: torch.device) -> float:
    """Median time until one forward's call returns, begun on an idle device."""
    times = []
    with torch.inference_mode():
        for _ in range(5):
            synchronize(device)
            begun = time.perf_counter()
            forward(batch)
            times.append(time.perf_counter() - begun)
    synchronize(device)
    return statistics.median(times) * 1e3


def kernel_milliseconds(forward: Contender, batches: Sequence[dict[str, Tensor]]) -> float:
    """Time in which the device ran kernels or copies, over one round of all batches."""
    from torch.profiler import ProfilerActivity, profile

    with torch.inference_mode():
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as found:
            for batch in batches:
                forward(batch)
            torch.cuda.synchronize()
    on_device = [event for event in found.events() or () if event.device_type.name == "CUDA"]
    return covered([(event.time_range.start, event.time_range.end) for event in on_device]) / 1e3


def covered(spans: Sequence[tuple[float, float]]) -> float:
    """Length of the union of spans."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def compiled(model: Any) -> Contender:
    """torch.compile over the whole model, shapes dynamic."""
    whole: Any = torch.compile(model, dynamic=True)
    return lambda batch: whole(**batch).last_hidden_state


def nested(model: Any) -> Contender:
    """torch's own encoder in its inference fast path, of the model's shape with random weights."""
    config = model.config
    layer = nn.TransformerEncoderLayer(
        config.hidden_size,
        config.num_attention_heads,
        config.intermediate_size,
        dropout=0.0,
        activation="gelu",
        batch_first=True,
    )
    encoder = nn.TransformerEncoder(layer, config.num_hidden_layers, enable_nested_tensor=True)
    first = next(model.parameters())
    encoder = encoder.to(device=first.device, dtype=first.dtype).eval()

    def forward(batch: dict[str, Tensor]) -> Tensor:
        embedded = model.embeddings(input_ids=batch["input_ids"])
        out: Tensor = encoder(embedded, src_key_padding_mask=batch["attention_mask"] == 0)
        return out

    return forward


def kernel_table(model: Any, batch: dict[str, Tensor], options: EncoderOptions, rows: int = 16) -> str:
    """Where a forward's time on the device goes, by kernel, with our encoder."""
    from torch.profiler import ProfilerActivity, profile

    forward = forward_of(optimized_copy(model, options))
    with torch.inference_mode():
        for _ in range(3):
            forward(batch)
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as found:
            for _ in range(3):
                forward(batch)
            torch.cuda.synchronize()
    return str(found.key_averages().table(sort_by="cuda_time_total", row_limit=rows, max_name_column_width=60))


@dataclass(frozen=True, slots=True)
class StringsRow:
    """One contender from strings to vectors."""

    contender: str
    seconds: float
    texts_per_second: float
    smallest_cosine: float


def compare_strings(
    name: str, texts: Sequence[str], device: torch.device, runs: int, progress: Callable[[str], None]
) -> list[StringsRow]:
    """From strings to vectors on the host: sentence-transformers at its defaults, and `Encoder` at its own."""
    from sentence_transformers import SentenceTransformer

    from onegpu.encoder import Encoder

    progress("loading sentence-transformers and onegpu")
    theirs = SentenceTransformer(name, device=str(device))
    ours = Encoder.from_pretrained(name, device=str(device))
    calls: dict[str, Callable[[], Any]] = {
        "sentence-transformers": lambda: theirs.encode(list(texts), show_progress_bar=False),
        "onegpu.Encoder": lambda: ours.encode(list(texts)),
    }
    if device.type == "cuda":
        half = SentenceTransformer(name, device=str(device), model_kwargs={"dtype": torch.float16})
        calls["sentence-transformers, float16"] = lambda: half.encode(list(texts), show_progress_bar=False)
    times: dict[str, list[float]] = {label: [] for label in calls}
    vectors: dict[str, Any] = {}
    for turn in range(runs + 2):
        for label, call in calls.items():
            begun = time.perf_counter()
            vectors[label] = call()
            if turn >= 2:
                times[label].append(time.perf_counter() - begun)
    want = vectors["sentence-transformers"]
    rows = []
    for label, measured in times.items():
        seconds = statistics.median(measured)
        rows.append(StringsRow(label, seconds, len(texts) / seconds, smallest_cosine(vectors[label], want)))
    return rows


def smallest_cosine(a: Any, b: Any) -> float:
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(((a * b).sum(1) / np.maximum(norms, 1e-30)).min())
