"""The engine by itself: sequences come and go between steps, and each gets what it would get alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList

from decoder.calls import build
from onegpu.decoder import optimize_decoder
from onegpu.decoder.driver import Driver
from onegpu.decoder.engine import Engine
from onegpu.decoder.sampling import plan_selection
from onegpu.decoder.stopping import StopRule
from onegpu.errors import ArgumentError, DoesNotFitError


def make(name: str, slots: int = 3) -> tuple[Any, Engine]:
    model = build(name)
    optimize_decoder(model)
    driver: Driver = model.__dict__["_onegpu_decoder"]
    selection = plan_selection(LogitsProcessorList(), GenerationConfig(do_sample=False), 96)
    assert not isinstance(selection, str)
    stop = StopRule(eos=(), has_eos=True, bounded=False)
    return model, Engine(driver.workspace(slots, 40), selection, stop, pad=0, chunk=8)


def ids(length: int, seed: int) -> Tensor:
    return torch.randint(3, 90, (length,), generator=torch.Generator().manual_seed(seed))


def alone(model: Any, prompt: Tensor, new: int) -> list[int]:
    return model.generate(prompt[None], max_new_tokens=new, do_sample=False)[0, prompt.shape[0] :].tolist()


@pytest.mark.parametrize("name", ["llama", "gemma3", "bloom"])
def test_sequences_come_and_go(name: str) -> None:
    model, engine = make(name)
    prompts = {0: ids(11, 0), 1: ids(4, 1)}
    got: dict[int, list[int]] = {0: [], 1: []}
    assert [engine.add(prompts[0]), engine.add(prompts[1])] == [0, 1]

    def step() -> None:
        engine.step()
        chosen = engine.take()
        for slot in got:
            got[slot].append(int(chosen.tokens[slot]))

    for _ in range(3):
        step()
    prompts[2], got[2] = ids(1, 2), []
    assert engine.add(prompts[2]) == 2
    for _ in range(2):
        step()
    engine.remove(0)
    first = got.pop(0)
    assert first == alone(model, prompts[0], 5)
    prompts[0], got[0] = ids(9, 3), []
    assert engine.add(prompts[0]) == 0
    for _ in range(4):
        step()
    for slot, tokens in got.items():
        assert tokens == alone(model, prompts[slot], len(tokens)), slot


def test_tokens_may_be_taken_late() -> None:
    model, engine = make("llama")
    prompt = ids(5, 0)
    engine.add(prompt)
    for _ in range(4):
        engine.step()
    assert engine.pending == 4
    assert [int(engine.take().tokens[0]) for _ in range(4)] == alone(model, prompt, 4)


def test_generate_leaves_the_engine_alone() -> None:
    model, engine = make("llama")
    prompt, other = ids(5, 0), ids(8, 1)
    engine.add(prompt)
    got = []
    for _ in range(4):
        engine.step()
        alone(model, other, 3)
        got.append(int(engine.take().tokens[0]))
    assert got == alone(model, prompt, 4)
    driver = model.__dict__["_onegpu_decoder"]
    assert len(driver.workspaces) == 2
    engine.close()
    assert all(space.user() is None for space, _ in driver.workspaces)


def test_bad_prompts() -> None:
    _, engine = make("llama", slots=1)
    with pytest.raises(ArgumentError, match="a prompt has 1 to 255 tokens, one less than its slot; got 0"):
        engine.add(ids(0, 0))
    with pytest.raises(ArgumentError, match="got 256"):
        engine.add(ids(256, 0))
    engine.add(ids(3, 0))
    with pytest.raises(DoesNotFitError, match="all 1 slots are taken"):
        engine.add(ids(3, 0))
