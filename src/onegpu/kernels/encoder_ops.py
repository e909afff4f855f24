"""The operators of the encoders: leaving padding out, attention without it, residual + LayerNorm, product + GELU.

Bound like those in `ops`: a check, shapes for tracing, the torch reference as the CPU implementation and as what a GPU
without Triton runs, the Triton launcher elsewhere.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

from onegpu.errors import ArgumentError, DeviceError
from onegpu.kernels.ops import bind

__all__ = [
    "MAX_BLOCK_SEQUENCES",
    "MAX_HEAD_DIM",
    "MAX_NORM_SIZE",
    "add_layer_norm",
    "attention_blocks",
    "gelu_",
    "linear_gelu",
    "place_tokens",
    "varlen_attention",
]

FLOATS: Final = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_DIM: Final = 128
MAX_NORM_SIZE: Final = 16384
# One program reads the bounds of all sequences at once.
MAX_BLOCK_SEQUENCES: Final = 4096
NO_BOUND: Final = 2**31 - 1


def check_device(first: Tensor, *others: Tensor | None) -> None:
    for other in others:
        if other is not None and other.device != first.device:
            raise DeviceError(f"expected every tensor on {first.device}; got one on {other.device}")


def check_varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    positions: Tensor,
    _max_seqlen: int,
    _scale: float,
    _causal: bool = False,
    _window: int | None = None,
    bias: Tensor | None = None,
    blocks: Tensor | None = None,
) -> None:
    check_device(query, key, value, cu_seqlens, positions, bias, blocks)
    if query.dim() != 3 or key.shape != query.shape or value.shape != query.shape:
        shapes = [list(t.shape) for t in (query, key, value)]
        raise ArgumentError(f"query, key and value must be [T, H, D], all of one shape; got {shapes}")
    if query.dtype not in FLOATS or key.dtype != query.dtype or value.dtype != query.dtype:
        raise ArgumentError(f"query, key and value must be of one floating dtype; got {query.dtype}, {key.dtype}")
    if query.shape[2] > MAX_HEAD_DIM:
        raise ArgumentError(f"the head dim must be at most {MAX_HEAD_DIM}; got {query.shape[2]}")
    if cu_seqlens.dtype != torch.int32 or positions.dtype != torch.int32 or positions.numel() != query.shape[0]:
        raise ArgumentError("cu_seqlens and positions must be int32, positions one per token")
    if bias is not None and (bias.dtype != torch.float32 or bias.shape[0] != query.shape[1] or bias.shape[1] % 2 == 0):
        raise ArgumentError(f"bias must be float32 [H, 2 * S - 1]; got {bias.dtype} {list(bias.shape)}")
    if blocks is not None and (blocks.dtype != torch.int32 or blocks.dim() != 2 or blocks.shape[0] != 3):
        raise ArgumentError(f"blocks must be int32 [3, P]; got {blocks.dtype} {list(blocks.shape)}")


def reference_varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    positions: Tensor,
    _max_seqlen: int,
    scale: float,
    causal: bool = False,
    window: int | None = None,
    bias: Tensor | None = None,
    _blocks: Tensor | None = None,
) -> Tensor:
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    bounds = cu_seqlens.tolist()
    for start, end in pairwise(bounds):
        q, k, v = (t[start:end].transpose(0, 1).float() for t in (query, key, value))
        at = positions[start:end]
        distance = (at[None, :] - at[:, None]).long()
        scores = q @ k.transpose(1, 2) * scale
        if bias is not None:
            scores = scores + bias[:, distance + bias.shape[1] // 2]
        if causal:
            scores = scores.masked_fill(torch.ones_like(distance, dtype=torch.bool).triu(1), -torch.inf)
        if window is not None:
            scores = scores.masked_fill(distance.abs() > window, -torch.inf)
        out[start:end] = (scores.softmax(-1) @ v).transpose(0, 1).to(query.dtype)
    return out


def check_attention_blocks(cu_seqlens: Tensor, tokens: int, block_m: int) -> None:
    if cu_seqlens.dtype != torch.int32 or not 1 <= cu_seqlens.numel() <= MAX_BLOCK_SEQUENCES + 1:
        raise ArgumentError(
            f"cu_seqlens must be int32, for at most {MAX_BLOCK_SEQUENCES} sequences; got {cu_seqlens.dtype}, "
            f"{cu_seqlens.numel()} entries"
        )
    if tokens < 0 or block_m < 1:
        raise ArgumentError(f"tokens must be at least 0 and block_m at least 1; got {tokens} and {block_m}")


def reference_attention_blocks(cu_seqlens: Tensor, tokens: int, block_m: int) -> Tensor:
    bounds = cu_seqlens.tolist()
    sequences = sorted(pairwise(bounds), key=lambda ends: ends[0] - ends[1])
    found = [(start, end - start, row) for start, end in sequences for row in range(0, end - start, block_m)]
    found += [(0, 0, 0)] * (block_count(tokens, len(bounds) - 1, block_m) - len(found))
    return torch.tensor(found, dtype=torch.int32, device=cu_seqlens.device).reshape(-1, 3).T.contiguous()


def block_count(tokens: int, sequences: int, block_m: int) -> int:
    """The most blocks that so many tokens in so many sequences can have."""
    return -(-tokens // block_m) + sequences


def check_place_tokens(
    mask: Tensor, indices: Tensor, positions: Tensor, cu_seqlens: Tensor, facts: Tensor, filler: int
) -> None:
    check_device(mask, indices, positions, cu_seqlens, facts)
    if mask.dtype != torch.bool or mask.dim() != 2 or not mask.numel() or mask.shape[0] > MAX_BLOCK_SEQUENCES:
        raise ArgumentError(
            f"mask must be bool [B, S], B from 1 to {MAX_BLOCK_SEQUENCES}; got {mask.dtype} {list(mask.shape)}"
        )
    wanted = ((indices, torch.int64), (positions, torch.int32), (cu_seqlens, torch.int32), (facts, torch.int32))
    if any(t.dtype != dtype or t.dim() != 1 or not t.is_contiguous() for t, dtype in wanted):
        raise ArgumentError("indices must be int64, positions, cu_seqlens and facts int32, each one row of memory")
    if positions.numel() != indices.numel() or cu_seqlens.numel() < mask.shape[0] + 1 or facts.numel() != 4:
        raise ArgumentError(
            f"expected as many positions as indices, at least {mask.shape[0] + 1} bounds and 4 facts; got "
            f"{positions.numel()} and {indices.numel()}, {cu_seqlens.numel()}, {facts.numel()}"
        )
    if filler < 0:
        raise ArgumentError(f"filler must be at least 0; got {filler}")


def reference_place_tokens(
    mask: Tensor, indices: Tensor, positions: Tensor, cu_seqlens: Tensor, facts: Tensor, filler: int
) -> None:
    B, S = mask.shape
    lengths = mask.sum(dim=1)
    places = mask.flatten().nonzero()[:, 0][: indices.numel()]
    total = int(lengths.sum())
    indices[:total].copy_(places)
    positions[:total].copy_(places % S)
    indices[total : total + filler].zero_()
    positions[total : total + filler].zero_()
    cu_seqlens[B + 1 :].fill_(NO_BOUND)
    cu_seqlens[:1].zero_()
    cu_seqlens[1 : B + 1].copy_(lengths.cumsum(0))
    runs = mask[:, 0] + (mask[:, 1:] & ~mask[:, :-1]).sum(dim=1)
    facts.copy_(torch.stack([lengths.sum(), lengths.max(), runs.max(), mask[:, 0].sum()]))


def check_add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, _eps: float) -> None:
    check_device(x, residual, weight, bias)
    if residual.shape != x.shape or residual.dtype != x.dtype or x.dtype not in FLOATS:
        raise ArgumentError(
            f"x and residual must be of one shape and floating dtype; got {list(x.shape)} {x.dtype} and "
            f"{list(residual.shape)} {residual.dtype}"
        )
    if weight.shape != x.shape[-1:] or bias.shape != x.shape[-1:] or x.shape[-1] > MAX_NORM_SIZE:
        raise ArgumentError(f"weight and bias must be [K], K at most {MAX_NORM_SIZE}; got {list(weight.shape)}")


def reference_add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    total = x.float() + residual.float()
    return F.layer_norm(total, x.shape[-1:], weight.float(), bias.float(), eps).to(x.dtype)


def check_linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    check_device(x, weight, bias)
    if weight.dim() != 2 or x.shape[-1] != weight.shape[1] or bias.shape != weight.shape[:1]:
        raise ArgumentError(
            f"expected x [..., K], weight [N, K], bias [N]; got {list(x.shape)}, {list(weight.shape)}, "
            f"{list(bias.shape)}"
        )
    if x.dtype not in FLOATS or weight.dtype != x.dtype or bias.dtype != x.dtype:
        raise ArgumentError(
            f"x, weight and bias must be of one floating dtype; got {x.dtype}, {weight.dtype}, {bias.dtype}"
        )


def reference_linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(x.float() @ weight.float().T + bias.float()).to(x.dtype)


def check_gelu(x: Tensor) -> None:
    if x.dtype not in FLOATS or not x.is_contiguous():
        raise ArgumentError(f"x must be contiguous, of a floating dtype; got {x.dtype}, strides {x.stride()}")


def reference_gelu(x: Tensor) -> Tensor:
    return x.copy_(F.gelu(x.float()))


_varlen_attention = bind(
    "varlen_attention(Tensor query, Tensor key, Tensor value, Tensor cu_seqlens, Tensor positions, SymInt max_seqlen,"
    " float scale, bool causal=False, int? window=None, Tensor? bias=None, Tensor? blocks=None) -> Tensor",
    check=check_varlen_attention,
    fake=lambda query, *_: query.new_empty(query.shape),
    plain=reference_varlen_attention,
    cuda="onegpu.kernels.varlen_attention",
)
_attention_blocks = bind(
    "attention_blocks(Tensor cu_seqlens, SymInt tokens, int block_m) -> Tensor",
    check=check_attention_blocks,
    fake=lambda cu_seqlens, tokens, block_m: cu_seqlens.new_empty(
        (3, block_count(tokens, cu_seqlens.shape[0] - 1, block_m))
    ),
    plain=reference_attention_blocks,
    cuda="onegpu.kernels.varlen_attention",
)
_place_tokens = bind(
    "place_tokens(Tensor mask, Tensor(a!) indices, Tensor(b!) positions, Tensor(c!) cu_seqlens, Tensor(d!) facts,"
    " int filler) -> ()",
    check=check_place_tokens,
    fake=lambda *_: None,
    plain=reference_place_tokens,
    cuda="onegpu.kernels.unpad",
)
_add_layer_norm = bind(
    "add_layer_norm(Tensor x, Tensor residual, Tensor weight, Tensor bias, float eps) -> Tensor",
    check=check_add_layer_norm,
    fake=lambda x, *_: x.new_empty(x.shape),
    plain=reference_add_layer_norm,
    cuda="onegpu.kernels.norm",
)
_linear_gelu = bind(
    "linear_gelu(Tensor x, Tensor weight, Tensor bias) -> Tensor",
    check=check_linear_gelu,
    fake=lambda x, weight, _: x.new_empty((*x.shape[:-1], weight.shape[0])),
    plain=reference_linear_gelu,
    cuda="onegpu.kernels.activation",
)
_gelu_ = bind(
    "gelu_(Tensor(a!) x) -> Tensor(a!)",
    check=check_gelu,
    fake=lambda x: x,
    plain=reference_gelu,
    cuda="onegpu.kernels.activation",
)


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    positions: Tensor,
    max_seqlen: int,
    scale: float,
    causal: bool = False,
    window: int | None = None,
    bias: Tensor | None = None,
    blocks: Tensor | None = None,
) -> Tensor:
    """softmax(scale * q k^T + bias) v within each sequence (FlashAttention, arXiv 2205.14135). No gradient.

    Args:
        query, key, value: [T, H, D], D at most 128, float16, bfloat16 or float32; any strides.
        cu_seqlens: int32 [N + 1], where each sequence begins and the last one ends.
        positions: int32 [T], what `window` and `bias` measure distances in.
        max_seqlen: at least the longest sequence.
        causal: a token sees those before it in its sequence, and itself.
        window: largest distance seen; None for no limit.
        bias: float32 [H, 2 * S - 1], added for distance d at index d + S - 1, every |d| below S.
        blocks: of these sequences, by `attention_blocks` with the block_m of `varlen_config.tiles_for`; it saves
            programs that find nothing to do.

    Returns:
        [T, H, D], contiguous. Tokens of no sequence hold anything.

    Raises:
        ArgumentError, DeviceError: tensors that do not fit together.
    """
    out: Tensor = _varlen_attention(
        query, key, value, cu_seqlens, positions, max_seqlen, scale, causal, window, bias, blocks
    )
    return out


def attention_blocks(cu_seqlens: Tensor, tokens: int, block_m: int) -> Tensor:
    """Which queries each program of `varlen_attention` computes: the longest sequences' first.

    Args:
        cu_seqlens: int32 [N + 1], N at most 4096.
        tokens: T, at least the last entry.
        block_m: queries of a program.

    Returns:
        int32 [3, P], P = ceil(T / block_m) + N: first token and length of the sequence, first query in it. Places that
        nothing takes have the length 0.

    Raises:
        ArgumentError: sizes or a dtype that do not fit.
    """
    out: Tensor = _attention_blocks(cu_seqlens, tokens, block_m)
    return out


def place_tokens(
    mask: Tensor, indices: Tensor, positions: Tensor, cu_seqlens: Tensor, facts: Tensor, filler: int
) -> None:
    """Write down where the real tokens of a padded batch stand, row by row. Nothing waits for the device.

    Args:
        mask: bool [B, S], True where a token is real; B from 1 to 4096.
        indices: int64 [capacity], gets the flat place in [B * S] of each token, then `filler` zeros; places beyond the
            capacity are left out.
        positions: int32 [capacity], gets the column of each token, then `filler` zeros.
        cu_seqlens: int32 [C + 1], C at least B, gets the bounds of the rows, then 2^31 - 1, for a bucket to cut.
        facts: int32 [4], gets the number of tokens, the longest row, the most runs of tokens in a row, and how many
            rows begin with a token.

    Raises:
        ArgumentError, DeviceError: tensors that do not fit together.
    """
    _place_tokens(mask, indices, positions, cu_seqlens, facts, filler)


def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm(x + residual) over the last dimension (arXiv 1607.06450), in float32, rounded once. No gradient.

    Args:
        x, residual: [..., K], one shape and dtype, K at most 16384.
        weight, bias: [K].

    Returns:
        [..., K] in the dtype of x.

    Raises:
        ArgumentError, DeviceError: tensors that do not fit together.
    """
    out: Tensor = _add_layer_norm(x, residual, weight, bias, eps)
    return out


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """gelu(x W^T + bias), the exact (erf) GELU, the sum in float32, rounded once. No gradient.

    Args:
        x: [..., K]; weight: [N, K]; bias: [N]; one dtype.

    Returns:
        [..., N].

    Raises:
        ArgumentError, DeviceError: tensors that do not fit together.
    """
    out: Tensor = _linear_gelu(x, weight, bias)
    return out


def gelu_(x: Tensor) -> Tensor:
    """The exact (erf) GELU of a contiguous tensor, in place. No gradient.

    Raises:
        ArgumentError: a tensor with gaps, or of another dtype.
    """
    _gelu_(x)
    return x
