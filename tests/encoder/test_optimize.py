"""Heads on an optimized encoder, the ways that stay plain, and input that can't be right."""

from __future__ import annotations

import copy
import inspect
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from encoder.test_architectures import assert_equal, outcomes, run
from encoder.zoo import CASES, MODERN, SEQ2SEQ, SPEECH, TEXT, Case, padded_mask, seq2seq, speech, text
from onegpu.encoder import EncoderOptions
from onegpu.encoder.graphs import record_on_host
from onegpu.encoder.optimize import encoder_report, optimize_encoder, restore_encoder
from onegpu.errors import ArgumentError, ConfigError

BERT = next(case for case in CASES if case.name == "bert")


def choices(mask: Tensor) -> dict[str, Tensor]:
    rows = text(mask)
    return {name: value.view(2, 2, -1) for name, value in rows.items()}


HEADS = [
    Case("bert cross-encoder", "BertConfig", "BertForSequenceClassification", {**TEXT, "num_labels": 1}),
    Case("roberta sequence", "RobertaConfig", "RobertaForSequenceClassification", TEXT),
    Case("xlm-roberta sequence", "XLMRobertaConfig", "XLMRobertaForSequenceClassification", TEXT),
    Case("modernbert sequence", "ModernBertConfig", "ModernBertForSequenceClassification", MODERN),
    Case("electra sequence", "ElectraConfig", "ElectraForSequenceClassification", {**TEXT, "embedding_size": 16}),
    Case("bert tokens", "BertConfig", "BertForTokenClassification", TEXT),
    Case("bert masked words", "BertConfig", "BertForMaskedLM", TEXT),
    Case("albert masked words", "AlbertConfig", "AlbertForMaskedLM", {**TEXT, "embedding_size": 16}),
    Case(
        "distilbert question",
        "DistilBertConfig",
        "DistilBertForQuestionAnswering",
        {"dim": 32, "n_heads": 4, "n_layers": 2, "hidden_dim": 64, "vocab_size": 100, "max_position_embeddings": 64},
    ),
    Case("bert question", "BertConfig", "BertForQuestionAnswering", TEXT),
    Case("bert choices", "BertConfig", "BertForMultipleChoice", TEXT, choices),
    Case("bart words", "BartConfig", "BartForConditionalGeneration", SEQ2SEQ, seq2seq),
    Case("wav2vec2 sequence", "Wav2Vec2Config", "Wav2Vec2ForSequenceClassification", SPEECH, speech),
    Case("wav2vec2 letters", "Wav2Vec2Config", "Wav2Vec2ForCTC", SPEECH, speech),
]


@pytest.mark.parametrize("case", HEADS, ids=lambda case: case.name)
def test_heads(case: Case) -> None:
    mask = padded_mask((6, 10, 3, 2))
    model, inputs = case.build(), case.inputs(mask)
    want = run(model, inputs)
    assert optimize_encoder(model).is_optimized
    got = run(model, inputs)
    assert outcomes(model).get("direct") == 1
    if "start_logits" in got:
        for name in ("start_logits", "end_logits"):
            assert bool((got[name][mask == 0] == torch.finfo(torch.float32).min).all())
            torch.testing.assert_close(got[name][mask == 1], want[name][mask == 1], rtol=0, atol=2e-4)
    elif case.inputs is choices:
        torch.testing.assert_close(got["logits"], want["logits"], rtol=0, atol=2e-5)
    else:
        assert_equal(case, mask, got, want)


def plain_reason(model: Any) -> str:
    ways = [key for key in outcomes(model) if key.startswith("plain: ")]
    assert len(ways) == 1, outcomes(model)
    return ways[0].removeprefix("plain: ")


@pytest.mark.parametrize("in_config", [False, True])
def test_attentions_are_the_plain_ones(in_config: bool) -> None:
    model, flag = BERT.build(), "output_attentions"
    model.set_attn_implementation("eager")
    inputs = BERT.inputs(padded_mask())
    options = {} if in_config else {flag: True}
    optimize_encoder(model)
    if in_config:
        setattr(model.config, flag, True)
    with torch.no_grad():
        got = model(**inputs, **options)
        assert plain_reason(model) == f"{flag} was asked for"
        restore_encoder(model)
        want = model(**inputs, **options)
    name = flag.removeprefix("output_")
    assert len(got[name]) == len(want[name]) > 1
    assert all(torch.equal(a, b) for a, b in zip(got[name], want[name], strict=True))


