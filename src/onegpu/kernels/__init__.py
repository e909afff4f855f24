"""The few operators of the project: quantized products, and quantizing itself, on CPU and GPU."""

from __future__ import annotations

from onegpu.kernels.choice import kernel_for
from onegpu.kernels.decode_ops import append_kv, decode_attention, rotary_decode_attention, why_not_kv_dtype
from onegpu.kernels.decode_products import linear_8bit_rows, linear_16bit, rms_norm
from onegpu.kernels.ops import (
    dequantize_4bit,
    linear_4bit,
    linear_8bit,
    quantize_4bit,
    quantize_8bit_rows,
    why_not_triton,
)
from onegpu.kernels.prompt_ops import gated_activation, rotate_and_append

__all__ = [
    "append_kv",
    "decode_attention",
    "dequantize_4bit",
    "gated_activation",
    "kernel_for",
    "linear_4bit",
    "linear_8bit",
    "linear_8bit_rows",
    "linear_16bit",
    "quantize_4bit",
    "quantize_8bit_rows",
    "rms_norm",
    "rotary_decode_attention",
    "rotate_and_append",
    "why_not_kv_dtype",
    "why_not_triton",
]
