"""The slots are those that a generation makes: their number, their capacity, and their bytes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import onegpu
from onegpu.decoder import workspace
from onegpu.decoder.crossed import CrossedCache
from onegpu.decoder.driver import Driver
from onegpu.decoder.options import DecoderOptions
from onegpu.decoder.ways import SOURCE_STEP
from onegpu.memory import slots as planned
from onegpu.memory.geometry import read_geometry
from onegpu.memory.runtime import cache_bytes, kv_bytes
from tiny_models import MODELS

BY_NAME = {model.name: model for model in MODELS}
KV = {"16bit": None, "int8": "int8", "fp8": "fp8"}


def test_slots_are_counted_as_the_decoder_makes_them() -> None:
    for tokens in (1, 255, 256, 257, 2049, 4096, 4097, 8193, 32896):
        assert planned.capacity(tokens) == workspace.capacity_bucket(tokens)
    for batch in range(1, planned.MOST_SLOTS + 1):
        assert planned.slots(batch) == workspace.bucket(batch)
    assert DecoderOptions().max_batch == planned.MOST_SLOTS
    assert planned.SOURCE_STEP == SOURCE_STEP


def held_by(model: Any, prompt: int, new: int, batch: int) -> int:
    """Bytes of the slots that `generate` made."""
    ids = torch.randint(4, 90, (batch, prompt), generator=torch.Generator().manual_seed(0))
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, pad_token_id=0)
    (driver,) = [value for value in vars(model).values() if isinstance(value, Driver)]
    kv = driver.workspaces[-1][0].kv
    tensors = [t for layer in kv.layers for t in (layer.k, layer.v, layer.k_scale, layer.v_scale) if t is not None]
    if isinstance(kv, CrossedCache):
        tensors += [kv.hidden, *(t for layer in kv.cross for t in (layer.k, layer.v))]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("kv_dtype", KV)
@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "gpt2"])
def test_the_cache_is_what_a_generation_holds(name: str, kv_dtype: str) -> None:
    model = BY_NAME[name].build(torch.bfloat16)
    onegpu.optimize(model, kv_cache_dtype=KV[kv_dtype])
    geometry = read_geometry(model.config.to_dict())
    held = held_by(model, 20, 4, 2)
    if name == "gpt2":  # its layers end with their table of positions
        assert held <= cache_bytes(geometry, 24, 2, kv_dtype)
    else:
        assert held == cache_bytes(geometry, 24, 2, kv_dtype)
    assert kv_bytes(geometry, 24, 2, kv_dtype) < held, "slots are larger than what is in them"


def test_layers_with_a_window_have_whole_slots() -> None:
    geometry = read_geometry(BY_NAME["mistral"].make_config().to_dict())
    assert any(window is not None for window in geometry.windows)
    assert cache_bytes(geometry, 8192, 1) == 2 * cache_bytes(geometry, 4096, 1)


def test_batches_that_have_no_slots_are_counted_as_they_grow() -> None:
    geometry = read_geometry(BY_NAME["llama"].make_config().to_dict())
    assert cache_bytes(geometry, 100, 65) == kv_bytes(geometry, 100, 65)
    assert cache_bytes(geometry, 100, 64) == 64 * kv_bytes(geometry, 256, 1)
    encoder = SimpleNamespace(kind="encoder", windows=(), layers=2)
    assert not planned.has_slots(encoder, 1)  # type: ignore[arg-type]
    hybrid = SimpleNamespace(kind="decoder", windows=(None,), layers=2)
    assert not planned.has_slots(hybrid, 1)  # type: ignore[arg-type]
