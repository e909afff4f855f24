"""The dispatch table: every operator of the namespace `onegpu`, with its schema and what runs it where.

An operator has five parts, all bound here: a check of its arguments (`checks`); shapes only, for tracing (`fake_*`);
what it means in torch (`reference`), which CPUs run unless something faster is named; the Triton launcher for CUDA and
ROCm devices, imported at the first call that needs it; and for the two products a backward. A GPU on which Triton
cannot run takes the reference too.
Registration is by call, so every part stays a plain function that tests and benchmarks can reach. The callables at
the end are what the rest of the project uses; `torch.ops.onegpu` has the same operators.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from onegpu.errors import UnsupportedError
from onegpu.formats import rowwise
from onegpu.kernels import checks, cpu_4bit, reference

__all__ = [
    "dequantize_4bit",
    "linear_4bit",
    "linear_8bit",
    "quantize_4bit",
    "quantize_8bit_rows",
    "why_not_triton",
]

# Registrations live as long as this object.
LIBRARY: Final = torch.library.Library("onegpu", "DEF")  # type: ignore[no-untyped-call]
OLDEST_CAPABILITY = (7, 5)
INT8_DOT_CAPABILITY = (8, 0)


@functools.cache
def why_not_triton(device: torch.device, capability: tuple[int, int] = OLDEST_CAPABILITY) -> str | None:
    """None where Triton kernels run on `device`, else the reason in a sentence."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < capability:
        major, minor = torch.cuda.get_device_capability(device)
        return f"compute capability {major}.{minor} is below {capability[0]}.{capability[1]}"
    return None


def bind(
    schema: str,
    *,
    check: Callable[..., None],
    fake: Callable[..., Any],
    plain: Callable[..., Any],
    cuda: str,
    cpu: Callable[..., Any] | None = None,
    capability: tuple[int, int] = OLDEST_CAPABILITY,
) -> Callable[..., Any]:
    """Define one operator, and return it.

    Args:
        check: runs before each implementation.
        plain: the reference; on a GPU it stands in where Triton cannot run.
        cuda: module of the Triton launcher, which has the operator's own name.
        cpu: what CPU tensors take, if not the reference.
        capability: what the launcher needs of a device.
    """
    name = schema.partition("(")[0]

    @functools.cache
    def cuda_implementation(device: torch.device) -> Callable[..., Any]:
        if why_not_triton(device, capability) is not None:
            return plain
        launcher: Callable[..., Any] = getattr(importlib.import_module(cuda), name)
        return launcher

    def on_cpu(*args: Any) -> Any:
        check(*args)
        return plain(*args) if cpu is None else cpu(*args)

    def on_cuda(*args: Any) -> Any:
        check(*args)
        return cuda_implementation(args[0].device)(*args)

    def on_fake(*args: Any) -> Any:
        check(*args)
        return fake(*args)

    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
    LIBRARY.impl(name, on_cpu, "CPU")  # type: ignore[no-untyped-call]
    LIBRARY.impl(name, on_cuda, "CUDA")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"onegpu::{name}", on_fake, lib=LIBRARY)
    operator: Callable[..., Any] = getattr(torch.ops.onegpu, name).default
    return operator


