"""`generate` on an optimized model: Transformers' answer, by the engine where it can."""

from __future__ import annotations

import gc
import io
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import StoppingCriteria, TextStreamer

from decoder.calls import DECODERS, NOT_OURS, build, outcomes, prompts, ready
from onegpu.decoder import DecoderOptions, decoder_report, optimize_decoder, restore_decoder
from tiny_checkpoint import byte_tokenizer, save_tiny, tiny_llama
from tiny_models import TinyModel

NEW = {"max_new_tokens": 10, "do_sample": False}


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "universal"])
@pytest.mark.parametrize("entry", DECODERS, ids=lambda entry: entry.name)
def test_every_decoder(entry: TinyModel, fused: bool) -> None:
    model = ready(entry)
    batch = prompts()
    alone = {"input_ids": batch["input_ids"][:1, 5:]}
    wanted = [model.generate(**inputs, **NEW) for inputs in (batch, alone)]
    plain = model(**alone).logits
    report = optimize_decoder(model, DecoderOptions(fused=fused))
    assert report.is_optimized == (entry.name not in NOT_OURS), report.lines()
    got = [model.generate(**inputs, **NEW) for inputs in (batch, alone)]
    assert all(map(torch.equal, got, wanted))
    assert torch.equal(got[1][0, 7:], got[0][0, 12:])  # a row is the same alone and among others
    if report.is_optimized:
        assert outcomes(model) == {"fast": 2}
    model_class = type(model).__mro__[2]
    assert restore_decoder(model) is model
    assert type(model) is model_class
    assert decoder_report(model) is None
    assert torch.equal(model(**alone).logits, plain)
    assert torch.equal(model.generate(**batch, **NEW), wanted[0])


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "universal"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_long_prompts_are_taken_in_chunks(name: str, fused: bool) -> None:
    model = build(name)
    inputs = {"input_ids": torch.randint(3, 90, (2, 40), generator=torch.Generator().manual_seed(0))}
    wanted = model.generate(**inputs, **NEW)
    optimize_decoder(model, DecoderOptions(prefill_chunk=16, fused=fused))
    assert torch.equal(model.generate(**inputs, **NEW), wanted)


@pytest.mark.parametrize("kv_cache_dtype", ["int8", "fp8"])
def test_keys_and_values_in_8_bit(kv_cache_dtype: str) -> None:
    model = build("llama")
    batch = prompts()
    wanted = model.generate(**batch, **NEW, return_dict_in_generate=True, output_logits=True)
    optimize_decoder(model, DecoderOptions(kv_cache_dtype=kv_cache_dtype))
    got = model.generate(**batch, **NEW, return_dict_in_generate=True, output_logits=True)
    assert outcomes(model) == {"fast": 1}
    # The second step is the first to read the cache, after the same tokens.
    same = got.sequences[:, 12] == wanted.sequences[:, 12]
    cosine = torch.cosine_similarity(got.logits[1], wanted.logits[1], dim=-1)[same]
    assert bool(same.any())
    assert float(cosine.min()) > 0.97
    assert float(cosine.max()) < 1 - 1e-9


def test_the_same_slots_serve_again() -> None:
    model = build("llama")
    optimize_decoder(model)
    first = model.generate(**prompts(seed=1), **NEW)
    model.generate(**prompts((12, 3, 5), seed=2), **NEW)
    driver = model.__dict__["_onegpu_decoder"]
    assert len(driver.workspaces) == 1
    assert torch.equal(model.generate(**prompts(seed=1), **NEW), first)


def test_eos_pads_and_stops() -> None:
    model = build("llama")
    batch = prompts()
    free = model.generate(**batch, max_new_tokens=12, do_sample=False)
    model.generation_config.eos_token_id = [int(free[0, 14]), int(free[1, 17])]
    model.generation_config.pad_token_id = 1
    wanted = model.generate(**batch, max_new_tokens=40, do_sample=False)
    optimize_decoder(model)
    got = model.generate(**batch, max_new_tokens=40, do_sample=False)
    assert torch.equal(got, wanted)
    assert bool((got[:, 12:] == 1).any())


def test_sampling_draws_what_transformers_draws() -> None:
    model = build("llama")
    batch = prompts()
    options = {"max_new_tokens": 10, "do_sample": True, "temperature": 1.3, "top_k": 20, "repetition_penalty": 1.2}
    torch.manual_seed(5)
    wanted = model.generate(**batch, **options)
    optimize_decoder(model)
    torch.manual_seed(5)
    got = model.generate(**batch, **options)
    other = model.generate(**batch, **options)
    assert outcomes(model) == {"fast": 2}
    assert torch.equal(got, wanted)
    assert not torch.equal(other, wanted)


