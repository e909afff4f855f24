# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# mypy: disable-error-code="assignment"
"""Pieces of kernels whose values are a thread's own registers: flat tuples, and single elements by inline assembly.

Values have the shape [warps, 32 lanes], whose element index is the thread's own index. Triton may choose another layout
for what it loads and stores itself, and then computes all that it depends on again, assembly included.
"""

from __future__ import annotations

import triton
import triton.language as tl

from onegpu.kernels import asm_4bit as asm

__all__ = ["dtype_name", "load_element", "same", "slice_of", "store_element", "sums_of_warps", "zeros"]


@triton.constexpr_function
def same(kind, count):
    """The types of so many results of a kind."""
    return (kind,) * count


@triton.constexpr_function
def dtype_name(dtype):
    """As `asm_4bit` calls it: "bf16"."""
    return dtype.name


@triton.jit
def zeros(like, count: tl.constexpr):
    """So many float32 zeros of the layout of `like`, as a flat tuple."""
    out = ()
    for _ in tl.static_range(count):
        out = out + (like.to(tl.float32),)  # noqa: RUF005, tuples of Triton know no unpacking
    return out


@triton.jit
def slice_of(values, first: tl.constexpr, count: tl.constexpr):
    """`count` of a flat tuple."""
    out = ()
    for i in tl.static_range(count):
        out = out + (values[first + i],)  # noqa: RUF005
    return out


@triton.jit
def sums_of_warps(sums, TOTAL: tl.constexpr, WARPS: tl.constexpr, WARPS_N: tl.constexpr):
    """`TOTAL` sums of each thread, added up over the warps that share rows of W: in the first of them."""
    CHUNK: tl.constexpr = asm.chunk(WARPS, TOTAL)
    values = ()
    for first in tl.static_range(0, TOTAL, CHUNK):
        part = slice_of(sums, first, CHUNK)
        if WARPS > WARPS_N:
            part = tl.inline_asm_elementwise(
                asm.sum_rows(WARPS, WARPS_N, CHUNK),
                asm.outputs("f", CHUNK) + ",f" * CHUNK,
                part,
                dtype=same(tl.float32, CHUNK),
                is_pure=False,
                pack=1,
            )
        values = values + part
    return values


@triton.jit
def load_element(pointer, wanted):
    """One element in float32, 0 where it is not wanted."""
    return tl.inline_asm_elementwise(
        asm.load_element(dtype_name(pointer.dtype.element_ty)),
        "=&f,l,r",
        (pointer.to(tl.int64), wanted.to(tl.int32)),
        dtype=tl.float32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def store_element(pointer, value, wanted):
    """Round once, write one element."""
    tl.inline_asm_elementwise(
        asm.store(dtype_name(pointer.dtype.element_ty)),
        "=r,l,f,r",
        (pointer.to(tl.int64), value, wanted.to(tl.int32)),
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
