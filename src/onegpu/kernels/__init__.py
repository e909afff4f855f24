"""The few operators of the project: quantized products, and quantizing itself, on CPU and GPU."""

from __future__ import annotations

from onegpu.kernels.choice import kernel_for
from onegpu.kernels.decode_products import linear_8bit_rows, linear_16bit, rms_norm
from onegpu.kernels.ops import (
    dequantize_4bit,
    linear_4bit,
    linear_8bit,
    quantize_4bit,
    quantize_8bit_rows,
    why_not_triton,
)

__all__ = [
    "dequantize_4bit",
    "kernel_for",
    "linear_4bit",
    "linear_8bit",
    "linear_8bit_rows",
    "linear_16bit",
    "quantize_4bit",
    "quantize_8bit_rows",
    "rms_norm",
    "why_not_triton",
]
