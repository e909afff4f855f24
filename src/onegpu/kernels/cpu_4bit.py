"""`x @ W.T + bias` with a 4-bit W on a CPU, few rows: machine code made by llvmlite, called with one struct.

Optional: without llvmlite (or where `why_not` has a reason) the op dequantizes and multiplies with torch. At one row
a product of 576 x 576 takes some microseconds, so the call itself is kept to little: a dozen attribute reads, one
allocation, one `struct.pack`. The code is compiled at the first call of each variant (dtype, blocksize, nested; some
tens of milliseconds) and kept for the life of the process. Threads are those of torch (its OpenMP runtime), as many as
`torch.get_num_threads()` says.

Numbers: float32 codebook value times float32 x, summed per block and scaled by the float32 absmax, all in float32,
plus the bias, rounded once to the dtype of x. The bits of a row depend neither on the other rows nor on the number of
threads. Block sums are taken before they are scaled: finite as long as |x| < 2**120.
"""

from __future__ import annotations

import ctypes
import functools
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from onegpu.config import BLOCKSIZES, NESTED_BLOCKSIZE
from onegpu.errors import UnsupportedError
from onegpu.formats.codebooks import codebook
from onegpu.kernels.cpu_4bit_forms import FORMS, Threads, Variant

__all__ = ["available", "form_name", "linear_4bit", "max_rows", "why_not"]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
OLDEST_LLVMLITE = (0, 45)

PACK = struct.Struct("12q").pack

Entry = Callable[[bytes], int]


@functools.cache
def available() -> bool:
    """Whether products can be compiled here: llvmlite new enough, a little-endian 64-bit processor. Never raises."""
    return _missing() is None


def _missing() -> str | None:
    if sys.byteorder != "little" or struct.calcsize("P") != 8:
        return "the processor is not a little-endian 64-bit one"
    try:
        import llvmlite

        version = tuple(int(part) for part in llvmlite.__version__.split(".")[:2])
    except Exception as error:
        return f"llvmlite is not importable ({type(error).__name__}: {error})"
    if version < OLDEST_LLVMLITE:
        return f"llvmlite is {llvmlite.__version__}, needs {'.'.join(map(str, OLDEST_LLVMLITE))} or newer"
    return None


@functools.cache
def form_name() -> str:
    """The form of the code that this processor gets: `avx512`, `avx2` or `generic`."""
    from llvmlite import binding

    features = binding.get_host_cpu_features()
    return next(form.name for form in FORMS.values() if all(features.get(name, False) for name in form.needs))


@functools.cache
def max_rows() -> int:
    """Rows of x up to which this is quicker than dequantizing and torch's own product; 0 where it is not available."""
    return FORMS[form_name()].max_rows if available() else 0


