"""One answer: messages in, streamed text and its times out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from onegpu.bench.environment import describe_device, versions
from onegpu.bench.generate import path_of
from onegpu.bench.measure import Timing, dense_bytes, step_bytes, weight_bytes
from onegpu.cli.models import Loaded
from onegpu.cli.options import Sampling
from onegpu.cli.streaming import TextStream
from onegpu.errors import ConfigError

__all__ = [
    "Answer",
    "Message",
    "answer",
    "as_document",
    "bandwidth_share",
    "closing_line",
    "messages_for",
    "speed_line",
]

Message = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Answer:
    """The text, its times, and why it ended: `stop` (the model's own end), `length` or `interrupt`."""

    text: str
    timing: Timing
    finish_reason: str


def messages_for(prompt: str, system: str | None) -> list[Message]:
    """A conversation of one question."""
    opening: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    return [*opening, {"role": "user", "content": prompt}]


def encode(loaded: Loaded, messages: Sequence[Message]) -> Any:
    """Token tensors [1, S] on the model's device: by the chat template, or the last message as it stands.

    Raises:
        ConfigError: the prompt is empty, longer than the model can read, or has a system message and no template.
    """
    tokenizer = loaded.tokenizer
    if tokenizer.chat_template:
        inputs = tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    elif len(messages) > 1:
        raise ConfigError(
            f"{loaded.name.name} has no chat template, so it takes one plain prompt and no system message",
            "leave --system out, or use `onegpu run`",
        )
    else:
        inputs = tokenizer(messages[-1]["content"], return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    limit = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
    if length == 0:
        raise ConfigError("the prompt is empty")
    if limit is not None and length >= limit:
        raise ConfigError(f"the prompt has {length} tokens; {loaded.name.name} reads {limit - 1}", "shorten it")
    return inputs.to(loaded.model.device)


def answer(loaded: Loaded, messages: Sequence[Message], sampling: Sampling, write: Callable[[str], None]) -> Answer:
    """Generate, handing text to `write` as it comes. Ctrl-C ends the answer, not the program."""
    from transformers import set_seed

    inputs = encode(loaded, messages)
    set_seed(sampling.seed)
    stream = TextStream(loaded.tokenizer, write)
    try:
        loaded.model.generate(**inputs, **sampling.arguments(), streamer=stream)
    except KeyboardInterrupt:
        stream.end()
        return Answer(stream.text, stream.timing(), "interrupt")
    ended = bool(stream.token_ids) and stream.token_ids[-1] in end_tokens(loaded.model)
    return Answer(stream.text, stream.timing(), "stop" if ended else "length")


def end_tokens(model: Any) -> set[int]:
    """Token ids that end an answer."""
    ids = model.generation_config.eos_token_id
    if ids is None:
        return set()
    return set(ids) if isinstance(ids, (list, tuple)) else {int(ids)}


def closing_line(loaded: Loaded, given: Answer) -> str:
    """Format, bytes before and after, load time, first token, decode speed, device: what was measured, in one line."""
    from onegpu.loading.placement import format_bytes

    before, after = dense_bytes(loaded.model.config), weight_bytes(loaded.model)
    return " · ".join(
        (
            loaded.format,
            f"weights {format_bytes(before)} in 16 bit -> {format_bytes(after)}",
            f"loaded in {loaded.load_seconds:.1f} s",
            speed_line(loaded, given),
            describe_device(loaded.model.device),
        )
    )


def speed_line(loaded: Loaded, given: Answer) -> str:
    """First token, decode speed, and its share of what the GPU's memory allows, where that is known."""
    speed, share = given.timing.tokens_per_second, bandwidth_share(loaded.model, given.timing)
    said = "one token" if speed is None else f"{speed:.1f} tok/s"
    if share is not None:
        said += f", {share:.0%} of the bandwidth limit"
    return f"first token {given.timing.ttft_ms:.0f} ms · {said}"


def bandwidth_share(model: Any, timing: Timing) -> float | None:
    """Bytes that the steps had to read, over what the GPU's datasheet lets it read in that time; None if unknown."""
    import torch

    from onegpu.memory import find_gpu

    if timing.tpot_ms is None or timing.tpot_ms <= 0 or model.device.type != "cuda":
        return None
    try:
        bandwidth = find_gpu(torch.cuda.get_device_name(model.device)).bandwidth
    except ConfigError:
        return None
    read = step_bytes(model, 1, timing.prompt_tokens + timing.new_tokens // 2)
    if read is None or bandwidth is None:
        return None
    return read / bandwidth / (timing.tpot_ms / 1e3)


def as_document(loaded: Loaded, given: Answer) -> dict[str, object]:
    """The same facts and the text, ready for JSON."""
    return {
        "model": loaded.name.name,
        "revision": loaded.name.revision,
        "format": loaded.format,
        "text": given.text,
        "finish_reason": given.finish_reason,
        **given.timing.as_row(),
        "load_seconds": round(loaded.load_seconds, 3),
        "bandwidth_share": bandwidth_share(loaded.model, given.timing),
        "path": path_of(loaded.model),
        "weight_bytes": weight_bytes(loaded.model),
        "weight_bytes_16bit": dense_bytes(loaded.model.config),
        "device": describe_device(loaded.model.device),
        "versions": versions(),
    }
