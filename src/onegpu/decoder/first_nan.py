"""Which layer first gave what is no number."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["first_nan"]


def first_nan(model: nn.Module, tokens: Tensor) -> str | None:
    """The name of the first module, in the order they finish, whose output holds a NaN; None where none does.

    Args:
        tokens: ids int64 [n], run through the plain model once more.
    """
    found: list[str] = []

    def watch(name: str) -> Any:
        def look(_module: nn.Module, _args: Any, output: Any) -> None:
            if not found and any(bool(t.isnan().any()) for t in floats(output)):
                found.append(name)

        return look

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        with torch.no_grad():
            model(input_ids=tokens[None], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def floats(output: Any) -> list[Tensor]:
    """The floating tensors directly in an output."""
    parts = output if isinstance(output, tuple | list) else [output]
    return [part for part in parts if isinstance(part, Tensor) and part.is_floating_point()]