def test_several_answers_per_prompt() -> None:
    model = build("llama")
    options = {"max_new_tokens": 6, "do_sample": True, "num_return_sequences": 3}
    torch.manual_seed(5)
    wanted = model.generate(**prompts(), **options)
    optimize_decoder(model)
    torch.manual_seed(5)
    assert torch.equal(model.generate(**prompts(), **options), wanted)
    assert wanted.shape == (9, 18)


def test_the_output_object() -> None:
    model = build("mistral")
    batch = prompts()
    options = {**NEW, "return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    options["repetition_penalty"] = 1.3
    wanted = model.generate(**batch, **options)
    optimize_decoder(model)
    got = model.generate(**batch, **options)
    assert outcomes(model) == {"fast": 1}
    assert type(got) is type(wanted)
    assert got.keys() == wanted.keys()
    assert torch.equal(got.sequences, wanted.sequences)
    for mine, theirs in ((got.scores, wanted.scores), (got.logits, wanted.logits)):
        assert len(mine) == len(theirs) == 10
        torch.testing.assert_close(torch.stack(mine), torch.stack(theirs), atol=2e-4, rtol=2e-4)


def test_the_cache_given_back_goes_on() -> None:
    model = build("mistral")
    batch = prompts()
    longer = model.generate(**batch, max_new_tokens=14, do_sample=False)
    optimize_decoder(model)
    first = model.generate(**batch, **NEW, return_dict_in_generate=True)
    mask = torch.cat([batch["attention_mask"], torch.ones(3, 10, dtype=torch.long)], 1)
    second = model.generate(
        first.sequences,
        attention_mask=mask,
        past_key_values=first.past_key_values,
        max_new_tokens=4,
        do_sample=False,
    )
    assert torch.equal(second, longer)
    assert outcomes(model) == {"fast": 1, "Transformers' loop: a cache was given": 1}


def test_embeddings_instead_of_ids() -> None:
    model = build("llama")
    batch = prompts()
    inputs = {
        "inputs_embeds": model.get_input_embeddings()(batch["input_ids"]).detach(),
        "attention_mask": batch["attention_mask"],
    }
    wanted = model.generate(**inputs, **NEW)
    optimize_decoder(model)
    assert torch.equal(model.generate(**inputs, **NEW), wanted)
    assert outcomes(model) == {"fast": 1}


class Collected:
    """A streamer that keeps what it is given."""

    def __init__(self) -> None:
        self.given: list[Tensor] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.given.append(value)

    def end(self) -> None:
        self.ended = True


def test_streamers() -> None:
    model = build("llama")
    ids = prompts()["input_ids"][1:2]
    plain, mine = Collected(), Collected()
    model.generate(ids, **NEW, streamer=plain)
    optimize_decoder(model)
    model.generate(ids, **NEW, streamer=mine)
    assert mine.ended
    assert [value.tolist() for value in mine.given] == [value.tolist() for value in plain.given]


def test_stop_strings_and_time() -> None:
    tokenizer = byte_tokenizer()
    model = tiny_llama(torch.float32)
    model.generation_config.eos_token_id = None
    inputs = tokenizer(["hello there", "and now"], return_tensors="pt", padding=True, padding_side="left")
    inputs.pop("token_type_ids", None)
    free = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    middle = tokenizer.decode(free[0, -12])
    options = {"max_new_tokens": 24, "do_sample": False, "stop_strings": [middle], "tokenizer": tokenizer}
    wanted = model.generate(**inputs, **options)
    optimize_decoder(model)
    assert torch.equal(model.generate(**inputs, **options), wanted)
    timed = model.generate(**inputs, max_new_tokens=24, do_sample=False, max_time=1e-6)
    assert timed.shape[1] == inputs["input_ids"].shape[1] + 1
    assert outcomes(model) == {"fast": 2}


class Never(StoppingCriteria):
    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def reverse(input_ids: Tensor, scores: Tensor) -> Tensor:
    return -scores


def with_holes() -> dict[str, Tensor]:
    batch = prompts()
    batch["attention_mask"][1, 4] = 0
    return batch


def padded_behind() -> dict[str, Tensor]:
    batch = prompts()
    return {name: value.flip(1) for name, value in batch.items()}


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "beams": ({"num_beams": 2}, ""),
    "a criterion of one's own": ({"stopping_criteria": [Never()]}, "Never"),
    "a processor of one's own": ({"logits_processor": [reverse]}, "function"),
    "hidden states": ({"return_dict_in_generate": True, "output_hidden_states": True}, "output_hidden_states"),
    "no cache": ({"use_cache": False}, "use_cache=False"),
    "holes": (with_holes(), "zeros that are not in front"),
    "padding behind": (padded_behind(), "zeros that are not in front"),
    "guidance": ({"guidance_scale": 1.5}, "UnbatchedClassifierFreeGuidance"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_transformers_does_itself(name: str) -> None:
    given, words = OTHERS[name]
    model = build("llama")
    inputs = {**prompts(), **NEW, **given}
    if name == "guidance":
        inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    wanted = model.generate(**inputs)
    optimize_decoder(model)
    got = model.generate(**inputs)
    if isinstance(got, Tensor):
        assert torch.equal(got, wanted)
    else:
        assert torch.equal(got.sequences, wanted.sequences)
    # Other modes never come to the loop of greedy and sampling.
    found = outcomes(model)
    assert "fast" not in found
    assert [key for key in found if words in key] or not words, found


def test_a_hook_is_not_passed_by() -> None:
    model = build("llama")
    optimize_decoder(model)
    seen: list[int] = []
    handle = model.model.layers[0].register_forward_hook(lambda *_: seen.append(1))
    model.generate(**prompts(), **NEW)
    assert len(seen) == 10
    assert outcomes(model) == {"Transformers' loop: a hook is set on model.layers.0": 1}
    handle.remove()
    model.generate(**prompts(), **NEW)
    assert outcomes(model)["fast"] == 1


def test_weights_put_in_later_are_used() -> None:
    model, other = build("llama"), build("llama")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5).add_(0.01 * torch.randn_like(parameter))
    wanted = other.generate(**prompts(), **NEW)
    optimize_decoder(model, DecoderOptions(fused=True))
    before = model.generate(**prompts(), **NEW)
    model.load_state_dict(other.state_dict())
    assert torch.equal(model.generate(**prompts(), **NEW), wanted)
    assert not torch.equal(before, wanted)
    model.model.layers[1] = build("llama").model.layers[1]
    assert not torch.equal(model.generate(**prompts(), **NEW), wanted)


def test_training_as_before() -> None:
    model, plain = build("llama"), build("llama")
    batch = prompts()
    optimize_decoder(model)
    model.generate(**batch, **NEW)
    for each in (model, plain):
        each.train()
        each(**batch, labels=batch["input_ids"]).loss.backward()
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)
    model.generate(**batch, **NEW)
    assert outcomes(model) == {"fast": 1, "Transformers' loop: the model is in training mode": 1}


