"""The operators of prompts between products: one pass over packed tokens each, bound like those in `ops`.

    rotate_and_append     q and k of every token normed and rotated where they lie, k and v written to the KV cache
    gated_activation      act(gate) * up of a product that gives both

What they round is what a decode step rounds (`decode_reference`). T tokens of any sequences stand one behind another.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from onegpu.errors import ArgumentError
from onegpu.kernels import checks
from onegpu.kernels import decode_reference as reference
from onegpu.kernels.decode_ops import FLOATS, _check_cache, _check_device, _described
from onegpu.kernels.ops import bind
from onegpu.kernels.tail import ACTIVATIONS, apply_tail

__all__ = ["gated_activation", "reference_gated_activation", "reference_rotate_and_append", "rotate_and_append"]

ROTATE: Final = "rotate_and_append"
GATE: Final = "gated_activation"
# Rows at a time in the reference, whose float32 copies a long prompt has no room for.
ROWS_AT_A_TIME: Final = 1024


def check_rotate_and_append(
    qkv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    places: Tensor,
    num_heads: int,
    interleaved: bool = False,  # noqa: ARG001
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    _norm_eps: float = 1e-6,
    _norm_offset: float = 0.0,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    tensors = {"cos": cos, "sin": sin, "k_cache": k_cache, "v_cache": v_cache, "slots": slots, "places": places}
    _check_device(ROTATE, qkv, **tensors, q_norm=q_norm, k_norm=k_norm, k_scale=k_scale, v_scale=v_scale)
    if qkv.dim() != 2 or qkv.dtype not in FLOATS or qkv.stride(1) != 1:
        raise ArgumentError(
            f"{ROTATE}: qkv must be [T, (Hq + 2 Hkv) * D] in a floating dtype, elements of a row side by side; "
            f"got {_described(qkv)}"
        )
    _check_cache(ROTATE, 0, qkv.dtype, k_cache, v_cache, k_scale, v_scale)
    T, Hkv, D = qkv.shape[0], k_cache.shape[1], k_cache.shape[3]
    if num_heads < 1 or qkv.shape[1] != (num_heads + 2 * Hkv) * D or v_cache.shape[3] != D:
        raise ArgumentError(
            f"{ROTATE}: qkv must be [T, {(num_heads + 2 * Hkv) * D}] for {num_heads} heads of queries and {Hkv} of "
            f"keys and values, {D} each; got {list(qkv.shape)}, caches {list(k_cache.shape)} and {list(v_cache.shape)}"
        )
    if (cos is None) != (sin is None):
        raise ArgumentError(f"{ROTATE}: cos and sin go together; one came as None")
    if cos is not None and sin is not None:
        fits = cos.dim() == 2 and cos.shape[0] == T and cos.shape[1] % 2 == 0 and cos.shape[1] <= D
        if not fits or sin.shape != cos.shape or sin.dtype != cos.dtype or cos.dtype not in (qkv.dtype, torch.float32):
            raise ArgumentError(
                f"{ROTATE}: cos and sin must be [{T}, R], R even and at most {D}, in the dtype of qkv or float32; "
                f"got {_described(cos)} and {_described(sin)}"
            )
    for name, weight in (("q_norm", q_norm), ("k_norm", k_norm)):
        if weight is not None and (weight.shape != (D,) or weight.dtype not in FLOATS):
            raise ArgumentError(f"{ROTATE}: {name} must be floating point [{D}]; got {_described(weight)}")
    for name, where in (("slots", slots), ("places", places)):
        if where.dtype != torch.int32 or where.shape != (T,) or (T > 1 and where.stride(0) != 1):
            raise ArgumentError(f"{ROTATE}: {name} must be int32 [{T}], contiguous; got {_described(where)}")


def reference_rotate_and_append(
    qkv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    places: Tensor,
    num_heads: int,
    interleaved: bool = False,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    norm_eps: float = 1e-6,
    norm_offset: float = 0.0,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    Hkv, D = k_cache.shape[1], k_cache.shape[3]
    heads = qkv.view(qkv.shape[0], num_heads + 2 * Hkv, D)
    slots, places = slots.long(), places.long()
    for first in range(0, qkv.shape[0], ROWS_AT_A_TIME):
        rows = slice(first, min(first + ROWS_AT_A_TIME, qkv.shape[0]))
        q, k, v = torch.split(heads[rows], [num_heads, Hkv, Hkv], 1)
        cos_rows, sin_rows = None if cos is None else cos[rows], None if sin is None else sin[rows]
        for part, weight in ((q, q_norm), (k, k_norm)):
            normed = reference.head_norm(part, weight, norm_eps, norm_offset)
            part.copy_(reference.rotate(normed, cos_rows, sin_rows, interleaved))
        for new, cache, scales in ((k, k_cache, k_scale), (v, v_cache, v_scale)):
            if scales is None:
                cache[slots[rows], :, places[rows]] = new
                continue
            codes, scale = reference.quantize_kv(new, cache.dtype)
            scales[slots[rows], :, places[rows]] = scale
            # A device may not know how to scatter 8-bit floats: their bits are bytes.
            cache.view(torch.uint8)[slots[rows], :, places[rows]] = codes.view(torch.uint8)


def check_gated_activation(x: Tensor, activation: str) -> None:
    K = checks._input(GATE, x)
    if activation not in ACTIVATIONS:
        known = ", ".join(repr(name) for name in ACTIVATIONS)
        raise ArgumentError(f"{GATE}: activation must be one of {known}; got {activation!r}")
    if K % 2:
        raise ArgumentError(f"{GATE}: x must be [..., 2 F], gate then up; got {list(x.shape)}")


def reference_gated_activation(x: Tensor, activation: str) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    y = x.new_empty((rows.shape[0], x.shape[-1] // 2))
    for first in range(0, rows.shape[0], ROWS_AT_A_TIME):
        part = slice(first, first + ROWS_AT_A_TIME)
        y[part] = apply_tail(rows[part].float(), None, activation, True, x.dtype)
    return y.view(*x.shape[:-1], y.shape[1])


def nothing(*_: Any) -> None:
    """Shapes of what is written in place."""


_rotate_and_append = bind(
    f"{ROTATE}(Tensor(a!) qkv, Tensor? cos, Tensor? sin, Tensor(b!) k_cache, Tensor(c!) v_cache, Tensor slots,"
    " Tensor places, SymInt num_heads, bool interleaved=False, Tensor? q_norm=None, Tensor? k_norm=None,"
    " float norm_eps=1e-6, float norm_offset=0.0, Tensor(d!)? k_scale=None, Tensor(e!)? v_scale=None) -> ()",
    check=check_rotate_and_append,
    fake=nothing,
    plain=reference_rotate_and_append,
    cuda="onegpu.kernels.prompt_rotation",
)
_gated_activation = bind(
    f"{GATE}(Tensor x, str activation) -> Tensor",
    check=check_gated_activation,
    fake=lambda x, _: x.new_empty((*x.shape[:-1], x.shape[-1] // 2)),
    plain=reference_gated_activation,
    cuda="onegpu.kernels.prompt_gate",
)


def rotate_and_append(
    qkv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    places: Tensor,
    num_heads: int,
    interleaved: bool = False,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    norm_eps: float = 1e-6,
    norm_offset: float = 0.0,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """What comes between the product that makes q, k, v of T tokens and attention over them, in place. No gradient.

    q and k of each head are normed (RMSNorm over D) and rotated where they lie in qkv; k as it is then and v go to the
    cache. Roundings are those of `rotary_decode_attention`.

    Args:
        qkv: [T, (Hq + 2 Hkv) * D], bfloat16, float16 or float32, elements of a row side by side.
        cos, sin: [T, R] for the first R elements of a head, R even, in the dtype of qkv or float32; None for none.
        k_cache, v_cache: [slots, Hkv, capacity, D], in the dtype of qkv, int8 or float8_e4m3fn.
        slots, places: int32 [T], where in the cache each token goes: within it, and no two to the same place.
        num_heads: Hq.
        interleaved: pairs lie side by side, not R / 2 apart.
        q_norm, k_norm: weights [D], or None; `norm_eps` and `norm_offset` as `rms_norm` takes them.
        k_scale, v_scale: float32 [slots, Hkv, capacity] of an int8 or float8 cache.

    Raises:
        ArgumentError, DeviceError: tensors that do not fit together.
        UnsupportedError: float8 on a card without it.
    """
    _rotate_and_append(
        qkv, cos, sin, k_cache, v_cache, slots, places, num_heads, interleaved, q_norm, k_norm, norm_eps, norm_offset,
        k_scale, v_scale,
    )  # fmt: skip


def gated_activation(x: Tensor, activation: str) -> Tensor:
    """act(x[..., :F]) * x[..., F:] in float32, rounded once: [..., 2 F] to [..., F]. No gradient.

    Args:
        x: bfloat16, float16 or float32, any strides.
        activation: one of `onegpu.kernels.tail.ACTIVATIONS`.

    Raises:
        ArgumentError: an unknown activation, a dtype or shape that does not fit.
    """
    y: Tensor = _gated_activation(x, activation)
    return y
