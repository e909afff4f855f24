# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# mypy: disable-error-code="assignment, misc"
"""y[s] = x[s // k] @ W[expert_ids[s]].T for stacked 4-bit or int8 weights: the chosen experts only, read in place.

    few pairs     `pair_kernel`: a warp has a pair and some rows of W; weights decoded to float32, products and sums in
                  float32, rounded once
    more          the pairs in order of their experts, padded to tiles of one expert each; `tile_kernel` decodes
                  weights, rounded to the dtype of x as dequantizing gives them, for tensor cores with float32 sums

Nothing asks the host which experts were chosen: the number of tiles is bounded by the number of pairs and experts, and
programs beyond the last tile end at once. A pair whose expert does not exist gets zeros; it may stand for one that
another device has, or for padding.

int8 weights are exact in the dtype of x, and their row's scale comes last (see `onegpu.formats.rowwise`).
"""

from __future__ import annotations

from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from onegpu.formats.rowwise import INVERSE_127
from onegpu.kernels.codes import look_up, value_table
from onegpu.kernels.launch import NO_CONTRACTION, capability, load_scale, nested_arguments, on_device_of

__all__ = ["experts_4bit", "experts_8bit"]

DOT_CAPABILITY = (8, 0)
INVERSE_127_32: Final = tl.constexpr(INVERSE_127)
# Up to so many pairs, or a quarter of the experts: next to no two of them share an expert's weights then.
FEW_PAIRS: Final = 8
# Columns per step of `pair_kernel`: eight to a thread.
PAIR_COLUMNS: Final = 256


