"""A call of `generate` as the engine takes it, or the reason why Transformers' own loop runs it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from onegpu.decoder.sampling import Selection, plan_selection
from onegpu.decoder.stopping import StopRule, plan_stop

__all__ = ["Request", "plan_request"]

# What the models' forward is given that the engine makes itself.
KNOWN = {
    "attention_mask",
    "position_ids",
    "past_key_values",
    "use_cache",
    "logits_to_keep",
    "cache_position",
    "inputs_embeds",
    "encoder_outputs",
    "decoder_attention_mask",
    "tokenizer",
    "assistant_tokenizer",
}
CACHES = (None, "dynamic", "dynamic_full", "static", "hybrid", "sliding_window")


@dataclass(frozen=True, slots=True)
class Source:
    """An encoder's states [B, S, width] and their mask [B, S], None where all are real."""

    hidden: Tensor
    mask: Tensor | None


@dataclass(slots=True)
class Request:
    """What to generate.

    `input_ids` int64 [B, L] as given, `starts` and `lengths` where each row's real tokens lie in it. `embeddings`
    [B, L, hidden] replace the ids in the layers. `max_new` tokens at most.
    """

    input_ids: Tensor
    starts: list[int]
    lengths: list[int]
    embeddings: Tensor | None
    max_new: int
    pad: int
    selection: Selection
    stop: StopRule
    config: Any
    streamer: Any = None
    source: Source | None = None

    @property
    def as_dict(self) -> bool:
        """Whether Transformers' output object is wanted."""
        return bool(self.config.return_dict_in_generate)

    @property
    def batch_size(self) -> int:
        """Rows."""
        return self.input_ids.shape[0]

    @property
    def tokens(self) -> int:
        """Tokens that the longest row may come to, padding included."""
        return max(self.input_ids.shape[1], max(self.lengths)) + self.max_new

    def most_new(self, positions: int | None) -> int:
        """New tokens that can be made by a model of so many positions; the last one is fed to nobody."""
        return self.max_new if positions is None else min(self.max_new, positions - max(self.lengths) + 1)

    def prompt(self, row: int, device: torch.device) -> Tensor:
        """The real tokens of a row, or their embeddings."""
        source = self.input_ids if self.embeddings is None else self.embeddings
        return source[row, self.starts[row] : self.starts[row] + self.lengths[row]].to(device, non_blocking=True)


def plan_request(
    model: nn.Module,
    input_ids: Tensor,
    processors: Any,
    criteria: Any,
    config: Any,
    vocab_size: int,
    synced_gpus: bool,
    streamer: Any,
    inputs: dict[str, Any],
) -> Request | str:
    """A request for the engine; a str is the reason for Transformers' own loop."""
    reason = why_not_asked(model, config, synced_gpus, inputs)
    if reason is not None:
        return reason
    stop = plan_stop(criteria)
    if isinstance(stop, str):
        return stop
    if not stop.bounded:
        return "no largest length is known"
    selection = plan_selection(processors, config, vocab_size)
    if isinstance(selection, str):
        return selection
    embeddings = inputs.get("inputs_embeds")
    if embeddings is not None and input_ids.shape[1] not in (0, embeddings.shape[1]):
        return "embeddings came with token ids of another length"
    shape = input_ids.shape if embeddings is None else embeddings.shape[:2]
    source = source_of(model, inputs)
    if isinstance(source, str):
        return source
    mask = inputs.get("attention_mask" if source is None else "decoder_attention_mask")
    rows = real_tokens(shape, mask, inputs.get("position_ids"))
    if isinstance(rows, str):
        return rows
    pad = getattr(config, "_pad_token_tensor", None)
    return Request(
        input_ids=input_ids,
        starts=rows[0],
        lengths=rows[1],
        embeddings=embeddings,
        max_new=stop.max_length - input_ids.shape[1],
        pad=0 if pad is None else int(pad),
        selection=selection,
        stop=stop,
        config=config,
        streamer=streamer,
        source=source,
    )


def source_of(model: Any, inputs: dict[str, Any]) -> Source | str | None:
    """What an encoder made, None for a decoder alone, a str where it is not the usual."""
    if not getattr(model.config, "is_encoder_decoder", False):
        return "encoder_outputs was given" if inputs.get("encoder_outputs") is not None else None
    hidden = getattr(inputs.get("encoder_outputs"), "last_hidden_state", None)
    mask = inputs.get("attention_mask")
    if not isinstance(hidden, Tensor) or hidden.dim() != 3:
        return "the encoder's outputs are not its states alone"
    if mask is not None and mask.shape != hidden.shape[:2]:
        # Speech models are given the mask of what their encoder heard, and look at all that it made of it.
        mask = None
    return Source(hidden, mask)


def why_not_asked(model: nn.Module, config: Any, synced_gpus: bool, inputs: dict[str, Any]) -> str | None:
    """A reason in the options of the call."""
    if model.training:
        return "the model is in training mode"
    if torch.is_autocast_enabled(next(model.parameters()).device.type):
        return "autocast is on"
    if synced_gpus:
        return "several processes generate in step"
    for flag in ("output_attentions", "output_hidden_states"):
        if getattr(config, flag, False):
            return f"{flag} was asked for"
    if getattr(config, "is_assistant", False):
        return "the model assists another one"
    if config.cache_implementation not in CACHES:
        return f"cache_implementation={config.cache_implementation!r} was asked for"
    if inputs.get("use_cache") is False:
        return "use_cache=False was asked for"
    cache = inputs.get("past_key_values")
    if cache is not None and (getattr(cache, "_is_user_defined", False) or int(cache.get_seq_length()) > 0):
        return "a cache was given"
    for name, value in inputs.items():
        if name not in KNOWN and value is not None:
            return f"{name} was given"
    return None


def real_tokens(shape: Any, mask: Any, position_ids: Any) -> tuple[list[int], list[int]] | str:
    """Where each row's real tokens begin and how many there are. Reads the mask, which waits for the device once."""
    rows, length = shape
    if mask is None:
        starts, lengths = [0] * rows, [length] * rows
        counted = torch.arange(length)[None].expand(rows, -1)
    else:
        if mask.dim() != 2 or tuple(mask.shape) != (rows, length):
            return f"the attention mask is {list(mask.shape)} for tokens {[rows, length]}"
        real = mask.cpu() != 0
        counts = real.sum(1)
        if not bool((real == (torch.arange(length) >= length - counts[:, None])).all()):
            return "the attention mask has zeros that are not in front"
        lengths = counts.tolist()
        starts = [length - n for n in lengths]
        counted = (real.long().cumsum(1) - 1).clamp(min=0)
    if not length or min(lengths) < 1:
        return "a row has no real token"
    if isinstance(position_ids, torch.Tensor):
        given = position_ids.cpu()
        if given.dim() != 2 or given.shape[-1] != length or not bool((given == counted).all()):
            return "position_ids of another kind were given"
    return starts, lengths