def why_not(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    bias: Tensor | None,
    out_features: int,
    blocksize: int,
    nested_absmax: Tensor | None = None,
    nested_code: Tensor | None = None,
    nested_offset: Tensor | None = None,
) -> str | None:
    """The reason why `linear_4bit` would refuse these, or None. Any number of rows is taken; see `max_rows`."""
    if not available():
        return _missing() or "llvmlite was not there when it was first looked for"
    if x.dtype not in DTYPES or not x.is_cpu:
        return f"x is {x.dtype} on {x.device}, not bfloat16, float16 or float32 on the CPU"
    K = x.shape[-1] if x.dim() else 0
    if K == 0 or K % 8:
        return f"K = {K} is not a positive multiple of 8"
    if blocksize not in BLOCKSIZES:
        return f"blocksize = {blocksize} is not one of {BLOCKSIZES}"
    blocks = -(-K * out_features // blocksize)
    wrong = _wrong("packed", packed, torch.uint8, K * out_features // 2)
    if bias is not None:
        wrong = wrong or _wrong("bias", bias, bias.dtype if bias.dtype in DTYPES else x.dtype, out_features)
    if nested_absmax is None:
        if nested_code is not None or nested_offset is not None:
            return "nested_absmax is missing"
        return wrong or _wrong("absmax", absmax, torch.float32, blocks)
    return (
        wrong
        or _wrong("absmax", absmax, torch.uint8, blocks)
        or _wrong("nested_absmax", nested_absmax, torch.float32, -(-blocks // NESTED_BLOCKSIZE))
        or _wrong("nested_code", nested_code, torch.float32, 256)
        or _wrong("nested_offset", nested_offset, torch.float32, 1, dim=0)
    )


def _wrong(name: str, tensor: Tensor | None, dtype: torch.dtype, length: int, dim: int = 1) -> str | None:
    if tensor is None:
        return f"{name} is missing"
    if tensor.dtype is not dtype or tensor.numel() != length or tensor.dim() != dim:
        expected = [length] if dim else []
        return f"{name} is {tensor.dtype} {list(tensor.shape)}, not {dtype} {expected}"
    if not (tensor.is_cpu and tensor.is_contiguous()):
        return f"{name} is not contiguous on the CPU"
    return None


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
    """`x [..., K] @ W.T + bias` for the 4-bit W [N, K] of `onegpu.formats.blockwise`; the result is [..., N] like x.

    Args:
        x: bfloat16, float16 or float32, K a multiple of 8.
        packed: uint8 [N K / 2]; absmax: float32 [ceil(N K / blocksize)], or uint8 with the three nested tensors.
        bias: [N], any of the three dtypes, or None.

    Raises:
        UnsupportedError: with the sentence of `why_not`, or LLVM's where it cannot compile.
        ConfigError: an unknown quant_type.
    """
    reason = why_not(x, packed, absmax, bias, out_features, blocksize, nested_absmax, nested_code, nested_offset)
    if reason is not None:
        raise UnsupportedError(f"no compiled 4-bit product for this: {reason}")
    form = form_name()
    if form == "generic":
        # Not every processor converts float16 by itself.
        bias = bias.float() if bias is not None and bias.dtype is torch.float16 else bias
        if x.dtype is torch.float16:
            nested = (nested_absmax, nested_code, nested_offset)
            return linear_4bit(x.float(), packed, absmax, bias, out_features, quant_type, blocksize, *nested).half()
    x = x.contiguous()
    shape = x.shape
    K = shape[-1]
    bias_dtype = None if bias is None else bias.dtype
    entry = compiled(x.dtype, bias_dtype, blocksize, nested_absmax is not None, K % blocksize == 0, form)
    if isinstance(entry, UnsupportedError):
        raise entry
    out = x.new_empty((*shape[:-1], out_features))
    status = entry(
        PACK(
            x.data_ptr(),
            packed.data_ptr(),
            absmax.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            out.data_ptr(),
            _codebook(quant_type).data_ptr(),
            0 if nested_absmax is None else nested_absmax.data_ptr(),
            0 if nested_code is None else nested_code.data_ptr(),
            0 if nested_offset is None else nested_offset.data_ptr(),
            x.numel() // K,
            out_features,
            K,
        )
    )
    if status:
        raise MemoryError("no memory for a float32 copy of x")
    return out


@functools.cache
def _codebook(quant_type: str) -> Tensor:
    return codebook(quant_type, torch.device("cpu"))


@functools.cache
def _threads() -> Threads | None:
    """torch's own OpenMP entry points, found through its library's dependencies; None where it has none of GNU's."""
    for library in sorted((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.so*")):
        try:
            loaded = ctypes.CDLL(str(library))
            names = ("GOMP_parallel", "omp_get_max_threads", "omp_get_num_threads", "omp_get_thread_num")
            found = [ctypes.cast(getattr(loaded, name), ctypes.c_void_p).value for name in names]
        except (OSError, AttributeError):
            continue
        return Threads(*(address or 0 for address in found)) if all(found) else None
    return None


@functools.cache
def compiled(
    x_dtype: torch.dtype, bias_dtype: torch.dtype | None, blocksize: int, nested: bool, aligned: bool, form: str
) -> Entry | UnsupportedError:
    """The machine code of one variant, made at the first call and kept; an error is kept too, so as to try once."""
    from llvmlite import binding

    from onegpu.kernels.cpu_4bit_ir import build_module

    variant = Variant(FORMS[form], _name(x_dtype), _name(bias_dtype), blocksize, nested, aligned)
    try:
        binding.initialize_native_target()
        binding.initialize_native_asmprinter()
        module = binding.parse_assembly(str(build_module(variant, _threads())))
        machine = binding.Target.from_default_triple().create_target_machine(cpu=variant.form.cpu, opt=3, jit=True)
        engine = binding.create_mcjit_compiler(module, machine)
        engine.finalize_object()
    except RuntimeError as error:
        return UnsupportedError(f"LLVM could not compile the 4-bit product for this processor ({form}): {error}")
    entry = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_char_p)(engine.get_function_address("entry"))
    # The code is freed with its engine.
    entry.engine = engine  # type: ignore[attr-defined]
    return entry


def _name(dtype: torch.dtype | None) -> str:
    return "" if dtype is None else str(dtype).removeprefix("torch.")
