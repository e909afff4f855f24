"""How fast one sequence can be decoded: the bytes a token needs, over the bandwidth.

A token reads every weight once, except the rows of the embedding table that it does not look up, the experts it does
not choose, and parts for other inputs (an encoder, an image tower); then the cache. Of the datasheet's bandwidth a
chain of layers reaches a share: 0.70 is what 4-bit layers reached in a chain on an H100; 0.75 in 16 bit lies between
the 0.69 of gpt-fast on an A100 and the 0.78 of a megakernel on an H100, as their authors publish them; int8's 0.65 is
an estimate. Each layer costs some microseconds of its own. That is a decode loop without host work; one driven by
Python, as `generate()` is, is slower.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from onegpu.memory.geometry import Geometry
from onegpu.memory.runtime import kv_bytes
from onegpu.memory.weights import Weight, bytes_in

__all__ = ["EFFICIENCY", "LAYER_SECONDS", "bytes_per_token", "tokens_per_second"]

EFFICIENCY = {"16bit": 0.75, "int8": 0.65, "nf4": 0.70, "nf4+double": 0.70, "fp4": 0.70, "fp4+double": 0.70}
LAYER_SECONDS = 10e-6
OTHER_INPUTS = re.compile(r"(model\.)?(encoder|vision\w*|visual|audio\w*|speech\w*|image\w*|multi_modal\w*)\..*")


def bytes_per_token(geometry: Geometry, weights: Sequence[Weight], format: str, context: int, kv_dtype: str) -> int:
    """Bytes that decoding one token reads, with `context` tokens in the cache."""
    read = 0
    for weight in weights:
        if (weight.role == "embedding" and not weight.tied) or OTHER_INPUTS.fullmatch(weight.name):
            continue
        size = bytes_in(weight, format)
        if weight.role == "experts" and geometry.experts:
            size = size * geometry.chosen // geometry.experts
        read += size
    return read + kv_bytes(geometry, context, 1, kv_dtype)


def tokens_per_second(
    geometry: Geometry,
    weights: Sequence[Weight],
    format: str,
    *,
    context: int,
    kv_dtype: str,
    bandwidth: float | None,
) -> float | None:
    """Expected decode speed at batch 1 with half of `context` in the cache; None for encoders and unknown bandwidth."""
    if bandwidth is None or geometry.kind == "encoder":
        return None
    read = bytes_per_token(geometry, weights, format, context // 2, kv_dtype)
    return 1 / (read / (bandwidth * EFFICIENCY.get(format, 0.65)) + geometry.layers * LAYER_SECONDS)
