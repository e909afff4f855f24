# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""What all kernels share: reading 4-bit codes and their scales on the device, and the launchers' small questions.

Every kernel is compiled without floating-point contraction (`NO_CONTRACTION`): a product that is followed by a sum
is rounded in between, as the torch definitions do, and where one rounding is wanted the kernel says `tl.fma`.
Kernels run under Triton's interpreter too, on CPU tensors; nothing here needs a GPU to be imported.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from onegpu.formats.codebooks import FP4_CODE, NF4_CODE, SMALLEST_SCALE

__all__ = [
    "NO_CONTRACTION",
    "SHARED_BYTES",
    "capability",
    "decode",
    "load_scale",
    "nested_arguments",
    "on_device_of",
    "processors",
    "reciprocal",
    "round_half_even",
    "select_of_16",
    "shared_bytes",
    "to_float16_range",
]

NO_CONTRACTION: Final = {"enable_fp_fusion": False}
# Bytes of shared memory that every card has for one program, AMD's being the least.
SHARED_BYTES: Final = 65536
# The interpreter has no device to ask; it does all that the newest one does.
INTERPRETER_CAPABILITY = (9, 0)
# It has no processors either; a few make sequences come in parts.
INTERPRETER_PROCESSORS = 4

NF4: Final = tl.constexpr(NF4_CODE)
FP4: Final = tl.constexpr(FP4_CODE)
SMALLEST_NORMAL: Final = tl.constexpr(SMALLEST_SCALE)
# Adding and taking off 1.5 * 2**23 leaves a float32 of magnitude below 2**22 rounded to a whole number, half to even.
ROUND_OFFSET: Final = tl.constexpr(12582912.0)
FLOAT16_MAX: Final = tl.constexpr(65504.0)


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """The current device becomes that of `tensor` for a launch; the stream is the caller's current one there."""
    # By its index: torch looks longer at a `torch.device`.
    return torch.cuda.device(tensor.get_device()) if tensor.is_cuda else contextlib.nullcontext()


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a device, as (major, minor)."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else INTERPRETER_CAPABILITY


def nested_arguments(
    absmax: Tensor, nested_absmax: Tensor | None, nested_code: Tensor | None, nested_offset: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four scale pointers of a kernel; without nested scales the last three are never read."""
    absmax = absmax.contiguous()
    if nested_absmax is None or nested_code is None or nested_offset is None:
        return absmax, absmax, absmax, absmax
    return absmax, nested_absmax.contiguous(), nested_code.contiguous(), nested_offset


@triton.jit
def decode(q, QUANT_TYPE: tl.constexpr):
    """The table value of each code 0..15: float32. A tree of selects: no memory, no shuffle, any layout."""
    if QUANT_TYPE == "nf4":
        value = select_of_16(q, NF4)
    else:
        value = select_of_16(q, FP4)
    return value


@triton.jit
def select_of_16(q, CODE: tl.constexpr):
    """CODE[q] for q in 0..15."""
    b0 = (q & 1) != 0
    b1 = (q & 2) != 0
    b2 = (q & 4) != 0
    b3 = (q & 8) != 0
    v0 = tl.where(b1, tl.where(b0, CODE[3], CODE[2]), tl.where(b0, CODE[1], CODE[0]))
    v1 = tl.where(b1, tl.where(b0, CODE[7], CODE[6]), tl.where(b0, CODE[5], CODE[4]))
    v2 = tl.where(b1, tl.where(b0, CODE[11], CODE[10]), tl.where(b0, CODE[9], CODE[8]))
    v3 = tl.where(b1, tl.where(b0, CODE[15], CODE[14]), tl.where(b0, CODE[13], CODE[12]))
    return tl.where(b3, tl.where(b2, v3, v2), tl.where(b2, v1, v0))


@triton.jit
def load_scale(
    absmax_ptr,  # float32 [m], or uint8 [m] if NESTED
    nested_absmax_ptr,  # float32 [ceil(m / 256)]
    nested_code_ptr,  # float32 [256]
    nested_offset_ptr,  # float32 []
    block,
    mask,
    NESTED: tl.constexpr,
):
    """The float32 scale of each block; nested ones in two roundings, product then sum."""
    if NESTED:
        code = tl.load(absmax_ptr + block, mask=mask, other=0).to(tl.int32)
        scale = tl.load(nested_code_ptr + code) * tl.load(nested_absmax_ptr + block // 256, mask=mask, other=0.0)
        scale += tl.load(nested_offset_ptr)
    else:
        scale = tl.load(absmax_ptr + block, mask=mask, other=0.0)
    return scale


@triton.jit
def reciprocal(absmax):
    """1 / absmax as IEEE rounds it, and 0 where absmax is (nearly) 0 or NaN."""
    ordinary = tl.abs(absmax) >= SMALLEST_NORMAL
    return tl.where(ordinary, tl.math.div_rn(1.0, tl.where(ordinary, absmax, 1.0)), 0.0)


@triton.jit
def round_half_even(value):
    """Nearest whole number of a float32 of magnitude below 2**22."""
    return (value + ROUND_OFFSET) - ROUND_OFFSET


@triton.jit
def to_float16_range(x):
    """float32 copy of values rounded to float16, saturating; NaN stays."""
    wide = tl.maximum(x.to(tl.float32), -FLOAT16_MAX, propagate_nan=tl.PropagateNan.ALL)
    wide = tl.minimum(wide, FLOAT16_MAX, propagate_nan=tl.PropagateNan.ALL)
    if x.dtype != tl.float16:
        wide = wide.to(tl.float16).to(tl.float32)
    return wide


@functools.cache
def processors(device: torch.device) -> int:
    """How many processors a device has, which work side by side."""
    if device.type != "cuda":
        return INTERPRETER_PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def shared_bytes(device: torch.device) -> int:
    """What one program may have of a device's shared memory; a little is left for sums over warps."""
    if device.type != "cuda" or torch.version.hip is not None:
        return SHARED_BYTES
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", SHARED_BYTES + 1024)) - 1024
