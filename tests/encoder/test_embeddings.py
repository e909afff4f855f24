"""Embeddings put off until padding is out of the way: only where nobody looks at them, and never a wrong answer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from encoder.test_architectures import assert_equal, run
from encoder.test_arena import BATCHES, stack_of
from encoder.test_fuse import case_of
from encoder.zoo import padded_mask
from onegpu.encoder.embeddings import EmbeddingCall

LATE = {
    "bert": True,
    "roberta": True,
    "xlm-roberta": True,
    "distilbert": True,
    "modernbert": True,
    "electra": False,  # projects them to the layers' size
    "albert": False,  # the same
    "mpnet": False,  # its positions come from a function, not a method
    "layoutlm": False,  # wants boxes
}


@pytest.mark.parametrize("name", LATE)
def test_equal(name: str) -> None:
    case = case_of(name)
    model = case.build()
    wanted = [run(model, case.inputs(mask)) for mask in BATCHES]
    stack = stack_of(model)
    assert stack.embeds_late == LATE[name]
    for _ in range(3):
        for mask, want in zip(BATCHES, wanted, strict=True):
            assert_equal(case, mask, run(model, case.inputs(mask)), want)
    assert stack.embeds_late == LATE[name]


def test_only_real_tokens_are_embedded() -> None:
    case, mask = case_of("bert"), padded_mask((1, 1, 2, 1), 10)
    model = case.build()
    stack = stack_of(model)
    rows: list[int] = []
    model.embeddings.word_embeddings.register_forward_hook(lambda module, args, output: rows.append(args[0].numel()))
    run(model, case.inputs(mask))
    assert rows == [40]  # someone is watching
    model.embeddings.word_embeddings._forward_hooks.clear()
    original = model.embeddings.word_embeddings.forward
    model.embeddings.word_embeddings.forward = lambda ids: (rows.append(ids.numel()), original(ids))[1]
    run(model, case.inputs(mask))
    assert rows == [40, 32]
    assert stack.embeds_late


@pytest.mark.parametrize("name", ["bert", "roberta", "xlm-roberta"])
def test_types_and_positions(name: str) -> None:
    case, mask = case_of(name), padded_mask((5, 10, 4, 2))
    model = case.build()
    types = (torch.arange(10)[None] % 2 if model.config.type_vocab_size > 1 else torch.zeros(1, 10)).long()
    variants: list[dict[str, Tensor]] = [
        {},
        {"token_type_ids": types.expand(4, 10)},
        {"position_ids": torch.arange(10).flip(0)[None] + 3},
        {"position_ids": (torch.arange(40).view(4, 10) % 13 + 2), "token_type_ids": types.expand(4, 10).contiguous()},
    ]
    inputs = [{**case.inputs(mask), **more} for more in variants]
    wanted = [run(model, given) for given in inputs]
    stack = stack_of(model)
    for _ in range(3):
        for given, want in zip(inputs, wanted, strict=True):
            assert_equal(case, mask, run(model, given), want)
    assert stack.embeds_late
    assert len(stack.graphs.captured) >= 3


def test_embeddings_given() -> None:
    case, mask = case_of("bert"), padded_mask((5, 10, 4, 2))
    model = case.build()
    vectors = torch.randn(4, 10, 32, generator=torch.Generator().manual_seed(0))
    inputs = {"inputs_embeds": vectors, "attention_mask": mask}
    want = run(model, inputs)
    stack = stack_of(model)
    for _ in range(3):
        assert_equal(case, mask, run(model, inputs), want)
    assert stack.embeds_late


def test_a_new_table_is_seen() -> None:
    case, mask = case_of("bert"), padded_mask((5, 10, 4, 2))
    model, other = case.build(), case.build()
    inputs = case.inputs(mask)
    stack_of(model)
    for _ in range(3):
        run(model, inputs)
    for one in (model, other):
        torch.manual_seed(3)
        one.embeddings.word_embeddings = nn.Embedding(100, 32)
        with torch.no_grad():
            one.embeddings.LayerNorm.weight.mul_(2)
    assert_equal(case, mask, run(model, inputs), run(other, inputs))


class Doubled(nn.Module):
    """Changes what it gets on the way to the layers, as some models project it."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.encoder(hidden * 2, *args, **kwargs)


def test_someone_comes_between() -> None:
    """After the proof: the forward begins anew, with the embeddings in their place."""
    case, mask = case_of("bert"), padded_mask((5, 10, 4, 2))
    model, other = case.build(), case.build()
    inputs = case.inputs(mask)
    stack = stack_of(model)
    assert stack.embeds_late
    for one in (model, other):
        one.encoder = Doubled(one.encoder)
    for _ in range(3):
        assert_equal(case, mask, run(model, inputs), run(other, inputs))
    assert not stack.embeds_late


def test_the_proof_can_fail() -> None:
    """A model that adds its embeddings behind the layers: what stands in their place would be seen."""
    case = case_of("bert")
    model = case.build()
    kept: list[Tensor] = []

    class Adding(nn.Module):
        def forward(self, hidden: Tensor) -> Tensor:
            return hidden[:, 0] + kept.pop()[:, 0]

    model.pooler = Adding()
    create = model._create_attention_masks

    def keep(*args: Any, **kwargs: Any) -> Any:
        kept.append(kwargs["embedding_output"])
        return create(*args, **kwargs)

    model._create_attention_masks = keep
    want = run(model, case.inputs(padded_mask()))
    stack = stack_of(model)
    assert stack.passes_mask_on
    assert not stack.embeds_late
    for _ in range(3):
        assert_equal(case, padded_mask(), run(model, case.inputs(padded_mask())), want)


def test_what_fits() -> None:
    assert EmbeddingCall.fits(case_of("bert").build().embeddings)
    assert not EmbeddingCall.fits(case_of("layoutlm").build().embeddings)
    assert not EmbeddingCall.fits(nn.Embedding(3, 4))
