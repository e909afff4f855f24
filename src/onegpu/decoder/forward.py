"""One forward of Transformers' own model, with our attention and capturable experts for exactly its time.

At rest the model's configuration is the user's: any other call, training, saving and Transformers' own loop see nothing
of us.
"""

from __future__ import annotations

import inspect
import weakref
from typing import Any

from torch import Tensor, nn

from onegpu.attention.causal_interface import DECODER_IMPLEMENTATION, register_decoder
from onegpu.attention.interface import ADDITIVE, register
from onegpu.errors import UnsupportedError

__all__ = ["ModelForward"]

# Experts over a few tokens: no token's choice is read by the host, and no size depends on it.
DECODE_EXPERTS = "batched_mm"
SWITCHED = ("_attn_implementation_internal", "_experts_implementation_internal")


class ModelForward:
    """Calls a model it does not keep alive.

    Args:
        ours: whether attention goes through our interface; else it is what the user chose.
    """

    def __init__(self, model: nn.Module, ours: bool) -> None:
        self.reference = weakref.ref(model)
        self.names = frozenset(inspect.signature(model.forward).parameters)
        self.ours = ours
        self.configs = configs_of(model)
        # Layers that compute attention themselves want the mask as numbers to add. Transformers makes it with the
        # host's help before 5.20, which a captured step does without.
        self.own_attention = not any(can_choose(part) for part in model.modules())
        register_decoder()
        register()

    @property
    def model(self) -> Any:
        """The model.

        Raises:
            UnsupportedError: it was deleted.
        """
        model = self.reference()
        if model is None:
            raise UnsupportedError("the model of this generation was deleted")
        return model

    def __call__(self, decoding: bool, **inputs: Any) -> Any:
        """The model's output. `decoding`: one token per row, so that experts may gather the weights of each."""
        before = [(config, name, getattr(config, name, None)) for config in self.configs for name in SWITCHED]
        try:
            for config, name, value in before:
                if name == SWITCHED[0] and self.ours:
                    setattr(config, name, DECODER_IMPLEMENTATION)
                elif name == SWITCHED[0] and value == "eager" and self.own_attention:
                    setattr(config, name, ADDITIVE)
                if name == SWITCHED[1] and decoding and value is not None:
                    setattr(config, name, DECODE_EXPERTS)
            return self.model(**inputs, use_cache=True, return_dict=True)
        finally:
            for config, name, value in before:
                if hasattr(config, name):
                    setattr(config, name, value)

    def positional(self, position_ids: Tensor) -> dict[str, Tensor]:
        """The argument for position ids, where the model takes one."""
        return {"position_ids": position_ids} if "position_ids" in self.names else {}


def can_choose(module: nn.Module) -> bool:
    """Whether a module is a Transformers model whose attention goes through the interface."""
    ask = getattr(module, "_can_set_attn_implementation", None)
    return bool(ask()) if callable(ask) else False


def configs_of(model: nn.Module) -> list[Any]:
    """The configs that modules of a model look into, each once."""
    found = {id(config): config for part in model.modules() if (config := getattr(part, "config", None)) is not None}
    return [config for config in found.values() if hasattr(config, SWITCHED[0])]