@pytest.mark.parametrize("in_config", [False, True])
@pytest.mark.parametrize("name", ["bert", "roformer", "t5-encoder", "modernbert", "mpnet", "xlm-roberta", "wav2vec2"])
def test_hidden_states_without_padding(name: str, in_config: bool) -> None:
    """Of every layer, as many and of the same shapes; zeros at padding behind the first layer."""
    case, mask = next(case for case in CASES if case.name == name), padded_mask((6, 10, 3, 2))
    model, inputs = case.build(), case.inputs(mask)
    options = {} if in_config else {"output_hidden_states": True}
    model.config.output_hidden_states = in_config
    with torch.no_grad():
        want = model(**inputs, **options)
        report = optimize_encoder(model)
        for line in report.stacks:
            assert line.stack is not None
            line.stack.graphs.works_anywhere = True
            line.stack.graphs.capture = record_on_host
        for _ in range(3):
            got = model(**inputs, **options)
            run(model, {**inputs})  # the way of graphs in between
    assert outcomes(model)["direct"] >= 3
    assert len(got.hidden_states) == len(want.hidden_states) > 2
    for place, (actual, expected) in enumerate(zip(got.hidden_states, want.hidden_states, strict=True)):
        assert actual.shape == expected.shape
        valid = case.valid(mask, expected.shape[1])
        limit = 2e-5 * float(expected[valid].abs().max())
        assert float((actual[valid] - expected[valid]).abs().max()) <= limit
        assert place == 0 or float(actual[~valid].abs().max()) == 0
    valid = case.valid(mask, got.last_hidden_state.shape[1])
    assert torch.equal(got.hidden_states[-1][valid], got.last_hidden_state[valid])
    restore_encoder(model)
    with torch.no_grad():
        again = model(**inputs, **options)
    assert all(torch.equal(a, b) for a, b in zip(again.hidden_states, want.hidden_states, strict=True))


def test_a_layer_someone_watches_stays_plain() -> None:
    model, inputs = BERT.build(), BERT.inputs(padded_mask())
    want = run(model, inputs)
    optimize_encoder(model)
    seen = []
    model.encoder.layer[1].register_forward_hook(lambda module, args, output: seen.append(output.shape))
    got = run(model, inputs)
    assert torch.equal(got["last_hidden_state"], want["last_hidden_state"])
    assert seen == [(4, 10, 32)]
    assert plain_reason(model) == "a layer has a hook that is not ours"


def gradients(model: Any, inputs: dict[str, Tensor], mask: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    hidden = model(**inputs).last_hidden_state
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(8))
    (hidden * weights * mask[..., None]).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_training_is_plain() -> None:
    mask = padded_mask()
    model, inputs = BERT.build().train(), BERT.inputs(mask)
    want = gradients(model, inputs, mask)
    optimize_encoder(model)
    got = gradients(model, inputs, mask)
    assert plain_reason(model) == "the model is in training mode"
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("name", ["bert", "roformer", "t5-encoder", "modernbert", "mpnet"])
def test_gradients_without_padding(name: str) -> None:
    """eval() with gradients on: unpadded, differentiable, the plain gradients. 1e-4 of the largest.

    A key's bias moves no score against another: its gradient is zero but for rounding, hence the floor.
    """
    case, mask = next(case for case in CASES if case.name == name), padded_mask()
    model, inputs = case.build(), case.inputs(mask)
    want = gradients(model, inputs, mask)
    optimize_encoder(model)
    got = gradients(model, inputs, mask)
    assert outcomes(model) == {"direct": 1}
    assert got.keys() == want.keys()
    for key, expected in want.items():
        assert float((got[key] - expected).abs().max()) <= 1e-4 * max(float(expected.abs().max()), 0.1), key


def test_again_gives_the_same_report() -> None:
    model = BERT.build()
    report = optimize_encoder(model)
    assert optimize_encoder(model) is report
    other = optimize_encoder(model, EncoderOptions(graphs=False))
    assert other is not report
    assert encoder_report(model) is other
    restore_encoder(model)
    assert encoder_report(model) is None
    assert restore_encoder(model) is model