def fake_quantize_4bit(weight: Tensor, _quant_type: str, blocksize: int, *_: object) -> tuple[Tensor, Tensor]:
    n = weight.numel()
    packed = weight.new_empty((n + 1) // 2, dtype=torch.uint8)
    return packed, weight.new_empty((n + blocksize - 1) // blocksize, dtype=torch.float32)


def fake_dequantize_4bit(
    packed: Tensor, _absmax: Tensor, shape: Sequence[int], dtype: torch.dtype, *_: object
) -> Tensor:
    return packed.new_empty(tuple(shape), dtype=dtype)


def fake_linear_4bit(
    x: Tensor, _packed: Tensor, _absmax: Tensor, _bias: Tensor | None, out_features: int, *_: object
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


def fake_quantize_8bit_rows(x: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    M, K = x.shape
    codes = x.new_empty((M, K), dtype=torch.int8)
    return codes, x.new_empty(M, dtype=torch.float32), x.new_empty(K, dtype=torch.bool)


def fake_linear_8bit(x: Tensor, codes: Tensor, *_: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


def linear_4bit_on_cpu(x: Tensor, *weight: Any) -> Tensor:
    """Compiled code where there is a compiler and x has few rows, else the reference."""
    if x.numel() <= cpu_4bit.max_rows() * x.shape[-1]:
        try:
            return cpu_4bit.linear_4bit(x, *weight)
        except UnsupportedError:
            pass
    return reference.linear_4bit(x, *weight)


NESTED = "Tensor? nested_absmax=None, Tensor? nested_code=None, Tensor? nested_offset=None"

_quantize_4bit = bind(
    "quantize_4bit(Tensor weight, str quant_type, int blocksize, bool scale_search=False, Tensor? importance=None)"
    " -> (Tensor packed, Tensor absmax)",
    check=checks.quantize_4bit,
    fake=fake_quantize_4bit,
    plain=reference.quantize_4bit,
    cuda="onegpu.kernels.quantize",
)
_dequantize_4bit = bind(
    "dequantize_4bit(Tensor packed, Tensor absmax, SymInt[] shape, ScalarType dtype, str quant_type, int blocksize,"
    f" {NESTED}) -> Tensor",
    check=checks.dequantize_4bit,
    fake=fake_dequantize_4bit,
    plain=reference.dequantize_4bit,
    cuda="onegpu.kernels.dequantize",
)
_linear_4bit = bind(
    "linear_4bit(Tensor x, Tensor packed, Tensor absmax, Tensor? bias, SymInt out_features, str quant_type,"
    f" int blocksize, {NESTED}) -> Tensor",
    check=checks.linear_4bit,
    fake=fake_linear_4bit,
    plain=reference.linear_4bit,
    cpu=linear_4bit_on_cpu,
    cuda="onegpu.kernels.matmul_4bit",
)
_quantize_8bit_rows = bind(
    "quantize_8bit_rows(Tensor x, float threshold=0.0) -> (Tensor codes, Tensor row_stats, Tensor outlier_cols)",
    check=checks.quantize_8bit_rows,
    fake=fake_quantize_8bit_rows,
    plain=reference.quantize_8bit_rows,
    cuda="onegpu.kernels.quantize_rows",
)
_linear_8bit = bind(
    "linear_8bit(Tensor x, Tensor codes, Tensor row_stats, Tensor? bias, float threshold=0.0) -> Tensor",
    check=checks.linear_8bit,
    fake=fake_linear_8bit,
    plain=reference.linear_8bit,
    cuda="onegpu.kernels.matmul_8bit",
    capability=INT8_DOT_CAPABILITY,
)


def linear_4bit_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001, passed by name
    x, packed, absmax, bias, out_features, quant_type, blocksize, *nested = inputs
    ctx.save_for_backward(packed, absmax, *nested)
    ctx.weight_shape = (out_features, x.shape[-1])
    ctx.quant_type, ctx.blocksize = quant_type, blocksize
    ctx.x_dtype, ctx.bias_dtype = x.dtype, None if bias is None else bias.dtype


def linear_4bit_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of x and bias; W is dequantized again rather than kept."""
    packed, absmax, *nested = ctx.saved_tensors
    grad_x = None
    if ctx.needs_input_grad[0]:
        weight = dequantize_4bit(packed, absmax, ctx.weight_shape, ctx.x_dtype, ctx.quant_type, ctx.blocksize, *nested)
        grad_x = grad @ weight
    grad_bias = _bias_gradient(grad, ctx.bias_dtype) if ctx.needs_input_grad[3] else None
    return grad_x, None, None, grad_bias, None, None, None, None, None, None


def linear_8bit_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001, passed by name
    x, codes, row_stats, bias, _ = inputs
    ctx.save_for_backward(codes, row_stats)
    ctx.x_dtype, ctx.bias_dtype = x.dtype, None if bias is None else bias.dtype


def linear_8bit_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of x and bias, as if x had not been rounded to int8: the rounding has no useful slope."""
    codes, row_stats = ctx.saved_tensors
    grad_x = grad @ rowwise.dequantize_rows(codes, row_stats, ctx.x_dtype) if ctx.needs_input_grad[0] else None
    grad_bias = _bias_gradient(grad, ctx.bias_dtype) if ctx.needs_input_grad[3] else None
    return grad_x, None, None, grad_bias, None


def _bias_gradient(grad: Tensor, dtype: torch.dtype) -> Tensor:
    return grad.reshape(-1, grad.shape[-1]).sum(dim=0, dtype=torch.float32).to(dtype)


torch.library.register_autograd(
    "onegpu::linear_4bit", linear_4bit_backward, setup_context=linear_4bit_setup, lib=LIBRARY
)
torch.library.register_autograd(
    "onegpu::linear_8bit", linear_8bit_backward, setup_context=linear_8bit_setup, lib=LIBRARY
)


def nothing_watches() -> bool:
    """Whether a call may go around the dispatcher: no gradients, tracing, compiling, transforms or dispatch modes."""
    return not (
        torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or torch._C._is_tracing()
        or is_in_torch_dispatch_mode()
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def quantize_4bit(
    weight: Tensor, quant_type: str, blocksize: int, scale_search: bool = False, importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Quantize a weight to NF4 or FP4 (QLoRA, arXiv 2305.14314), byte for byte as bitsandbytes does on CUDA.

    Args:
        weight: [...], n elements, bfloat16, float16 or float32; finite (nothing here can ask a GPU about that).
        quant_type: `nf4` or `fp4`.
        blocksize: weights per scale, one of `onegpu.config.BLOCKSIZES`.
        scale_search: choose each block's scale by least squared error, not by its maximum.
        importance: weights of the squared errors, float32 like `weight`, or [K] with one per input feature.

    Returns:
        packed: uint8 [ceil(n / 2)], the even element in the high nibble.
        absmax: float32 [ceil(n / blocksize)].

    Raises:
        ArgumentError: a dtype or shape that does not fit.
        ConfigError: an unknown quant_type or blocksize.
        DeviceError: tensors on different devices.
    """
    packed, absmax = _quantize_4bit(weight, quant_type, blocksize, scale_search, importance)
    return packed, absmax


def dequantize_4bit(
    packed: Tensor,
    absmax: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
    quant_type: str,
    blocksize: int,
    nested_absmax: Tensor | None = None,
    nested_code: Tensor | None = None,
    nested_offset: Tensor | None = None,
) -> Tensor:
    """The weight that packed 4-bit codes stand for: code value times scale in float32, rounded once to `dtype`.

    Args:
        packed: uint8 [ceil(n / 2)], n the product of `shape`.
        absmax: float32 [m], m = ceil(n / blocksize); uint8 [m] with the three nested tensors.
        shape, dtype: of the result; bfloat16, float16 or float32.
        nested_absmax: float32 [ceil(m / 256)]; nested_code: float32 [256]; nested_offset: float32 [].

    Raises:
        ArgumentError, ConfigError, DeviceError: as `quantize_4bit`.
    """
    out: Tensor = _dequantize_4bit(
        packed, absmax, shape, dtype, quant_type, blocksize, nested_absmax, nested_code, nested_offset
    )
    return out


def linear_4bit(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    bias: Tensor | None,
    out_features: int,
    quant_type: str,
    blocksize: int,
    nested_absmax: Tensor | None = None,
    nested_code: Tensor | None = None,
    nested_offset: Tensor | None = None,
) -> Tensor:
    """x @ W.T + bias for a 4-bit weight W of shape [N, K].

    Never less accurate than dequantizing W to the dtype of x and multiplying; the sum is float32, rounded once.
    Differentiable in x and bias.

    Args:
        x: [..., K], bfloat16, float16 or float32; any number of rows, also none.
        packed, absmax, nested_*: as `dequantize_4bit`, with n = N * K.
        bias: [N] in a floating dtype, or None.
        out_features: N.

    Returns:
        [..., N] in the dtype of x.

    Raises:
        ArgumentError, ConfigError, DeviceError: as `quantize_4bit`.
    """
    if x.is_cpu and nothing_watches() and type(x) is Tensor and x.numel() <= cpu_4bit.max_rows() * x.shape[-1]:
        # At one row, going through the dispatcher can take longer than the product.
        try:
            return cpu_4bit.linear_4bit(
                x, packed, absmax, bias, out_features, quant_type, blocksize, nested_absmax, nested_code, nested_offset
            )
        except UnsupportedError:
            pass
    y: Tensor = _linear_4bit(
        x, packed, absmax, bias, out_features, quant_type, blocksize, nested_absmax, nested_code, nested_offset
    )
    return y


def quantize_8bit_rows(x: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize the rows of a matrix to int8, as LLM.int8() (arXiv 2208.07339) does with weights and activations.

    Args:
        x: [M, K], bfloat16, float16 or float32.
        threshold: magnitude from which an element is an outlier; 0 for none.

    Returns:
        codes: int8 [M, K], zero in outlier columns.
        row_stats: float32 [M], the largest magnitude below the threshold; codes * row_stats / 127 is x again.
        outlier_cols: bool [K], the columns with an outlier in any row.

    Raises:
        ArgumentError: a dtype, rank or threshold that does not fit.
    """
    codes, row_stats, outlier_cols = _quantize_8bit_rows(x, threshold)
    return codes, row_stats, outlier_cols


def linear_8bit(x: Tensor, codes: Tensor, row_stats: Tensor, bias: Tensor | None, threshold: float = 0.0) -> Tensor:
    """LLM.int8() (arXiv 2208.07339): x @ W.T + bias with W in int8 rows and x quantized to int8 rows on the way.

    Outlier columns of x (see `quantize_8bit_rows`, over all rows of the call) keep their own dtype. Sums are exact
    int32 or float32, rounded once. Differentiable in x and bias.
    On a GPU with tensor cores, up to 32 rows of 16-bit x (on Hopper 64) are not quantized at all (`linear_8bit_rows`):
    reading W takes the time then. That is at least as exact, and rows do not depend on each other.

    Args:
        x: [..., K], bfloat16, float16 or float32; any number of rows, also none.
        codes: int8 [N, K]; row_stats: float32 [N].
        bias: [N] in a floating dtype, or None.
        threshold: 0 for no outliers; LLM.int8() uses 6.

    Returns:
        [..., N] in the dtype of x.

    Raises:
        ArgumentError, DeviceError: a tensor that does not fit.
    """
    y: Tensor = _linear_8bit(x, codes, row_stats, bias, threshold)
    return y
