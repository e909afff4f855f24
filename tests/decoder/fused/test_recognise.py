"""Which decoders are fused, which are not and why, and every number that was read."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from decoder.fused.models import TINY, build, plan_of, quantize
from onegpu.config import QuantConfig
from onegpu.decoder.fused import recognise
from tiny_models import MODELS

# Whoever is fused today stays fused: what is not in this list must be in REFUSED, with its reason.
RECOGNISED = {
    "llama",
    "llama-tied",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen3",
    "qwen3-moe",
    "gemma2",
    "gemma3",
    "phi3",
    "olmo2",
    "granite",
    "smollm3",
}
ELSEWHERE = "has no `layers` with a `norm` behind them"
REFUSED = {
    "bert-generation": ELSEWHERE,
    "bloom": ELSEWHERE,
    "codegen": ELSEWHERE,
    "falcon": ELSEWHERE,
    "falcon-new": ELSEWHERE,
    "gpt2": ELSEWHERE,
    "gpt-bigcode": ELSEWHERE,
    "gptj": ELSEWHERE,
    "gpt-neo": ELSEWHERE,
    "gpt-neox": ELSEWHERE,
    "opt": ELSEWHERE,
    "blip-2": ELSEWHERE,
    "bark": "does not say which its embeddings are",
    **dict.fromkeys(
        ["bart", "fsmt", "m2m100", "marian", "mbart", "pegasus", "prophetnet", "t5", "whisper"],
        "is no decoder-only Transformers model",
    ),
}


def test_the_lists_are_whole() -> None:
    assert RECOGNISED | set(REFUSED) == {tiny.name for tiny in MODELS}
    assert not RECOGNISED & set(REFUSED)


@pytest.mark.parametrize("name", sorted(RECOGNISED))
def test_recognised(name: str) -> None:
    model = build(name)
    plan = plan_of(model)
    assert len(plan.layers) == model.config.num_hidden_layers
    assert plan.is_current()
    own = {"mixtral": 2, "qwen3-moe": 1}.get(name, 0)
    assert [layer.down is None for layer in plan.layers].count(True) == own


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_refused(name: str) -> None:
    reason = recognise(build(name))
    assert isinstance(reason, str)
    assert REFUSED[name] in reason


def test_recognising_changes_nothing() -> None:
    model = build("gemma2")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    implementation = model.config._attn_implementation
    plan_of(model)
    assert model.config._attn_implementation == implementation
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def layers(name: str) -> Any:
    return plan_of(build(name)).layers


def test_numbers_of_attention() -> None:
    assert [layer.window for layer in layers("mistral")] == [8, 8]
    assert [layer.window for layer in layers("gemma2-capped")] == [4, None]
    assert [layer.softcap for layer in layers("gemma2-capped")] == [0.7, 0.7]
    assert [layer.scale for layer in layers("gemma2-capped")] == [5**-0.5] * 2
    assert [layer.scale for layer in layers("granite-numbers")] == [0.4, 0.4]
    assert [layer.window for layer in layers("phi3-partial")] == [4, 4]
    llama = layers("llama")[0]
    assert (llama.num_heads, llama.num_kv_heads, llama.head_dim) == (4, 2, 16)
    assert (llama.window, llama.softcap, llama.sinks) == (None, None, None)
    assert [layer.sinks is None for layer in layers("gpt-oss")] == [False, False]


def test_numbers_of_norms() -> None:
    gemma = layers("gemma2")[0]
    norms = [gemma.input_norm, gemma.post_attention_norm, gemma.mlp_norm, gemma.post_mlp_norm]
    assert [norm.offset for norm in norms] == [1.0] * 4
    llama = layers("llama")[0]
    assert (llama.input_norm.offset, llama.input_norm.eps) == (0.0, 1e-6)
    assert (llama.post_attention_norm, llama.post_mlp_norm) == (None, None)
    olmo = layers("olmo2")[0]
    assert (olmo.input_norm, olmo.mlp_norm) == (None, None)
    assert olmo.post_attention_norm is not None
    assert olmo.post_mlp_norm is not None
    assert not olmo.head_norm
    qwen = layers("qwen3")[0]
    assert qwen.head_norm
    assert qwen.q_norm.weight.shape == (16,)


def test_activations() -> None:
    assert layers("llama")[0].activation == "silu"
    assert layers("gemma2")[0].activation == "gelu_tanh"
    assert layers("llama-gelu")[0].activation == "gelu"


def test_rotation_by_layer() -> None:
    plan = plan_of(build("gemma3-both"))
    assert [layer.window for layer in plan.layers] == [4, None, 4, None]
    assert [plan.rotaries[layer.rotary].layer_type for layer in plan.layers] == [
        "sliding_attention",
        "full_attention",
    ] * 2
    smol = plan_of(build("smollm3-norope"))
    assert [layer.rotary for layer in smol.layers] == [0, None, 0, None]
    glm = plan_of(build("glm"))
    assert (glm.rotaries[0].interleaved, glm.rotaries[0].given) == (True, "halves")
    partial = plan_of(build("phi3-partial"))
    assert partial.rotaries[0].table(4, torch.float32, torch.device("cpu")).shape == (4, 2, 8)


def test_numbers_of_the_ends() -> None:
    plan = plan_of(build("granite-numbers"))
    assert (plan.embedding_multiplier, plan.logits_divisor, plan.logits_softcap) == (3.0, 5.0, None)
    assert [layer.residual_multiplier for layer in plan.layers] == [0.3, 0.3]
    assert plan_of(build("gemma2-capped")).logits_softcap == 1.5
    tied = build("llama-tied")
    assert plan_of(tied).head.weight is tied.get_input_embeddings().weight


def test_kinds_of_weights() -> None:
    for config in (QuantConfig("nf4"), QuantConfig("int8")):
        plan = plan_of(quantize(build("llama"), config))
        assert plan.has_int8 == (config.quant_type == "int8")


def reason(model: Any) -> str:
    found = recognise(model)
    assert isinstance(found, str)
    return found


def test_an_adapter_is_not_passed_over() -> None:
    peft = get_peft_model(build("llama"), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert "(PeftModelForCausalLM) is an adapter" in reason(peft.eval())
    assert re.search(r"self_attn.q_proj \(Linear\) is an adapter", reason(peft.base_model.model))


def test_hooks_and_foreign_forwards() -> None:
    model = build("llama")
    model.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    assert reason(model) == "model.layers.1.mlp (LlamaMLP) has hooks or a forward of its own"
    model = build("llama")
    model.model.norm.forward = model.model.norm.forward
    assert "model.norm (LlamaRMSNorm)" in reason(model)


def test_hooks_that_note_outputs_are_no_obstacle() -> None:
    model = build("llama")
    model(torch.tensor([[3, 4]]), output_hidden_states=True, output_attentions=False)
    assert any(module._forward_hooks for module in model.modules())
    plan_of(model)


def test_places() -> None:
    model = build("llama")
    model.model.layers[1].mlp.to("meta")
    assert reason(model) == "it is spread over cpu, meta"
    assert "on the meta device" in reason(build("llama").to("meta"))
    assert reason(build("llama").train()) == "it is in training mode"
    assert "no decoder-only Transformers model" in reason(nn.Linear(3, 3))


def test_what_differs_is_named() -> None:
    model = build("llama")
    model.model.layers[1].self_attn.q_proj = nn.Sequential(model.model.layers[1].self_attn.q_proj)
    assert reason(model) == (
        "model.layers.1.self_attn (LlamaAttention): q_proj is Sequential, not a plain linear layer"
    )

    class Doubled(type(model.model.layers[0])):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs) * 2

    model = build("llama")
    model.model.layers[0].__class__ = Doubled
    assert reason(model) == ("model.layers.0 (Doubled) gives the next layer something else than a residual layer does")

    class Shifted(type(model.model.norm)):  # type: ignore[misc]
        def forward(self, x: Any) -> Any:
            return super().forward(x) + 0.01

    model = build("llama")
    model.model.layers[1].input_layernorm.__class__ = Shifted
    assert reason(model) == "model.layers.1.input_layernorm (Shifted): does not compute RMSNorm"

    class Turned(type(model.model.layers[0].self_attn)):  # type: ignore[misc]
        def forward(self, hidden_states: Any, position_embeddings: Any, *args: Any, **kwargs: Any) -> Any:
            cos, sin = position_embeddings
            return super().forward(hidden_states, (sin, cos), *args, **kwargs)

    model = build("llama")
    model.model.layers[0].self_attn.__class__ = Turned
    assert "no rotary embedding of the model does what positions do to it" in reason(model)
    model = build("llama")
    model.model.layers[0].self_attn.is_causal = False
    assert "is not causal" in reason(model)


def test_a_mlp_of_another_kind_is_run_by_itself() -> None:
    class Squared(nn.Module):
        def forward(self, x: Any) -> Any:
            return torch.relu(x).square()

    model = build("llama")
    model.model.layers[0].mlp.act_fn = Squared()
    plan = plan_of(model)
    assert [layer.down is None for layer in plan.layers] == [True, False]


def test_every_tiny_model_is_looked_at() -> None:
    for name in set(TINY) - RECOGNISED - set(REFUSED):
        plan_of(build(name))
