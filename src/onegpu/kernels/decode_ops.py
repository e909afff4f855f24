"""The operators of a decode step: append to the KV cache, attention over it, and both with norm and rotation.

Bound like those in `ops`: a check, shapes for tracing, the torch reference (`decode_reference`) as the CPU
implementation and as what a GPU without Triton runs, the Triton launcher elsewhere. Row b of a step is slot b of the
cache. Lengths are read on the device only, so that a captured graph serves every length; the host knows capacities.

Shapes: B rows, Hq query heads, Hkv key heads (Hq a multiple), D head dim, Dv of the values; caches
[slots, Hkv, capacity, D], slots >= B, elements of a head side by side, scales [slots, Hkv, capacity].
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from onegpu.errors import ArgumentError, DeviceError
from onegpu.kernels import decode_reference as reference
from onegpu.kernels.ops import bind

__all__ = ["append_kv", "decode_attention", "rotary_decode_attention", "why_not_kv_dtype"]

FLOATS: Final = (torch.float16, torch.bfloat16, torch.float32)
MAX_DECODE_HEAD_DIM: Final = 256
DECODE_CAPABILITY: Final = (8, 0)
FLOAT8_CAPABILITY: Final = (8, 9)


def why_not_kv_dtype(device: torch.device, dtype: torch.dtype) -> str | None:
    """None where a cache in `dtype` (float16, bfloat16, float32, int8, float8_e4m3fn) is fast, else the reason."""
    if dtype not in (*FLOATS, torch.int8, torch.float8_e4m3fn):
        return f"a KV cache is of float16, bfloat16, float32, int8 or float8_e4m3fn, not {_name(dtype)}"
    if dtype != torch.float8_e4m3fn or device.type != "cuda":
        return None
    if torch.version.hip is not None:
        return "float8_e4m3fn in our kernels is for NVIDIA cards; int8 takes the same room"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < FLOAT8_CAPABILITY:
        return (
            f"float8_e4m3fn needs compute capability 8.9, and this card has {major}.{minor}; int8 takes the same room"
        )
    return None


def check_append_kv(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    op = "append_kv"
    _check_device(op, k, v=v, k_cache=k_cache, v_cache=v_cache, positions=positions, k_scale=k_scale, v_scale=v_scale)
    if k.dim() != 3 or v.dim() != 3 or k.shape[:2] != v.shape[:2] or k.dtype not in FLOATS or v.dtype != k.dtype:
        raise ArgumentError(
            f"{op}: k and v must be [B, Hkv, D] and [B, Hkv, Dv] in one floating dtype; "
            f"got {_described(k)} and {_described(v)}"
        )
    _check_cache(op, k.shape[0], k.dtype, k_cache, v_cache, k_scale, v_scale)
    if k_cache.shape[1] != k.shape[1] or k_cache.shape[3] != k.shape[2] or v_cache.shape[3] != v.shape[2]:
        raise ArgumentError(
            f"{op}: the caches must have the heads and head dims of k {list(k.shape)} and v {list(v.shape)}; "
            f"got {list(k_cache.shape)} and {list(v_cache.shape)}"
        )
    _check_positions(op, k.shape[0], positions)


def check_decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    _scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    _overlap: bool = False,
) -> None:
    op = "decode_attention"
    tensors = {"k_cache": k_cache, "v_cache": v_cache, "positions": positions, "sinks": sinks}
    _check_device(op, q, **tensors, k_scale=k_scale, v_scale=v_scale)
    if q.dim() != 3 or q.dtype not in FLOATS:
        raise ArgumentError(f"{op}: q must be [B, Hq, D], bfloat16, float16 or float32; got {_described(q)}")
    _check_cache(op, q.shape[0], q.dtype, k_cache, v_cache, k_scale, v_scale)
    if k_cache.shape[3] != q.shape[2] or q.shape[1] == 0 or q.shape[1] % k_cache.shape[1]:
        raise ArgumentError(
            f"{op}: q [B, Hq, D] and k_cache [slots, Hkv, capacity, D] must agree in D, Hq a multiple of Hkv; "
            f"got {list(q.shape)} and {list(k_cache.shape)}"
        )
    _check_positions(op, q.shape[0], positions)
    _check_scores(op, q.shape[1], window, softcap, sinks)


def check_rotary_decode_attention(
    qkv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    num_heads: int,
    _scale: float,
    interleaved: bool = False,  # noqa: ARG001
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    _norm_eps: float = 1e-6,
    _norm_offset: float = 0.0,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    _overlap: bool = False,
) -> None:
    op = "rotary_decode_attention"
    tensors = {"k_cache": k_cache, "v_cache": v_cache, "positions": positions, "sinks": sinks}
    _check_device(op, qkv, cos=cos, sin=sin, q_norm=q_norm, k_norm=k_norm, **tensors, k_scale=k_scale, v_scale=v_scale)
    if qkv.dim() != 2 or qkv.dtype not in FLOATS:
        raise ArgumentError(f"{op}: qkv must be [B, (Hq + 2 Hkv) * D] in a floating dtype; got {_described(qkv)}")
    _check_cache(op, qkv.shape[0], qkv.dtype, k_cache, v_cache, k_scale, v_scale)
    Hkv, D = k_cache.shape[1], k_cache.shape[3]
    if num_heads < 1 or num_heads % Hkv or qkv.shape[1] != (num_heads + 2 * Hkv) * D or v_cache.shape[3] != D:
        raise ArgumentError(
            f"{op}: num_heads {num_heads} must be a multiple of the cache's {Hkv} heads and qkv "
            f"[B, {(num_heads + 2 * Hkv) * D}] for head dim {D}, keys and values alike; "
            f"got {list(qkv.shape)}, caches {list(k_cache.shape)} and {list(v_cache.shape)}"
        )
    if (cos is None) != (sin is None):
        raise ArgumentError(f"{op}: cos and sin go together; one came as None")
    if cos is not None and sin is not None:
        R = cos.shape[-1]
        fits = cos.dim() == 2 and cos.shape[0] == qkv.shape[0] and R % 2 == 0 and R <= D
        if not fits or sin.shape != cos.shape or sin.dtype != cos.dtype or cos.dtype not in (qkv.dtype, torch.float32):
            raise ArgumentError(
                f"{op}: cos and sin must be [{qkv.shape[0]}, R], R even and at most {D}, in the dtype of qkv or "
                f"float32; got {_described(cos)} and {_described(sin)}"
            )
    for name, weight in (("q_norm", q_norm), ("k_norm", k_norm)):
        if weight is not None and (weight.shape != (D,) or weight.dtype not in FLOATS):
            raise ArgumentError(f"{op}: {name} must be floating point [{D}]; got {_described(weight)}")
    _check_positions(op, qkv.shape[0], positions)
    _check_scores(op, num_heads, window, softcap, sinks)


def _check_cache(
    op: str,
    B: int,
    dtype: torch.dtype,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> None:
    if (
        k_cache.dim() != 4
        or v_cache.dim() != 4
        or k_cache.shape[:3] != v_cache.shape[:3]
        or k_cache.shape[0] < B
        or 0 in k_cache.shape[1:]
        or k_cache.stride(3) != 1
        or v_cache.stride(3) != 1
    ):
        raise ArgumentError(
            f"{op}: k_cache and v_cache must be [slots, Hkv, capacity, D], at least {B} slots, elements of a head "
            f"side by side; got {list(k_cache.shape)} and {list(v_cache.shape)}"
        )
    if max(k_cache.shape[3], v_cache.shape[3]) > MAX_DECODE_HEAD_DIM:
        raise ArgumentError(
            f"{op}: the head dim must be at most {MAX_DECODE_HEAD_DIM}; got {k_cache.shape[3]}, {v_cache.shape[3]}"
        )
    quantized = k_cache.dtype in reference.LARGEST_CODE
    if k_cache.dtype != v_cache.dtype or (k_cache.dtype != dtype and not quantized):
        raise ArgumentError(
            f"{op}: the caches must be both {_name(dtype)}, int8 or float8_e4m3fn; "
            f"got {_name(k_cache.dtype)} and {_name(v_cache.dtype)}"
        )
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if (scale is not None) != quantized:
            need = "needs" if quantized else "takes no"
            raise ArgumentError(f"{op}: a cache in {_name(k_cache.dtype)} {need} {name}")
        if scale is not None and (scale.dtype != torch.float32 or scale.shape != k_cache.shape[:3]):
            raise ArgumentError(f"{op}: {name} must be float32 {list(k_cache.shape[:3])}; got {_described(scale)}")
    if k_scale is not None and v_scale is not None and k_scale.stride() != v_scale.stride():
        raise ArgumentError(
            f"{op}: k_scale and v_scale must have the same strides; got {k_scale.stride()} and {v_scale.stride()}"
        )


def _check_positions(op: str, B: int, positions: Tensor) -> None:
    if positions.dtype != torch.int32 or positions.shape != (B,) or (B > 1 and positions.stride(0) != 1):
        raise ArgumentError(f"{op}: positions must be int32 [{B}], contiguous; got {_described(positions)}")


def _check_scores(op: str, num_heads: int, window: int | None, softcap: float | None, sinks: Tensor | None) -> None:
    if window is not None and window < 1:
        raise ArgumentError(
            f"{op}: window counts the keys seen, the token's own among them, so at least 1; got {window}"
        )
    if softcap is not None and not softcap > 0:
        raise ArgumentError(f"{op}: softcap must be above 0; got {softcap}")
    if sinks is not None and (sinks.shape != (num_heads,) or sinks.dtype not in FLOATS):
        raise ArgumentError(f"{op}: sinks must be floating point [{num_heads}]; got {_described(sinks)}")


def _check_device(op: str, first: Tensor, **others: Tensor | None) -> None:
    for name, other in others.items():
        if other is not None and other.device != first.device:
            raise DeviceError(f"{op}: all tensors must be on {first.device}; {name} is on {other.device}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _described(tensor: Tensor) -> str:
    return f"{_name(tensor.dtype)} {list(tensor.shape)}"


_append_kv = bind(
    "append_kv(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor positions,"
    " Tensor(c!)? k_scale=None, Tensor(d!)? v_scale=None) -> ()",
    check=check_append_kv,
    fake=lambda *_: None,
    plain=reference.append_kv,
    cuda="onegpu.kernels.kv_rows",
    capability=DECODE_CAPABILITY,
)
_decode_attention = bind(
    "decode_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor positions, float scale, int? window=None,"
    " float? softcap=None, Tensor? sinks=None, Tensor? k_scale=None, Tensor? v_scale=None, bool overlap=False)"
    " -> Tensor",
    check=check_decode_attention,
    fake=lambda q, _, v_cache, *__: q.new_empty((*q.shape[:2], v_cache.shape[3])),
    plain=reference.decode_attention,
    cpu=reference.decode_attention_on_cpu,
    cuda="onegpu.kernels.split_launch",
    capability=DECODE_CAPABILITY,
)
_rotary_decode_attention = bind(
    "rotary_decode_attention(Tensor qkv, Tensor? cos, Tensor? sin, Tensor(a!) k_cache, Tensor(b!) v_cache,"
    " Tensor positions, SymInt num_heads, float scale, bool interleaved=False, Tensor? q_norm=None,"
    " Tensor? k_norm=None, float norm_eps=1e-6, float norm_offset=0.0, int? window=None, float? softcap=None,"
    " Tensor? sinks=None, Tensor(c!)? k_scale=None, Tensor(d!)? v_scale=None, bool overlap=False) -> Tensor",
    check=check_rotary_decode_attention,
    fake=lambda qkv, _, __, k_cache, ___, ____, num_heads, *_____: qkv.new_empty(
        (qkv.shape[0], num_heads * k_cache.shape[3])
    ),
    plain=reference.rotary_decode_attention,
    cuda="onegpu.kernels.split_launch",
    capability=DECODE_CAPABILITY,
)


def append_kv(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Write one token's keys and values of each sequence into the cache, in place. No gradient.

    Args:
        k, v: [B, Hkv, D] and [B, Hkv, Dv]; any strides, elements of a head side by side.
        k_cache, v_cache: [slots, Hkv, capacity, D or Dv], in the dtype of k, int8 or float8_e4m3fn.
        positions: int32 [B], where in slot b the token goes; one outside 0 .. capacity - 1 is not written.
        k_scale, v_scale: float32 [slots, Hkv, capacity] of an int8 or float8 cache (see `decode_reference`).

    Raises:
        ArgumentError, DeviceError: tensors that do not fit together.
        UnsupportedError: float8 on a card without it.
    """
    _append_kv(k, v, k_cache, v_cache, positions, k_scale, v_scale)


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    overlap: bool = False,
) -> Tensor:
    """softmax(scale * q k^T) v of one query per sequence over the keys 0 .. positions[b] of slot b. No gradient.

    Args:
        q: [B, Hq, D]; float16, bfloat16 or float32; query head h reads key head h // (Hq / Hkv).
        k_cache, v_cache, k_scale, v_scale: as `append_kv`; D and Dv at most 256.
        positions: int32 [B], in 0 .. capacity - 1; rows outside give any finite numbers.
        window: newest keys seen, the token's own among them (Transformers' `sliding_window`); None for all.
        softcap: scores become softcap * tanh(scores / softcap), as in Gemma 2.
        sinks: [Hq], one more score of each head that has no value, as in GPT-OSS.
        overlap: begin before the kernel in front has ended (compute capability 9.0 and up, else ignored).

    Returns:
        [B, Hq, Dv] in the dtype of q.

    Raises:
        ArgumentError, DeviceError: tensors that do not fit together.
        UnsupportedError: float8 on a card without it.
    """
    out: Tensor = _decode_attention(
        q, k_cache, v_cache, positions, scale, window, softcap, sinks, k_scale, v_scale, overlap
    )
    return out


