"""Makes Triton's interpreter right in bfloat16 and float8, for tests only.

The interpreter keeps bfloat16 as raw uint16 and then computes with those integers: conversions truncate or misread,
and products are nonsense, without a word. Here conversions and `tl.dot` go through float32, rounding half to even, and
any other arithmetic on bfloat16 is refused: our kernels widen first, and one that forgot to would pass unseen.
Rounding to float8 (e4m3) there has no carry and rounds halves up; it goes through torch here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch


def widened(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits (uint16) as float32."""
    return np.left_shift(bits.astype(np.uint32), 16).view(np.float32)


def rounded(values: np.ndarray) -> np.ndarray:
    """float32 to bfloat16 bits (uint16), nearest, half to even."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32).astype(np.uint64)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, nearest).astype(np.uint16)


def rounded_to_float8(values: np.ndarray) -> np.ndarray:
    """float32 to float8_e4m3fn bits (uint8), nearest, half to even."""
    values = np.array(values, dtype=np.float32)
    return torch.from_numpy(values).to(torch.float8_e4m3fn).view(torch.uint8).numpy()


def install() -> None:
    """Patch the interpreter that this process has imported."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder, Handle = interpreter.InterpreterBuilder, interpreter.TensorHandle

    def is_bf16(value: Any) -> bool:
        return isinstance(value, Handle) and value.dtype.scalar == tl.bfloat16

    def as_float32(handle: Any) -> Any:
        return Handle(widened(handle.data), tl.float32) if is_bf16(handle) else handle

    def to_type(like: Any, scalar: Any) -> Any:
        return like.dtype.with_element_ty(scalar) if like.dtype.is_block() else scalar

    def convert(original: Callable[..., Any]) -> Callable[..., Any]:
        def converted(self: Any, src: Any, dst_type: Any, *rest: Any) -> Any:
            if src.dtype.scalar == tl.float8e4nv and dst_type.scalar == tl.bfloat16:
                src = original(self, src, to_type(src, tl.float32), *rest)
            if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.float8e4nv:
                return Handle(rounded_to_float8(src.data), tl.float8e4nv)
            if dst_type.scalar == tl.bfloat16:
                return src if is_bf16(src) else Handle(rounded(src.data.astype(np.float32)), tl.bfloat16)
            if is_bf16(src):
                src = as_float32(src)
                return src if dst_type.scalar == tl.float32 else self.cast_impl(src, dst_type)
            return original(self, src, dst_type, *rest)

        return converted

    def refuse(original: Callable[..., Any]) -> Callable[..., Any]:
        def refused(self: Any, *args: Any) -> Any:
            assert not any(is_bf16(value) for value in args), "arithmetic on bfloat16 in a kernel; widen it first"
            return original(self, *args)

        return refused

    def dot(original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda self, a, b, *rest: original(self, as_float32(a), as_float32(b), *rest)

    for name, wrap in {
        "cast_impl": convert,
        "create_fp_to_fp": convert,
        "create_dot": dot,
        "binary_op": refuse,
        "unary_op": refuse,
        "ternary_op": refuse,
    }.items():
        setattr(builder, name, wrap(getattr(builder, name)))
