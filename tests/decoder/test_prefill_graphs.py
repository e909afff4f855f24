"""Short prompts from graphs: which are, that they answer as the plain way does, and what happens where none can be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from onegpu.decoder import optimize_decoder, restore_decoder
from onegpu.decoder.cache import KVCache, LayerShape
from onegpu.decoder.classes import driver_of
from onegpu.decoder.options import DecoderOptions
from onegpu.decoder.prefill_graphs import PrefillGraphs
from onegpu.decoder.universal import UniversalPrefill
from onegpu.decoder.views import Segment


def small_model(device: str = "cpu") -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().to(device)


def graphs_over(model: Any) -> PrefillGraphs:
    shape = LayerShape(2, 16, 16, torch.float32, torch.device("cpu"))
    return PrefillGraphs(UniversalPrefill(model, KVCache([shape] * 2, 2, 256)), lambda: None)


def test_which_rows_have_a_graph() -> None:
    graphs = graphs_over(small_model())
    ids = torch.zeros(100, dtype=torch.int64)
    assert graphs.key_of([Segment(1, 0, 100)], ids, [99]) == (1, 128)
    assert graphs.key_of([Segment(0, 0, 128)], torch.zeros(128, dtype=torch.int64), [127]) == (0, 128)
    assert graphs.key_of([Segment(0, 0, 300)], torch.zeros(300, dtype=torch.int64), [299]) is None  # beyond the slot
    assert graphs.key_of([Segment(0, 8, 100)], ids, [99]) is None
    assert graphs.key_of([Segment(0, 0, 50), Segment(1, 0, 50)], ids, [49, 99]) is None
    assert graphs.key_of([Segment(0, 0, 100)], torch.zeros(100, 64), [99]) is None


def test_what_cannot_be_captured_runs_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise RuntimeError("a layer waited for the host")

    monkeypatch.setattr("onegpu.decoder.prefill_graphs.capture", refuse)
    model = small_model()
    graphs = graphs_over(model)
    optimize_decoder(model)  # sets the attention that reads slots
    ids = torch.randint(0, 97, (20,))
    with torch.no_grad():
        outs = [graphs([Segment(0, 0, 20)], ids, [19]) for _ in range(3)]
        plain = graphs.plain([Segment(0, 0, 20)], ids, [19])
    assert all(torch.equal(out, plain) for out in outs)
    assert graphs.refused == "RuntimeError: a layer waited for the host"


@pytest.mark.gpu
def test_replayed_prompts_answer_as_plain_ones() -> None:
    """Lengths around those of graphs, several times each, against the same model without graphs."""
    model = small_model("cuda")
    prompts = [torch.randint(0, 97, (1, n), device="cuda") for n in (3, 32, 33, 100, 127, 128, 129)]

    def answers() -> list[torch.Tensor]:
        return [
            model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, pad_token_id=0)
            for ids in prompts
            for _ in range(3)
        ]

    optimize_decoder(model, DecoderOptions(graphs=False))
    expected = answers()
    restore_decoder(model)
    optimize_decoder(model)
    assert all(torch.equal(got, want) for got, want in zip(answers(), expected, strict=True))
    driver = driver_of(model)
    assert driver is not None
    prefills = [workspace.prefill for workspace, _ in driver.workspaces]
    assert all(isinstance(prefill, PrefillGraphs) and prefill.captured for prefill in prefills)