@triton.jit
def load_codes(weight_ptr, n, start, K, FORMAT: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Bytes [BLOCK_N, BLOCK_K / 2] of 4-bit codes, or [BLOCK_N, BLOCK_K] of int8, as they are; zeros from K on."""
    PER_BYTE: tl.constexpr = 1 if FORMAT == "int8" else 2
    byte = tl.max_contiguous(tl.arange(0, BLOCK_K // PER_BYTE), 8 // PER_BYTE)
    pointers = weight_ptr + start // PER_BYTE + (n[:, None] * (K // PER_BYTE) + byte[None, :])
    if EVEN_K:
        codes = tl.load(pointers)
    else:
        codes = tl.load(pointers, mask=(byte < (K - start) // PER_BYTE)[None, :], other=0)
    return codes


@triton.jit
def load_scales(
    absmax_ptr, nested_absmax_ptr, nested_code_ptr, nested_offset_ptr, first, n, start, K,
    BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Scales [BLOCK_N, BLOCK_K / GROUP] of groups of columns with one scale each, from column `start` on."""
    column = tl.arange(0, BLOCK_K // GROUP) * GROUP
    # `start` is a multiple of BLOCK_K, and of BLOCKSIZE and BLOCK_K one divides the other.
    block = n[:, None] * (K // BLOCKSIZE) + (column // BLOCKSIZE)[None, :]
    if EVEN_K:
        mask = (n >= 0)[:, None] & (column >= 0)[None, :]
    else:
        mask = (n >= 0)[:, None] & (column < K - start)[None, :]
    first += start // BLOCKSIZE
    if NESTED:
        block = first + block
    else:
        absmax_ptr += first
    return load_scale(absmax_ptr, nested_absmax_ptr, nested_code_ptr, nested_offset_ptr, block, mask, NESTED)


@triton.jit
def scaled(value, scale):
    """value [BLOCK_N, BLOCK_K] times the scales of its groups of columns."""
    BLOCK_N: tl.constexpr = value.shape[0]
    BLOCK_K: tl.constexpr = value.shape[1]
    GROUPS: tl.constexpr = scale.shape[1]
    parts = tl.reshape(value, (BLOCK_N, GROUPS, BLOCK_K // GROUPS)) * scale[:, :, None]
    return tl.reshape(parts, (BLOCK_N, BLOCK_K))


@triton.jit
def load_words(words_ptr, n, start, K, EVEN_K: tl.constexpr, BLOCK_K: tl.constexpr):
    """int32 [BLOCK_N, BLOCK_K / 8], eight 4-bit codes each, one to a thread; zeros from K on."""
    word = tl.max_contiguous(tl.arange(0, BLOCK_K // 8), 1)
    pointers = words_ptr + start // 8 + (n[:, None] * (K // 8) + word[None, :])
    if EVEN_K:
        words = tl.load(pointers)
    else:
        words = tl.load(pointers, mask=(word < (K - start) // 8)[None, :], other=0)
    return words


@triton.jit
def load_stored(weight_ptr, n, start, K, FORMAT: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_K: tl.constexpr):
    """What `pair_kernel` loads ahead: int8 codes, or words of 4-bit ones."""
    if FORMAT == "int8":
        stored = load_codes(weight_ptr, n, start, K, FORMAT, EVEN_K, BLOCK_K)
    else:
        stored = load_words(weight_ptr, n, start, K, EVEN_K, BLOCK_K)
    return stored


@triton.jit
def in_eights(x):
    """x [BLOCK_K] as eight tensors [1, BLOCK_K / 8]: the first of each eight elements, the second, and so on."""
    COUNT: tl.constexpr = x.shape[0] // 8
    even, odd = tl.split(tl.reshape(x, (1, COUNT, 2, 2, 2)))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    x0, x4 = tl.split(x0)
    x1, x5 = tl.split(x1)
    x2, x6 = tl.split(x2)
    x3, x7 = tl.split(x3)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def multiply_words(words, table, x):
    """The sum over each word's eight codes of value times x: float32 [BLOCK_N, BLOCK_K / 8]."""
    parts = in_eights(x)
    # The even code of a byte is in its high half.
    sums = look_up(table, (words >> 4) & 15) * parts[0]
    for i in tl.static_range(1, 8):
        sums = tl.fma(look_up(table, (words >> (i * 4 ^ 4)) & 15), parts[i], sums)
    return sums


@triton.jit(do_not_specialize=["num_experts", "top_k", "S"])
def pair_kernel(
    x_ptr,  # [T, K]
    stride_xt,
    expert_ids_ptr,  # int32 or int64 [S]
    weight_ptr,  # int32 [E, N, K / 8], words of 4-bit codes; or int8 [E, N, K]
    absmax_ptr,  # float32 or uint8 [E, N, K / BLOCKSIZE]; for int8 row_stats, float32 [E, N]
    nested_absmax_ptr,
    nested_code_ptr,
    nested_offset_ptr,
    y_ptr,  # [S, N]
    num_experts,
    top_k,
    S,
    N,
    K,
    FORMAT: tl.constexpr,  # nf4, fp4 or int8
    BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,
    EVEN_K: tl.constexpr,  # K is a multiple of BLOCK_K
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Pairs change fastest: those that share an expert meet its weights in L2.
    pair = (tl.program_id(0) % S).to(tl.int64)
    n = tl.program_id(0) // S * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.minimum(n, N - 1)
    expert = tl.load(expert_ids_ptr + pair).to(tl.int64)
    y_ptrs = y_ptr + pair * N + n
    if (expert < 0) | (expert >= num_experts):
        tl.store(y_ptrs, tl.zeros((BLOCK_N,), y_ptr.dtype.element_ty), mask=n < N)
        return
    elements = expert * N * K
    x_ptr += pair // top_k * stride_xt
    if FORMAT == "int8":
        weight_ptr += elements
    else:
        weight_ptr += elements // 8
        table = value_table(FORMAT)
    first = elements // BLOCKSIZE
    k = tl.max_contiguous(tl.arange(0, BLOCK_K), 8)
    # Eight products of a thread are summed at once: they have one scale.
    sums = tl.zeros((BLOCK_N, BLOCK_K // 8), tl.float32)
    codes = load_stored(weight_ptr, row, 0, K, FORMAT, EVEN_K, BLOCK_K)
    for start in range(0, K, BLOCK_K):
        now = codes
        x = tl.load(x_ptr + start + k, mask=k < K - start, other=0.0)
        x = x.to(tl.float32)
        # The next codes are under way while these are used; after the last, those of some columns again.
        following = tl.where(start + BLOCK_K < K, start + BLOCK_K, 0)
        codes = load_stored(weight_ptr, row, following, K, FORMAT, EVEN_K, BLOCK_K)
        if FORMAT == "int8":
            products = now.to(tl.float32) * x[None, :]
            sums += tl.sum(tl.reshape(products, (BLOCK_N, BLOCK_K // 8, 8)), axis=2)
        else:
            products = multiply_words(now, table, x)
            scale = load_scales(
                absmax_ptr, nested_absmax_ptr, nested_code_ptr, nested_offset_ptr, first, row, start, K,
                BLOCKSIZE, NESTED, EVEN_K, BLOCK_K, 8,
            )  # fmt: skip
            sums = tl.fma(products, scale, sums)
    y = tl.sum(sums, axis=1)
    if FORMAT == "int8":
        y *= tl.load(absmax_ptr + expert * N + row) * INVERSE_127_32
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=n < N)


@triton.jit
def find_tile(tile, starts_ptr, EXPERTS: tl.constexpr, NUM_EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Which group of pairs a tile belongs to, and its first place among them and the group's end; past the last tile
    the group is one more than there are.

    Group e has the places starts[e] to starts[e + 1] of the sorted pairs; the last group is that of no expert.
    """
    e = tl.arange(0, EXPERTS)
    begin = tl.load(starts_ptr + e, mask=e <= NUM_EXPERTS, other=0)
    end = tl.load(starts_ptr + e + 1, mask=e <= NUM_EXPERTS, other=0)
    tiles = (end - begin + BLOCK_M - 1) // BLOCK_M
    upto = tl.cumsum(tiles, axis=0)
    group = tl.sum(((upto <= tile) & (e <= NUM_EXPERTS)).to(tl.int32), axis=0)
    mine = e == group
    first = tl.sum(tl.where(mine, begin + (tile - (upto - tiles)) * BLOCK_M, 0), axis=0)
    return group, first, tl.sum(tl.where(mine, end, 0), axis=0)


@triton.jit(do_not_specialize=["top_k"])
def tile_kernel(
    x_ptr,  # [T, K]
    stride_xt,
    order_ptr,  # int64 [S]: pairs in order of their experts
    starts_ptr,  # int32 [E + 2]: where each expert's begin, then those of no expert, then S
    weight_ptr,  # as in `pair_kernel`, and so on to y_ptr
    absmax_ptr,
    nested_absmax_ptr,
    nested_code_ptr,
    nested_offset_ptr,
    y_ptr,  # [S, N]
    top_k,
    N,
    K,
    FORMAT: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,
    EVEN_K: tl.constexpr,
    EXPERTS: tl.constexpr,  # a power of two above NUM_EXPERTS
    NUM_EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    expert, first_place, end = find_tile(tl.program_id(0), starts_ptr, EXPERTS, NUM_EXPERTS, BLOCK_M)
    if expert > NUM_EXPERTS:
        return
    place = first_place + tl.arange(0, BLOCK_M)
    inside = place < end
    pair = tl.load(order_ptr + place, mask=inside, other=0).to(tl.int32)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.minimum(n, N - 1)
    elements = expert.to(tl.int64) * N * K
    if FORMAT == "int8":
        weight_ptr += elements
    else:
        weight_ptr += elements // 2
        table = value_table(FORMAT)
    first = elements // BLOCKSIZE
    k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + (pair // top_k).to(tl.int64)[None, :] * stride_xt + k[:, None]
    GROUP: tl.constexpr = BLOCKSIZE if BLOCKSIZE < BLOCK_K else BLOCK_K
    # Weights are the left operand, so that every warp decodes rows of its own.
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    depth = tl.where(expert < NUM_EXPERTS, K, 0)
    for start in range(0, depth, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs + start, mask=inside[None, :], other=0.0)
        else:
            x = tl.load(x_ptrs + start, mask=inside[None, :] & (k < K - start)[:, None], other=0.0)
        codes = load_codes(weight_ptr, row, start, K, FORMAT, EVEN_K, BLOCK_K)
        if FORMAT == "int8":
            value = codes.to(x.dtype)
        else:
            scale = load_scales(
                absmax_ptr, nested_absmax_ptr, nested_code_ptr, nested_offset_ptr, first, row, start, K,
                BLOCKSIZE, NESTED, EVEN_K, BLOCK_K, GROUP,
            )  # fmt: skip
            pair_of_codes = codes.to(tl.int32)
            code = tl.reshape(tl.join(pair_of_codes >> 4, pair_of_codes & 15), (BLOCK_N, BLOCK_K))
            value = scaled(look_up(table, code), scale).to(x.dtype)
        acc = tl.dot(value, x, acc)
    if FORMAT == "int8":
        # The pairs of no expert have sums of zero.
        existing = tl.minimum(expert, NUM_EXPERTS - 1).to(tl.int64)
        stats = tl.load(absmax_ptr + existing * N + row)
        acc *= (stats * INVERSE_127_32)[:, None]
    y_ptrs = y_ptr + pair.to(tl.int64)[None, :] * N + n[:, None]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=inside[None, :] & (n < N)[:, None])


def experts_4bit(
    x: Tensor,
    expert_ids: Tensor,
    packed: Tensor,
    absmax: Tensor,
    num_experts: int,
    out_features: int,
    quant_type: str,
    blocksize: int,
    nested_absmax: Tensor | None = None,
    nested_code: Tensor | None = None,
    nested_offset: Tensor | None = None,
) -> Tensor:
    """Launcher of the operator `experts_4bit`; its arguments have been checked."""
    scales = nested_arguments(absmax, nested_absmax, nested_code, nested_offset)
    return _multiply(x, expert_ids, packed.contiguous(), scales, num_experts, out_features, quant_type, blocksize)


def experts_8bit(x: Tensor, expert_ids: Tensor, codes: Tensor, row_stats: Tensor) -> Tensor:
    """Launcher of the operator `experts_8bit`; its arguments have been checked."""
    scales = nested_arguments(row_stats, None, None, None)
    return _multiply(x, expert_ids, codes.contiguous(), scales, codes.shape[0], codes.shape[1], "int8", 1)


def _multiply(
    x: Tensor,
    expert_ids: Tensor,
    weight: Tensor,
    scales: tuple[Tensor, Tensor, Tensor, Tensor],
    num_experts: int,
    N: int,
    weight_format: str,
    blocksize: int,
) -> Tensor:
    """The product by whichever kernel suits the number of pairs."""
    x = x.detach() if x.stride(1) == 1 else x.detach().contiguous()
    ids = expert_ids.reshape(-1).contiguous()
    T, K = x.shape
    S = ids.numel()
    y = torch.empty(S, N, dtype=x.dtype, device=x.device)
    if S == 0:
        return y
    settings: dict[str, Any] = {
        "FORMAT": weight_format,
        "BLOCKSIZE": blocksize,
        "NESTED": scales[0].dtype == torch.uint8,
        **NO_CONTRACTION,
    }
    has_dot = x.dtype != torch.float32 and capability(x.device) >= DOT_CAPABILITY
    with on_device_of(x):
        if max(FEW_PAIRS, num_experts // 4) >= S or not has_dot:
            tile = pair_settings(S, N, K)
            stored = weight if weight_format == "int8" else in_words(weight)
            pair_kernel[(S * triton.cdiv(N, tile["BLOCK_N"]),)](
                x, x.stride(0), ids, stored, *scales, y, num_experts, S // T, S, N, K, **tile, **settings
            )
            return y
        order, starts = sort_pairs(ids, num_experts)
        tile = tile_settings(S, num_experts, K, narrow=torch.version.hip is not None)
        grid = (num_tiles(S, num_experts, tile["BLOCK_M"]), triton.cdiv(N, tile["BLOCK_N"]))
        tile_kernel[grid](
            x, x.stride(0), order, starts, weight, *scales, y, S // T, N, K,
            EXPERTS=triton.next_power_of_2(num_experts + 2), NUM_EXPERTS=num_experts, **tile, **settings,
        )  # fmt: skip
    return y


def in_words(packed: Tensor) -> Tensor:
    """Codes as int32, eight to each; a copy where they do not begin on a word's boundary. Rows are whole words."""
    packed = packed.view(-1)
    return (packed.clone() if packed.data_ptr() % 4 else packed).view(torch.int32)


def sort_pairs(ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Pairs in order of their experts [S], and where each expert's begin, int32 [E + 2]; those of none come last."""
    exists = (ids >= 0) & (ids < num_experts)
    ordered, order = torch.sort(torch.where(exists, ids, num_experts))
    edges = torch.arange(num_experts + 2, device=ids.device, dtype=ids.dtype)
    return order, torch.searchsorted(ordered, edges, out_int32=True)


def num_tiles(S: int, num_experts: int, block_m: int) -> int:
    """No routing of S pairs takes more tiles: each group, that of no expert too, has at most one that is not full."""
    return S // block_m + min(num_experts + 1, S)


def pair_settings(S: int, N: int, K: int) -> dict[str, Any]:
    """How a program of `pair_kernel` works: a warp with 8 rows, or with 4 where that leaves the device idle."""
    return {
        "BLOCK_N": 8 if S * N >= 32768 else 4,
        "BLOCK_K": PAIR_COLUMNS,
        "EVEN_K": K % PAIR_COLUMNS == 0,
        "num_warps": 1,
    }


def tile_settings(S: int, num_experts: int, K: int, *, narrow: bool = False) -> dict[str, Any]:
    """How a program of `tile_kernel` works, by the pairs that an expert has on average.

    Args:
        narrow: for AMD, whose compiler spills registers in the largest tiles.
    """
    mean = S / num_experts
    block_m = 16 if mean <= 12 else 32 if mean <= 24 else 64 if mean <= 96 or narrow else 128
    # The tile of weights is 64 columns deep: a block of 64 or more has one scale in it.
    return {
        "BLOCK_M": block_m,
        "BLOCK_N": 128 if block_m == 128 else 64,
        "BLOCK_K": 64,
        "EVEN_K": K % 64 == 0,
        "num_warps": 8 if block_m == 128 else 4,
        "num_stages": 3,
    }
