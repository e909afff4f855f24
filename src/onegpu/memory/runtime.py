"""What a run needs beside the weights: the key-value cache and the workspace, in bytes.

The cache is the slots of `onegpu.memory.slots`, or where there are none what grows token by token (`kv_bytes`).

The workspace is the largest of what is alive at once, in 16 bit, for the tokens that one forward of a prompt takes:

    rows          batch x context; a decoder alone takes its prompts in pieces of 2048 tokens, or of a quarter of the
                  context where that is more
    feed-forward  rows x (3 inner + 4 hidden + 2 head_dim), 2 inner without a gate: gate, up and their product; the
                  embedded prompt, the layer's input, the residual and what goes in; the rotary table. Of experts the
                  chosen ones' inner, or twice the chosen ones' hidden where that is more: their outputs, and these
                  times their shares
    attention     rows x (7 hidden + 2 head_dim), where that is more; with one layer's keys and values, gathered, where
                  a prompt comes in pieces
    long prompts  where that is more: layers known by their structure see the whole of one, context x (2 hidden + q +
                  k + v, or hidden + 2 q + k + v, or 2 hidden + q; of the rotary table 4 head_dim); their feed-forward
                  a quarter of it at a time, or 8192 tokens: context x hidden, and of these the feed-forward's inner
                  and 2 hidden
    logits        batch x vocabulary, in 16 bit and twice in float32: of the last token only
    angles        capacity x 2 head_dim: the rotary table of a step over slots
    scratch       a dequantized slice of 2**25 weights in 4 bit, but none on Hopper; of a layer whose experts cannot be
                  multiplied as they are stored, all of them in 16 bit
    libraries     32 MiB that the vendor's matrix products keep
    growth        without slots at least one layer's keys and values again, since a growing cache is copied layer by
                  layer
"""

from __future__ import annotations

from collections.abc import Sequence

from onegpu.memory.geometry import Geometry
from onegpu.memory.slots import capacity, has_slots, slot_bytes
from onegpu.memory.weights import Weight

__all__ = ["KV_DTYPES", "cache_bytes", "kv_bytes", "loading_bytes", "workspace_bytes"]

KV_DTYPES = ("16bit", "fp8", "int8")
LIBRARY_BYTES = 32 << 20
# As `onegpu.decoder` cuts prompts.
PIECE_TOKENS = 2048
MOST_PIECES = 4
MOST_ROWS = 8192
SCRATCH_WEIGHTS = 1 << 25


def cache_bytes(geometry: Geometry, context: int, batch: int, kv_dtype: str = "16bit") -> int:
    """What is held for the keys and values of `batch` sequences of `context` tokens: slots, or just themselves."""
    held = slot_bytes if has_slots(geometry, batch) else kv_bytes
    return held(geometry, context, batch, kv_dtype)


def kv_bytes(geometry: Geometry, context: int, batch: int, kv_dtype: str = "16bit") -> int:
    """Keys and values of `batch` sequences of `context` tokens, and no place more.

    A layer with a window keeps no more than that. 8 bit adds one float32 scale for each vector. An encoder-decoder
    keeps `context` tokens of its own answer and, in each layer, those of the encoder's output.
    """
    per_token = geometry.values_per_token * (2 if kv_dtype == "16bit" else 1)
    per_token += 0 if kv_dtype == "16bit" else 4 * geometry.vectors_per_token
    tokens = sum(context if window is None else min(context, window) for window in geometry.windows)
    if geometry.kind == "encoder-decoder":
        tokens += len(geometry.windows) * (geometry.source_tokens or context)
    return batch * tokens * per_token


def workspace_bytes(
    geometry: Geometry,
    weights: Sequence[Weight],
    format: str,
    context: int,
    batch: int,
    kv_dtype: str = "16bit",
    *,
    decodes_in_place: bool = False,
) -> int:
    """The largest of what a forward over the whole prompt holds at once; the formula is at the top of this page.

    `decodes_in_place`: products of many rows take 4-bit weights as they are (Hopper), without a slice in 16 bit.
    """
    rows = batch * max(context, geometry.source_tokens or 0)
    if geometry.kind == "decoder":
        rows = min(rows, max(PIECE_TOKENS, -(-context // MOST_PIECES)))
    embedded = 4 * geometry.hidden
    feed_forward = (3 if geometry.gated else 2) * geometry.inner
    if geometry.experts:
        feed_forward = max(feed_forward, 2 * geometry.hidden) * geometry.chosen
    attention = rows * 7 * max(geometry.hidden, geometry.heads * geometry.head_dim)
    if geometry.kind == "decoder" and context > PIECE_TOKENS:
        attention += context * geometry.values_per_token
    prompt = 2 * (max(rows * (feed_forward + embedded), attention) + rows * 2 * geometry.head_dim)
    if geometry.kind == "decoder" and context > PIECE_TOKENS:
        prompt = max(prompt, 2 * long_prompt_values(geometry, context, feed_forward))
    logits = 0 if geometry.kind == "encoder" else batch * geometry.vocab * (2 + 4 + 4)
    if has_slots(geometry, batch):
        growth, angles = 0, 2 * capacity(context) * 2 * geometry.head_dim
    else:
        growth, angles = kv_bytes(geometry, context, batch, kv_dtype) // max(len(geometry.windows), 1), 0
    scratch = scratch_bytes(weights, format, decodes_in_place=decodes_in_place)
    return max(prompt, growth) + logits + angles + scratch + LIBRARY_BYTES


def long_prompt_values(geometry: Geometry, context: int, feed_forward: int) -> int:
    """Numbers that are alive at once in one prompt through recognised layers; `feed_forward` for each of its tokens."""
    hidden, queries = geometry.hidden, geometry.heads * geometry.head_dim
    kept = geometry.values_per_token
    attention = max(2 * hidden + queries + kept, hidden + 2 * queries + kept, 2 * hidden + queries)
    piece = max(PIECE_TOKENS, min(MOST_ROWS, -(-context // MOST_PIECES)))
    rows = max(context * attention, context * hidden + piece * (feed_forward + 2 * hidden))
    return rows + context * 4 * geometry.head_dim


def scratch_bytes(weights: Sequence[Weight], format: str, *, decodes_in_place: bool = False) -> int:
    """Weights in 16 bit again, for the length of one call: a slice, or a whole layer's experts of unknown structure."""
    if format in ("16bit", "int8") or decodes_in_place or not any(weight.role == "matrix" for weight in weights):
        slices = 0
    else:
        slices = min(SCRATCH_WEIGHTS, max(weight.numel for weight in weights if weight.role == "matrix"))
    layers: dict[str, int] = {}
    if format != "16bit":
        for weight in weights:
            if weight.role == "experts" and weight.as_one:
                layer = weight.name.rpartition(".")[0]
                layers[layer] = layers.get(layer, 0) + weight.numel
    return 2 * max(slices, *layers.values(), 0)


def loading_bytes(weights: Sequence[Weight], format: str) -> int:
    """What loading needs beside the finished weights: a tensor, or expert, in 16 bit before it is quantized."""
    if format == "16bit":
        return 0
    made = [weight for weight in weights if weight.role in ("matrix", "experts") and weight.stored is None]
    return 2 * max((weight.numel // weight.experts for weight in made), default=0)