def test_saving_an_optimized_model(tmp_path: Path) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    model = build("llama")
    model.save_pretrained(tmp_path / "plain")
    optimize_decoder(model, DecoderOptions(fused=True))
    model.generate(**prompts(), **NEW)
    model.save_pretrained(tmp_path / "fast")
    plain, fast = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "fast"))
    assert plain.keys() == fast.keys()
    assert all(torch.equal(plain[name], fast[name]) for name in plain)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "fast")
    assert type(again).__name__ == "LlamaForCausalLM"


def test_a_copy_generates_by_itself() -> None:
    import copy

    model = build("llama")
    optimize_decoder(model, DecoderOptions(fused=True))
    wanted = model.generate(**prompts(), **NEW)
    other = copy.deepcopy(model)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert torch.equal(other.generate(**prompts(), **NEW), wanted)
    assert outcomes(other) == {"fast": 1}
    assert other.__dict__["_onegpu_decoder"].model is other


def test_a_deleted_model_is_gone() -> None:
    model = build("llama")
    optimize_decoder(model, DecoderOptions(fused=True))
    model.generate(**prompts(), **NEW)
    gone = weakref.ref(model)
    gc.collect()
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()


def test_pipeline(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

    folder = save_tiny(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ask = {"max_new_tokens": 8, "do_sample": False}
    wanted = pipeline("text-generation", model=model, tokenizer=tokenizer)("hello", **ask)
    optimize_decoder(model)
    run = pipeline("text-generation", model=model, tokenizer=tokenizer)
    assert run("hello", **ask) == wanted
    assert outcomes(model) == {"fast": 1}
    text = io.StringIO()
    streamer = TextStreamer(tokenizer)
    streamer.on_finalized_text = lambda piece, stream_end=False: text.write(piece)  # type: ignore[method-assign]
    run("hello", **ask, streamer=streamer)
    assert wanted[0]["generated_text"] in text.getvalue()


@pytest.mark.slow
def test_smollm2_over_64_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    from onegpu.cli.demo_model import demo_checkpoint, find_gguf
    from onegpu.errors import OneGpuError

    monkeypatch.setenv("ONEGPU_CACHE", str(tmp_path))
    try:
        folder = demo_checkpoint(find_gguf(None))
    except OneGpuError as error:
        pytest.skip(error.message)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.generation_config.pad_token_id = 0
    generator = torch.Generator().manual_seed(0)
    lengths = tuple(int(n) for n in torch.randint(1, 40, (64,), generator=generator))
    batch = prompts(lengths, width=40)
    wanted = model.generate(**batch, max_new_tokens=16, do_sample=False)
    optimize_decoder(model)
    got = model.generate(**batch, max_new_tokens=16, do_sample=False)
    assert outcomes(model) == {"fast": 1}
    assert torch.equal(got, wanted)
