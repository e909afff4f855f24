"""A small call of each operator of a decode step, of prompts and of the unpadded encoders, with what it must give."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import gelu, relu, scaled_dot_product_attention

from onegpu.formats.tiling import tile_codes, tile_scales
from onegpu.kernels import (
    append_kv,
    decode_attention,
    gated_activation,
    linear_8bit_rows,
    linear_16bit,
    reference,
    rms_norm,
    rotary_decode_attention,
    rotate_and_append,
)
from onegpu.kernels.encoder_ops import attention_blocks, gelu_, place_tokens, varlen_attention
from onegpu.kernels.experts_ops import experts_4bit, experts_8bit
from onegpu.kernels.prefill_ops import causal_attention
from onegpu.kernels.tiled_ops import linear_4bit_tiled

__all__ = ["decode_trials", "encoder_trials", "many_rows_trials"]

Trial = Callable[[], tuple[Tensor, Tensor]]
B, HEADS, KV_HEADS, HEAD_DIM, CAPACITY = 2, 4, 2, 64, 16
INPUTS, OUTPUTS = 128, 64
MANY_ROWS = 40


def decode_trials(device: torch.device, dtype: torch.dtype) -> dict[str, Trial]:
    """For each operator of a decode step or a prompt a call on `device` and what it must give."""
    generator = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    x, weight = randn(B, INPUTS), randn(OUTPUTS, INPUTS)
    packed, absmax = reference.quantize_4bit(weight.cpu(), "nf4", 64)
    plain = reference.dequantize_4bit(packed, absmax, [OUTPUTS, INPUTS], dtype, "nf4", 64).to(device)
    tiled = tile_codes(packed, OUTPUTS, INPUTS).to(device), tile_scales(absmax, OUTPUTS, INPUTS, 64).to(device)
    codes, row_stats, _ = reference.quantize_8bit_rows(weight.cpu())
    ones = torch.ones(INPUTS, device=device, dtype=dtype)
    one = torch.zeros(x.shape[0], 1, dtype=torch.int64, device=device)
    q, k, v = randn(B, HEADS, HEAD_DIM), randn(B, KV_HEADS, HEAD_DIM), randn(B, KV_HEADS, HEAD_DIM)
    k_cache, v_cache = randn(B, KV_HEADS, CAPACITY, HEAD_DIM), randn(B, KV_HEADS, CAPACITY, HEAD_DIM)
    last = torch.full((B,), CAPACITY - 1, dtype=torch.int32, device=device)
    scale = HEAD_DIM**-0.5

    def appended() -> tuple[Tensor, Tensor]:
        caches = k_cache.clone(), v_cache.clone()
        append_kv(k, v, *caches, last)
        return caches[1][:, :, -1], v

    def attended(keys: Tensor, values: Tensor) -> Tensor:
        return scaled_dot_product_attention(q[:, :, None], keys, values, scale=scale, enable_gqa=True)[:, :, 0]

    def all_at_once() -> tuple[Tensor, Tensor]:
        keys, values = k_cache.clone(), v_cache.clone()
        qkv = torch.cat([part.flatten(1) for part in (q, k, v)], dim=1)
        out = rotary_decode_attention(qkv, None, None, keys, values, last, HEADS, scale)
        return out, attended(keys, values).flatten(1)

    def turned() -> tuple[Tensor, Tensor]:
        keys, values = k_cache.clone(), v_cache.clone()
        qkv = torch.cat([part.flatten(1) for part in (q, k, v)], dim=1)
        zeros, ones = (torch.full((B, HEAD_DIM), value, device=device, dtype=dtype) for value in (0.0, 1.0))
        slots = torch.arange(B, dtype=torch.int32, device=device)
        # A quarter of a turn puts the second half of a head, with its sign changed, in front of the first.
        rotate_and_append(qkv, zeros, ones, keys, values, slots, last, HEADS)
        want = torch.cat([torch.roll(part, HEAD_DIM // 2, -1) for part in (q, k)], dim=1)
        want[..., : HEAD_DIM // 2] *= -1
        return torch.cat((qkv, values[:, :, -1].flatten(1)), 1), torch.cat((want, v, v), 1).flatten(1)

    return {
        "rotate_and_append": turned,
        "gated_activation": lambda: (gated_activation(x, "relu"), relu(x[:, :OUTPUTS]) * x[:, OUTPUTS:]),
        "linear_16bit": lambda: (linear_16bit(x, weight), x @ weight.T),
        "linear_8bit_rows": lambda: (linear_8bit_rows(x, codes.to(device), row_stats.to(device)), x @ weight.T),
        "linear_4bit_tiled": lambda: (linear_4bit_tiled(x, *tiled, None, OUTPUTS, "nf4", 64), x @ plain.T),
        "rms_norm": lambda: (rms_norm(x, ones, 1e-6), torch.nn.functional.rms_norm(x, (INPUTS,), ones, 1e-6)),
        "experts_4bit": lambda: (
            experts_4bit(x, one, packed.to(device), absmax.to(device), 1, OUTPUTS, "nf4", 64),
            x @ plain.T,
        ),
        "experts_8bit": lambda: (
            experts_8bit(x, one, codes.to(device)[None], row_stats.to(device)[None]),
            x @ weight.T,
        ),
        "append_kv": appended,
        "decode_attention": lambda: (decode_attention(q, k_cache, v_cache, last, scale), attended(k_cache, v_cache)),
        "rotary_decode_attention": all_at_once,
    }


def many_rows_trials(device: torch.device, dtype: torch.dtype) -> dict[str, Trial]:
    """Products of many rows with 4-bit and 8-bit weights: a call on `device` and what it must give."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(MANY_ROWS, INPUTS, generator=generator).to(device, dtype)
    weight = torch.randn(OUTPUTS, INPUTS, generator=generator)
    packed, absmax = reference.quantize_4bit(weight, "nf4", 64)
    plain = reference.dequantize_4bit(packed, absmax, [OUTPUTS, INPUTS], dtype, "nf4", 64).to(device)
    tiled = tile_codes(packed, OUTPUTS, INPUTS).to(device), tile_scales(absmax, OUTPUTS, INPUTS, 64).to(device)
    codes, row_stats, _ = (tensor.to(device) for tensor in reference.quantize_8bit_rows(weight))
    dense = (codes.float() * row_stats[:, None] / 127).to(dtype)
    return {
        "linear_4bit_tiled, many rows": lambda: (
            linear_4bit_tiled(x, *tiled, None, OUTPUTS, "nf4", 64),
            x @ plain.T,
        ),
        "linear_8bit_rows, many rows": lambda: (linear_8bit_rows(x, codes, row_stats), x @ dense.T),
    }


