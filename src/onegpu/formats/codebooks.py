"""The value tables of the 4-bit formats and of the nested scales, and the rule that picks a code.

NF4 and FP4 are those of QLoRA (arXiv 2305.14314) with the exact float32 values and decision thresholds that
bitsandbytes uses on CUDA, so that its checkpoints and ours hold the same bytes. NF4 is a sorted table of 16 values
with its own zero; FP4 is a sign bit and a 3-bit magnitude, whose codes are not in order of size.
The tuples are plain Python floats, each exactly a float32, for whoever needs the numbers without a tensor.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from onegpu.config import check_choice

__all__ = [
    "FP4_BOUNDARIES",
    "FP4_CODE",
    "NF4_BOUNDARIES",
    "NF4_CODE",
    "QUANT_TYPES_4BIT",
    "SMALLEST_SCALE",
    "ZERO_CODE",
    "boundaries",
    "codebook",
    "dynamic_map",
    "encode",
    "nearest",
    "reciprocal",
]

QUANT_TYPES_4BIT = ("nf4", "fp4")
# A scale below the smallest normal float32 is a zero scale: GPUs that flush subnormals must agree with CPUs.
SMALLEST_SCALE = 2.0**-126
# The code that stands for +0.0: of padding, and of every element of an all-zero block.
ZERO_CODE = {"nf4": 7, "fp4": 0}

NF4_CODE = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
FP4_CODE = (
    0.0,
    0.0052083334885537624,
    0.6666666865348816,
    1.0,
    0.3333333432674408,
    0.5,
    0.1666666716337204,
    0.25,
    0.0,
    -0.0052083334885537624,
    -0.6666666865348816,
    -1.0,
    -0.3333333432674408,
    -0.5,
    -0.1666666716337204,
    -0.25,
)
# Midpoints of neighbouring values: a scaled weight takes the code that counts the boundaries it lies above.
NF4_BOUNDARIES = (
    -0.8480963706970215,
    -0.6106328964233398,
    -0.4599952697753906,
    -0.33967941999435425,
    -0.23460739850997925,
    -0.13791173696517944,
    -0.045525018125772476,
    0.03979014977812767,
    0.120255246758461,
    0.2035212516784668,
    0.2920137643814087,
    0.3893125355243683,
    0.5016634464263916,
    0.6427869200706482,
    0.8614784479141235,
)
# On the magnitude; as compiled into bitsandbytes' CUDA kernels, a few units in the last place off the midpoints.
FP4_BOUNDARIES = (
    0.0026041700039058924,
    0.0859375,
    0.2083333283662796,
    0.2916666567325592,
    0.4166666865348816,
    0.5833330154418945,
    0.8333333134651184,
)

# Entries 128 to 255 of the signed 8-bit dynamic map as big-endian float32; the rest follow by mirroring.
_DYNAMIC_MAP_POSITIVE = """
3513a3b7 365a1a94 370205ff 37b24206 38378034 388aefb3 38ba1f4b 3923d70b
398ce705 39c7e283 3a016f01 3a1eecc1 3a3c6a80 3a59e83e 3a7765ff 3aa7ef9d
3af1a9fc 3b1db22d 3b428f5c 3b676c8a 3b8624dd 3b989374 3bab020d 3bbd70a4
3bcfdf3b 3be24dd3 3bf4bc6a 3c039581 3c0ccccd 3c160418 3c1f3b64 3c3ae148
3c68f5c3 3c8b851f 3ca28f5d 3cb9999a 3cd0a3d7 3ce7ae15 3cfeb852 3d0ae148
3d166667 3d21eb85 3d2d70a3 3d38f5c3 3d447ae1 3d500000 3d5b851f 3d670a3d
3d728f5d 3d7e147b 3d84cccd 3d8a8f5d 3d9051eb 3d96147b 3d9bd70a 3da1999a
3da75c2a 3dad1eb8 3db2e148 3db8a3d7 3dbe6667 3dc428f7 3dc9eb85 3ddb3334
3df80000 3e0a6666 3e18cccd 3e273333 3e35999a 3e440000 3e526666 3e60cccd
3e6f3333 3e7d9999 3e860000 3e8d3334 3e946666 3e9b999a 3ea2cccc 3eaa0000
3eb13333 3eb86666 3ebf999a 3ec6cccc 3ece0000 3ed53333 3edc6666 3ee3999a
3eeacccc 3ef20000 3ef93332 3f003333 3f03cccc 3f076666 3f0b0000 3f0e999a
3f123334 3f15cccd 3f196666 3f1d0000 3f20999a 3f243334 3f27cccd 3f2b6666
3f2f0000 3f32999a 3f363334 3f39cccd 3f3d6666 3f410000 3f44999a 3f483333
3f4bcccd 3f4f6666 3f530000 3f56999a 3f5a3333 3f5dcccd 3f616666 3f650000
3f68999a 3f6c3333 3f6fcccd 3f736666 3f770000 3f7a999a 3f7e3333 3f800000
"""


def codebook(quant_type: str, device: torch.device | str | None = None) -> Tensor:
    """The 16 values of `nf4` or `fp4` in code order: float32 [16].

    Raises:
        ConfigError: another `quant_type`.
    """
    check_choice("quant_type", quant_type, QUANT_TYPES_4BIT)
    return _table(NF4_CODE if quant_type == "nf4" else FP4_CODE, device)


def boundaries(quant_type: str, device: torch.device | str | None = None) -> Tensor:
    """The decision thresholds: float32 [15] on the scaled weight for `nf4`, [7] on its magnitude for `fp4`.

    A value equal to a threshold belongs below it.

    Raises:
        ConfigError: another `quant_type`.
    """
    check_choice("quant_type", quant_type, QUANT_TYPES_4BIT)
    return _table(NF4_BOUNDARIES if quant_type == "nf4" else FP4_BOUNDARIES, device)


def dynamic_map(device: torch.device | str | None = None) -> Tensor:
    """The signed 8-bit dynamic map of the nested scales: float32 [256], increasing, zero at 127, one at 255.

    Kept as bit patterns: computed, its last bits depend on whether the machine has fused multiply-add.
    The most negative entry mirrors entry 254, so there is no minus one.
    """
    positive = struct.unpack(">128f", bytes.fromhex(_DYNAMIC_MAP_POSITIVE))
    negative = [-value for value in reversed(positive[:-1])]
    return _table((*negative, 0.0, *positive), device)


def reciprocal(absmax: Tensor) -> Tensor:
    """1 / absmax rounded to float32, and 0 where absmax is (nearly) 0, so that a zero block scales to zeros."""
    return torch.where(absmax.abs() >= SMALLEST_SCALE, absmax.reciprocal(), 0.0)


def encode(scaled: Tensor, quant_type: str) -> Tensor:
    """The codes of weights already divided by their scale: float32 in, uint8 of the same shape out.

    NF4: the number of boundaries strictly below the value. FP4: the same count on the magnitude, brought into the
    code order of the table, plus 8 for values below zero, so that a small negative keeps its sign.
    """
    if quant_type == "nf4":
        return _count_below(scaled, NF4_BOUNDARIES).to(torch.uint8)
    count = _count_below(scaled.abs(), FP4_BOUNDARIES).to(torch.uint8)
    # Magnitudes in order of size have the codes 0 1 6 7 4 5 2 3: bit 2 flips wherever bit 1 is set.
    code = count.bitwise_xor_(count.bitwise_and(2).mul_(2))
    return code.add_((scaled < 0).view(torch.uint8), alpha=8)


def nearest(scaled: Tensor, quant_type: str) -> Tensor:
    """The table values of the codes that `encode` picks: float32 of the same shape (zeros of either sign)."""
    if quant_type == "nf4":
        return _look_up(NF4_CODE, _count_below(scaled, NF4_BOUNDARIES))
    magnitudes = tuple(sorted(FP4_CODE[:8]))
    return _look_up(magnitudes, _count_below(scaled.abs(), FP4_BOUNDARIES)).copysign_(scaled)


def _count_below(values: Tensor, thresholds: tuple[float, ...]) -> Tensor:
    """How many thresholds lie strictly below each value, as float32.

    On a CPU a comparison into float32 is vectorized where one into bool is not, and a pass for each threshold is ten
    times as fast as a binary search.
    """
    count = torch.zeros_like(values)
    above = torch.empty_like(values)
    for threshold in thresholds:
        count += torch.gt(values, threshold, out=above)
    return count


def _look_up(table: tuple[float, ...], index: Tensor) -> Tensor:
    return torch.index_select(_table(table, index.device), 0, index.int().view(-1)).view_as(index)


def _table(values: tuple[float, ...], device: torch.device | str | None) -> Tensor:
    # Not torch.tensor(device=...), which makes the host wait for the GPU.
    return torch.tensor(values, dtype=torch.float32, device="cpu").to(device, non_blocking=True)
