"""Loading holds the final model and one 16-bit tensor, not more."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import onegpu
from onegpu import QuantConfig

CONFIGS = {
    "nf4": QuantConfig("nf4"),
    "nf4-double": QuantConfig("nf4", double_quant=True),
    "fp4-search": QuantConfig("fp4", scale_search=True),
    "int8": QuantConfig("int8"),
}
# What the quantizers of the CPU need beside their input and output: a few chunks of a fixed size, whatever the tensor.
CHUNKS = 24 * 2**20


class PeakBytes(TorchDispatchMode):
    """Counts the bytes of storages that operators make, while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                self.count(tensor.untyped_storage())
        return out

    def count(self, storage: Any) -> None:
        key = storage.data_ptr()
        if storage.nbytes() == 0 or key in self.seen:
            return
        self.seen.add(key)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.release, key, storage.nbytes())

    def release(self, key: int, num_bytes: int) -> None:
        self.seen.discard(key)
        self.now -= num_bytes


def big_llama() -> Any:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512,
            hidden_size=1024,
            intermediate_size=8192,
            num_hidden_layers=2,
            num_attention_heads=8,
            num_key_value_heads=4,
        )
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("big")
    with torch.device("cpu"):
        big_llama().to(torch.bfloat16).save_pretrained(path)
    return path


def model_bytes(model: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_peak_on_the_cpu_by_counting(config: QuantConfig, folder: Path) -> None:
    gc.collect()
    with PeakBytes() as counted:
        model = onegpu.AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu")
    final, largest = model_bytes(model), 8192 * 1024 * 2
    assert counted.peak > final, "nothing was counted"
    assert counted.peak <= 1.05 * final + largest + CHUNKS, (counted.peak, final, largest)
    # Loading it in 16 bit would not have passed.
    assert onegpu.report(model).original_bytes > 1.05 * final + largest + CHUNKS


@pytest.mark.gpu
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_peak_on_a_gpu(config: QuantConfig, folder: Path) -> None:
    onegpu.AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)  # kernels are compiled once
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = onegpu.AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    assert model.device.type == "cuda"
    final, largest = model_bytes(model), 8192 * 1024 * 2
    peak = torch.cuda.max_memory_allocated() - before
    assert peak <= 1.05 * final + largest, (peak, final, largest)
    del model
    assert torch.cuda.memory_allocated() - before < 2**20


@pytest.mark.gpu
def test_peak_of_experts_on_a_gpu(tmp_path: Path) -> None:
    """A layer's experts are merged on the CPU: the device sees one expert in 16 bit at a time."""
    config = MixtralConfig(
        vocab_size=512,
        hidden_size=1024,
        intermediate_size=2048,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        num_local_experts=8,
    )
    MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    onegpu.AutoModelForCausalLM.from_pretrained(tmp_path, load_in_4bit=True)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = onegpu.AutoModelForCausalLM.from_pretrained(tmp_path, load_in_4bit=True)
    largest = 2 * 2048 * 1024 * 2
    peak = torch.cuda.max_memory_allocated() - before
    # The stacked codes of a layer exist twice for a moment, as a list of experts and joined.
    assert peak <= 1.05 * model_bytes(model) + largest + 8 * 2 * 2048 * 1024 // 2 * 1.2, (peak, model_bytes(model))
