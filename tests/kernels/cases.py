"""Inputs, a float64 oracle and the error budget that the tests of the products share.

All of it works where its tensors are: tests of large shapes make weights and references on the GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from onegpu.formats import blockwise

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Weights in float64 at a time: 128 MiB.
EXACT_CHUNK = 2**24


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
        """The weight it stands for, where it is; a GPU and a CPU give the same bits."""
        absmax = self.absmax
        if self.nested:
            absmax = blockwise.dequantize_absmax(blockwise.NestedAbsmax(absmax, *self.nested))
        return blockwise.dequantize_4bit(self.packed, absmax, self.shape, dtype, self.quant_type, self.blocksize)


def normal(
    *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Tensor:
    """Standard normal numbers; another kind of device gives other ones."""
    return torch.randn(*shape, generator=torch.Generator(device).manual_seed(seed), device=device).to(dtype)


@functools.lru_cache(maxsize=8)
def weight_4bit(
    N: int, K: int, quant_type: str = "nf4", blocksize: int = 64, nested: bool = False, device: str = "cpu"
) -> Weight4bit:
    """Made by the definition, on `device`; shared among tests, so nobody may write to it."""
    weight = normal(N, K, seed=N + K, device=device).mul_(0.02)
    packed, absmax = blockwise.quantize_4bit(weight, quant_type, blocksize)
    rest: tuple[Tensor, ...] = ()
    if nested:
        absmax, *rest_list = blockwise.quantize_absmax(absmax)
        rest = tuple(rest_list)
    return Weight4bit(packed, absmax, (N, K), quant_type, blocksize, rest)


def exact_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight.T + bias in float64, where the weight is, and a part of it at a time."""
    rows = x.to(weight.device).double()
    parts = weight.split(max(1, EXACT_CHUNK // max(1, weight.shape[1])))
    y = torch.cat([rows @ part.double().T for part in parts], -1)
    return y if bias is None else y + bias.to(weight.device).double()


def assert_no_worse(y: Tensor, plain: Tensor, exact: Tensor, factor: float = 1.5, what: object = "") -> None:
    """The error of y against float64 is within `factor` of that of the plain computation in the same dtype.

    Root mean squares over all elements, plus what rounding the result once costs: on a few elements the plain
    computation may be right by chance. Compared where `exact` is; `what` is compared, for the message.
    """
    assert y.dtype == plain.dtype
    assert y.shape == plain.shape == exact.shape

    def rms(values: Tensor) -> float:
        return float(values.double().square().mean().sqrt())

    rounding = torch.finfo(y.dtype).eps / 2 * rms(exact)
    error, base = (rms(values.to(exact.device).double() - exact) for values in (y, plain))
    budget = factor * base + rounding
    assert error <= budget, f"error {error:.3g} above {budget:.3g} {what}"


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
