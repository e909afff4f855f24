"""On a GPU: every decoder captured, the same tokens as without graphs, no waiting for the host, memory given back."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

from decoder.calls import DECODERS, NOT_OURS, build, outcomes, prompts, ready
from onegpu.decoder import DecoderOptions, decoder_report, optimize_decoder, restore_decoder
from onegpu.decoder import generate as generate_module
from onegpu.decoder.driver import Driver
from onegpu.decoder.engine import Engine
from onegpu.errors import DoesNotFitError
from tiny_models import TinyModel

pytestmark = pytest.mark.gpu
NEW = {"max_new_tokens": 10, "do_sample": False}
# Falcon picks heads with a list, which is copied from the host.
NOT_CAPTURED = {"falcon", "falcon-new"}


def on_gpu(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value.cuda() for name, value in batch.items()}


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "universal"])
@pytest.mark.parametrize("entry", DECODERS, ids=lambda entry: entry.name)
def test_every_decoder_is_captured(entry: TinyModel, fused: bool) -> None:
    model = ready(entry).cuda()
    batch = on_gpu(prompts())
    wanted = model.generate(**batch, **NEW)
    optimize_decoder(model, DecoderOptions(graphs=False, fused=fused))
    eager = model.generate(**batch, **NEW)
    restore_decoder(model)
    report = optimize_decoder(model, DecoderOptions(fused=fused))
    got = [model.generate(**batch, **NEW) for _ in range(2)]
    assert report.is_optimized == (entry.name not in NOT_OURS), report.lines()
    assert torch.equal(eager, wanted)
    assert all(torch.equal(each, wanted) for each in got)
    now = decoder_report(model)
    assert now is not None
    if entry.name not in NOT_OURS | NOT_CAPTURED:
        assert now.parts[0].graphs == 1, now.lines()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "mixtral", "phi3", "bloom"])
def test_sixteen_bit(name: str, dtype: torch.dtype) -> None:
    model = build(name).to("cuda", dtype)
    batch = on_gpu(prompts())
    optimize_decoder(model, DecoderOptions(graphs=False))
    eager = model.generate(**batch, **NEW)
    restore_decoder(model)
    report = optimize_decoder(model)
    assert report.is_optimized, report.lines()
    assert torch.equal(model.generate(**batch, **NEW), eager)


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 17])
def test_batches_of_every_size(rows: int) -> None:
    model = build("llama").cuda()
    lengths = tuple(1 + (7 * row) % 12 for row in range(rows))
    batch = on_gpu(prompts(lengths))
    wanted = model.generate(**batch, **NEW)
    optimize_decoder(model)
    for _ in range(2):
        assert torch.equal(model.generate(**batch, **NEW), wanted)
    assert outcomes(model) == {"fast": 2}


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "bloom"])
def test_replays_never_wait(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(name).cuda()
    batch = on_gpu(prompts())
    optimize_decoder(model)
    wanted = model.generate(**batch, **NEW)
    plain_step = Engine.step

    def watched(engine: Engine) -> None:
        if engine.waiting:
            plain_step(engine)
            return
        torch.cuda.set_sync_debug_mode("error")
        try:
            plain_step(engine)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Engine, "step", watched)
    assert torch.equal(model.generate(**batch, **NEW), wanted)


def test_sampling_is_captured_with_its_noise() -> None:
    model = build("llama").cuda()
    batch = on_gpu(prompts((12,)))
    options = {"max_new_tokens": 12, "do_sample": True, "top_k": 30}
    optimize_decoder(model)
    torch.manual_seed(1)
    first = model.generate(**batch, **options)
    second = model.generate(**batch, **options)
    torch.manual_seed(1)
    again = model.generate(**batch, **options)
    assert not torch.equal(first, second)
    assert torch.equal(first, again)


@pytest.mark.parametrize("kv_cache_dtype", ["int8", "fp8"])
def test_keys_and_values_in_8_bit(kv_cache_dtype: str) -> None:
    model = build("llama").to("cuda", torch.bfloat16)
    batch = on_gpu(prompts())
    options = {**NEW, "return_dict_in_generate": True, "output_logits": True}
    optimize_decoder(model)
    wanted = model.generate(**batch, **options)
    optimize_decoder(model, DecoderOptions(kv_cache_dtype=kv_cache_dtype))
    got = model.generate(**batch, **options)
    same = got.sequences[:, 12] == wanted.sequences[:, 12]
    assert bool(same.any())
    assert float(torch.cosine_similarity(got.logits[1], wanted.logits[1], dim=-1)[same].min()) > 0.97


def test_memory_is_back_after_running_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama").cuda()
    batch = on_gpu(prompts())
    optimize_decoder(model)
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()

    def greedy_for_memory(*_: Any) -> None:
        torch.empty(2**50, dtype=torch.uint8, device="cuda")

    with monkeypatch.context() as patch:
        patch.setattr(generate_module, "check_numbers", greedy_for_memory)
        with pytest.raises(DoesNotFitError, match="out of memory while generating"):
            model.generate(**batch, **NEW)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before + 2**20
    assert model.generate(**batch, **NEW).shape == (3, 22)


def test_restoring_gives_all_memory_back() -> None:
    model = build("llama").cuda()
    batch = on_gpu(prompts())
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    left = []
    for _ in range(2):  # after the first time kernels keep their counters
        optimize_decoder(model)
        model.generate(**batch, **NEW)
        driver: Driver = model.__dict__["_onegpu_decoder"]
        assert driver.workspaces
        del driver
        restore_decoder(model)
        gc.collect()
        # As many as threads and streams that multiplied; they are torch's.
        torch._C._cuda_clearCublasWorkspaces()
        left.append(torch.cuda.memory_allocated())
    assert left[1] <= left[0] + 2**20
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
