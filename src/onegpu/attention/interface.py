"""How a model's layers reach attention over unpadded tokens: two functions registered with Transformers.

The mask function gives every model what it knows, a tensor, as small as it can be ([B, 1, 1, S]), with a note on it of
what it stands for. A layer that runs on unpadded tokens is given an `AttentionView` in place of that tensor, and the
attention function does what it finds: a view is attention over `cu_seqlens`, a tensor is Transformers' own SDPA.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from onegpu.attention.unpadded import AttentionView, RelativeBias
from onegpu.attention.varlen import varlen_attention
from onegpu.errors import UnsupportedError

__all__ = ["ADDITIVE", "IMPLEMENTATION", "MaskNote", "attend", "note_of", "register"]

IMPLEMENTATION: Final = "onegpu"
# The same, for models whose attention adds the mask to the scores itself.
ADDITIVE: Final = "onegpu_additive"
NOTE: Final = "_onegpu_note"


@dataclass(frozen=True, slots=True)
class MaskNote:
    """What a mask tensor stands for: `padding` [B, S] bool, True where real, and who sees whom.

    `is_guess`: read off a mask that the model made itself, whose other values are not known yet.
    """

    padding: Tensor
    causal: bool = False
    window: int | None = None
    is_guess: bool = False


def note_of(mask: object) -> MaskNote | None:
    """The note on a mask made here, or one read off a plain additive padding mask [B, 1, 1, S]."""
    if not isinstance(mask, Tensor):
        return None
    note = getattr(mask, NOTE, None)
    if isinstance(note, MaskNote):
        return note
    if mask.dim() == 4 and mask.shape[1] == mask.shape[2] == 1:
        return MaskNote((mask if mask.dtype == torch.bool else mask == 0)[:, 0, 0], is_guess=True)
    return None


def attention_function(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention interface: query [B, H, S, D] to ([B, S, H, D], None)."""
    bias = kwargs.get("position_bias")
    if isinstance(attention_mask, AttentionView):
        return attend(query, key, value, attention_mask, scaling, bias), None
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    # The mask function never leaves a causal mask out, so that None means: every token is seen.
    kwargs["is_causal"] = False
    if isinstance(bias, RelativeBias):
        kwargs["position_bias"] = bias.dense()
    out: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
    )
    return out


def attend(
    query: Tensor, key: Tensor, value: Tensor, view: AttentionView, scaling: float | None, bias: Any = None
) -> Tensor:
    """[1, H, T, D] to [1, T, H, D].

    Raises:
        UnsupportedError: a bias that is not one by distance.
    """
    if bias is not None and not isinstance(bias, RelativeBias):
        raise UnsupportedError("this bias on the scores is not one by distance", "run the plain model")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    return varlen_attention(q, k, v, view, scale, bias)[None]


def note_for(
    batch_size: int, q_length: int, kv_length: int, mask_function: Any, attention_mask: Tensor | None, local: Any
) -> MaskNote | None:
    """What a mask asked for stands for; None where it is none of the simple kinds."""
    from transformers import masking_utils

    if attention_mask is None or q_length != kv_length or tuple(attention_mask.shape) != (batch_size, kv_length):
        return None
    if mask_function is masking_utils.bidirectional_mask_function:
        return MaskNote(attention_mask)
    if mask_function is masking_utils.causal_mask_function:
        return MaskNote(attention_mask, causal=True)
    # A window's function is made anew for each mask: it is known by its parts' code.
    if isinstance(local, int) and is_bidirectional_window(mask_function):
        return MaskNote(attention_mask, window=local)
    return None


def is_bidirectional_window(mask_function: Any) -> bool:
    """Whether this is Transformers' symmetric window and nothing more."""
    from transformers import masking_utils

    make = getattr(masking_utils, "sliding_window_bidirectional_mask_function", None)
    if make is None or not hasattr(mask_function, "__code__"):
        return False
    mine, theirs = closure_codes(make(1)), closure_codes(mask_function)
    return bool(mine) and mine == theirs


def closure_codes(function: Any) -> list[Any]:
    """The code objects of a closure and of the functions it holds, in order."""
    found = [function.__code__]
    for cell in function.__closure__ or ():
        content = cell.cell_contents
        parts = content if isinstance(content, tuple) else (content,)
        for part in parts:
            if hasattr(part, "__code__"):
                found += closure_codes(part)
    return found


def mask_function_for(additive: bool, **kwargs: Any) -> Tensor | None:
    """Transformers' mask interface: bool [B, 1, 1 or S, S], or the additive float form of it; None for no mask."""
    from transformers.masking_utils import sdpa_mask

    padding, offset = kwargs.get("attention_mask"), kwargs.get("q_offset", 0)
    note = None
    if isinstance(padding, Tensor) and padding.dim() == 2 and isinstance(offset, int) and offset == 0:
        note = note_for(
            kwargs["batch_size"],
            kwargs["q_length"],
            kwargs["kv_length"],
            kwargs.get("mask_function"),
            padding,
            kwargs.get("local_size"),
        )
    if note is not None and not note.causal and note.window is None:
        mask: Tensor | None = note.padding[:, None, None, :]
    else:
        # With padding given, the question whether there is any would wait for the device: it is not asked.
        skip = padding is None and kwargs.get("allow_is_bidirectional_skip", False)
        mask = sdpa_mask(**{**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": skip})
    if mask is None:
        return None
    if additive:
        dtype = kwargs.get("dtype") or torch.float32
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)
    if note is not None:
        setattr(mask, NOTE, note)
    return mask


@functools.cache
def register() -> None:
    """Make the two implementations known to Transformers. It changes no model; once is enough."""
    from transformers import AttentionInterface, AttentionMaskInterface

    for name, additive in ((IMPLEMENTATION, False), (ADDITIVE, True)):
        AttentionInterface.register(name, attention_function)
        AttentionMaskInterface.register(name, functools.partial(mask_function_for, additive))
