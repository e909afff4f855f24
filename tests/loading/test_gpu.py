"""The whole way on a GPU: the CPU's answers, offload, graphs, memory given back."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import onegpu
from onegpu import QuantConfig
from onegpu.errors import DeviceError
from tiny_models import MODELS

pytestmark = pytest.mark.gpu
Auto = onegpu.AutoModelForCausalLM
CONFIGS = {
    "nf4": QuantConfig("nf4"),
    "nf4-double": QuantConfig("nf4", double_quant=True),
    "fp4": QuantConfig("fp4"),
    "int8": QuantConfig("int8"),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_gpu_answers_as_the_cpu(config: QuantConfig, llama_folder: Path, ids: torch.Tensor, tmp_path: Path) -> None:
    on_gpu = Auto.from_pretrained(llama_folder, quantization_config=config)
    on_cpu = Auto.from_pretrained(llama_folder, quantization_config=config, device_map="cpu")
    assert on_gpu.device.type == "cuda"
    for name, tensor in on_cpu.state_dict().items():
        if "nested_offset" not in name:  # a mean: the last bit depends on the order of the sum
            assert torch.equal(on_gpu.state_dict()[name].cpu(), tensor), name
    got, expected = on_gpu(ids.cuda()).logits.cpu().float(), on_cpu(ids).logits.float()
    assert (got - expected).norm() / expected.norm() < 2e-2
    on_gpu.save_pretrained(tmp_path)
    again = Auto.from_pretrained(tmp_path)
    assert torch.equal(again(ids.cuda()).logits, on_gpu(ids.cuda()).logits)


@pytest.mark.parametrize("name", ["gpt2", "falcon", "mixtral", "qwen3-moe", "gemma2", "t5", "bart"])
def test_architectures(name: str, tmp_path: Path) -> None:
    tiny = next(model for model in MODELS if model.name == name)
    tiny.build().save_pretrained(tmp_path)
    for flag in ("load_in_4bit", "load_in_8bit"):
        model = getattr(onegpu, tiny.auto).from_pretrained(tmp_path, dtype=torch.float32, **{flag: True})
        on_cpu = getattr(onegpu, tiny.auto).from_pretrained(
            tmp_path, dtype=torch.float32, device_map="cpu", **{flag: True}
        )
        got, expected = tiny.logits(model).cpu(), tiny.logits(on_cpu)
        assert (got - expected).norm() / expected.norm() < 2e-2, flag


def test_experts_decode_without_waiting(tmp_path: Path) -> None:
    tiny = next(model for model in MODELS if model.name == "mixtral")
    tiny.build(torch.bfloat16).save_pretrained(tmp_path)
    experts = Auto.from_pretrained(tmp_path, load_in_4bit=True).model.layers[0].mlp.experts
    x = torch.randn(1, 64, device="cuda", dtype=torch.bfloat16)
    index = torch.tensor([[3, 1]], device="cuda")
    weights = torch.tensor([[0.75, 0.25]], device="cuda", dtype=torch.bfloat16)
    expected = experts.forward_plain(torch.bfloat16, x, index, weights)
    experts(x, index, weights)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = experts(x, index, weights)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (got - expected).float().norm() / expected.float().norm() < 2e-2


def test_what_does_not_fit_goes_to_the_cpu(llama_folder: Path, ids: torch.Tensor, tmp_path: Path) -> None:
    whole = Auto.from_pretrained(llama_folder, load_in_4bit=True)
    with pytest.warns(UserWarning, match=r"of weights do not fit on the GPU and stay on the CPU; .* tokens per second"):
        model = Auto.from_pretrained(
            llama_folder, load_in_4bit=True, device_map="auto", max_memory={0: "190KB", "cpu": "2GB"}
        )
    assert {"cpu", 0} <= set(model.hf_device_map.values())
    assert torch.equal(model(ids.cuda()).logits.cpu(), whole(ids.cuda()).logits.cpu())
    assert model.generate(ids.cuda(), max_new_tokens=4, pad_token_id=0).shape[1] > 8
    model.save_pretrained(tmp_path)
    assert torch.equal(Auto.from_pretrained(tmp_path)(ids.cuda()).logits, whole(ids.cuda()).logits)


def test_inputs_left_on_the_cpu(llama_folder: Path, ids: torch.Tensor) -> None:
    model = Auto.from_pretrained(llama_folder, load_in_4bit=True)
    with pytest.raises(DeviceError, match=r"the model is on cuda:0, an input is on cpu\n\nhint: move the inputs"):
        model(ids)


def test_moving_to_the_cpu_and_back(llama_folder: Path, ids: torch.Tensor) -> None:
    model = Auto.from_pretrained(llama_folder, load_in_4bit=True)
    expected = model(ids.cuda()).logits.clone()
    assert torch.isfinite(model.to("cpu")(ids).logits).all()
    assert torch.equal(model.to("cuda")(ids.cuda()).logits, expected)


@pytest.mark.parametrize("flag", ["load_in_4bit", "load_in_8bit"])
def test_a_forward_is_captured_and_replayed(flag: str, llama_folder: Path) -> None:
    layer = Auto.from_pretrained(llama_folder, **{flag: True}).model.layers[0].mlp
    x = torch.randn(1, 128, device="cuda", dtype=torch.bfloat16)
    stream = torch.cuda.Stream()
    with torch.no_grad(), torch.cuda.stream(stream):
        layer(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            out = layer(x)
    x.copy_(torch.randn_like(x))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, layer(x))


def test_del_gives_the_memory_back(llama_folder: Path, ids: torch.Tensor) -> None:
    Auto.from_pretrained(llama_folder, load_in_4bit=True)(ids.cuda())
    gc.collect()
    before = torch.cuda.memory_allocated()
    model = Auto.from_pretrained(llama_folder, load_in_4bit=True)
    model(ids.cuda())
    assert torch.cuda.memory_allocated() > before
    del model
    assert torch.cuda.memory_allocated() == before


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_bitsandbytes_reads_it_and_answers_alike(
    config: QuantConfig, llama_folder: Path, ids: torch.Tensor, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    ours = Auto.from_pretrained(llama_folder, quantization_config=config)
    ours.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": 0}, dtype=torch.bfloat16)
    assert type(theirs.model.layers[0].mlp.up_proj).__module__.startswith("bitsandbytes")
    got, expected = ours(ids.cuda()).logits.float(), theirs(ids.cuda()).logits.float()
    assert (got - expected).norm() / expected.norm() < 3e-2


def test_bitsandbytes_reads_negative_scales_on_a_gpu(llama_folder: Path, ids: torch.Tensor, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    for double in (False, True):
        config = QuantConfig("nf4", scale_search=True, double_quant=double)
        ours = Auto.from_pretrained(llama_folder, quantization_config=config)
        layer = ours.model.layers[0].mlp.up_proj
        assert double or bool((layer.absmax < 0).any())
        ours.save_pretrained(tmp_path / str(double))
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / str(double), device_map={"": 0}, dtype=torch.bfloat16)
        for rows in (1, 8):  # their small and large products are different kernels
            got = ours(ids[:, :rows].cuda()).logits.float()
            expected = theirs(ids[:, :rows].cuda()).logits.float()
            assert (got - expected).norm() / expected.norm() < 3e-2
