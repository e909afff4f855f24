"""Attention over unpadded tokens: the ways to compute it, in order of speed, and why each one can't.

torch_varlen    torch.nn.attention.varlen: FlashAttention over cu_seqlens
onegpu_varlen   our Triton kernel: float32, a bias by distance, windows over holes; first where sequences are short
grouped         sequences of equal length through scaled_dot_product_attention, a group at a time; any CPU
padded          back to [B, S] for this one operation; takes everything, also where gradients are wanted
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from onegpu.attention.unpadded import AttentionView, RelativeBias
from onegpu.errors import UnsupportedError
from onegpu.kernels.encoder_ops import MAX_HEAD_DIM
from onegpu.kernels.encoder_ops import varlen_attention as varlen_kernel
from onegpu.kernels.ops import why_not_triton
from onegpu.kernels.varlen_config import tiles_for

__all__ = ["BACKENDS", "Backend", "VarlenSpec", "choose", "flash_allowed", "varlen_attention"]


# torch's kernel has tiles of 128 queries, and programs for blocks that short sequences do not have.
SHORT_SEQLEN = 512
SHORT_HEAD_DIM = 64


@dataclass(frozen=True, slots=True)
class VarlenSpec:
    """All that decides which backend can run."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    has_bias: bool = False
    has_window: bool = False
    has_holes: bool = False
    needs_grad: bool = False
    lengths_on_host: bool = False
    flash_allowed: bool = True
    fixed: bool = False
    is_short: bool = False


Run = Callable[[Tensor, Tensor, Tensor, AttentionView, float, RelativeBias | None], Tensor]


@dataclass(frozen=True, slots=True)
class Backend:
    """One way to compute it. `why_not` gives None where it can, else the reason in a sentence."""

    name: str
    why_not: Callable[[VarlenSpec], str | None]
    run: Run


