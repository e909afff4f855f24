"""On a GPU: equal to plain Transformers in every dtype, and captured graphs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from encoder.test_architectures import MASKS
from encoder.zoo import CASES, Case, padded_mask
from onegpu.bench import encode as bench
from onegpu.encoder import Encoder, EncoderOptions
from onegpu.encoder.optimize import optimize_encoder, restore_encoder

pytestmark = pytest.mark.gpu
# Of the largest value, against the plain model in float32: what that dtype's own roundings make, and three times it.
TOLERANCE = {torch.float32: 3e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
VARIANTS = {
    "default": EncoderOptions(),
    "epilogue": EncoderOptions(fuse_activation="epilogue"),
    "ours": EncoderOptions(attention="onegpu_varlen"),
    "no graphs": EncoderOptions(graphs=False),
}


@pytest.fixture(autouse=True)
def no_tf32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def floats(model: Any, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    first = next(model.parameters())
    moved = {k: v.cuda().to(first.dtype) if v.is_floating_point() else v.cuda() for k, v in inputs.items()}
    torch.manual_seed(5)
    with torch.no_grad():
        output = model(**moved)
    return {k: v.float().cpu() for k, v in output.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}


BY_DTYPE = [(case, torch.float16) for case in CASES] + [
    (case, dtype)
    for case in CASES
    for dtype in (torch.float32, torch.bfloat16)
    if case.name in ("bert", "t5-encoder", "modernbert", "mpnet", "roformer", "wav2vec2")
]


@pytest.mark.parametrize(("case", "dtype"), BY_DTYPE, ids=lambda value: getattr(value, "name", str(value)))
def test_every_architecture(case: Case, dtype: torch.dtype) -> None:
    masks = [padded_mask((5, 10, 4, 2)), padded_mask((9, 2, 3, 6)), padded_mask((6, 10, 3, 2))]
    model = case.build().cuda()
    wanted = [floats(model, case.inputs(mask)) for mask in masks]
    model = model.to(dtype)
    plain = [floats(model, case.inputs(mask)) for mask in masks]
    report = optimize_encoder(model)
    for _ in range(3):
        for mask, want, own in zip(masks, wanted, plain, strict=True):
            got = floats(model, case.inputs(mask))
            for name, expected in want.items():
                actual, theirs = got[name], own[name]
                if not bool(theirs.isfinite().all()):
                    continue  # this dtype is too small for the plain model too
                if expected.dim() == 3 and expected.shape[0] == len(mask) and expected.shape[1] >= mask.shape[1]:
                    valid = case.valid(mask, expected.shape[1])
                    expected, actual, theirs = expected[valid], actual[valid], theirs[valid]
                scale = float(expected.abs().max())
                error, budget = float((actual - expected).abs().max()), float((theirs - expected).abs().max())
                assert error <= max(3 * budget, TOLERANCE[dtype] * scale), name
    # Eight bits of mantissa can part two right answers by more than the proof allows: then it declines, which is safe.
    if case.reason is None and dtype is not torch.bfloat16:
        assert report.is_optimized, report.lines()


@pytest.mark.parametrize("variant", VARIANTS)
def test_bert_in_graphs(variant: str) -> None:
    case = next(case for case in CASES if case.name == "bert")
    model = case.build().cuda().half()
    wanted = {kind: floats(model, case.inputs(mask)) for kind, mask in MASKS.items()}
    stack = optimize_encoder(model, VARIANTS[variant]).stacks[0].stack
    assert stack is not None
    for _ in range(3):
        for kind, mask in MASKS.items():
            got, rows = floats(model, case.inputs(mask)), mask.bool().any(1)
            for name, want in wanted[kind].items():
                valid = mask.bool() & rows[:, None] if want.dim() == 3 else rows
                assert float((got[name][valid] - want[valid]).abs().max()) <= 2e-2 * float(want.abs().max())
    if variant == "no graphs":
        assert not stack.graphs.captured
    else:
        assert stack.graphs.captured
        assert not stack.graphs.refused
    weight = model.encoder.layer[0].output.dense.weight
    with torch.no_grad():
        weight.mul_(0.5)
    got = floats(model, case.inputs(MASKS["right"]))
    restore_encoder(model)
    want = floats(model, case.inputs(MASKS["right"]))
    valid = MASKS["right"].bool()
    key = "last_hidden_state"
    assert float((got[key][valid] - want[key][valid]).abs().max()) <= 2e-2 * float(want[key].abs().max())


def test_one_wait_a_forward() -> None:
    """The host waits for the mask and for nothing else; with lengths known beforehand, for nothing at all."""
    model = bench.random_model("minilm-l6", torch.float16, torch.device("cuda"))
    texts = bench.make_texts([30, 7, 19, 30], 4, 30000, torch.device("cuda"))
    report = optimize_encoder(model)
    assert report.is_optimized
    from onegpu.attention.unpadded import UnpaddedBatch
    from onegpu.encoder.optimize import known_batch

    with torch.inference_mode():
        for _ in range(4):
            model(**texts.batches[0])
        known = UnpaddedBatch.from_lengths(texts.lengths, 30, "cuda")
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            known_batch(model, known)
            model(**texts.batches[0])
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_encoder_in_half(minilm: Path) -> None:
    texts = ["a cat", "", "a much longer sentence about a dog " * 20] * 50
    here = Encoder.from_pretrained(str(minilm), device="cpu").encode(texts)
    there = Encoder.from_pretrained(str(minilm), device="cuda", tokens_per_batch=999).encode(texts)
    assert bench.smallest_cosine(here, there) >= 1 - 1e-4
