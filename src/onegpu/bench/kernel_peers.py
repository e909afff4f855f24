"""Other packages' quantized products, by name: each makes one from a bfloat16 weight, or raises where it cannot.

A maker takes a weight [N, K] and gives the product, x [M, K] to [M, N], and the bytes it holds. None of these
packages is needed; they are looked up by name when asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, Final

import torch
from torch import Tensor, nn

__all__ = ["PEERS"]

GROUP = 64
Peer = tuple[Callable[[Tensor], Tensor], int]


def bitsandbytes_4bit(weight: Tensor) -> Peer:
    package = import_module("bitsandbytes")
    packed, state = package.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    return lambda x: package.matmul_4bit(x, packed.t(), state), packed.nbytes + state.absmax.nbytes


def bitsandbytes_8bit(weight: Tensor) -> Peer:
    package = import_module("bitsandbytes")
    N, K = weight.shape
    module = package.nn.Linear8bitLt(K, N, bias=False, has_fp16_weights=False, threshold=6.0)
    module.weight = package.nn.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False)
    module = module.to(weight.device)
    return module, N * K + 4 * N


def torchao_4bit(weight: Tensor) -> Peer:
    package = import_module("torchao.quantization")
    N, K = weight.shape
    module = nn.Linear(K, N, bias=False, dtype=weight.dtype, device=weight.device)
    module.weight.data.copy_(weight)
    package.quantize_(module, package.Int4WeightOnlyConfig(group_size=GROUP))
    return module, N * K // 2 + 4 * (N * K // GROUP)


def gemlite_4bit(weight: Tensor) -> Peer:
    package: Any = import_module("gemlite.core")
    N, K = weight.shape
    groups = weight.float().view(-1, GROUP)
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    scales = (high - low) / 15
    zeros = -low / scales
    codes = (groups / scales + zeros).round().clamp(0, 15).to(torch.uint8).view(N, K)
    module = package.GemLiteLinearTriton(
        4,
        group_size=GROUP,
        in_features=K,
        out_features=N,
        input_dtype=package.DType.BF16,
        output_dtype=package.DType.BF16,
    )
    scales, zeros = (tensor.view(N, K // GROUP).to(weight.dtype) for tensor in (scales, zeros))
    module.pack(codes, scales, zeros, None)
    return module, N * K // 2 + 4 * (N * K // GROUP)


PEERS: Final[dict[str, Callable[[Tensor], Peer]]] = {
    "bitsandbytes nf4": bitsandbytes_4bit,
    "bitsandbytes int8, outliers": bitsandbytes_8bit,
    "torchao int4": torchao_4bit,
    "gemlite int4": gemlite_4bit,
}
