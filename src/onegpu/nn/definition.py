"""Quantized layers as they are defined: the product with the dequantized weight, by the vendor's library.

A proof that holds a fast path against this needs no kernel but the one that dequantizes, whatever the shapes and rows,
and shares none with what it judges.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from onegpu.nn.linear import QuantLinear, QuantLinear4bit, QuantLinear8bit

__all__ = ["by_definition"]


@contextmanager
def by_definition(model: nn.Module) -> Iterator[None]:
    """Let the quantized layers of a model on a GPU multiply with dequantized weights for a while.

    One weight at a time is in memory in 16 bit. On a CPU, and for layers with a forward of their own, nothing changes.
    """
    layers: list[QuantLinear] = [
        module
        for module in model.modules()
        if isinstance(module, QuantLinear)
        and type(module) in (QuantLinear4bit, QuantLinear8bit)
        and module.weight.is_cuda
        and "forward" not in module.__dict__
    ]
    try:
        for layer in layers:
            layer.__dict__["forward"] = partial(product, layer)
        yield
    finally:
        for layer in layers:
            del layer.__dict__["forward"]


def product(layer: QuantLinear, x: Tensor) -> Tensor:
    """x [..., in] -> [..., out] in x's dtype."""
    dtype = layer.compute_dtype or x.dtype
    bias = None if layer.bias is None else layer.bias.to(dtype)
    return F.linear(x.to(dtype), layer.dequantize(dtype), bias).to(x.dtype)
