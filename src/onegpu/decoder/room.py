"""How much memory a batch of sequences takes, and whether there is that much."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from onegpu.decoder.cache import LayerShape, kv_bytes
from onegpu.errors import DoesNotFitError

__all__ = ["check_fits", "free_bytes"]

GIB = 2**30


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can still be taken on a device, None where that is not known."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    if device.type == "cpu" and hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        # Pages of files that are only cached count as taken here: all memory there is bounds it instead.
        return int(os.sysconf("SC_PHYS_PAGES")) * int(os.sysconf("SC_PAGE_SIZE"))
    return None


def check_fits(
    shapes: Sequence[LayerShape], slots: int, capacity: int, kv_cache_dtype: str | None, device: torch.device
) -> int:
    """Bytes that the slots take.

    Raises:
        DoesNotFitError: there is less than that.
    """
    needed, free = kv_bytes(shapes, slots, capacity, kv_cache_dtype), free_bytes(device)
    if free is not None and needed > free:
        raise DoesNotFitError(
            f"keys and values of {slots} sequences of {capacity:,} tokens take {needed / GIB:.1f} GiB; "
            f"{free / GIB:.1f} GiB are free on {device}",
            "ask for fewer new tokens or a smaller batch"
            + ("" if kv_cache_dtype else ', or store keys and values in 8 bit: kv_cache_dtype="int8"'),
        )
    return needed