def encoder_trials(device: torch.device, dtype: torch.dtype) -> dict[str, Trial]:
    """For each operator of the unpadded encoders that is not a plain layer a call on `device` and what it must give."""
    generator = torch.Generator().manual_seed(2)
    lengths = [3, 5]
    tokens = sum(lengths)
    query, key, value = (torch.randn(tokens, HEADS, HEAD_DIM, generator=generator).to(device, dtype) for _ in range(3))
    bounds = torch.tensor([0, 3, tokens], dtype=torch.int32, device=device)
    columns = torch.tensor([*range(3), *range(5)], dtype=torch.int32, device=device)
    mask = torch.arange(5, device=device) < torch.tensor([[3], [5]], device=device)

    def one_by_one() -> Tensor:
        parts = zip(*(torch.split(tensor, lengths) for tensor in (query, key, value)), strict=True)
        outs = [scaled_dot_product_attention(*(t.transpose(0, 1)[None] for t in part)) for part in parts]
        return torch.cat([out[0].transpose(0, 1) for out in outs])

    def causal() -> tuple[Tensor, Tensor]:
        got = causal_attention(query, key, value, bounds, bounds, 5, HEAD_DIM**-0.5)
        parts = zip(*(torch.split(tensor, lengths) for tensor in (query, key, value)), strict=True)
        rows = [tuple(t.transpose(0, 1)[None] for t in part) for part in parts]
        outs = [scaled_dot_product_attention(q, k, v, is_causal=True)[0].transpose(0, 1) for q, k, v in rows]
        return got, torch.cat(outs)

    def placed() -> tuple[Tensor, Tensor]:
        indices = torch.zeros(tokens, dtype=torch.int64, device=device)
        positions = torch.zeros(tokens, dtype=torch.int32, device=device)
        found = torch.zeros(3, dtype=torch.int32, device=device)
        facts = torch.zeros(4, dtype=torch.int32, device=device)
        place_tokens(mask, indices, positions, found, facts, 0)
        return indices, mask.flatten().nonzero().flatten()

    def blocks() -> tuple[Tensor, Tensor]:
        return attention_blocks(bounds, tokens, 16)[1].sum()[None], torch.tensor([tokens], device=device)

    return {
        "varlen_attention": lambda: (
            varlen_attention(query, key, value, bounds, columns, 5, HEAD_DIM**-0.5),
            one_by_one(),
        ),
        "causal_attention": causal,
        "attention_blocks": blocks,
        "place_tokens": placed,
        "gelu_": lambda: (gelu_(query.clone()), gelu(query)),
    }
