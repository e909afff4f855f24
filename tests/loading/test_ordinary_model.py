"""What comes back is an ordinary Transformers model: everything its users do with one works."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, pipeline

import onegpu
from onegpu import QuantConfig
from onegpu.errors import DeviceError
from onegpu.nn import QuantLinear4bit, QuantLinear8bit

Auto = onegpu.AutoModelForCausalLM
CONFIGS = {"4bit": QuantConfig("nf4", double_quant=True), "8bit": QuantConfig("int8")}


@pytest.fixture(scope="module", params=CONFIGS.values(), ids=CONFIGS)
def model(request: pytest.FixtureRequest, llama_folder: Path) -> Any:
    return Auto.from_pretrained(llama_folder, quantization_config=request.param)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{index}": index for index in range(126)} | {"[UNK]": 126, "[PAD]": 127}
    inner = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", pad_token="[PAD]", eos_token="[PAD]")


def test_its_class(model: Any) -> None:
    assert isinstance(model, LlamaForCausalLM)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert not model.training
    assert model.dtype == torch.bfloat16
    kind = QuantLinear8bit if model.config.quantization_config.load_in_8bit else QuantLinear4bit
    assert type(model.model.layers[0].mlp.up_proj) is kind
    assert type(model.lm_head) is torch.nn.Linear


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 20},
        {"num_beams": 3, "do_sample": False},
        {"num_beams": 2, "num_return_sequences": 2, "do_sample": True},
        {"do_sample": False, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    ],
    ids=["greedy", "sampling", "beams", "beam-sampling", "penalties"],
)
def test_generate(model: Any, ids: torch.Tensor, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    out = model.generate(ids, max_new_tokens=6, pad_token_id=0, **options)
    assert out.shape[0] == options.get("num_return_sequences", 1)
    assert torch.equal(out[:, :8], ids.expand(out.shape[0], -1))
    assert 8 < out.shape[1] <= 14


def test_greedy_is_what_the_dequantized_model_says(llama_folder: Path, ids: torch.Tensor) -> None:
    model = Auto.from_pretrained(llama_folder, load_in_4bit=True, dtype=torch.float32)
    plain = copy.deepcopy(model).dequantize()
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **options), plain.generate(ids, **options))


def test_pipeline(model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    run = pipeline("text-generation", model=model, tokenizer=tokenizer)
    [answer] = run("w3 w4 w5", max_new_tokens=4, do_sample=False)
    assert answer["generated_text"].startswith("w3 w4 w5")


def test_lora_forward_and_backward(llama_folder: Path, ids: torch.Tensor, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = Auto.from_pretrained(llama_folder, load_in_4bit=True, dtype=torch.float32)
    base = model(ids).logits.detach()
    plain = copy.deepcopy(model).dequantize()
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(1)
    tuned = peft.get_peft_model(model, config)
    torch.manual_seed(1)
    reference = peft.get_peft_model(plain, config)
    grads = []
    for one in (tuned, reference):
        out = one(input_ids=ids, labels=ids)
        assert (out.logits - base).abs().max() > 1e-3
        out.loss.backward()
        grads.append({name: p.grad for name, p in one.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert all("lora" in name for name in grads[0])
    for name, grad in grads[0].items():
        assert torch.allclose(grad, grads[1][name], rtol=1e-3, atol=1e-6), name
    tuned.save_pretrained(tmp_path / "adapter")
    fresh = Auto.from_pretrained(llama_folder, load_in_4bit=True, dtype=torch.float32)
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    assert torch.allclose(loaded(ids).logits, tuned(ids).logits, atol=1e-5)


def test_8bit_gives_a_gradient_for_the_input(llama_folder: Path, ids: torch.Tensor) -> None:
    model = Auto.from_pretrained(llama_folder, load_in_8bit=True, dtype=torch.float32)
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
    model(inputs_embeds=embeds).logits.square().mean().backward()
    assert embeds.grad is not None
    assert float(embeds.grad.abs().max()) > 0
    assert all(p.grad is None for m in model.modules() if isinstance(m, QuantLinear8bit) for p in m.parameters())


def test_compile_of_a_linear(model: Any) -> None:
    layer = model.model.layers[0].mlp.up_proj
    x = torch.randn(3, 128, dtype=torch.bfloat16)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))


def test_deepcopy_is_its_own(model: Any, ids: torch.Tensor, tmp_path: Path) -> None:
    other = copy.deepcopy(model)
    assert type(other) is type(model)
    assert torch.equal(other(ids).logits, model(ids).logits)
    with torch.no_grad():
        other.model.layers[0].self_attn.q_proj.weight.zero_()
    assert not torch.equal(other(ids).logits, model(ids).logits)
    other.save_pretrained(tmp_path)
    assert torch.equal(Auto.from_pretrained(tmp_path)(ids).logits, other(ids).logits)


def test_torch_save_of_the_whole_model(model: Any, ids: torch.Tensor) -> None:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_moving_keeps_the_stored_bytes(model: Any, ids: torch.Tensor) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    moved = copy.deepcopy(model).to("cpu").to(torch.float16)
    layer, original = moved.model.layers[0].mlp.up_proj, model.model.layers[0].mlp.up_proj
    for name, tensor in layer.state.items():
        assert tensor.dtype == original.state[name].dtype
        assert torch.equal(tensor, original.state[name]), name
    assert moved.lm_head.weight.dtype == torch.float16
    assert torch.isfinite(moved(ids).logits).all()
    with pytest.raises(ValueError, match="half"):
        model.half()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_state_dict_round_trip(model: Any, llama_folder: Path, ids: torch.Tensor) -> None:
    config = CONFIGS["8bit" if model.config.quantization_config.load_in_8bit else "4bit"]
    other = Auto.from_pretrained(llama_folder, quantization_config=config)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.zero_()
    assert not torch.equal(other(ids).logits, model(ids).logits)
    assert other.load_state_dict(model.state_dict()).missing_keys == []
    assert torch.equal(other(ids).logits, model(ids).logits)


def test_del_frees_the_memory_at_once(llama_folder: Path, ids: torch.Tensor) -> None:
    model = Auto.from_pretrained(llama_folder, load_in_4bit=True)
    model(ids)
    held = [weakref.ref(parameter) for parameter in model.parameters()]
    gc.collect()
    gc.disable()
    try:
        del model
        assert all(reference() is None for reference in held)
    finally:
        gc.enable()


def test_inputs_on_another_device(model: Any, ids: torch.Tensor) -> None:
    with pytest.raises(DeviceError, match=r"the model is on cpu, an input is on meta\n\nhint: move the inputs"):
        model(ids.to("meta"))


def test_a_missing_head_is_drawn_and_stays_trainable(llama_folder: Path, ids: torch.Tensor) -> None:
    model = onegpu.AutoModelForSequenceClassification.from_pretrained(llama_folder, load_in_4bit=True, num_labels=3)
    assert type(model.score) is torch.nn.Linear
    assert model.score.weight.requires_grad
    assert model(ids, attention_mask=torch.ones_like(ids)).logits.shape == (1, 3)
    assert isinstance(model.model.layers[0].mlp.up_proj, QuantLinear4bit)


def test_dequantize_gives_the_plain_model(model: Any, llama: Any, ids: torch.Tensor, tmp_path: Path) -> None:
    plain = copy.deepcopy(model).dequantize()
    assert type(plain) is LlamaForCausalLM
    assert not getattr(plain, "is_quantized", False)
    assert plain.state_dict().keys() == llama.state_dict().keys()
    assert all(tensor.dtype == torch.bfloat16 for tensor in plain.parameters())
    plain.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(again(ids).logits, plain(ids).logits)
