"""What each backend of `scaled_dot_product_attention` asks of a call, as rules that give a sentence and a cure.

Sources: the documentation of torch.nn.functional.scaled_dot_product_attention and of torch.nn.attention, and what torch
2.11 to 2.14 accepts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.backends import cuda as switches

__all__ = ["BACKENDS", "RULES", "Call", "Reason"]

BACKENDS = ("flash", "cudnn", "efficient", "math")
HALF = (torch.float16, torch.bfloat16)
Reason = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Call:
    """One call, and the GPU it is on: None for tensors that are on none."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    dropout_p: float
    is_causal: bool
    enable_gqa: bool
    capability: tuple[int, int] | None

    @property
    def on_gpu(self) -> bool:
        """Whether the query is on a CUDA or ROCm device."""
        return bool(self.q.is_cuda)


def switched_off(is_on: Callable[[], bool], switch: str) -> Callable[[Call], Iterator[Reason]]:
    def rule(_: Call) -> Iterator[Reason]:
        if not is_on():
            yield (
                "is switched off",
                f"torch.backends.cuda.{switch}(True), or leave the sdpa_kernel() block that excludes it",
            )

    return rule


def four_dimensions(call: Call) -> Iterator[Reason]:
    if any(tensor.dim() != 4 for tensor in (call.q, call.k, call.v)):
        found = ", ".join(str(tensor.dim()) for tensor in (call.q, call.k, call.v))
        yield (
            f"takes 4 dimensions [batch, heads, tokens, head_dim]; q, k, v have {found}",
            "q.unsqueeze(0) adds a batch of one",
        )


def one_dtype(call: Call) -> Iterator[Reason]:
    dtypes = {tensor.dtype for tensor in (call.q, call.k, call.v)}
    if len(dtypes) > 1:
        yield f"takes q, k, v of one dtype; got {names(dtypes)}", "cast them: k.to(q.dtype)"
    mask = call.mask
    if mask is not None and mask.dtype not in (torch.bool, call.q.dtype):
        yield (
            f"takes a mask of bool or {dtype_name(call.q.dtype)}; got {dtype_name(mask.dtype)}",
            "cast it: mask.to(q.dtype)",
        )


def one_device(call: Call) -> Iterator[Reason]:
    found = {str(tensor.device) for tensor in (call.q, call.k, call.v, call.mask) if tensor is not None}
    if len(found) > 1:
        yield f"takes tensors on one device; they are on {', '.join(sorted(found))}", "move them: k.to(q.device)"


def mask_or_causal(call: Call) -> Iterator[Reason]:
    if call.mask is not None and call.is_causal:
        yield "attn_mask and is_causal exclude each other", "put the causal part into the mask, or leave the mask out"


def matching_heads(call: Call) -> Iterator[Reason]:
    if any(tensor.dim() != 4 for tensor in (call.q, call.k, call.v)):
        return
    heads, kv_heads = call.q.shape[1], call.k.shape[1]
    if heads != kv_heads and not call.enable_gqa and kv_heads != 1:
        yield f"q has {heads} heads, k has {kv_heads}", "pass enable_gqa=True"
    elif heads != kv_heads and call.enable_gqa and heads % max(kv_heads, 1):
        yield f"{heads} heads of q are no multiple of the {kv_heads} of k", "check how the heads were split"
    if call.q.shape[-1] != call.k.shape[-1]:
        yield f"q has head dim {call.q.shape[-1]}, k has {call.k.shape[-1]}", "they must be equal to be multiplied"


def gpu_only(call: Call) -> Iterator[Reason]:
    if not call.on_gpu:
        yield f"is a kernel for GPUs, and q is on {call.q.device}", "move q, k, v to a GPU: q.to('cuda')"


def newer_than(major: int, minor: int) -> Callable[[Call], Iterator[Reason]]:
    def rule(call: Call) -> Iterator[Reason]:
        if call.capability is not None and call.capability < (major, minor):
            has = "{}.{}".format(*call.capability)
            yield f"needs compute capability {major}.{minor}, this GPU has {has}", "efficient is next in line here"

    return rule


def half_precision(call: Call) -> Iterator[Reason]:
    if call.on_gpu and call.q.dtype not in HALF:
        yield (
            f"takes float16 and bfloat16, not {dtype_name(call.q.dtype)}",
            "load the model in bfloat16, or q.to(torch.bfloat16)",
        )


def float_on_cpu(call: Call) -> Iterator[Reason]:
    if not call.on_gpu and not call.q.dtype.is_floating_point:
        yield f"takes floating dtypes, not {dtype_name(call.q.dtype)}", "cast to bfloat16 or float32"