def rotary_decode_attention(
    qkv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    num_heads: int,
    scale: float,
    interleaved: bool = False,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    norm_eps: float = 1e-6,
    norm_offset: float = 0.0,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    overlap: bool = False,
) -> Tensor:
    """All of a decode step between the product that makes q, k, v and the one that takes the result. No gradient.

    q and k of each head are normed (RMSNorm over D) and rotated, k and v appended to the cache in place, then
    `decode_attention`. Roundings to the dtype of qkv are those of Transformers' own code (`decode_reference`).

    Args:
        qkv: [B, (Hq + 2 Hkv) * D], query heads, then key heads, then value heads.
        cos, sin: [B, R], R even, at most D: element i of the first R turns by cos[i], sin[i], with its partner half R
            away, or next to it if `interleaved`; in the dtype of qkv, or float32 for one rounding at the end. None
            for no rotation.
        k_cache, v_cache, positions, k_scale, v_scale: as `append_kv`.
        num_heads: Hq.
        q_norm, k_norm: [D] weights, or None for no norm; `norm_offset` is added to them. With offset 0 the normed
            row is rounded before the weight, as in Llama's RMSNorm; else there is one rounding, as in Gemma's.
        scale, window, softcap, sinks: as `decode_attention`.
        overlap: begin before the kernel in front has ended (compute capability 9.0 and up, else ignored). That
            kernel may write qkv, cos and sin; `positions` and older keys and values must be older than it.

    Returns:
        [B, Hq * D] in the dtype of qkv.

    Raises:
        ArgumentError, DeviceError: tensors that do not fit together.
        UnsupportedError: float8 on a card without it.
    """
    out: Tensor = _rotary_decode_attention(
        qkv,
        cos,
        sin,
        k_cache,
        v_cache,
        positions,
        num_heads,
        scale,
        interleaved,
        q_norm,
        k_norm,
        norm_eps,
        norm_offset,
        window,
        softcap,
        sinks,
        k_scale,
        v_scale,
        overlap,
    )
    return out
