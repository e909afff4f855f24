"""A mask read before the embeddings: the same batch as from the mask itself, and graphs that need nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from encoder.test_architectures import MASKS, assert_equal, run
from encoder.test_fuse import case_of, optimized
from encoder.zoo import padded_mask
from onegpu.attention.unpadded import UnpaddedBatch
from onegpu.encoder.arena import MAX_POSITIONS, Arena, close_bounds
from onegpu.encoder.buckets import bucket_of
from onegpu.encoder.graphs import GraphCache
from onegpu.encoder.stack import Stack

BATCHES = [
    padded_mask((5, 10, 4, 2)),
    padded_mask((9, 2, 3, 6)),
    padded_mask((4, 4, 2, 10)),
    padded_mask((6, 10, 3, 2)),
]


def stack_of(model: Any) -> Stack:
    stack = optimized(model).stacks[0].stack
    assert stack is not None
    return stack


def random_mask(B: int, S: int, seed: int) -> Tensor:
    mask = torch.rand(B, S, generator=torch.Generator().manual_seed(seed)) > 0.4
    mask[0, 0] = True
    return mask


@pytest.mark.parametrize(("B", "S"), [(1, 1), (4, 10), (17, 33), (3, 700)])
def test_the_batch_in_its_bucket(B: int, S: int) -> None:
    """Entry by entry what `bucket_of` makes, also where an older, longer batch was written before."""
    arena = Arena.on(torch.device("cpu"))
    arena.begin(random_mask(16, 100, 0))
    mask = random_mask(B, S, 1)
    early = arena.begin(mask)
    got = close_bounds(arena.batch(early, early.sizes()))
    lengths = mask.sum(1)
    places = mask.flatten().nonzero()[:, 0]
    ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    runs = mask[:, 0] + (mask[:, 1:] & ~mask[:, :-1]).sum(1)
    direct = UnpaddedBatch(
        batch_size=B,
        seqlen=S,
        total=int(lengths.sum()),
        max_seqlen=int(lengths.max()),
        indices=places,
        positions=(places % S).to(torch.int32),
        cu_seqlens=ends,
        has_holes=bool((runs > 1).any()),
        has_first=bool(mask[:, 0].all()),
        lengths=None,
    )
    want = bucket_of(direct)
    for name in ("batch_size", "seqlen", "total", "max_seqlen", "has_holes", "has_first"):
        assert getattr(got, name) == getattr(want, name), name
    for name in ("indices", "positions", "cu_seqlens"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name


def test_what_has_room() -> None:
    assert Arena.fits(torch.ones(64, 512))
    assert not Arena.fits(torch.ones(129, 512))
    assert not Arena.fits(torch.ones(4090, 1))
    assert not Arena.fits(torch.ones(0, 5))
    assert MAX_POSITIONS == 65536


@pytest.mark.parametrize("name", ["bert", "roberta", "xlm-roberta", "distilbert", "electra", "albert"])
def test_replayed_by_sizes_alone(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Once a bucket's graph is there, batches of it run without anything else being looked up or copied."""
    case = case_of(name)
    model = case.build()
    wanted = [run(model, case.inputs(mask)) for mask in BATCHES]
    stack = stack_of(model)
    assert stack.passes_mask_on
    for _ in range(3):
        for mask in BATCHES:
            run(model, case.inputs(mask))
    calls = []
    monkeypatch.setattr(GraphCache, "run", lambda *args, **kwargs: calls.append(1))
    for mask, want in zip(BATCHES, wanted, strict=True):
        assert_equal(case, mask, run(model, case.inputs(mask)), want)
    assert not calls
    assert stack.graphs.quick


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("name", ["bert", "roberta", "modernbert", "t5-encoder", "mpnet"])
def test_every_kind_of_padding(name: str, kind: str) -> None:
    """The early way and the plain way it may end in, with a bool, an integer and a float mask."""
    case, mask = case_of(name), MASKS[kind]
    model, inputs = case.build(), case.inputs(mask)
    want = run(model, inputs)
    stack = stack_of(model)
    for dtype in (torch.int64, torch.bool, torch.float32, torch.int32, torch.int64):
        assert_equal(case, mask, run(model, {**inputs, "attention_mask": mask.to(dtype)}), want)
    assert stack.early is None
    assert stack.late is None


def test_positional_mask() -> None:
    case, mask = case_of("bert"), padded_mask((5, 10, 4, 2))
    model, inputs = case.build(), case.inputs(mask)
    want = run(model, inputs)
    stack = stack_of(model)
    with torch.no_grad():
        for _ in range(4):
            got = model(inputs["input_ids"], inputs["attention_mask"]).last_hidden_state
    valid = mask.bool()
    torch.testing.assert_close(got[valid], want["last_hidden_state"][valid], rtol=0, atol=2e-5)
    assert stack.graphs.quick


def test_a_mask_that_is_not_handed_on() -> None:
    """LayoutLM makes a mask of its own from it: it is read where the layers get it, as before."""
    case = case_of("layoutlm")
    model = case.build()
    stack = stack_of(model)
    assert not stack.passes_mask_on
    run(model, case.inputs(padded_mask()))
    assert stack.graphs.arena is None


def test_gradients_take_the_late_way() -> None:
    case, mask = case_of("bert"), padded_mask((5, 10, 4, 2))
    model, inputs = case.build(), case.inputs(mask)
    stack = stack_of(model)
    hidden = model(**inputs).last_hidden_state
    assert hidden.requires_grad
    assert stack.outcomes["direct"] == 1
