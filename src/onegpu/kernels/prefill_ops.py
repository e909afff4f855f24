"""The operator `causal_attention`: prompts against their keys, bound like those in `ops`.

query i of a sequence with Lq queries and Lk keys sees keys 0 .. Lk - Lq + i (with a window, the newest of these)
"""

from __future__ import annotations

from itertools import pairwise
from typing import Final

import torch
from torch import Tensor

from onegpu.errors import ArgumentError, DeviceError
from onegpu.kernels.ops import bind

__all__ = ["MAX_PREFILL_HEAD_DIM", "causal_attention", "reference_causal_attention"]

OP: Final = "causal_attention"
FLOATS: Final = (torch.float16, torch.bfloat16, torch.float32)
MAX_PREFILL_HEAD_DIM: Final = 256
CAPABILITY: Final = (8, 0)
# Rows of scores at a time in the reference, so that a long prompt does not need Lq * Lk of them.
ROWS_AT_A_TIME: Final = 512


def check_causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    _max_q: int,
    _scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> None:
    for name, other in (("k", k), ("v", v), ("cu_q", cu_q), ("cu_k", cu_k), ("sinks", sinks)):
        if other is not None and other.device != q.device:
            raise DeviceError(f"{OP}: all tensors must be on {q.device}; {name} is on {other.device}")
    if q.dim() != 3 or k.dim() != 3 or v.dim() != 3 or k.shape[:2] != v.shape[:2] or k.shape[2] != q.shape[2]:
        shapes = [list(t.shape) for t in (q, k, v)]
        raise ArgumentError(f"{OP}: q, k and v must be [Tq, Hq, D], [Tk, Hkv, D] and [Tk, Hkv, Dv]; got {shapes}")
    if q.shape[1] == 0 or k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ArgumentError(f"{OP}: Hq must be a multiple of Hkv; got {q.shape[1]} and {k.shape[1]}")
    if q.dtype not in FLOATS or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ArgumentError(f"{OP}: q, k and v must be of one floating dtype; got {q.dtype}, {k.dtype}, {v.dtype}")
    if max(q.shape[2], v.shape[2]) > MAX_PREFILL_HEAD_DIM:
        raise ArgumentError(
            f"{OP}: the head dim must be at most {MAX_PREFILL_HEAD_DIM}; got {q.shape[2]}, {v.shape[2]}"
        )
    if cu_q.dtype != torch.int32 or cu_k.dtype != torch.int32 or cu_q.dim() != 1 or cu_q.shape != cu_k.shape:
        raise ArgumentError(f"{OP}: cu_q and cu_k must be int32 [N + 1]; got {list(cu_q.shape)}, {list(cu_k.shape)}")
    if window is not None and window < 1:
        raise ArgumentError(f"{OP}: window counts the keys seen, the token's own too, so at least 1; got {window}")
    if softcap is not None and not softcap > 0:
        raise ArgumentError(f"{OP}: softcap must be above 0; got {softcap}")
    if sinks is not None and (sinks.shape != (q.shape[1],) or sinks.dtype not in FLOATS):
        raise ArgumentError(f"{OP}: sinks must be floating point [{q.shape[1]}]; got {list(sinks.shape)}")


def reference_causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    _max_q: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    out = q.new_zeros((q.shape[0], q.shape[1], v.shape[2]))
    G = q.shape[1] // k.shape[1]
    for (start, end), (first, last) in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True):
        keys = k[first:last].permute(1, 2, 0).float()[:, None]
        values = v[first:last].transpose(0, 1).float()[:, None]
        columns = torch.arange(last - first, device=q.device)
        for begin in range(start, end, ROWS_AT_A_TIME):
            rows = q[begin : min(end, begin + ROWS_AT_A_TIME)].float().contiguous()
            places = torch.arange(len(rows), device=q.device)[:, None] + (last - first) - (end - begin)
            scores = rows.view(len(rows), -1, G, rows.shape[2]).permute(1, 2, 0, 3) @ keys * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            hidden = columns > places
            if window is not None:
                hidden = hidden | (columns <= places - window)
            scores = scores.masked_fill(hidden, -torch.inf)
            if sinks is not None:
                column = sinks.float().view(-1, G, 1, 1).expand(-1, -1, len(rows), 1)
                scores = torch.cat((scores, column), -1)
            # A row without a key has only -inf, whose softmax is NaN: it gets 0.
            weights = scores.softmax(-1)[..., : last - first].masked_fill(hidden, 0.0)
            out[begin : begin + len(rows)] = (weights @ values).permute(2, 0, 1, 3).flatten(1, 2).to(q.dtype)
    return out


_causal_attention = bind(
    f"{OP}(Tensor q, Tensor k, Tensor v, Tensor cu_q, Tensor cu_k, SymInt max_q, float scale, int? window=None,"
    " float? softcap=None, Tensor? sinks=None) -> Tensor",
    check=check_causal_attention,
    fake=lambda q, _, v, *__: q.new_empty((q.shape[0], q.shape[1], v.shape[2])),
    plain=reference_causal_attention,
    cuda="onegpu.kernels.causal_attention",
    capability=CAPABILITY,
)


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """softmax(scale * q k^T) v within each sequence, causal, the last query beside the last key. No gradient.

    Args:
        q: [Tq, Hq, D]; k: [Tk, Hkv, D]; v: [Tk, Hkv, Dv]; one floating dtype, D and Dv at most 256, Hq a multiple of
            Hkv, any strides.
        cu_q, cu_k: int32 [N + 1], where each sequence's queries and keys begin and the last ones end.
        max_q: at least the most queries of a sequence.
        window: newest keys seen, the token's own among them; None for all.
        softcap: scores become softcap * tanh(scores / softcap).
        sinks: [Hq], one more score of each head that has no value.

    Returns:
        [Tq, Hq, Dv], contiguous. A query without a key gets 0; tokens of no sequence hold anything.

    Raises:
        ArgumentError, DeviceError: tensors that do not fit together.
    """
    out: Tensor = _causal_attention(q, k, v, cu_q, cu_k, max_q, scale, window, softcap, sinks)
    return out
