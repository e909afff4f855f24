"""What `generate` was given, looked at before anything runs: on a GPU a bad token id kills the process's device."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from onegpu.errors import ArgumentError

__all__ = ["check_arguments", "context_limit", "vocabulary_of"]


def check_arguments(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Check ids and mask.

    Raises:
        ArgumentError: an empty prompt, ids out of range, a mask of another shape, more tokens than positions.
    """
    ids = args[0] if args else kwargs.get("inputs")
    ids = kwargs.get("input_ids") if ids is None else ids
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.dim() != 2:
        return
    if not ids.shape[1] and kwargs.get("inputs_embeds") is None:
        raise ArgumentError(
            f"the prompt is empty: input_ids are {list(ids.shape)}", "give at least one token, such as bos_token_id"
        )
    check_range(model, ids, "input_ids")
    if isinstance(kwargs.get("decoder_input_ids"), Tensor):
        check_range(model, kwargs["decoder_input_ids"], "decoder_input_ids")
    mask = kwargs.get("attention_mask")
    fresh = kwargs.get("past_key_values") is None and kwargs.get("inputs_embeds") is None
    if isinstance(mask, Tensor) and mask.dim() == 2 and fresh and mask.shape != ids.shape:
        raise ArgumentError(
            f"attention_mask must have the shape of input_ids, {list(ids.shape)}; got {list(mask.shape)}",
            "pass the mask that the tokenizer returned with these ids",
        )
    limit = context_limit(model)
    if limit is not None and ids.shape[1] > limit:
        raise ArgumentError(
            f"the prompt has {ids.shape[1]:,} tokens; the model has positions for {limit:,}", "shorten the prompt"
        )


def check_range(model: Any, ids: Tensor, name: str) -> None:
    """Raise where an id is not in the table of embeddings."""
    size = vocabulary_of(model)
    if size is None or not ids.numel():
        return
    smallest, largest = (int(n) for n in ids.aminmax())
    if smallest < 0 or largest >= size:
        bad = smallest if smallest < 0 else largest
        raise ArgumentError(
            f"{name} must be from 0 to {size - 1:,}, the model's vocabulary; got {bad:,}",
            "use the tokenizer that belongs to this model",
        )


def vocabulary_of(model: Any) -> int | None:
    """How many tokens the input embeddings know, None where they are no table."""
    try:
        size = getattr(model.get_input_embeddings(), "num_embeddings", None)
    except NotImplementedError:
        return None
    return size if isinstance(size, int) else None


def context_limit(model: Any) -> int | None:
    """How many positions a model has where they come from a table, None where they are computed."""
    config = model.config
    if getattr(config, "is_encoder_decoder", False):
        return None
    length = getattr(config, "max_position_embeddings", None)
    if not isinstance(length, int):
        return None
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and ("position" in last or last == "wpe"):
            return length
    return None
