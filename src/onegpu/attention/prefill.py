"""Attention of prompts, or parts of them, over the keys so far: the ways to compute it, in order of speed.

cudnn           cuDNN's, for one long prompt from its beginning on Hopper and Blackwell
torch_flash     torch's FlashAttention over cu_seqlens; key heads are not repeated
onegpu_causal   our Triton kernel: float32, soft cap, sinks, values of another size
sdpa            scaled_dot_product_attention, equal lengths side by side at once; any device
plain           the definition; takes everything
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from onegpu.attention.varlen import capability, flash_allowed
from onegpu.errors import ArgumentError, UnsupportedError
from onegpu.kernels.ops import why_not_triton
from onegpu.kernels.prefill_ops import (
    CAPABILITY,
    MAX_PREFILL_HEAD_DIM,
    causal_attention,
    check_causal_attention,
    reference_causal_attention,
)

# cuDNN plans for each shape anew, which takes as long as it saves on shorter prompts.
CUDNN_TOKENS: Final = 20480
CUDNN_HEAD_DIM: Final = 128
# Where it was measured, or is made for: data center cards of the last two generations.
CUDNN_CAPABILITIES: Final = ((9, 0), (10, 0), (10, 3))

__all__ = ["PREFILL_BACKENDS", "PrefillBackend", "PrefillBounds", "PrefillSpec", "choose_prefill", "prefill_attention"]


@dataclass(frozen=True, slots=True)
class PrefillBounds:
    """How many queries and keys each of N sequences has, on the host and on the device."""

    lengths_q: tuple[int, ...]
    lengths_k: tuple[int, ...]
    cu_q: Tensor  # int32 [N + 1]: where each sequence's queries begin; the last entry ends the last ones
    cu_k: Tensor  # int32 [N + 1]: as cu_q, of keys

    @classmethod
    def of(
        cls, lengths_q: Sequence[int], lengths_k: Sequence[int], device: torch.device | str = "cpu"
    ) -> PrefillBounds:
        """From the lengths; copied without waiting for the device.

        Raises:
            ArgumentError: no sequence, not as many of both, or a sequence with more queries than keys.
        """
        fits = len(lengths_q) == len(lengths_k) and len(lengths_q) > 0
        if not fits or any(not 0 <= q <= k for q, k in zip(lengths_q, lengths_k, strict=True)):
            raise ArgumentError(
                f"every sequence must have 0 or more queries and at least as many keys; "
                f"got {list(lengths_q)} and {list(lengths_k)}"
            )
        host = torch.tensor([[0, *accumulate(lengths)] for lengths in (lengths_q, lengths_k)], dtype=torch.int32)
        if torch.device(device).type == "cuda":
            host = host.pin_memory()
        cu_q, cu_k = host.to(device, non_blocking=True)
        return cls(tuple(lengths_q), tuple(lengths_k), cu_q, cu_k)

    def groups(self) -> Iterator[tuple[int, int, int, int, int]]:
        """Runs of sequences of equal lengths: first query, first key, how many sequences, their Lq, their Lk."""
        first_q = first_k = 0
        for (Lq, Lk), run in groupby(zip(self.lengths_q, self.lengths_k, strict=True)):
            count = len(list(run))
            yield first_q, first_k, count, Lq, Lk
            first_q, first_k = first_q + count * Lq, first_k + count * Lk


@dataclass(frozen=True, slots=True)
class PrefillSpec:
    """All that decides which backend can run."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    value_dim: int
    has_softcap: bool = False
    has_sinks: bool = False
    flash_allowed: bool = True
    cudnn_allowed: bool = True
    is_long_square: bool = False  # one sequence of `CUDNN_TOKENS` or more with as many queries, all of which are seen


Run = Callable[[Tensor, Tensor, Tensor, PrefillBounds, float, int | None, float | None, Tensor | None], Tensor]


@dataclass(frozen=True, slots=True)
class PrefillBackend:
    """One way to compute it. `why_not` gives None where it can, else the reason in a sentence."""

    name: str
    why_not: Callable[[PrefillSpec], str | None]
    run: Run


