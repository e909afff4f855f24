# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""act(gate) * up over rows of a product that gives both: reads each element once, writes half as many."""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from onegpu.kernels.launch import NO_CONTRACTION, on_device_of
from onegpu.kernels.tail_device import activate

__all__ = ["BLOCK", "gated_activation", "gated_activation_kernel"]

BLOCK: Final = 1024


@triton.jit
def gated_activation_kernel(
    x_ptr,  # [M, 2 F]
    stride_xm,
    y_ptr,  # [M, F]
    F,
    ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    m = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = n < F
    gate = tl.load(x_ptr + m * stride_xm + n, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + m * stride_xm + F + n, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + m * F + n, (activate(gate, ACTIVATION) * up).to(y_ptr.dtype.element_ty), mask=mask)


def gated_activation(x: Tensor, activation: str) -> Tensor:
    """Launch the kernel; arguments as `onegpu.kernels.prompt_ops.gated_activation`."""
    F = x.shape[-1] // 2
    rows = x.detach().reshape(-1, 2 * F)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    y = torch.empty((rows.shape[0], F), dtype=x.dtype, device=x.device)
    if y.numel():
        with on_device_of(x):
            gated_activation_kernel[(rows.shape[0], triton.cdiv(F, BLOCK))](
                rows, rows.stride(0), y, F, ACTIVATION=activation, BLOCK_N=BLOCK, num_warps=4,
                **NO_CONTRACTION,
            )  # fmt: skip
    return y.view(*x.shape[:-1], F)
