"""What Transformers is given: small masks with a note of what they stand for, and attention that reads either."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import BertConfig, ModernBertConfig
from transformers.masking_utils import (
    create_bidirectional_mask,
    create_bidirectional_sliding_window_mask,
    create_causal_mask,
)

from onegpu.attention.interface import ADDITIVE, IMPLEMENTATION, attention_function, note_of, register
from onegpu.attention.unpadded import AttentionView, UnpaddedBatch
from onegpu.errors import UnsupportedError

PADDING = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])


def config_of(name: str, **options: Any) -> Any:
    register()
    config = ModernBertConfig(**options) if options else BertConfig()
    config._attn_implementation_internal = name
    return config


def test_a_bidirectional_mask_is_a_view() -> None:
    config, embeds = config_of(IMPLEMENTATION), torch.zeros(2, 4, 8)
    mask = create_bidirectional_mask(config=config, inputs_embeds=embeds, attention_mask=PADDING)
    assert mask.shape == (2, 1, 1, 4)
    assert mask.dtype == torch.bool
    note = note_of(mask)
    assert note is not None
    assert torch.equal(note.padding, PADDING.bool())
    assert (note.causal, note.window, note.is_guess) == (False, None, False)
    assert create_bidirectional_mask(config=config, inputs_embeds=embeds, attention_mask=None) is None


def test_additive() -> None:
    mask = create_bidirectional_mask(
        config=config_of(ADDITIVE), inputs_embeds=torch.zeros(2, 4, 8), attention_mask=PADDING
    )
    assert mask.dtype == torch.float32
    assert mask[0, 0, 0].tolist() == [0, 0, 0, torch.finfo(torch.float32).min]
    note = note_of(mask)
    assert note is not None
    assert torch.equal(note.padding, PADDING.bool())


def test_causal_and_windows() -> None:
    embeds = torch.zeros(2, 4, 8)
    causal = create_causal_mask(
        config=config_of(IMPLEMENTATION), inputs_embeds=embeds, attention_mask=PADDING, past_key_values=None
    )
    note = note_of(causal)
    assert note is not None
    assert note.causal
    assert torch.equal(causal[0, 0], torch.ones(4, 4).tril().bool() & PADDING[0].bool())
    config = config_of(IMPLEMENTATION, local_attention=2)
    window = create_bidirectional_sliding_window_mask(config=config, inputs_embeds=embeds, attention_mask=PADDING)
    note = note_of(window)
    assert note is not None
    assert note.window == config.sliding_window == 1
    assert window[0, 0].int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 0], [0, 0, 1, 0]]


def test_masks_of_other_kinds_have_no_note() -> None:
    config, embeds = config_of(IMPLEMENTATION), torch.zeros(2, 4, 8)
    mixed = create_bidirectional_mask(
        config=config, inputs_embeds=embeds, attention_mask=PADDING, and_mask_function=lambda b, h, q, k: q >= k
    )
    assert note_of(mixed) is None
    cross = create_bidirectional_mask(
        config=config, inputs_embeds=embeds[:, :2], attention_mask=PADDING, encoder_hidden_states=embeds
    )
    assert getattr(cross, "_onegpu_note", None) is None
    assert note_of(None) is None
    guess = note_of(torch.tensor([0.0, -1e4])[None, None, None])
    assert guess is not None
    assert guess.is_guess
    assert guess.padding.tolist() == [[True, False]]


def test_a_causal_mask_is_never_left_out() -> None:
    """Without one, attention would have to guess from the module whether it is causal."""
    mask = create_causal_mask(
        config=config_of(IMPLEMENTATION), inputs_embeds=torch.zeros(1, 3, 8), attention_mask=None, past_key_values=None
    )
    assert torch.equal(mask[0, 0], torch.ones(3, 3).tril().bool())


def test_attention_reads_a_view_or_a_tensor() -> None:
    module: Any = SimpleNamespace()  # says nothing about being causal
    hidden = torch.randn(3, 2, 2, 4, 8)
    real = PADDING.bool()
    padded, _ = attention_function(module, *hidden, real[:, None, None, :], scaling=0.5)
    batch = UnpaddedBatch.from_mask(real)
    tokens = [t.transpose(1, 2).flatten(0, 1)[batch.indices].transpose(0, 1)[None] for t in hidden]
    unpadded, weights = attention_function(module, *tokens, AttentionView(batch), scaling=0.5)
    assert weights is None
    torch.testing.assert_close(unpadded[0], padded.flatten(0, 1)[batch.indices], rtol=0, atol=2e-6)
    free, _ = attention_function(module, *hidden, None, scaling=0.5)
    every, _ = attention_function(module, *hidden, torch.ones(2, 1, 1, 4, dtype=torch.bool), scaling=0.5)
    torch.testing.assert_close(free, every, rtol=0, atol=2e-6)


def test_a_bias_not_by_distance_is_refused() -> None:
    batch = UnpaddedBatch.from_lengths([3], 3)
    q = torch.randn(1, 2, 3, 8)
    with pytest.raises(UnsupportedError, match="not one by distance"):
        attention_function(
            torch.nn.Identity(), q, q, q, AttentionView(batch), scaling=1.0, position_bias=torch.zeros(1, 2, 3, 3)
        )
