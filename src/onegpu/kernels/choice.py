"""Which kernel runs an operator on a device, as a phrase for reports."""

from __future__ import annotations

import torch

from onegpu.kernels import cpu_4bit
from onegpu.kernels.decode_ops import DECODE_CAPABILITY
from onegpu.kernels.ops import INT8_DOT_CAPABILITY, OLDEST_CAPABILITY, why_not_triton

__all__ = ["kernel_for"]

NEEDED = {
    "linear_8bit": INT8_DOT_CAPABILITY,
    **dict.fromkeys(("append_kv", "decode_attention", "rotary_decode_attention"), DECODE_CAPABILITY),
}


def kernel_for(operator: str, device: torch.device) -> str:
    """What runs `operator` ("linear_4bit", ...) on `device`, and why nothing faster does."""
    if device.type == "cuda":
        reason = why_not_triton(device, NEEDED.get(operator, OLDEST_CAPABILITY))
        return "Triton" if reason is None else f"torch reference, since {reason}"
    if operator == "linear_4bit" and device.type == "cpu":
        if cpu_4bit.available():
            return f"compiled by LLVM ({cpu_4bit.form_name()}) up to {cpu_4bit.max_rows()} rows, torch above"
        return "torch reference; `pip install llvmlite` gives a faster one"
    return "torch reference"
