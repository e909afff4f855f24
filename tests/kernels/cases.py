"""Inputs, a float64 oracle and the error budget that the tests of the products share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from onegpu.formats import blockwise

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Weight4bit:
    """A quantized weight on some device, with the arguments that operators take for it."""

    packed: Tensor
    absmax: Tensor
    shape: tuple[int, int]
    quant_type: str
    blocksize: int
    nested: tuple[Tensor, ...]

    @property
    def args(self) -> tuple:
        """What follows x and bias in `linear_4bit`."""
        return (self.shape[0], self.quant_type, self.blocksize, *self.nested)

    def to(self, device: torch.device) -> Weight4bit:
        nested = tuple(tensor.to(device) for tensor in self.nested)
        return Weight4bit(
            self.packed.to(device), self.absmax.to(device), self.shape, self.quant_type, self.blocksize, nested
        )

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight it stands for, on the CPU."""
        absmax = self.absmax.cpu()
        if self.nested:
            absmax = blockwise.dequantize_absmax(blockwise.NestedAbsmax(absmax, *(t.cpu() for t in self.nested)))
        return blockwise.dequantize_4bit(self.packed.cpu(), absmax, self.shape, dtype, self.quant_type, self.blocksize)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@functools.lru_cache(maxsize=8)
def weight_4bit(N: int, K: int, quant_type: str = "nf4", blocksize: int = 64, nested: bool = False) -> Weight4bit:
    packed, absmax = blockwise.quantize_4bit(normal(N, K, seed=N + K) * 0.02, quant_type, blocksize)
    rest: tuple[Tensor, ...] = ()
    if nested:
        absmax, *rest_list = blockwise.quantize_absmax(absmax)
        rest = tuple(rest_list)
    return Weight4bit(packed, absmax, (N, K), quant_type, blocksize, rest)


def exact_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight.T + bias in float64, on the CPU."""
    y = x.cpu().double() @ weight.cpu().double().T
    return y if bias is None else y + bias.cpu().double()


def assert_no_worse(y: Tensor, plain: Tensor, exact: Tensor, factor: float = 1.5) -> None:
    """The error of y against float64 is within `factor` of that of the plain computation in the same dtype.

    Root mean squares over all elements, plus what rounding the result once costs: on a few elements the plain
    computation may be right by chance.
    """
    assert y.dtype == plain.dtype
    assert y.shape == plain.shape == exact.shape

    def rms(values: Tensor) -> float:
        return float(values.double().square().mean().sqrt())

    rounding = torch.finfo(y.dtype).eps / 2 * rms(exact)
    error, budget = rms(y.cpu().double() - exact), factor * rms(plain.cpu().double() - exact) + rounding
    assert error <= budget, f"error {error:.3g} above {budget:.3g}"


def run_captured(call: Callable[[], Any], change: Callable[[], None]) -> Any:
    """What `call` gives after `change` of its inputs, by replaying a CUDA graph captured before the change.

    On the way, `call` runs once where any wait of the host for the device is an error.
    """
    call()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    change()
    graph.replay()
    torch.cuda.synchronize()
    return out