def test_what_others_read_off_the_model() -> None:
    model = BERT.build()
    before = inspect.signature(model.forward)
    names = [name for name, _ in model.named_modules()]
    optimize_encoder(model)
    assert inspect.signature(model.forward) == before
    assert [name for name, _ in model.named_modules()] == names
    assert type(model) is transformers.BertModel
    assert model.config._attn_implementation == "sdpa"


def test_a_pickled_model_is_optimized_too() -> None:
    model, inputs = BERT.build(), BERT.inputs(padded_mask())
    want = run(model, inputs)
    optimize_encoder(model)
    loaded = pickle.loads(pickle.dumps(model))
    assert_equal(BERT, padded_mask(), run(loaded, inputs), want)
    assert outcomes(loaded) == {"direct": 1}


def test_someone_else_wraps_a_forward() -> None:
    """accelerate and others set `forward` on modules; taking ours away must not take theirs."""
    model, inputs = BERT.build(), BERT.inputs(padded_mask())
    want = run(model, inputs)
    optimize_encoder(model)
    layer, calls = model.encoder.layer[0], []
    ours = layer.forward

    def theirs(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return ours(*args, **kwargs)

    layer.forward = theirs
    assert_equal(BERT, padded_mask(), run(model, inputs), want)
    restore_encoder(model)
    assert layer.__dict__["forward"] is theirs
    got = run(model, inputs)
    assert torch.equal(got["last_hidden_state"], want["last_hidden_state"])
    assert len(calls) == 2


def test_an_error_inside_leaves_nothing_behind() -> None:
    model, mask = BERT.build(), padded_mask()
    inputs = BERT.inputs(mask)
    want = run(model, inputs)
    optimize_encoder(model)
    layer = model.encoder.layer[1]
    weight, layer.output.dense.weight = layer.output.dense.weight, nn.Parameter(torch.zeros(32, 63))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        run(model, inputs)
    assert model.config._attn_implementation == "sdpa"
    layer.output.dense.weight = weight
    assert_equal(BERT, mask, run(model, inputs), want)


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama", "bert as a decoder"])
def test_decoders_are_left_alone(name: str) -> None:
    torch.manual_seed(0)
    if name == "gpt2":
        config: Any = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=100, n_positions=64)
        model: Any = transformers.GPT2LMHeadModel(config)
    elif name == "opt":
        config = transformers.OPTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            ffn_dim=64,
            vocab_size=100,
            word_embed_proj_dim=32,
            max_position_embeddings=64,
        )
        model = transformers.OPTForCausalLM(config)
    elif name == "llama":
        config = transformers.LlamaConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=64,
            vocab_size=100,
        )
        model = transformers.LlamaForCausalLM(config)
    else:
        model = transformers.BertLMHeadModel(transformers.BertConfig(**TEXT, is_decoder=True))
    report = optimize_encoder(model.eval())
    assert not report.is_optimized
    assert report.stacks[0].reason in ("its attention is causal", "it is a decoder")
    assert "as before, because" in report.lines()[0]


def test_a_chosen_attention_is_respected() -> None:
    model = BERT.build()
    model.set_attn_implementation("flex_attention")
    assert optimize_encoder(model).stacks[0].reason == "the attention implementation 'flex_attention' was chosen for it"


def test_no_attention_at_all() -> None:
    model = transformers.ResNetModel(transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1]))
    report = optimize_encoder(model)
    assert report.stacks == []
    assert "no layer stack with attention was found" in report.lines()[0]


