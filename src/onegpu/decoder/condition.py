"""What a model is at this moment: whether generation can be ours, and whether what was made for it still holds.

Graphs keep the addresses of weights and the way the layers went. Whoever moves weights, adds an adapter, switches one
off or hangs hooks on modules changes that; it is looked for before each generation.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import nn

__all__ = ["Condition", "condition_of"]

ADAPTER_STATE = ("_disable_adapters", "merged_adapters", "_active_adapter")


@dataclass(frozen=True, slots=True)
class Condition:
    """`fingerprint` differs whenever graphs no longer hold; `reason` is why generation can't be ours at all."""

    fingerprint: int
    reason: str | None
    device: torch.device


def condition_of(model: nn.Module) -> Condition:
    """Look through a model's modules, parameters and buffers; nothing waits for the device."""
    marks: list[Any] = []
    reason: str | None = None
    for name, module in model.named_modules():
        marks.append(id(module))
        for hook in chain(module._forward_hooks.values(), module._forward_pre_hooks.values()):
            marks.append(id(hook))
            reason = reason or why_not_hook(name, hook)
        for attribute in ADAPTER_STATE:
            value = module.__dict__.get(attribute)
            if value is not None:
                marks.append(str(value))
    devices: dict[torch.device, None] = {}
    for tensor in chain(model.parameters(), model.buffers()):
        marks.append((tensor.data_ptr() if not tensor.is_meta else -1, tensor.dtype))
        if tensor.numel():
            devices[tensor.device] = None
    if any(device.type == "meta" for device in devices):
        reason = "parts of the model wait elsewhere until they are needed"
    elif len(devices) > 1:
        reason = f"the model is spread over {', '.join(map(str, devices))}"
    return Condition(hash(tuple(marks)), reason, next(iter(devices), torch.device("cpu")))


def why_not_hook(name: str, hook: Any) -> str | None:
    """A hook of someone's own must run at every call, which a captured step would not do."""
    home = str(getattr(hook, "__module__", "") or "")
    if home.startswith(("transformers.", "onegpu.")):
        return None
    return f"a hook is set on {name or 'the model'}"