def no_mask(call: Call) -> Iterator[Reason]:
    if call.on_gpu and call.mask is not None:
        yield (
            "takes no attn_mask",
            "is_causal=True stands for a causal mask; without padding leave the mask out; onegpu.optimize(model) "
            "takes the padding away",
        )


def causal_square(call: Call) -> Iterator[Reason]:
    if call.on_gpu and call.is_causal and call.q.shape[-2] != call.k.shape[-2]:
        yield (
            f"takes is_causal only for as many queries as keys; got {call.q.shape[-2]} and {call.k.shape[-2]}",
            "for one query leave is_causal out; else torch.nn.attention.bias.causal_lower_right",
        )


def no_dropout_on_cpu(call: Call) -> Iterator[Reason]:
    if not call.on_gpu and call.dropout_p > 0:
        yield f"has no dropout on a CPU; got {call.dropout_p}", "model.eval() sets it to 0"


def head_dim(largest: int, multiple: int) -> Callable[[Call], Iterator[Reason]]:
    def rule(call: Call) -> Iterator[Reason]:
        size, value_size = call.q.shape[-1], call.v.shape[-1]
        limit = 256 if largest == 128 and call.capability in ((9, 0), (10, 0), (10, 3)) else largest
        if size > limit or value_size > limit:
            yield f"takes head dims up to {limit}, not {max(size, value_size)}", "efficient takes larger ones"
        if size % multiple or value_size % multiple:
            odd = size if size % multiple else value_size
            yield (
                f"takes head dims that are multiples of {multiple}, not {odd}",
                "pad q, k, v with zeros and pass scale",
            )

    return rule


def aligned_head_dim(call: Call) -> Iterator[Reason]:
    multiple = 8 if call.q.dtype in HALF else 4
    yield from head_dim(1 << 30, multiple)(call)


def equal_head_dims(call: Call) -> Iterator[Reason]:
    if call.q.shape[-1] != call.v.shape[-1]:
        yield f"takes one head dim; q has {call.q.shape[-1]}, v has {call.v.shape[-1]}", "pad v with zeros"


def contiguous_rows(call: Call) -> Iterator[Reason]:
    odd = [label for label in "qkv" if getattr(call, label).stride(-1) != 1 and getattr(call, label).shape[-1] > 1]
    if odd:
        yield f"takes head dims with stride 1; {', '.join(odd)} differ", f"{odd[0]} = {odd[0]}.contiguous()"


def some_tokens(call: Call) -> Iterator[Reason]:
    if 0 in (call.q.shape[-2], call.k.shape[-2]):
        yield "takes at least one query and one key", "skip the call for an empty batch"


def several_keys(call: Call) -> Iterator[Reason]:
    if call.k.shape[-2] == 1:
        yield "takes more than one key", "flash and efficient take a single one"


def not_deterministic(_: Call) -> Iterator[Reason]:
    if torch.are_deterministic_algorithms_enabled():
        yield "is left out in deterministic mode", "torch.use_deterministic_algorithms(False)"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def names(dtypes: set[torch.dtype]) -> str:
    return ", ".join(sorted(map(dtype_name, dtypes)))


FUSED = (four_dimensions, one_device, one_dtype, mask_or_causal, matching_heads, contiguous_rows, some_tokens)
RULES: dict[str, tuple[Callable[[Call], Iterator[Reason]], ...]] = {
    "flash": (
        switched_off(switches.flash_sdp_enabled, "enable_flash_sdp"),
        *FUSED,
        newer_than(8, 0),
        half_precision,
        float_on_cpu,
        no_mask,
        causal_square,
        no_dropout_on_cpu,
        equal_head_dims,
        head_dim(256, 1),
    ),
    "cudnn": (
        switched_off(switches.cudnn_sdp_enabled, "enable_cudnn_sdp"),
        gpu_only,
        *FUSED,
        newer_than(8, 0),
        half_precision,
        head_dim(128, 8),
        several_keys,
        not_deterministic,
    ),
    "efficient": (
        switched_off(switches.mem_efficient_sdp_enabled, "enable_mem_efficient_sdp"),
        gpu_only,
        *FUSED,
        newer_than(5, 0),
        aligned_head_dim,
    ),
    "math": (
        switched_off(switches.math_sdp_enabled, "enable_math_sdp"),
        one_device,
        one_dtype,
        mask_or_causal,
        matching_heads,
    ),
}
