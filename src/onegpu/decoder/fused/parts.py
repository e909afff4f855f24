"""Single modules, known by what they compute: RMSNorms, activations, gated MLPs, projections of attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from onegpu.decoder.fused.plan import Norm
from onegpu.kernels.decode_products import reference_rms_norm
from onegpu.kernels.tail import ACTIVATIONS, apply_tail
from onegpu.nn.joined import is_plain_linear

__all__ = ["GatedMlp", "activation_of", "close", "gated_mlp", "norm_of", "qkv_of"]

# Two ways to the same value differ by a few roundings, sums in float32 by more; relative to the largest value.
ROUNDINGS: Final = 4
SUMS: Final = 4e-6


@dataclass(frozen=True, slots=True)
class GatedMlp:
    """down(act(gate(x)) * up(x)); `gate_up` are one or two linear layers, gate before up."""

    gate_up: tuple[nn.Module, ...]
    down: nn.Module
    activation: Callable[[Tensor], Tensor]


def close(got: Tensor, expected: Tensor) -> bool:
    """Equal but for a few roundings in the dtype of `got`. Waits for the device."""
    return all_close([(got, expected)])[0]


def all_close(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[bool]:
    """`close` of each pair; those of different shapes are not. Waits for the device once."""
    found = [
        beyond(got[None], expected[None]) if got.shape == expected.shape else expected.new_ones(1, dtype=torch.float64)
        for got, expected in pairs
    ]
    return [value <= 0 for value in torch.cat(found).tolist()]


def each_close(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[bool]:
    """For each index of the first dimension whether all pairs of tensors are close there. Waits for the device once."""
    return (torch.stack([beyond(got, expected) for got, expected in pairs]) <= 0).all(0).tolist()


def beyond(got: Tensor, expected: Tensor) -> Tensor:
    """[n]: by how much [n, ...] are further apart than a few roundings; no number where one of them is none."""
    wide, want = got.detach().double().flatten(1), expected.detach().double().flatten(1)
    bound = max(ROUNDINGS * torch.finfo(got.dtype).eps, SUMS) * want.abs().amax(1)
    return (wide - want).abs().amax(1) - bound


def norm_of(module: Any, size: int, dtype: torch.dtype) -> Norm | str:
    """An RMSNorm over `size` elements with a weight, or what is different. Tried on random input in `dtype`."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.shape != (size,) or getattr(module, "bias", None) is not None:
        return f"no RMSNorm with a weight of {size} and no bias"
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(eps, float):
        return "no RMSNorm with an epsilon of its own"
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, size, generator=generator)
    # The second row is so small that epsilon counts.
    x[1] *= eps**0.5
    x = x.to(device=weight.device, dtype=dtype)
    with torch.no_grad():
        expected = module(x)
        if not isinstance(expected, Tensor) or expected.dtype != dtype or expected.shape != x.shape:
            return f"its result is not in {dtype}"
        for offset in (0.0, 1.0):
            if close(reference_rms_norm(x, weight, eps, offset), expected):
                return Norm(module, eps, offset)
    return "does not compute RMSNorm"


def activation_of(function: Any) -> str | None:
    """The name among `onegpu.kernels.tail.ACTIVATIONS` of a function that is one of them, by its values."""
    points = torch.linspace(-6, 6, 49, dtype=torch.float64)
    try:
        got = function(points.clone())
    except (TypeError, ValueError, RuntimeError):
        return None
    if not isinstance(got, Tensor) or got.shape != points.shape:
        return None
    for name in ACTIVATIONS:
        if torch.allclose(got.double(), apply_tail(points, None, name, False, torch.float64), rtol=0, atol=1e-10):
            return name
    return None


def gated_mlp(module: nn.Module) -> GatedMlp | None:
    """A gated MLP of plain linear layers and nothing else, or None: then its own forward is run."""
    children = dict(module.named_children())
    functions = [name for name in ("act_fn", "activation_fn") if callable(getattr(module, name, None))]
    linears = {name: child for name, child in children.items() if name not in functions}
    together = {"gate_up_proj", "down_proj"}
    if len(functions) != 1 or set(linears) not in (together, {"gate_proj", "up_proj", "down_proj"}):
        return None
    if not all(is_plain_linear(child) for child in linears.values()) or any(True for _ in module.parameters(False)):
        return None
    up = [linears["gate_up_proj"]] if "gate_up_proj" in linears else [linears["gate_proj"], linears["up_proj"]]
    down: Any = linears["down_proj"]
    sizes = [int(child.out_features) for child in up]  # type: ignore[arg-type]
    if sum(sizes) != 2 * down.in_features or len(set(sizes)) != 1:
        return None
    return GatedMlp(tuple(up), down, getattr(module, functions[0]))


def qkv_of(attention: Any, q_size: int, kv_size: int) -> tuple[nn.Module, ...] | str:
    """The linear layers whose rows are queries, keys, values, in that order; or what is different."""
    children = dict(attention.named_children())
    names = [("q_proj", "k_proj", "v_proj"), ("qkv_proj",)]
    found = next((group for group in names if all(name in children for name in group)), None)
    if found is None or "o_proj" not in children:
        return "no q_proj, k_proj, v_proj (or qkv_proj) and o_proj"
    for name in (*found, "o_proj"):
        if not is_plain_linear(children[name]):
            return f"{name} is {type(children[name]).__name__}, not a plain linear layer"
    extra = set(children) - {*found, "o_proj", "q_norm", "k_norm"}
    extra = {name for name in extra if any(True for _ in children[name].parameters())}
    if extra:
        return f"{sorted(extra)[0]} has no place in plain attention"
    parts = tuple(children[name] for name in found)
    sizes = [int(part.out_features) for part in parts]
    expected = [q_size, kv_size, kv_size] if len(parts) == 3 else [q_size + 2 * kv_size]
    if sizes != expected or children["o_proj"].in_features != q_size:
        return f"projections of {sizes} rows; expected {expected}"
    return parts