def why_not_cudnn(spec: PrefillSpec) -> str | None:
    if spec.device.type != "cuda":
        return f"needs a CUDA device, the tokens are on {spec.device}"
    if not spec.cudnn_allowed:
        return "cuDNN's attention is switched off"
    if spec.has_softcap or spec.has_sinks:
        return "takes neither a soft cap nor sinks"
    if spec.dtype not in (torch.float16, torch.bfloat16):
        return f"takes float16 and bfloat16, not {spec.dtype}"
    if spec.head_dim != spec.value_dim or spec.head_dim % 8 or spec.head_dim > CUDNN_HEAD_DIM:
        return (
            f"is taken for head dims that are multiples of 8 up to {CUDNN_HEAD_DIM}, keys and values alike, "
            f"not {spec.head_dim} and {spec.value_dim}"
        )
    if not spec.is_long_square:
        return f"is taken for one whole prompt of at least {CUDNN_TOKENS:,} tokens, without a window"
    if torch.version.hip is not None or capability(spec.device) not in CUDNN_CAPABILITIES:
        return "is taken on Hopper and data center Blackwell cards"
    return None if torch._C._has_cudnn else "this torch was built without cuDNN"


def why_not_torch_flash(spec: PrefillSpec) -> str | None:
    if spec.device.type != "cuda":
        return f"needs a CUDA device, the tokens are on {spec.device}"
    if not spec.flash_allowed:
        return "flash attention is switched off"
    if spec.has_softcap or spec.has_sinks:
        return "takes neither a soft cap nor sinks"
    if spec.dtype not in (torch.float16, torch.bfloat16):
        return f"takes float16 and bfloat16, not {spec.dtype}"
    if spec.head_dim != spec.value_dim or spec.head_dim % 8 or spec.head_dim > 256:
        return (
            f"takes head dims that are multiples of 8 up to 256, keys and values alike, "
            f"not {spec.head_dim} and {spec.value_dim}"
        )
    if torch.version.hip is not None:
        return "whether ROCm's takes fewer key heads is not known"
    if capability(spec.device) < (8, 0):
        return "needs compute capability 8.0"
    return None if torch.backends.cuda.is_flash_attention_available() else "this torch was built without it"


def why_not_onegpu_causal(spec: PrefillSpec) -> str | None:
    if spec.device.type != "cuda":
        return f"needs a CUDA device, the tokens are on {spec.device}"
    if not spec.flash_allowed:
        return "flash attention is switched off"
    if max(spec.head_dim, spec.value_dim) > MAX_PREFILL_HEAD_DIM:
        return f"takes head dims up to {MAX_PREFILL_HEAD_DIM}, not {spec.head_dim} and {spec.value_dim}"
    return why_not_triton(spec.device, CAPABILITY)


def why_not_sdpa(spec: PrefillSpec) -> str | None:
    return "takes neither a soft cap nor sinks" if spec.has_softcap or spec.has_sinks else None


def run_cudnn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: PrefillBounds,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Any strides, fewer key heads as they are. A cuDNN that has no plan for a shape leaves it to torch's kernel."""
    batch = [(t if t.stride(2) == 1 else t.contiguous())[None].transpose(1, 2) for t in (q, k, v)]
    try:
        result = torch.ops.aten._scaled_dot_product_cudnn_attention(*batch, None, False, 0.0, True, False, scale=scale)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        if not flash_allowed():
            raise
        return run_torch_flash(q, k, v, bounds, scale, window, softcap, sinks)
    out: Tensor = result[0]
    return out[0].transpose(0, 1)


def run_torch_flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: PrefillBounds,
    scale: float,
    window: int | None,
    _softcap: float | None,
    _sinks: Tensor | None,
) -> Tensor:
    # varlen_attn refuses fewer key heads before torch 2.12, though the operator below it has always taken them.
    q, k, v = (t if t.stride(2) == 1 else t.contiguous() for t in (q, k, v))
    result = torch.ops.aten._flash_attention_forward(
        q,
        k,
        v,
        bounds.cu_q,
        bounds.cu_k,
        max(bounds.lengths_q),
        max(bounds.lengths_k),
        0.0,
        window is None,
        False,
        scale=scale,
        window_size_left=-1 if window is None else window - 1,
        window_size_right=0,
    )
    out: Tensor = result[0]
    return out


def run_onegpu_causal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: PrefillBounds,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    return causal_attention(q, k, v, bounds.cu_q, bounds.cu_k, max(bounds.lengths_q), scale, window, softcap, sinks)