def test_a_wrong_stack_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof against the plain model is what decides."""
    monkeypatch.setattr("onegpu.attention.varlen.run_grouped", None)
    original = torch.nn.functional.scaled_dot_product_attention

    def wrong(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return original(query, *args, **kwargs) * 1.01

    monkeypatch.setattr("onegpu.attention.varlen.scaled_dot_product_attention", wrong)
    model, inputs = BERT.build(), BERT.inputs(padded_mask())
    want = run(model, inputs)
    report = optimize_encoder(model)
    assert not report.is_optimized
    assert "differs from the plain model's" in str(report.stacks[0].reason)
    assert torch.equal(run(model, inputs)["last_hidden_state"], want["last_hidden_state"])


def test_mask_of_another_shape() -> None:
    model = BERT.build()
    optimize_encoder(model)
    with pytest.raises(ArgumentError, match=r"the shape of input_ids, \[4, 10\]; got \[4, 9\]"):
        model(input_ids=torch.ones(4, 10, dtype=torch.long), attention_mask=torch.ones(4, 9, dtype=torch.long))


@pytest.mark.parametrize("name", ["bert", "layoutlm", "markuplm", "roformer"])
@pytest.mark.parametrize("value", [2, 0.5, -1])
def test_odd_values_in_the_mask(name: str, value: float) -> None:
    """Whatever the plain model makes of them."""
    case, mask = next(case for case in CASES if case.name == name), padded_mask().float()
    mask[1, 4] = value
    model = case.build()
    inputs = {**case.inputs(padded_mask()), "attention_mask": mask}
    want = run(model, inputs)
    optimize_encoder(model)
    assert_equal(case, padded_mask(), run(model, inputs), want)


def test_four_dimensional_masks() -> None:
    """A mask of one's own, not of padding: the plain model's answer."""
    model, mask = BERT.build(), padded_mask()
    own = torch.rand(4, 1, 10, 10) > 0.3
    own[:, :, range(10), range(10)] = True
    inputs = {"input_ids": BERT.inputs(mask)["input_ids"], "attention_mask": own}
    want = run(model, inputs)
    optimize_encoder(model)
    got = run(model, inputs)
    torch.testing.assert_close(got["last_hidden_state"], want["last_hidden_state"], rtol=0, atol=2e-5)


def test_an_empty_batch() -> None:
    """BERT has no answer to it; neither have we another."""
    model = BERT.build()
    inputs = {"input_ids": torch.ones(0, 5, dtype=torch.long), "attention_mask": torch.ones(0, 5, dtype=torch.long)}
    with pytest.raises(RuntimeError, match="cannot reshape tensor of 0 elements"):
        run(model, inputs)
    optimize_encoder(model)
    with pytest.raises(RuntimeError, match="cannot reshape tensor of 0 elements"):
        run(model, inputs)


def test_answers_to_learn_from() -> None:
    """The loss is over all positions of a row, so the plain model computes it."""
    case, mask = next(case for case in HEADS if case.name == "bert question"), padded_mask()
    model, inputs = case.build(), case.inputs(mask)
    positions = {"start_positions": torch.tensor([1, 2, 0, 0]), "end_positions": torch.tensor([2, 4, 1, 0])}
    want = run(model, {**inputs, **positions})
    optimize_encoder(model)
    got = run(model, {**inputs, **positions})
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert plain_reason(model) == "switched off"
    short = run(model, inputs)["start_logits"].argmax(1)
    assert bool((short < mask.sum(1)).all())


def test_more_tokens_than_positions() -> None:
    model = BERT.build()
    optimize_encoder(model)
    ids = torch.ones(1, 65, dtype=torch.long)
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=ids, attention_mask=torch.ones_like(ids))


def test_unknown_options() -> None:
    with pytest.raises(ConfigError, match="fuse_activation must be one of"):
        EncoderOptions(fuse_activation="tanh")
    with pytest.raises(ConfigError, match="attention must be one of"):
        EncoderOptions(attention="flash")


@pytest.mark.parametrize("kind", ["load_in_4bit", "load_in_8bit"])
def test_quantized_encoders(kind: str, tmp_path: Path) -> None:
    """The linears are someone else's modules: they are called, never looked into."""
    import onegpu

    mask = padded_mask((6, 10, 3, 2))
    case = Case("bert", "BertConfig", "BertModel", {**TEXT, "hidden_size": 64, "intermediate_size": 128})
    case.build().save_pretrained(tmp_path)
    inputs = case.inputs(mask)
    model = onegpu.AutoModel.from_pretrained(tmp_path, dtype=torch.float32, **{kind: True}).eval()
    assert not any(type(m) is nn.Linear for m in model.encoder.modules())
    want = run(model, inputs)
    before = copy.deepcopy(model.state_dict())
    report = optimize_encoder(model)
    assert report.is_optimized, report.lines()
    got = run(model, inputs)
    for name, expected in want.items():
        valid = mask.bool() if expected.dim() == 3 else slice(None)
        mine, plain = got[name][valid], expected[valid]
        if kind == "load_in_4bit":
            assert float((mine - plain).abs().max()) <= 2e-5 * float(plain.abs().max())
        else:  # the padding rows that are gone had a say in which columns are outliers
            assert float(torch.cosine_similarity(mine, plain, dim=-1).min()) >= 0.98
    assert outcomes(model).get("direct") == 1
    restore_encoder(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
