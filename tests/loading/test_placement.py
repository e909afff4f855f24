"""Devices, budgets and what is said of offload."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import onegpu
from onegpu.errors import DoesNotFitError
from onegpu.loading.placement import announce_offload, device_in, format_bytes

Auto = onegpu.AutoModelForCausalLM


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 * 2**20, "3.0 MiB"), (6 * 2**30, "6.00 GiB")],
)
def test_bytes_for_people(value: int, text: str) -> None:
    assert format_bytes(value) == text


def test_the_longest_prefix_says_where() -> None:
    device_map = {"model": 0, "model.layers.1": "cpu", "model.layers.1.mlp": 1, "lm_head": "disk"}
    here = torch.device("cpu")
    assert device_in(device_map, "model.layers.0.mlp.up_proj.weight", here) == torch.device("cuda:0")
    assert device_in(device_map, "model.layers.1.self_attn.q_proj.weight", here) == torch.device("cpu")
    assert device_in(device_map, "model.layers.1.mlp.up_proj.weight", here) == torch.device("cuda:1")
    assert device_in(device_map, "lm_head.weight", here) == torch.device("cpu")
    assert device_in({"": "cpu"}, "anything", torch.device("meta")) == torch.device("cpu")
    assert device_in(None, "anything", torch.device("meta")) == torch.device("meta")


def test_offload_says_how_much_and_how_fast() -> None:
    sizes = {"": 12 * 2**30, "model.layers.0": 8 * 2**30, "model.layers.1": 4 * 2**30}
    with pytest.warns(UserWarning, match=r"4.00 GiB of 24.00 GiB .* stay on the CPU; .* at most 4.7 tokens per second"):
        announce_offload({"model.layers.0": 0, "model.layers.1": "cpu"}, sizes)


@pytest.mark.parametrize(
    "device_map", ["auto", "balanced", "sequential", "cpu", {"": "cpu"}, torch.device("cpu"), None]
)
def test_device_maps(device_map: Any, llama_folder: Path, ids: torch.Tensor) -> None:
    model = Auto.from_pretrained(llama_folder, load_in_4bit=True, device_map=device_map, max_memory={"cpu": 2**30})
    if torch.cuda.is_available():
        pytest.skip("these maps are for a machine without CUDA")
    assert model.device.type == "cpu"
    assert torch.isfinite(model(ids).logits).all()


@pytest.mark.parametrize("flag", ["load_in_4bit", "load_in_8bit"])
def test_disk_offload(flag: str, llama_folder: Path, tmp_path: Path, ids: torch.Tensor) -> None:
    """Packed weights wait on the disk, answer the same, and can be saved from there."""
    whole = Auto.from_pretrained(llama_folder, **{flag: True}, device_map="cpu")
    parts = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    parts |= {"lm_head": "cpu", "model.rotary_emb": "cpu"}
    model = Auto.from_pretrained(llama_folder, **{flag: True}, device_map=parts, offload_folder=tmp_path / "off")
    assert model.model.layers[1].mlp.up_proj.weight.is_meta
    assert torch.equal(model(ids).logits, whole(ids).logits)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(Auto.from_pretrained(tmp_path / "saved", device_map="cpu")(ids).logits, whole(ids).logits)


def test_what_is_needed_and_what_there_is(llama_folder: Path) -> None:
    with pytest.raises(DoesNotFitError) as caught:
        Auto.from_pretrained(llama_folder, load_in_4bit=True, device_map="auto", max_memory={"cpu": 100_000})
    assert "it needs 2" in caught.value.message
    assert "97.7 KiB (cpu: 97.7 KiB)" in caught.value.message
    assert "offload_folder for the disk" in caught.value.hint
