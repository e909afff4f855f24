"""Parts of a layer that run as one operator: query, key and value; product and GELU; residual and LayerNorm.

Each is known by its structure and proved on random input before it is kept. A fused part does its module's own work
whenever the forward is the plain model's, wants gradients, or a linear has become something else (an adapter, a
quantized layer), so that nothing is assumed that was not looked at in this very call.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear

from onegpu.encoder.calls import MethodCall
from onegpu.kernels.encoder_ops import MAX_NORM_SIZE, add_layer_norm, gelu_, linear_gelu
from onegpu.nn import Joined, join

if TYPE_CHECKING:
    from onegpu.encoder.stack import Stack

__all__ = ["ActivationCall", "NormCall", "QkvGroup", "fused_parts", "prove_part"]

QKV_NAMES: Final = (
    ("query", "key", "value"),
    ("q_proj", "k_proj", "v_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
)


# A third of an H100's L2: 2816 rows of BERT-base, whose tiles of 128 x 256 are two for each multiprocessor.
CHUNK_BYTES: Final = 17301504
TILE_ROWS: Final = 128


def is_active(stack: Stack, x: Tensor) -> bool:
    run = stack.run
    return run is not None and run.may_fuse and not run.is_plain and x.dtype in FUSED_DTYPES


FUSED_DTYPES: Final = (torch.float16, torch.bfloat16, torch.float32)


class NormCall(MethodCall):
    """BERT's output blocks: LayerNorm(dense(hidden) + input), the dropout between being idle."""

    def __init__(self, module: nn.Module, stack: Stack) -> None:
        super().__init__(module)
        self.stack = stack

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Children `dense`, `LayerNorm` and `dropout`, a LayerNorm over one dimension with weight and bias."""
        if {name for name, _ in module.named_children()} != {"dense", "LayerNorm", "dropout"}:
            return False
        norm = module.LayerNorm
        if type(norm) is not nn.LayerNorm or norm.bias is None or len(norm.normalized_shape) != 1:
            return False
        return norm.normalized_shape[0] <= MAX_NORM_SIZE

    def __call__(self, hidden_states: Tensor, input_tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        module: Any = self.module
        norm = module.LayerNorm
        if self.removed or args or kwargs or not is_active(self.stack, hidden_states) or type(norm) is not nn.LayerNorm:
            return self.plain(hidden_states, input_tensor, *args, **kwargs)
        projected = module.dense(hidden_states)
        if projected.shape != input_tensor.shape or projected.dtype != input_tensor.dtype:
            return norm(projected + input_tensor)
        return add_layer_norm(projected, input_tensor, norm.weight, norm.bias, norm.eps)


class ActivationCall(MethodCall):
    """BERT's intermediate block: gelu(dense(hidden)), the exact GELU."""

    def __init__(self, module: nn.Module, stack: Stack) -> None:
        super().__init__(module)
        self.stack = stack

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """A `dense` and an exact GELU behind it, nothing else with weights."""
        if not hasattr(module, "dense") or not is_exact_gelu(getattr(module, "intermediate_act_fn", None)):
            return False
        return {name for name, _ in module.named_children()} <= {"dense", "intermediate_act_fn"}

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.removed or args or kwargs or not is_active(self.stack, hidden_states):
            return self.plain(hidden_states, *args, **kwargs)
        dense: Any = self.module.dense
        if self.stack.options.fuse_activation == "epilogue" and is_plain_linear(dense) and dense.bias is not None:
            return linear_gelu(hidden_states, dense.weight, dense.bias)
        if self.stack.options.fuse_activation == "chunked" and is_plain_linear(dense) and dense.bias is not None:
            return linear_gelu_in_chunks(hidden_states, dense.weight, dense.bias)
        projected = dense(hidden_states)
        return gelu_(projected) if projected.is_contiguous() else gelu(projected)


