"""4-bit layers held in tile order, the one in which the fast product reads them, and back.

    tile     canonical tensors -> tile order; the canonical ones are let go
    untile   the inverse, bit for bit

Only one of the two is ever kept. A tiled layer is the same layer for everyone else: see `QuantLinear4bit`.
"""

from __future__ import annotations

from typing import Any

import torch

from onegpu.errors import UnsupportedError
from onegpu.formats.tiling import why_not_tiled
from onegpu.nn.linear import QuantLinear4bit
from onegpu.nn.state import tile_state, untile_state

__all__ = ["tile", "untile", "why_not"]


def why_not(module: Any) -> str | None:
    """None where `module` can be held in tile order (or is), else the reason in a sentence."""
    if not isinstance(module, QuantLinear4bit):
        return f"{type(module).__name__} has no 4-bit weight"
    weight = module.weight
    if weight.is_meta:
        return "its weight is on the meta device, not loaded or offloaded"
    if getattr(module, "_hf_hook", None) is not None:
        return "a hook of accelerate moves its weight"
    if not module.is_tiled and weight.dtype.is_floating_point and weight.shape == module.spec.shape:
        return "its weight is not quantized yet"
    N, K = module.spec.shape
    return why_not_tiled(N, K, module.spec.blocksize)


def tile(module: QuantLinear4bit) -> None:
    """Hold the weight in tile order from now on; nothing happens to a tiled one. The result is in memory of its own.

    Raises:
        UnsupportedError: it cannot be (`why_not`).
    """
    reason = why_not(module)
    if reason is not None:
        raise UnsupportedError(f"the weight of {module} cannot be tiled: {reason}")
    if not module.is_tiled:
        with torch.no_grad():
            module.hold_tiled(tile_state(module.state, module.spec))


def untile(module: QuantLinear4bit) -> None:
    """Hold the canonical tensors again, bit for bit; nothing happens to a layer that is not tiled."""
    if module.is_tiled:
        with torch.no_grad():
            module.set_state(untile_state(module.held, module.spec))
