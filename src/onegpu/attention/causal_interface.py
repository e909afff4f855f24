"""How a decoder's layers reach attention over the slots of a KV cache: one function registered with Transformers.

The view of a step travels as an attribute of a small 4-D mask, which Transformers' mask functions hand to the layers as
it is. Where the attention function finds a view, the view attends; where it finds none (cross attention, a call that is
not ours), it is Transformers' own SDPA.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from typing import Any, Final

import torch
from torch import Tensor

__all__ = ["DECODER_IMPLEMENTATION", "CacheView", "mask_with", "register_decoder", "view_of"]

DECODER_IMPLEMENTATION: Final = "onegpu_decoder"
VIEW: Final = "_onegpu_view"


class CacheView(ABC):
    """What one forward sees of the KV cache. The cache's layer has taken up the new keys before it is asked."""

    @abstractmethod
    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """Query [B, Hq, S, D], new keys and values [B, Hkv, S, D] to [B, S, Hq, Dv]."""


def mask_with(view: CacheView, device: torch.device) -> Tensor:
    """A bool mask [1, 1, 1, 1] that carries a view."""
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
    setattr(mask, VIEW, view)
    return mask


def view_of(mask: object) -> CacheView | None:
    """The view that a mask carries, None for any other."""
    view = getattr(mask, VIEW, None)
    return view if isinstance(view, CacheView) else None


def decoder_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention interface: query [B, H, S, D] to ([B, S, H, Dv], None)."""
    view = view_of(attention_mask)
    if view is not None and kwargs.get("position_bias") is None:
        scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        window, softcap, sinks = kwargs.get("sliding_window"), kwargs.get("softcap"), kwargs.get("s_aux")
        return view.attend(query, key, value, scale, window, softcap, sinks), None
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    out: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
    )
    return out


@functools.cache
def register_decoder() -> None:
    """Make the implementation known to Transformers. It changes no model; once is enough."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(DECODER_IMPLEMENTATION, decoder_attention)
    AttentionMaskInterface.register(DECODER_IMPLEMENTATION, sdpa_mask)
