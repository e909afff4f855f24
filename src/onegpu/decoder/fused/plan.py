"""What a fused step is made of: the model's own modules and every number read from them.

Modules are referred to, never copied, so that weights loaded in place are seen. `FusedPlan.join` lays the weights of
products that share an input side by side (`onegpu.nn.joined`); `split` undoes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn

from onegpu.errors import UnsupportedError
from onegpu.kernels import rms_norm
from onegpu.nn import Joined, QuantLinear8bit, join

__all__ = ["FusedPlan", "LayerPlan", "Norm", "Products", "Rotary", "is_touched"]

# Hooks of Transformers that note outputs when asked to, and else do nothing.
CAPTURING: Final = "transformers.utils.output_capturing"


def is_touched(module: nn.Module) -> bool:
    """Whether a call of the module does more than its class says: hooks, accelerate's too, or a forward of its own."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    foreign = any(not (getattr(hook, "__module__", None) or "").startswith(CAPTURING) for hook in hooks)
    return foreign or "forward" in module.__dict__ or getattr(module, "_hf_hook", None) is not None


@dataclass(frozen=True, slots=True)
class Norm:
    """An RMSNorm: `onegpu.kernels.rms_norm` with the module's weight and these numbers."""

    module: nn.Module
    eps: float
    offset: float

    @property
    def weight(self) -> Tensor:
        """[K], as it is now."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight

    def __call__(self, x: Tensor, overlap: bool) -> Tensor:
        return rms_norm(x, self.weight, self.eps, self.offset, overlap)


@dataclass(frozen=True, slots=True, eq=False)
class Rotary:
    """A rotary embedding module, and how heads are turned by what it gives.

    Attributes:
        layer_type: what the module wants to be told, None if nothing.
        interleaved: a pair lies side by side, not half the rotated part away.
        given: how the module gives each angle: "halves" (in both halves), "pairs" (twice in a row), "once".
        max_positions: beyond so many the frequencies depend on the length of the sequence; None if never.
    """

    module: nn.Module
    layer_type: str | None
    interleaved: bool
    given: str
    max_positions: int | None

    def cos_sin(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin [n, R] for position_ids [n], each angle where `interleaved` wants it; rounded to `dtype`."""
        like = torch.empty(1, dtype=dtype, device=position_ids.device)
        extra = () if self.layer_type is None else (self.layer_type,)
        cos, sin = (self.spread(part[0]) for part in self.module(like, position_ids[None], *extra))
        return cos, sin

    def spread(self, angles: Tensor) -> Tensor:
        """[n, R] from what the module gives."""
        if (self.given, self.interleaved) in (("halves", False), ("pairs", True)):
            return angles
        once = angles if self.given == "once" else angles[:, : angles.shape[-1] // 2]
        return once.repeat_interleave(2, -1) if self.interleaved else torch.cat((once, once), -1)

    def check(self, capacity: int) -> None:
        """Refuse slots whose last positions have frequencies that depend on the length of the sequence.

        Raises:
            UnsupportedError: it is so.
        """
        if self.max_positions is not None and capacity > self.max_positions:
            raise UnsupportedError(
                f"beyond {self.max_positions} positions this model's rotary frequencies depend on the sequence's "
                f"length; the cache has room for {capacity}"
            )

    def table(self, capacity: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """[capacity, 2, R]: cos and sin of every position of a slot.

        Raises:
            UnsupportedError: as `check`.
        """
        self.check(capacity)
        return torch.stack(self.cos_sin(torch.arange(capacity, device=device), dtype), dim=1)


@dataclass(slots=True, eq=False)
class Products:
    """The products of one layer, joined."""

    qkv: Joined
    o: Joined
    gate_up: Joined | None
    down: Joined | None

    def __iter__(self) -> Iterator[Joined]:
        yield from (part for part in (self.qkv, self.o, self.gate_up, self.down) if part is not None)


@dataclass(slots=True, eq=False)
class LayerPlan:
    """One layer.

        a = attention(qkv(input_norm(h)))          h += residual_multiplier * post_attention_norm(o(a))
        m = act(gate(mlp_norm(h))) * up(mlp_norm(h))    h += residual_multiplier * post_mlp_norm(down(m))

    A norm that is None is not there. `gate_up` and `down` are empty where the MLP is run by its own forward.
    `rotary` is an index into the plan's, None for no rotation. `head_norm`: q and k are normed head by head, else over
    all heads at once.
    """

    name: str
    qkv: tuple[nn.Module, ...]
    o: nn.Module
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int | None
    softcap: float | None
    sinks: Tensor | None
    rotary: int | None
    q_norm: Norm | None
    k_norm: Norm | None
    head_norm: bool
    input_norm: Norm | None
    post_attention_norm: Norm | None
    mlp_norm: Norm | None
    post_mlp_norm: Norm | None
    mlp: nn.Module
    gate_up: tuple[nn.Module, ...]
    down: nn.Module | None
    activation: str | None
    residual_multiplier: float = 1.0
    products: Products | None = None

    @property
    def linears(self) -> list[nn.Module]:
        """Every linear layer that is run for its module."""
        return [*self.qkv, self.o, *self.gate_up, *([] if self.down is None else [self.down])]


@dataclass(slots=True, eq=False)
class FusedPlan:
    """A whole model, made by `recognise`.

    `names` has the full name of each module the plan rests on, so that a module put in its place later is noticed.
    `why_not_prompts`: why prompts go through the plain layers though steps do not; None where `prove` found no reason.
    """

    model: nn.Module
    embed: nn.Module
    layers: list[LayerPlan]
    rotaries: list[Rotary]
    norm: Norm
    head: nn.Module
    dtype: torch.dtype
    device: torch.device
    vocab_size: int
    embedding_multiplier: float = 1.0
    logits_divisor: float = 1.0
    logits_softcap: float | None = None
    experts_configs: tuple[Any, ...] = ()
    names: dict[str, nn.Module] = field(default_factory=dict)
    joined_head: Joined | None = None
    why_not_prompts: str | None = "not proved yet"

    @property
    def windows(self) -> list[int | None]:
        """The sliding window of each layer, as `KVLayer.window`."""
        return [layer.window for layer in self.layers]

    @property
    def has_int8(self) -> bool:
        """Whether a linear layer's own forward rounds its input to int8."""
        return any(isinstance(m, QuantLinear8bit) for layer in self.layers for m in layer.linears)

    def join(self, tile: bool | None = None) -> None:
        """Join the products, once. `tile`: as `onegpu.nn.join` takes it."""
        for layer in self.layers:
            if layer.products is None:
                gated = bool(layer.gate_up)
                layer.products = Products(
                    join(layer.qkv, self.dtype, tile),
                    join([layer.o], self.dtype, tile),
                    join(layer.gate_up, self.dtype, tile) if gated else None,
                    join([layer.down], self.dtype, tile) if layer.down is not None else None,
                )
        if self.joined_head is None:
            self.joined_head = join([self.head], self.dtype, tile)

    def split(self) -> None:
        """Give every layer its weights back as they were before `join`."""
        for layer in self.layers:
            for product in layer.products or ():
                product.split()
            layer.products = None
        if self.joined_head is not None:
            self.joined_head.split()
            self.joined_head = None

    def is_current(self) -> bool:
        """Whether the modules are still in their places and the joined weights still theirs."""
        if self.model.training:
            return False
        for name, module in self.names.items():
            here: Any = self.model
            for part in name.split("."):
                here = here._modules.get(part) if isinstance(here, nn.Module) else None
            if here is not module or is_touched(module):
                return False
        joined = [product for layer in self.layers for product in layer.products or ()]
        return all(product.is_intact() for product in [*joined, *([self.joined_head] if self.joined_head else [])])

    def report(self) -> list[str]:
        """One line for the whole, and one for each kind of product that is not one kernel."""
        own = sum(layer.down is None for layer in self.layers)
        lines = [f"{len(self.layers)} layers fused" + (f", {own} with their own MLP" if own else "")]
        counts: dict[str, int] = {}
        for layer in self.layers:
            for product in layer.products or ():
                if product.reason is not None:
                    names = ", ".join(self.name_of(module) for module in product.modules)
                    key = f"{names} one by one: {product.reason}"
                    counts[key] = counts.get(key, 0) + 1
        return lines + [f"{count} × {key}" for key, count in counts.items()]

    def name_of(self, module: nn.Module) -> str:
        """The last part of a module's name."""
        return next((name.rpartition(".")[2] for name, known in self.names.items() if known is module), "?")
