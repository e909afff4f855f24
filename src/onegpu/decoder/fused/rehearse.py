"""What a fused plan will launch, run once so that its kernels are compiled side by side (`kernels.compile_ahead`).

One layer of each kind: the others launch the same kernels. Nothing that is computed here is looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, Final

import torch

from onegpu.decoder.cache import KVCache, LayerShape
from onegpu.decoder.fused.plan import FusedPlan, LayerPlan
from onegpu.decoder.fused.prompt import FusedPrompt, attend
from onegpu.decoder.fused.step import FusedStep
from onegpu.decoder.views import Segment
from onegpu.kernels import gated_activation
from onegpu.nn import Joined, QuantLinear4bit

__all__ = ["PROMPT_ROWS", "layer_shapes", "prompt_products", "rehearse", "rehearse_prompt"]

CAPACITY: Final = 16
# Rows of a prompt that the products are prepared for, and that the proof takes.
PROMPT_ROWS: Final = 128


def rehearse(plan: FusedPlan, rows: int) -> None:
    """Launch what a step of so many rows launches. Values left undefined are only added and multiplied."""
    kv = KVCache(layer_shapes(plan), rows, CAPACITY)
    step = FusedStep(plan, kv)
    tokens = torch.zeros(rows, dtype=torch.int64, device=plan.device)
    positions = torch.zeros(rows, dtype=torch.int32, device=plan.device)
    with torch.no_grad():
        hidden = step.embed(tokens)
        angles = step.angles(positions)
        for index in one_of_each_kind(plan):
            hidden = step.attention(index, hidden, positions, angles)
            # A module's own forward may turn values into indices, as routers do.
            if plan.layers[index].down is not None:
                hidden = step.mlp(plan.layers[index], hidden)
        step.logits(hidden)


def rehearse_prompt(plan: FusedPlan) -> None:
    """Launch what a prompt of up to `PROMPT_ROWS` tokens launches between its products."""
    limits = [rotary.max_positions for rotary in plan.rotaries if rotary.max_positions is not None]
    rows = min([PROMPT_ROWS, *limits])
    kv = KVCache(layer_shapes(plan), 1, rows)
    prompt = FusedPrompt(plan, kv, rows)
    inputs = prompt.inputs((Segment(0, 0, rows),), (rows - 1,), plan.device)
    with torch.no_grad():
        angles = prompt.angles(inputs)
        for index in one_of_each_kind(plan):
            layer = plan.layers[index]
            width = (layer.num_heads + 2 * layer.num_kv_heads) * layer.head_dim
            qkv = torch.zeros(rows, width, dtype=plan.dtype, device=plan.device)
            prompt.append(layer, kv.layers[index], qkv, inputs, angles)
            attend(layer, kv.layers[index], qkv, inputs)
            if layer.activation is not None and not isinstance(layer.down, QuantLinear4bit):
                gated_activation(torch.zeros(rows, 2 * 16, dtype=plan.dtype, device=plan.device), layer.activation)


def prompt_products(plan: FusedPlan) -> list[Callable[[], object]]:
    """The products of a prompt of `PROMPT_ROWS` tokens whose kernels Triton does not compile, each shape once."""
    if plan.device.type != "cuda" or has_no_gemm(plan):
        return []
    found: dict[Hashable, Callable[[], object]] = {}
    for index in one_of_each_kind(plan):
        layer = plan.layers[index]
        for product in layer.products or ():
            linear = product.modules[0]
            if isinstance(linear, QuantLinear4bit) and linear.is_tiled:
                activation = layer.activation if layer.gate_up and linear is layer.gate_up[0] else None
                key = (kind_of_linear(linear), product.out_features, activation)
                found.setdefault(key, partial(run_product, product, activation, plan))
    return list(found.values())


def has_no_gemm(plan: FusedPlan) -> bool:
    """Whether products of many rows are Triton's and the vendor's."""
    try:
        from onegpu.kernels.gemm_codes import why_not_gemm
    except ImportError:  # no Triton
        return True
    return why_not_gemm(plan.device, plan.dtype) is not None


def run_product(product: Joined, activation: str | None, plan: FusedPlan) -> None:
    """One product of zeros."""
    x = torch.zeros(PROMPT_ROWS, product.modules[0].in_features, dtype=plan.dtype, device=plan.device)
    product(x, activation=activation, gated=activation is not None, overlap=True)


def layer_shapes(plan: FusedPlan) -> list[LayerShape]:
    """What each layer keeps, in the model's dtype."""
    return [
        LayerShape(layer.num_kv_heads, layer.head_dim, layer.head_dim, plan.dtype, plan.device, layer.window)
        for layer in plan.layers
    ]


def one_of_each_kind(plan: FusedPlan) -> list[int]:
    """The first layer of each kind."""
    first: dict[Hashable, int] = {}
    for index, layer in enumerate(plan.layers):
        first.setdefault(kind_of(layer), index)
    return list(first.values())


def kind_of(layer: LayerPlan) -> Hashable:
    """Equal for layers that launch the same kernels."""
    norms = (layer.input_norm, layer.post_attention_norm, layer.mlp_norm, layer.post_mlp_norm, layer.q_norm)
    return (
        (layer.num_heads, layer.num_kv_heads, layer.head_dim, layer.rotary, layer.head_norm, layer.activation),
        (layer.window is None, layer.softcap is None, layer.sinks is None, layer.residual_multiplier == 1.0),
        tuple(norm is None for norm in norms),
        tuple(kind_of_linear(linear) for linear in layer.linears),
    )


def kind_of_linear(linear: Any) -> Hashable:
    """Equal for linear layers that launch the same kernels."""
    spec = getattr(linear, "spec", None)
    return type(linear), linear.in_features, linear.out_features, linear.bias is None, spec
