"""Which kernel runs an operator on a device, as a phrase for reports."""

from __future__ import annotations

import torch

from onegpu.kernels import cpu_4bit
from onegpu.kernels.ops import INT8_DOT_CAPABILITY, OLDEST_CAPABILITY, why_not_triton

__all__ = ["kernel_for"]


def kernel_for(operator: str, device: torch.device) -> str:
    """What runs `operator` ("linear_4bit", ...) on `device`, and why nothing faster does."""
    if device.type == "cuda":
        needed = INT8_DOT_CAPABILITY if operator == "linear_8bit" else OLDEST_CAPABILITY
        reason = why_not_triton(device, needed)
        return "Triton" if reason is None else f"torch reference, since {reason}"
    if operator == "linear_4bit" and device.type == "cpu":
        if cpu_4bit.available():
            return f"compiled by LLVM ({cpu_4bit.form_name()}) up to {cpu_4bit.max_rows()} rows, torch above"
        return "torch reference; `pip install llvmlite` gives a faster one"
    return "torch reference"
