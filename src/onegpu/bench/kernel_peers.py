"""Other packages' quantized products, by name: each makes one from a bfloat16 weight, or raises where it cannot.

A maker takes a weight [N, K] and gives the product, x [M, K] to [M, N], and the bytes it holds. None of these
packages is needed; they are looked up by name when asked for. "tinygemm int4" is the product that PyTorch itself has.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

import torch
from torch import Tensor, nn

__all__ = ["PEERS", "UNCAPTURED", "peer_versions"]

GROUP = 64
# Tiles along K that the layout of `_weight_int4pack_mm` holds side by side.
INNER_TILES = 8
Peer = tuple[Callable[[Tensor], Tensor], int]


def bitsandbytes_4bit(weight: Tensor) -> Peer:
    package = import_module("bitsandbytes")
    packed, state = package.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    return lambda x: package.matmul_4bit(x, packed.t(), state), packed.nbytes + state.absmax.nbytes


def bitsandbytes_8bit(weight: Tensor) -> Peer:
    package = import_module("bitsandbytes")
    # It says at each call that it casts x.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    N, K = weight.shape
    module = package.nn.Linear8bitLt(K, N, bias=False, has_fp16_weights=False, threshold=6.0)
    module.weight = package.nn.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False)
    module = module.to(weight.device)
    return module, N * K + 4 * N


def tinygemm_4bit(weight: Tensor) -> Peer:
    codes, scales, low = grouped_codes(weight)
    N, K = weight.shape
    # A value is (code - 8) * scale + offset.
    offsets = low + 8 * scales
    scales_and_offsets = torch.stack((scales, offsets), -1).view(N, K // GROUP, 2).transpose(0, 1).contiguous()
    packed = torch.ops.aten._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], INNER_TILES)
    rounded = scales_and_offsets.to(weight.dtype)

    def product(x: Tensor) -> Tensor:
        y: Tensor = torch.ops.aten._weight_int4pack_mm(x, packed, GROUP, rounded)
        return y

    return product, packed.nbytes + rounded.nbytes


def torchao_4bit(weight: Tensor) -> Peer:
    package = import_module("torchao.quantization")
    N, K = weight.shape
    module = nn.Linear(K, N, bias=False, dtype=weight.dtype, device=weight.device)
    module.weight.data.copy_(weight)
    # The only packing that needs no further package.
    config = package.Int4WeightOnlyConfig(
        group_size=GROUP, int4_packing_format="tile_packed_to_4d", set_inductor_config=False
    )
    package.quantize_(module, config)
    return module, N * K // 2 + 4 * (N * K // GROUP)


def gemlite_4bit(weight: Tensor) -> Peer:
    package: Any = import_module("gemlite.core")
    N, K = weight.shape
    codes, scales, low = grouped_codes(weight)
    zeros = -low / scales
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


def grouped_codes(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Even steps from the least to the largest of each group: codes uint8 [N, K], scales and least values [G, 1]."""
    groups = weight.float().view(-1, GROUP)
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    scales = (high - low) / 15
    codes = ((groups - low) / scales).round().clamp(0, 15).to(torch.uint8).view(weight.shape)
    return codes, scales, low


def peer_versions() -> dict[str, str | None]:
    """Versions of the packages, from their metadata alone; None for what is absent."""
    found: dict[str, str | None] = {}
    for name in ("bitsandbytes", "torchao", "gemlite"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


PEERS: Final[dict[str, Callable[[Tensor], Peer]]] = {
    "bitsandbytes nf4": bitsandbytes_4bit,
    "bitsandbytes int8, outliers": bitsandbytes_8bit,
    "tinygemm int4": tinygemm_4bit,
    "torchao int4": torchao_4bit,
    "gemlite int4": gemlite_4bit,
}
# Waits for the host to see which columns are outliers; a broken capture would be felt by what comes after.
UNCAPTURED: Final = frozenset({"bitsandbytes int8, outliers"})
