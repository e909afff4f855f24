"""Finding the encoder stacks of a model, by structure, and why a stack is left alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from onegpu.encoder.adapters import OWN_ATTENTION

__all__ = ["Found", "find_stacks", "reads_first_token", "why_not"]

# Heads that treat every token alike, or hand the tokens on with their mask.
TOKEN_HEADS = (
    "EncoderModel",
    "ForAudioFrameClassification",
    "ForCTC",
    "ForConditionalGeneration",
    "ForMaskedLM",
    "ForQuestionAnswering",
    "ForTokenClassification",
)


@dataclass(frozen=True, slots=True)
class Found:
    """A list of layers, the module that runs it, and the innermost Transformers model around both."""

    name: str
    tower: nn.Module
    owner: nn.Module
    layers: list[nn.Module]


def attentions(layer: nn.Module) -> list[nn.Module]:
    """The attention modules inside a layer, innermost ones included."""
    return [m for m in layer.modules() if "Attention" in type(m).__name__ or "Attn" in type(m).__name__]


def find_stacks(model: nn.Module) -> Iterator[Found]:
    """Every outermost `nn.ModuleList` whose items hold attention, in the order of the modules."""
    from transformers import PreTrainedModel

    modules = dict(model.named_modules())
    taken: list[str] = []
    for name, module in modules.items():
        if not isinstance(module, nn.ModuleList) or not len(module) or any(name.startswith(t + ".") for t in taken):
            continue
        if not attentions(module[0]):
            continue
        taken.append(name)
        parts = name.split(".")
        ancestors = [modules[".".join(parts[:end])] if end else model for end in range(len(parts))]
        towers = [ancestor for ancestor in ancestors if isinstance(ancestor, PreTrainedModel)]
        if towers:
            yield Found(name, towers[-1], ancestors[-1], list(module))


def why_not(found: Found) -> str | None:
    """None where the stack can run without padding, else the reason."""
    owner, tower = found.owner, found.tower
    config: Any = getattr(tower, "config", None)
    kinds = sorted({type(layer).__name__ for layer in found.layers})
    if "Decoder" in type(owner).__name__ or any("Decoder" in kind for kind in kinds):
        return "it is a decoder"
    if any(getattr(part, "is_decoder", False) is True for part in (owner, config)):
        return "it is a decoder"
    inner = [module for layer in found.layers for module in attentions(layer)]
    if any(getattr(module, "is_causal", False) is True for module in inner):
        return "its attention is causal"
    if any("CrossAttention" in type(module).__name__ for module in inner):
        return "its layers attend to something else as well"
    if getattr(tower, "adapter", None) is not None:
        return "a convolution over time follows the layers and would see the padding"
    own = any(type(module).__name__ in OWN_ATTENTION for module in inner)
    if not own:
        can_set = getattr(tower, "_can_set_attn_implementation", None)
        if can_set is None or not can_set():
            names = sorted({type(module).__name__ for module in inner})
            return f"{names[0]} computes attention itself, past Transformers' attention interface"
    chosen = getattr(config, "_attn_implementation", None)
    if chosen not in (None, "eager", "sdpa"):
        return f"the attention implementation {chosen!r} was chosen for it"
    return None


def reads_first_token(model: nn.Module, tower: nn.Module) -> bool:
    """Whether anything behind the layers may read the first token of a row, even where that is padding."""
    config: Any = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        return False
    if getattr(tower, "pooler", None) is not None:
        return True
    name = type(model).__name__
    return model is not tower and not name.endswith(TOKEN_HEADS)