@functools.cache
def torch_varlen_function() -> Any:
    """`varlen_attn` of this torch, None where it has none or one without windows (before 2.11)."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if "window_size" in inspect.signature(varlen_attn).parameters else None


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def why_not_torch_varlen(spec: VarlenSpec) -> str | None:
    if spec.device.type != "cuda":
        return f"needs a CUDA device, the tokens are on {spec.device}"
    if not spec.flash_allowed:
        return "flash attention is switched off"
    if spec.dtype not in (torch.float16, torch.bfloat16):
        return f"takes float16 and bfloat16, not {spec.dtype}"
    if spec.has_bias:
        return "takes no bias"
    if spec.has_window and spec.has_holes:
        return "measures windows in tokens, and a mask has holes"
    if spec.head_dim % 8 or spec.head_dim > 256:
        return f"takes head dims that are multiples of 8 up to 256, not {spec.head_dim}"
    if torch.version.hip is None and capability(spec.device) < (8, 0):
        return "needs compute capability 8.0"
    if torch_varlen_function() is None:
        return f"torch {torch.__version__} has no torch.nn.attention.varlen with windows"
    return None


def why_not_onegpu_varlen(spec: VarlenSpec) -> str | None:
    if spec.device.type != "cuda":
        # Its reference runs anywhere; it is slow, and wanted only where nothing else will do.
        return None if spec.fixed else f"needs a CUDA device, the tokens are on {spec.device}"
    if not spec.flash_allowed:
        return "flash attention is switched off"
    if spec.needs_grad:
        return "has no backward"
    if spec.head_dim > MAX_HEAD_DIM:
        return f"takes head dims up to {MAX_HEAD_DIM}, not {spec.head_dim}"
    return why_not_triton(spec.device)


def why_not_grouped(spec: VarlenSpec) -> str | None:
    if spec.fixed:
        return "depends on the lengths of one batch"
    return None if spec.lengths_on_host else "needs the lengths on the host, and they are on the device"


def why_not_padded(spec: VarlenSpec) -> str | None:
    return "depends on the lengths of one batch" if spec.fixed else None


def run_torch_varlen(
    query: Tensor, key: Tensor, value: Tensor, view: AttentionView, scale: float, _: RelativeBias | None
) -> Tensor:
    batch = view.batch
    window = -1 if view.window is None else view.window
    out: Tensor = torch_varlen_function()(
        query,
        key,
        value,
        batch.cu_seqlens,
        batch.cu_seqlens,
        batch.max_seqlen,
        batch.max_seqlen,
        scale=scale,
        window_size=(window, 0 if view.causal else window),
    )
    return out


def run_onegpu_varlen(
    query: Tensor, key: Tensor, value: Tensor, view: AttentionView, scale: float, bias: RelativeBias | None
) -> Tensor:
    batch = view.batch
    table = None if bias is None else bias.table
    blocks = None
    if query.device.type == "cuda":
        blocks = batch.blocks(tiles_for(query.dtype, query.shape[2], batch.max_seqlen).block_m)
    return varlen_kernel(
        query,
        key,
        value,
        batch.cu_seqlens,
        batch.positions,
        batch.max_seqlen,
        scale,
        view.causal,
        view.window,
        table,
        blocks,
    )


def allowed(positions: Tensor, view: AttentionView) -> Tensor | None:
    """Bool [1, L, L], True where a key is seen, for one sequence at `positions` [L]; None where all are."""
    if view.window is None:
        return None
    distance = positions[None, :] - positions[:, None]
    seen = distance.abs() <= view.window
    return (seen & (distance <= 0) if view.causal else seen)[None]


def run_grouped(
    query: Tensor, key: Tensor, value: Tensor, view: AttentionView, scale: float, bias: RelativeBias | None
) -> Tensor:
    """Equal lengths stand side by side, so a group is a view [n, L, H, D]: nothing is gathered."""
    batch = view.batch
    by_place = batch.has_holes and (bias is not None or view.window is not None)
    outs = []
    for start, count, length in batch.groups():
        # With holes, distances differ between sequences of equal length.
        step = 1 if by_place else count
        for begin in range(start, start + count * length, step * length):
            stop = begin + step * length
            q, k, v = (t[begin:stop].view(step, length, *t.shape[1:]).transpose(1, 2) for t in (query, key, value))
            places = batch.positions[begin : begin + length].long()
            seen = allowed(places, view)
            mask = seen
            if bias is not None:
                mask = bias.at(places) if by_place else bias.square(length)
                mask = mask.to(query.dtype)
                if seen is not None:
                    mask = mask.masked_fill(~seen, -torch.inf)
                if view.causal and seen is None:
                    mask = mask.masked_fill(places[None, :] > places[:, None], -torch.inf)
            out = scaled_dot_product_attention(
                q, k, v, attn_mask=mask, scale=scale, is_causal=view.causal and mask is None, enable_gqa=gqa(query, key)
            )
            outs.append(out.transpose(1, 2).flatten(0, 1))
    tokens = batch.indices.numel() - batch.total
    if tokens:
        outs.append(query.new_zeros((tokens, *query.shape[1:])))
    return torch.cat(outs) if outs else torch.zeros_like(query)


def run_padded(
    query: Tensor, key: Tensor, value: Tensor, view: AttentionView, scale: float, bias: RelativeBias | None
) -> Tensor:
    batch = view.batch
    B, S = batch.batch_size, batch.seqlen
    real = batch.indices[: batch.total]

    def pad(t: Tensor) -> Tensor:
        flat = t.new_zeros((B * S, *t.shape[1:])).index_copy_(0, real, t[: batch.total])
        return flat.view(B, S, *t.shape[1:]).transpose(1, 2)

    valid = torch.zeros(B * S, dtype=torch.bool, device=query.device).index_fill(0, real, True)
    mask = valid.view(B, 1, 1, S)
    columns = torch.arange(S, device=query.device)
    distance = columns[None, :] - columns[:, None]
    if view.window is not None:
        mask = mask & (distance.abs() <= view.window)
    if view.causal:
        mask = mask & (distance <= 0)
    # A padded query sees itself, so that no row is without a key; nobody reads it back.
    mask = mask | (distance == 0)
    if bias is not None:
        dense = bias.at(columns).to(query.dtype)
        mask = dense.masked_fill(~mask, torch.finfo(query.dtype).min)
    out = scaled_dot_product_attention(
        pad(query), pad(key), pad(value), attn_mask=mask, scale=scale, enable_gqa=gqa(query, key)
    )
    return out.transpose(1, 2).flatten(0, 1).index_select(0, batch.indices)


def flash_allowed() -> bool:
    """Whether flash attention is switched on in torch, which `sdp_kernel` and others switch off."""
    return bool(torch._C._get_flash_sdp_enabled())


def is_short(query: Tensor, view: AttentionView) -> bool:
    """Whether our kernel is the faster one: sequences of few tiles, without a window."""
    is_small = view.batch.max_seqlen <= SHORT_SEQLEN and query.shape[2] <= SHORT_HEAD_DIM
    return is_small and view.window is None and not view.causal


def gqa(query: Tensor, key: Tensor) -> bool:
    return query.shape[1] != key.shape[1]


BACKENDS = (
    Backend("torch_varlen", why_not_torch_varlen, run_torch_varlen),
    Backend("onegpu_varlen", why_not_onegpu_varlen, run_onegpu_varlen),
    Backend("grouped", why_not_grouped, run_grouped),
    Backend("padded", why_not_padded, run_padded),
)
SHORT_FIRST = (BACKENDS[1], BACKENDS[0], *BACKENDS[2:])


@functools.lru_cache(maxsize=256)
def choose(spec: VarlenSpec, name: str | None = None) -> Backend:
    """The first backend that can, or the one called `name`.

    Raises:
        UnsupportedError: `name` is not a backend, or none can; with the reason of each.
    """
    reasons = []
    for backend in SHORT_FIRST if spec.is_short else BACKENDS:
        if name not in (None, backend.name):
            continue
        reason = backend.why_not(spec)
        if reason is None:
            return backend
        reasons.append(f"{backend.name}: {reason}")
    known = ", ".join(backend.name for backend in BACKENDS)
    if not reasons:
        raise UnsupportedError(f"no attention backend is called {name!r}", f"use one of {known}")
    raise UnsupportedError(f"no attention over unpadded tokens can run here ({'; '.join(reasons)})")


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    view: AttentionView,
    scale: float,
    bias: RelativeBias | None = None,
) -> Tensor:
    """softmax(scale * q k^T + bias) v within each sequence of an unpadded batch.

    Args:
        query: [T, H, D]; key, value: [T, H_kv, D]; float16, bfloat16 or float32.
        view: the batch, whether attention is causal or windowed, and which backend is asked for.
        scale: of the product of query and key; the bias is added as it is.

    Returns:
        [T, H, D]. Tokens of a bucket beyond the batch's own hold anything.

    Raises:
        UnsupportedError: the backend asked for can't run, with its reason.
    """
    if key.shape[1] != query.shape[1] and query.device.type == "cuda":
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    spec = VarlenSpec(
        device=query.device,
        dtype=query.dtype,
        head_dim=query.shape[2],
        has_bias=bias is not None,
        has_window=view.window is not None,
        has_holes=view.batch.has_holes,
        needs_grad=torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad),
        lengths_on_host=view.batch.lengths is not None,
        fixed=view.fixed,
        flash_allowed=query.device.type != "cuda" or flash_allowed(),
        is_short=query.device.type == "cuda" and is_short(query, view),
    )
    return choose(spec, view.backend).run(query, key, value, view, scale, bias)
