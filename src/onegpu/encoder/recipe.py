"""How a model's token vectors become one vector per text, as its sentence-transformers files say.

`modules.json` lists the steps: the Transformers model, a pooling (`1_Pooling/config.json`) and maybe a normalisation.
Another step, such as a dense layer, is refused: an embedding without it would be a wrong one.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from onegpu.config import check_choice
from onegpu.errors import CheckpointError, UnsupportedError

__all__ = ["POOLINGS", "Recipe", "pool", "read_recipe"]

POOLINGS: Final = ("mean", "cls", "last")
FLAGS: Final = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "last",
}


@dataclass(frozen=True, slots=True)
class Recipe:
    """`pooling` of the token vectors, then `normalize` to length 1; `prompt` goes before each text.

    `max_length` counts tokens, special ones included; None for what the tokenizer and the model allow.

    Raises:
        ConfigError: an unknown pooling.
    """

    pooling: str = "mean"
    normalize: bool = False
    max_length: int | None = None
    prompt: str = ""

    def __post_init__(self) -> None:
        check_choice("pooling", self.pooling, POOLINGS)


def read_recipe(folder: Path) -> Recipe | None:
    """The recipe in a sentence-transformers folder, None where there is none.

    Raises:
        CheckpointError: a file that is not what it should be.
        UnsupportedError: a step or pooling that is not known here.
    """
    modules = read_json(folder / "modules.json")
    if modules is None:
        return None
    steps = {str(step.get("type", "")).rpartition(".")[2]: str(step.get("path", "")) for step in modules}
    unknown = sorted(set(steps) - {"Transformer", "Pooling", "Normalize"})
    if unknown:
        raise UnsupportedError(
            f"{folder}: a step {unknown[0]} follows the model, which is not known here",
            "use sentence_transformers, which runs an optimized model too",
        )
    pooling = "mean"
    if "Pooling" in steps:
        pooling = pooling_of(read_json(folder / steps["Pooling"] / "config.json") or {}, folder)
    base = read_json(folder / steps.get("Transformer", "") / "sentence_bert_config.json") or {}
    prompts = read_json(folder / "config_sentence_transformers.json") or {}
    chosen = prompts.get("default_prompt_name")
    return Recipe(
        pooling=pooling,
        normalize="Normalize" in steps,
        max_length=base.get("max_seq_length"),
        prompt=prompts.get("prompts", {}).get(chosen, "") if chosen else "",
    )


def pooling_of(config: dict[str, Any], folder: Path) -> str:
    """`mean`, `cls` or `last` from a pooling's config, of the old form (one flag each) or the new (`pooling_mode`).

    Raises:
        UnsupportedError: none or several of them, or another.
    """
    named = config.get("pooling_mode")
    if isinstance(named, str):
        found = [{"lasttoken": "last"}.get(named, named)]
    else:
        on = [key for key, value in config.items() if key.startswith("pooling_mode_") and value]
        found = [FLAGS.get(key, key.removeprefix("pooling_mode_")) for key in on] or ["mean"]
    if len(found) != 1 or found[0] not in POOLINGS:
        raise UnsupportedError(
            f"{folder}: pooling {' + '.join(found)} is not known here, only one of {', '.join(POOLINGS)}",
            "use sentence_transformers, which runs an optimized model too",
        )
    if config.get("include_prompt") is False:
        raise UnsupportedError(f"{folder}: pooling leaves out the prompt's tokens, which is not known here")
    return found[0]


def read_json(path: Path) -> Any:
    """The document, None where there is no such file.

    Raises:
        CheckpointError: not JSON.
    """
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error


def pool(hidden: Tensor, lengths: Tensor, recipe: Recipe) -> Tensor:
    """[B, S, hidden] with padding on the right, `lengths` [B] at least 1, to float32 [B, hidden]."""
    if recipe.pooling == "cls":
        pooled = hidden[:, 0].float()
    elif recipe.pooling == "last":
        pooled = hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1].float()
    else:
        real = torch.arange(hidden.shape[1], device=hidden.device)[None] < lengths[:, None]
        total = torch.where(real[..., None], hidden, 0).sum(1, dtype=torch.float32)
        pooled = total / lengths[:, None]
    return torch.nn.functional.normalize(pooled, dim=1) if recipe.normalize else pooled
