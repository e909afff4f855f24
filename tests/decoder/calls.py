"""What the tests of generation share: prompts, and a model that may go on for long."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tiny_models import MODELS, VOCAB, TinyModel

BY_NAME = {entry.name: entry for entry in MODELS}
DECODERS = [entry for entry in MODELS if entry.kind == "decoder"]
# GPT-Neo's local layers look at keys by their distance from the end of the slot.
NOT_OURS = {"gpt-neo"}


def build(name: str, **changes: Any) -> Any:
    """A tiny model that is not ended by a random token, unless `changes` to its generation config say so."""
    return ready(BY_NAME[name], **changes)


def ready(entry: TinyModel, **changes: Any) -> Any:
    model = entry.build()
    for name, value in {"eos_token_id": None, "pad_token_id": 0, **changes}.items():
        setattr(model.generation_config, name, value)
    return model


def prompts(lengths: tuple[int, ...] = (7, 12, 1), width: int = 12, seed: int = 3) -> dict[str, Tensor]:
    """Left-padded random ids and their mask, [rows, width]."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB - 4, (len(lengths), width), generator=generator)
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        mask[row, : width - length] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def outcomes(model: Any) -> dict[str, int]:
    """How the generations of an optimized model went."""
    from onegpu.decoder import decoder_report

    report = decoder_report(model)
    assert report is not None
    return report.parts[0].outcomes
