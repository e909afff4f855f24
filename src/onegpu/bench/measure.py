"""The clock and the scales: token times of one `generate`, and the bytes a model's weights take.

TTFT is the time from the call to the first token. TPOT is the mean time of each token after it, so that
`tokens_per_second` is the speed of decoding alone.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["Timing", "TokenClock", "dense_bytes", "step_bytes", "synchronize", "weight_bytes"]


@dataclass(frozen=True, slots=True)
class Timing:
    """The times of one generation of `new_tokens` tokens after a prompt of `prompt_tokens`."""

    prompt_tokens: int
    new_tokens: int
    ttft_ms: float
    decode_ms: float  # from the first token to the last

    @property
    def tpot_ms(self) -> float | None:
        """Mean milliseconds of a token after the first; None where there is no second token."""
        return self.decode_ms / (self.new_tokens - 1) if self.new_tokens > 1 else None

    @property
    def tokens_per_second(self) -> float | None:
        """Decode speed, the first token left out; None where there is no second token."""
        return 1000.0 / self.tpot_ms if self.tpot_ms else None

    def as_row(self) -> dict[str, object]:
        """JSON-ready, times rounded to a microsecond."""
        speed, tpot = self.tokens_per_second, self.tpot_ms
        return {
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "ttft_ms": round(self.ttft_ms, 3),
            "tpot_ms": None if tpot is None else round(tpot, 3),
            "tokens_per_second": None if speed is None else round(speed, 2),
        }


@dataclass(slots=True)
class TokenClock:
    """A streamer for `generate` that notes when each token reached the host. The first `put` is the prompt."""

    started: float = field(default_factory=time.perf_counter)
    prompt_tokens: int = -1
    token_ids: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)

    def put(self, value: torch.Tensor) -> None:
        """Take int [1, S] (the prompt, once) or int [n] (new tokens), already on the host."""
        if self.prompt_tokens < 0:
            self.prompt_tokens = value.numel()
            return
        now = time.perf_counter()
        self.token_ids += value.flatten().tolist()
        self.times += [now] * value.numel()

    def end(self) -> None:
        """Called once after the last token; the times are already taken."""

    def timing(self) -> Timing:
        """What was measured; all times are zero when no token came."""
        first = self.times[0] if self.times else self.started
        last = self.times[-1] if self.times else self.started
        return Timing(
            prompt_tokens=max(self.prompt_tokens, 0),
            new_tokens=len(self.times),
            ttft_ms=(first - self.started) * 1e3,
            decode_ms=(last - first) * 1e3,
        )


def stored_tensors(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Parameters, buffers, what bitsandbytes hangs on its parameters; each storage once, so tied weights too."""
    seen: set[int] = set()
    for tensor in (*model.parameters(), *model.buffers()):
        for held in (tensor, *attached(getattr(tensor, "quant_state", None)), *attached(getattr(tensor, "SCB", None))):
            pointer = held.untyped_storage().data_ptr()
            if pointer and pointer not in seen:
                seen.add(pointer)
                yield held


def attached(state: object) -> Iterator[torch.Tensor]:
    """The tensors of a bitsandbytes quantization state, which is neither parameter nor buffer, and of one inside it."""
    import torch

    if isinstance(state, torch.Tensor):
        yield state
    elif state is not None:
        for value in vars(state).values():
            if isinstance(value, torch.Tensor) or hasattr(value, "absmax"):
                yield from attached(value)


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of every weight as stored now: codes, scales, value tables, and what stayed in 16 bit."""
    return sum(tensor.untyped_storage().nbytes() for tensor in stored_tensors(model))


def step_bytes(model: Any, batch: int, context: int, kv_dtype: str = "16bit") -> int | None:
    """Bytes that a decode step of `batch` sequences must read: each weight once, and `context` keys and values of each.

    Of an embedding table that is no output head only the rows looked up are read, and of a layer's experts no more than
    were chosen. None for a model whose config does not tell its keys and values.
    """
    from torch import nn

    from onegpu.errors import ConfigError
    from onegpu.memory.geometry import read_geometry
    from onegpu.memory.runtime import kv_bytes

    try:
        geometry = read_geometry(model.config.to_dict())
    except ConfigError:
        return None
    head = model.get_output_embeddings()
    heads = set() if head is None else {tensor.untyped_storage().data_ptr() for tensor in head.parameters()}
    read = weight_bytes(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and module.weight.untyped_storage().data_ptr() not in heads:
            read -= module.weight.nbytes
            read += batch * module.weight.nbytes // max(module.num_embeddings, 1)
        elif name.rpartition(".")[2] == "experts" and geometry.experts:
            share = min(1.0, batch * geometry.chosen / geometry.experts)
            read -= int(weight_bytes(module) * (1 - share))
    return read + kv_bytes(geometry, context, batch, kv_dtype)


def dense_bytes(config: Any) -> int:
    """Bytes of the same model with every weight in 16 bit, counted on the meta device: nothing is allocated."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    return 2 * sum(int(parameter.numel()) for parameter in model.parameters())


def synchronize(device: torch.device) -> None:
    """Wait for the device, so that the clock reads finished work."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
