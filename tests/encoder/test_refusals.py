"""Why a forward, or a whole stack, takes the plain way: each reason by its words, and the answer is the plain one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from encoder.test_architectures import outcomes, run
from encoder.zoo import CASES, padded_mask
from onegpu.attention import varlen
from onegpu.attention.varlen import BACKENDS, VarlenSpec
from onegpu.encoder.optimize import encoder_report, known_batch, optimize_encoder
from onegpu.errors import UnsupportedError

BERT = next(case for case in CASES if case.name == "bert")


def optimized() -> Any:
    model = BERT.build()
    optimize_encoder(model)
    return model


def reasons(model: Any) -> list[str]:
    return [key.removeprefix("plain: ") for key in outcomes(model) if key.startswith("plain: ")]


def check(mask: Tensor, reason: str) -> None:
    """An optimized model refuses this mask for that reason, and gives what the plain model gives."""
    inputs = BERT.inputs(padded_mask()) | {"attention_mask": mask}
    model = optimized()
    got = run(model, inputs)
    assert reasons(model) == [reason]
    want = run(BERT.build(), inputs)
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_a_row_that_begins_with_padding() -> None:
    mask = padded_mask()
    mask[1, 0] = 0
    check(mask, "a row begins with padding, and the model may read its first token")


def test_nothing_but_padding() -> None:
    mask = torch.zeros_like(padded_mask())
    inputs = BERT.inputs(padded_mask()) | {"attention_mask": mask}
    model = optimized()
    run(model, inputs)
    assert len(reasons(model)) == 1


def test_a_convolution_behind_the_layers() -> None:
    config = transformers.Wav2Vec2Config(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        conv_dim=(16, 16),
        conv_stride=(5, 2),
        conv_kernel=(10, 3),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
        add_adapter=True,
        output_hidden_size=32,
        vocab_size=32,
    )
    model = transformers.Wav2Vec2Model(config).eval()
    report = optimize_encoder(model)
    assert not report.is_optimized
    expected = "a convolution over time follows the layers and would see the padding"
    assert [stack.reason for stack in report.stacks] == [expected]
    assert expected in "\n".join(report.lines())


def test_a_batch_is_told_to_an_optimized_model_only() -> None:
    model = BERT.build()
    assert encoder_report(model) is None
    with pytest.raises(UnsupportedError, match="this model's encoder is not optimized"):
        known_batch(model, None)


def test_a_torch_without_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "torch_varlen_function", lambda: None)
    monkeypatch.setattr(varlen, "capability", lambda device: (9, 0))
    spec = VarlenSpec(torch.device("cuda", 0), torch.float16, 64)
    reason = BACKENDS[0].why_not(spec)
    assert reason == f"torch {torch.__version__} has no torch.nn.attention.varlen with windows"
    monkeypatch.setattr(varlen, "capability", lambda device: (7, 5))
    monkeypatch.setattr("torch.version.hip", None)
    assert BACKENDS[0].why_not(spec) == "needs compute capability 8.0"
