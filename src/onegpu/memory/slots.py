"""The slots that generation on a GPU keeps keys and values in, as large as `onegpu.decoder` makes them.

A captured step finds its memory where it was, so that slots are made once, of a size known beforehand: their number is
a power of two up to 64, a slot's capacity a power of two from 256 tokens on and beyond 4096 a multiple of that. Every
layer keeps all of its slot, one with a sliding window too. In 8 bit each vector has a float32 scale.
"""

from __future__ import annotations

from onegpu.memory.geometry import Geometry

__all__ = ["capacity", "has_slots", "slot_bytes", "slots"]

MOST_SLOTS = 64
SMALLEST_CAPACITY = 256
LARGE_CAPACITY = 4096
# Places for an encoder's states come in steps of so many.
SOURCE_STEP = 64


def has_slots(geometry: Geometry, batch: int) -> bool:
    """Whether a batch is generated over slots: not by encoders, in larger batches, or with layers of another state."""
    return geometry.kind != "encoder" and batch <= MOST_SLOTS and len(geometry.windows) == geometry.layers


def slots(batch: int) -> int:
    """How many slots a batch of sequences takes."""
    return 1 << (batch - 1).bit_length()


def capacity(tokens: int) -> int:
    """How many tokens a slot holds in which `tokens` have room."""
    if tokens > LARGE_CAPACITY:
        return -(-tokens // LARGE_CAPACITY) * LARGE_CAPACITY
    return max(SMALLEST_CAPACITY, 1 << (tokens - 1).bit_length())


def slot_bytes(geometry: Geometry, context: int, batch: int, kv_dtype: str = "16bit") -> int:
    """Bytes of the slots of `batch` sequences of `context` tokens, with an encoder's side of them if there is one."""
    per_token = 2 * geometry.values_per_token
    if kv_dtype != "16bit":
        per_token = geometry.values_per_token + 4 * geometry.vectors_per_token
    layers = len(geometry.windows)
    own, source = capacity(context), 0
    if geometry.kind == "encoder-decoder":
        own = min(own, geometry.longest or own)
        places = -(-(geometry.source_tokens or context) // SOURCE_STEP) * SOURCE_STEP
        # The encoder's states stay beside what each layer makes of them, both in 16 bit.
        source = places * 2 * (layers * geometry.values_per_token + geometry.hidden)
    return slots(batch) * (layers * own * per_token + source)
