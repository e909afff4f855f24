"""What a user may choose about generation."""

from __future__ import annotations

from dataclasses import dataclass

from onegpu.config import check_choice
from onegpu.errors import ConfigError

__all__ = ["KV_CACHE_DTYPES", "DecoderOptions"]

KV_CACHE_DTYPES = (None, "int8", "fp8")


@dataclass(frozen=True, slots=True)
class DecoderOptions:
    """How a decoder is run.

    `kv_cache_dtype` stores keys and values in 8 bit, None in the model's own dtype. `max_batch` is the largest batch of
    `generate` on the fast path; larger ones take Transformers' loop. `graphs` captures decode steps in CUDA graphs.
    `fused` lets recognised layers run as a few kernels; None: on a GPU, as on a CPU the model's own layers are as fast.
    `prefill_chunk` is how many prompt tokens one forward takes, a quarter of the prompt where that is more; of fused
    layers only the MLPs take a longer prompt in pieces.

    Raises:
        ConfigError: an unknown dtype, a number below one.
    """

    kv_cache_dtype: str | None = None
    max_batch: int = 64
    graphs: bool = True
    fused: bool | None = None
    prefill_chunk: int = 2048

    def __post_init__(self) -> None:
        check_choice("kv_cache_dtype", self.kv_cache_dtype, KV_CACHE_DTYPES)
        for name in ("max_batch", "prefill_chunk"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be a whole number of at least 1; got {value!r}")