def run_sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: PrefillBounds,
    scale: float,
    window: int | None,
    _softcap: float | None,
    _sinks: Tensor | None,
) -> Tensor:
    out = q.new_empty((q.shape[0], q.shape[1], v.shape[2]))
    for first_q, first_k, count, Lq, Lk in bounds.groups():
        if Lq == 0:
            continue
        rows = q[first_q : first_q + count * Lq].view(count, Lq, *q.shape[1:]).transpose(1, 2)
        keys, values = (t[first_k : first_k + count * Lk].view(count, Lk, *t.shape[1:]).transpose(1, 2) for t in (k, v))
        square = Lq == Lk and (window is None or window >= Lk)
        part = scaled_dot_product_attention(
            rows,
            keys,
            values,
            attn_mask=None
            if square or (Lq == 1 and (window is None or window >= Lk))
            else seen(Lq, Lk, window, q.device),
            is_causal=square,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        out[first_q : first_q + count * Lq] = part.transpose(1, 2).flatten(0, 1)
    return out


def seen(Lq: int, Lk: int, window: int | None, device: torch.device) -> Tensor:
    """Bool [Lq, Lk]: which keys each query of one sequence sees."""
    columns = torch.arange(Lk, device=device)
    places = torch.arange(Lk - Lq, Lk, device=device)[:, None]
    mask = columns <= places
    return mask if window is None else mask & (columns > places - window)


def run_plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: PrefillBounds,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    cu_q, cu_k = (torch.tensor([0, *accumulate(lengths)]) for lengths in (bounds.lengths_q, bounds.lengths_k))
    return reference_causal_attention(q, k, v, cu_q, cu_k, max(bounds.lengths_q), scale, window, softcap, sinks)


PREFILL_BACKENDS = (
    PrefillBackend("cudnn", why_not_cudnn, run_cudnn),
    PrefillBackend("torch_flash", why_not_torch_flash, run_torch_flash),
    PrefillBackend("onegpu_causal", why_not_onegpu_causal, run_onegpu_causal),
    PrefillBackend("sdpa", why_not_sdpa, run_sdpa),
    PrefillBackend("plain", lambda _: None, run_plain),
)


@functools.lru_cache(maxsize=256)
def choose_prefill(spec: PrefillSpec, name: str | None = None) -> PrefillBackend:
    """The first backend that can, or the one called `name`.

    Raises:
        UnsupportedError: `name` is not a backend, or can't run, with its reason.
    """
    for backend in PREFILL_BACKENDS:
        if name not in (None, backend.name):
            continue
        reason = backend.why_not(spec)
        if reason is None:
            return backend
        if name is not None:
            raise UnsupportedError(f"prefill attention {name} cannot run here: {reason}")
    known = ", ".join(backend.name for backend in PREFILL_BACKENDS)
    raise UnsupportedError(f"no prefill attention is called {name!r}", f"use one of {known}")


def is_long_square(bounds: PrefillBounds, window: int | None) -> bool:
    """Whether there is one sequence, long and from its beginning, in which all keys before a query are seen."""
    if len(bounds.lengths_q) != 1 or bounds.lengths_q != bounds.lengths_k:
        return False
    return bounds.lengths_q[0] >= CUDNN_TOKENS and (window is None or window >= bounds.lengths_q[0])


def prefill_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: PrefillBounds,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """softmax(scale * q k^T) v within each sequence, causal, the last query beside the last key.

    Args:
        q: [Tq, Hq, D]; k: [Tk, Hkv, D]; v: [Tk, Hkv, Dv]; one floating dtype, Hq a multiple of Hkv.
        bounds: which tokens belong to which sequence.
        window: newest keys seen, the token's own among them (Transformers' `sliding_window`); None for all.
        softcap: scores become softcap * tanh(scores / softcap), as in Gemma 2.
        sinks: [Hq], one more score of each head that has no value, as in GPT-OSS.
        backend: one of `PREFILL_BACKENDS` by name; None for the first that can run.

    Returns:
        [Tq, Hq, Dv].

    Raises:
        ArgumentError, DeviceError: tensors that do not fit together.
        UnsupportedError: the backend asked for can't run, with its reason.
    """
    longest = max(bounds.lengths_q)
    check_causal_attention(q, k, v, bounds.cu_q, bounds.cu_k, longest, scale, window, softcap, sinks)
    if sum(bounds.lengths_q) != q.shape[0] or sum(bounds.lengths_k) != k.shape[0]:
        raise ArgumentError(
            f"bounds say {sum(bounds.lengths_q)} queries and {sum(bounds.lengths_k)} keys; "
            f"got {q.shape[0]} and {k.shape[0]}"
        )
    if q.shape[0] == 0:
        return q.new_empty((0, q.shape[1], v.shape[2]))
    spec = PrefillSpec(
        device=q.device,
        dtype=q.dtype,
        head_dim=q.shape[2],
        value_dim=v.shape[2],
        has_softcap=softcap is not None,
        has_sinks=sinks is not None,
        flash_allowed=q.device.type != "cuda" or flash_allowed(),
        cudnn_allowed=q.device.type != "cuda" or bool(torch._C._get_cudnn_sdp_enabled()),
        is_long_square=is_long_square(bounds, window),
    )
    return choose_prefill(spec, backend).run(q, k, v, bounds, scale, window, softcap, sinks)
