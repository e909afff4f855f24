"""A request through the engine: prompts in, one step after the other, tokens out as Transformers gives them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.generation.utils import GenerateDecoderOnlyOutput, GenerateEncoderDecoderOutput

from onegpu.decoder.arguments import context_limit
from onegpu.decoder.crossed import CrossedCache
from onegpu.decoder.driver import Driver
from onegpu.decoder.engine import Chosen, Engine
from onegpu.decoder.first_nan import first_nan
from onegpu.decoder.requests import Request
from onegpu.decoder.ways import Way
from onegpu.errors import ArgumentError, DoesNotFitError, NumericError

__all__ = ["run_request"]


@dataclass(slots=True)
class Answer:
    """What came back so far: tokens int64 [B] of each step on the host, scores and logits [B, V] on the device."""

    tokens: list[Tensor] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)


def run_request(driver: Driver, request: Request) -> Any:
    """The result of `_sample`: sequences int64 [B, L + new], or Transformers' output object.

    Raises:
        DoesNotFitError: the device ran out of memory; the slots are given back.
        NumericError: a logit is no number.
    """
    message = ""
    try:
        # What is made here outlives the call: it must not belong to a caller's inference mode.
        with driver.lock, torch.inference_mode(False), torch.no_grad():
            return generate(driver, request)
    except torch.OutOfMemoryError as error:
        message = str(error).splitlines()[0]
    except BaseException:
        # Steps may still be under way over these slots; what they hold is nobody's any more.
        driver.release()
        raise
    # Only here is the failed call's memory no longer held by its own error.
    driver.release()
    if driver.device.type == "cuda":
        torch.cuda.empty_cache()
    raise DoesNotFitError(
        f"out of memory while generating for {request.batch_size} sequences of up to {request.tokens:,} tokens: "
        f"{message}",
        "ask for fewer new tokens or a smaller batch; the model itself is unharmed",
    )


def generate(driver: Driver, request: Request) -> Any:
    """See `run_request`."""
    way = driver.way
    assert isinstance(way, Way)
    source = request.source
    workspace = driver.workspace(request.batch_size, request.tokens, 0 if source is None else source.hidden.shape[1])
    if source is not None:
        assert isinstance(workspace.kv, CrossedCache)
        workspace.kv.load(source.hidden.to(driver.device), source.mask)
    engine = Engine(workspace, request.selection, request.stop, request.pad, way.chunk)
    try:
        return answer_with(driver, request, engine)
    finally:
        engine.close()


def answer_with(driver: Driver, request: Request, engine: Engine) -> Any:
    """See `run_request`."""
    device = driver.device
    ids = request.input_ids.to(device, non_blocking=True)
    for row in range(request.batch_size):
        engine.add(request.prompt(row, device), ids[row])
    answer = run_steps(driver, request, engine)
    new = torch.stack(answer.tokens, 1).to(request.input_ids.device)
    sequences = torch.cat([request.input_ids, new], 1)
    if request.streamer is not None:
        request.streamer.end()
    return as_output(driver, request, sequences, answer, engine) if request.as_dict else sequences


def run_steps(driver: Driver, request: Request, engine: Engine) -> Answer:
    """Step until every row is finished. On a GPU the next step is under way while the last one's tokens are read."""
    answer = Answer()
    launched = 0
    done = False
    most = request.most_new(context_limit(driver.model))
    while not done and len(answer.tokens) < request.max_new:
        if len(answer.tokens) == most:
            raise ArgumentError(
                f"the model has positions for {context_limit(driver.model):,} tokens, and a prompt of "
                f"{max(request.lengths):,} with {most:,} new ones has no end yet",
                "shorten the prompt, or ask for fewer new tokens",
            )
        while launched < min(most, len(answer.tokens) + 1 + steps_ahead(driver, engine, answer)):
            engine.step()
            keep_outputs(request, engine, answer)
            launched += 1
        chosen = engine.take()
        check_numbers(driver, request, chosen, answer)
        answer.tokens.append(chosen.tokens[: request.batch_size])
        if request.streamer is not None:
            request.streamer.put(answer.tokens[-1])
        done = bool(chosen.finished[: request.batch_size].all()) or request.stop.out_of_time()
    # A step launched too many has left its outputs.
    del answer.scores[len(answer.tokens) :], answer.logits[len(answer.tokens) :]
    return answer


def steps_ahead(driver: Driver, engine: Engine, answer: Answer) -> int:
    """How many steps are under way beside the one whose tokens are read."""
    if driver.device.type != "cuda":
        return 0
    # The first step of all is captured, which takes longer than it: nobody's first token waits for that.
    return 1 if answer.tokens or engine.workspace.captured else 0


def keep_outputs(request: Request, engine: Engine, answer: Answer) -> None:
    """Copy the scores and logits of the step just launched, where they were asked for."""
    assert engine.last is not None
    state = engine.last.choice.selection_state
    for kept, buffer in ((answer.scores, state.scores), (answer.logits, state.logits)):
        if buffer is not None:
            kept.append(buffer[: request.batch_size].clone())


def check_numbers(driver: Driver, request: Request, chosen: Chosen, answer: Answer) -> None:
    """Raise where a row's logits hold a NaN, naming the layer it came from."""
    bad = chosen.bad[: request.batch_size].nonzero().flatten().tolist()
    if not bad:
        return
    row = bad[0]
    layer = None
    if request.embeddings is None:
        made = torch.tensor([int(tokens[row]) for tokens in answer.tokens], dtype=torch.int64, device=driver.device)
        layer = first_nan(driver.model, torch.cat([request.prompt(row, driver.device), made]))
    where = f"the first layer that gave one is {layer}" if layer else "run again, no layer gave one"
    raise NumericError(
        f"the logits of row {row} hold NaN after {len(answer.tokens)} new tokens; {where}",
        "look for damaged weights in that layer, or load the model in bfloat16 where float16 is too small for it",
    )


def as_output(driver: Driver, request: Request, sequences: Tensor, answer: Answer, engine: Engine) -> Any:
    """Transformers' output object, its cache made from the slots."""
    config = request.config
    parts = {
        "sequences": sequences,
        "scores": tuple(answer.scores) if config.output_scores else None,
        "logits": tuple(answer.logits) if config.output_logits else None,
        "past_key_values": cache_of(driver, request, engine, len(answer.tokens)),
    }
    if request.source is None:
        return GenerateDecoderOnlyOutput(**parts)
    return GenerateEncoderDecoderOutput(**parts)


def cache_of(driver: Driver, request: Request, engine: Engine, new: int) -> Any:
    """Transformers' own cache with what it would hold: padding in front, all tokens but the last one chosen."""
    kv = engine.workspace.kv
    cache: Any = DynamicCache(config=None if request.source is not None else driver.model.config)
    width = max(start + length for start, length in zip(request.starts, request.lengths, strict=True)) + new - 1
    for index, layer in enumerate(kv.layers):
        rows = []
        for row, start in enumerate(request.starts):
            pair = layer.read(row, width - start)
            rows.append([torch.nn.functional.pad(t, (0, 0, start, 0)) for t in pair])
        cache.update(torch.stack([k for k, _ in rows]), torch.stack([v for _, v in rows]), index)
    if request.source is None:
        return cache
    assert isinstance(kv, CrossedCache)
    cross = DynamicCache()
    batch, source = request.source.hidden.shape[:2]
    for index, layer in enumerate(kv.cross):
        cross.update(layer.k[:batch, :, :source].clone(), layer.v[:batch, :, :source].clone(), index)
    return EncoderDecoderCache(cache, cross)