def linear_gelu_in_chunks(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """gelu(x W^T + b) for x [..., K], some rows after another: each chunk is still in the cache when GELU reads it."""
    rows, N = x.reshape(-1, x.shape[-1]), weight.shape[0]
    M = rows.shape[0]
    out = torch.empty((M, N), dtype=x.dtype, device=x.device)
    chunks = max(1, -(-M * N * x.element_size() // CHUNK_BYTES))
    step = max(1, -(-M // (chunks * TILE_ROWS)) * TILE_ROWS)
    for first in range(0, M, step):
        part = out[first : first + step]
        torch.addmm(bias, rows[first : first + step], weight.t(), out=part)
        gelu_(part)
    return out.view(*x.shape[:-1], N)


def is_exact_gelu(function: Any) -> bool:
    """Known by what it computes, not by its name: tanh GELU differs by 5e-4 at 2."""
    if not callable(function):
        return False
    points = torch.linspace(-4, 4, 33, dtype=torch.float64)
    try:
        got = function(points.clone())
    except (TypeError, ValueError, RuntimeError):
        return False
    return isinstance(got, Tensor) and bool(torch.allclose(got, gelu(points), rtol=0, atol=1e-12))


def is_plain_linear(module: Any) -> bool:
    """`nn.Linear` itself, with no hook and no forward of its own: nothing would be passed over."""
    return type(module) is nn.Linear and not (
        module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__
    )


class QkvGroup:
    """One product for three linears of one input. Their weights become views of one tensor [3 N, K].

    The first of the three that is called computes all; the others are asked with the same tensor and take their part.
    """

    def __init__(self, parent: nn.Module, names: tuple[str, str, str], stack: Stack) -> None:
        self.stack = stack
        self.parts: list[nn.Linear] = [getattr(parent, name) for name in names]
        self.calls = [QkvCall(part, self, index) for index, part in enumerate(self.parts)]
        self.joined: Joined | None = None
        self.given: Tensor | None = None
        self.results: tuple[Tensor, ...] = ()

    @staticmethod
    def fits(parent: nn.Module, names: tuple[str, str, str]) -> bool:
        """Three plain linears of one shape, dtype and device, that no other module shares; and self-attention."""
        parts = [getattr(parent, name, None) for name in names]
        if not all(is_plain_linear(part) for part in parts) or "Cross" in type(parent).__name__:
            return False
        weights = [part.weight for part in parts]  # type: ignore[union-attr]
        first = weights[0]
        alike = all((w.shape, w.dtype, w.device) == (first.shape, first.dtype, first.device) for w in weights)
        return alike and not first.is_meta and len({id(w) for w in weights}) == 3

    def join(self) -> None:
        """Lay the three weights (and biases) one behind another, each parameter a view of its part."""
        self.joined = join(self.parts)

    def split(self) -> None:
        """Give each parameter memory of its own again, with the values it has now."""
        if self.joined is not None:
            self.joined.split()
        self.joined = None

    def project(self, index: int, x: Tensor) -> Tensor | None:
        """Part `index` of the joint product of x, None where it can't be had."""
        if index == 0:
            joined = self.joined
            if joined is None or joined.buffers is None or not is_active(self.stack, x):
                self.given = None
                return None
            if x.dtype != joined.dtype or not joined.is_intact():
                self.given = None
                return None
            self.given = x
            self.results = linear(x, joined.buffers.weight, joined.buffers.bias).chunk(3, dim=-1)
        if self.given is not x:
            return None
        result = self.results[index]
        if index == 2:
            self.given, self.results = None, ()
        return result


class QkvCall(MethodCall):
    """The forward of one of the three linears."""

    def __init__(self, module: nn.Module, group: QkvGroup, index: int) -> None:
        super().__init__(module)
        self.group = group
        self.index = index

    def __call__(self, x: Tensor) -> Tensor:
        part = None if self.removed else self.group.project(self.index, x)
        return self.plain(x) if part is None else part


def prove_part(part: MethodCall | QkvGroup, stack: Stack) -> bool:
    """Whether an installed part gives, on random input, what its module gives without it."""
    linears = part.parts if isinstance(part, QkvGroup) else [m for m in [part.module.dense] if isinstance(m, nn.Module)]
    first: Any = linears[0]
    parameter = floating_parameter(part.parts[0] if isinstance(part, QkvGroup) else part.module, stack)
    dtype = parameter.dtype
    generator = torch.Generator().manual_seed(0)

    def draw(size: int) -> Tensor:
        return torch.randn(1, 3, size, generator=generator).to(device=parameter.device, dtype=dtype)

    x = draw(first.in_features)
    arguments = (x, draw(first.out_features)) if isinstance(part, NormCall) else (x,)
    targets = part.parts if isinstance(part, QkvGroup) else [part.module]
    before = stack.run
    with torch.no_grad():
        stack.run = None
        want = [target(*arguments) for target in targets]
        stack.run = ProofRun()  # type: ignore[assignment]
        try:
            got = [target(*arguments) for target in targets]
        finally:
            stack.run = before
    return all(
        bool(((a - b).abs().max() <= PROOF_TOLERANCE[dtype] * b.abs().max().clamp_min(1e-6)).item())
        for a, b in zip(got, want, strict=True)
    )


def floating_parameter(module: nn.Module, stack: Stack) -> Tensor:
    """A parameter of the dtype that the module computes in; a quantized layer's own may all be codes."""
    near = (parameter for part in (module, *stack.layers) for parameter in part.parameters())
    return next(parameter for parameter in near if parameter.dtype in FUSED_DTYPES)


class ProofRun:
    """Stands for a forward under way, for one part alone."""

    may_fuse = True
    is_plain = False


# Of the largest value: a few roundings of each dtype.
PROOF_TOLERANCE: Final = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def fused_parts(stack: Stack) -> Iterator[MethodCall | QkvGroup]:
    """What can be fused in this stack, by its options; nothing is set yet."""
    options = stack.options
    for layer in stack.layers:
        for module in layer.modules():
            if options.fuse_norm and NormCall.fits(module):
                yield NormCall(module, stack)
            if options.fuse_activation != "off" and ActivationCall.fits(module):
                yield ActivationCall(module, stack)
            if options.fuse_qkv:
                for names in QKV_NAMES:
                    if all(hasattr(module, name) for name in names) and QkvGroup.fits(module, names):
                        yield QkvGroup(module, names, stack)
