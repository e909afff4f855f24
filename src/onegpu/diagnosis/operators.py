"""Whether every operator of ours runs on a device: each is called once on a small input and held to its definition."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from onegpu.attention.varlen import BACKENDS, VarlenSpec
from onegpu.diagnosis.finding import Finding
from onegpu.diagnosis.more_operators import decode_trials, encoder_trials, many_rows_trials
from onegpu.kernels import (
    dequantize_4bit,
    kernel_for,
    linear_4bit,
    linear_8bit,
    quantize_4bit,
    quantize_8bit_rows,
    reference,
)
from onegpu.kernels.encoder_ops import add_layer_norm, linear_gelu
from onegpu.kernels.ops import why_not_triton

__all__ = ["look_at_attention", "look_at_operators"]

ROWS, INPUTS, OUTPUTS = 3, 128, 64
# Of the largest magnitude: several roundings to float16, the coarsest dtype that is tried.
TOLERANCE = 2e-2
CURES = {
    "is not installed": "pip install triton",
    "compute capability": "the reference is right and slower; a GPU from Turing on runs the kernels",
    "llvmlite": "pip install llvmlite",
}


def cure_for(text: str) -> str:
    """What to do about a reason, by its words; nothing where nothing helps."""
    return next((cure for words, cure in CURES.items() if words in text), "")


def trials(device: torch.device) -> dict[str, Callable[[], tuple[Tensor, Tensor]]]:
    """For each operator a call on `device` and what it must give."""
    generator = torch.Generator().manual_seed(0)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    x = torch.randn(ROWS, INPUTS, generator=generator).to(device, dtype)
    weight = torch.randn(OUTPUTS, INPUTS, generator=generator).to(device, dtype)
    bias = torch.randn(OUTPUTS, generator=generator).to(device, dtype)
    ones, zeros = torch.ones(INPUTS, device=device, dtype=dtype), torch.zeros(INPUTS, device=device, dtype=dtype)
    packed, absmax = reference.quantize_4bit(weight.cpu(), "nf4", 64)
    plain = reference.dequantize_4bit(packed, absmax, [OUTPUTS, INPUTS], dtype, "nf4", 64).to(device)
    codes, row_stats, _ = reference.quantize_8bit_rows(weight.cpu())
    packed, absmax, codes, row_stats = (tensor.to(device) for tensor in (packed, absmax, codes, row_stats))
    shape = [OUTPUTS, INPUTS]
    return {
        "quantize_4bit": lambda: (quantize_4bit(weight, "nf4", 64)[1], absmax),
        "dequantize_4bit": lambda: (dequantize_4bit(packed, absmax, shape, dtype, "nf4", 64), plain),
        "linear_4bit": lambda: (linear_4bit(x, packed, absmax, bias, OUTPUTS, "nf4", 64), x @ plain.T + bias),
        "quantize_8bit_rows": lambda: (quantize_8bit_rows(weight)[1], row_stats),
        "linear_8bit": lambda: (linear_8bit(x, codes, row_stats, bias), x @ weight.T + bias),
        "add_layer_norm": lambda: (
            add_layer_norm(x, x, ones, zeros, 1e-5),
            torch.nn.functional.layer_norm(2 * x, (INPUTS,), ones, zeros, 1e-5),
        ),
        "linear_gelu": lambda: (
            linear_gelu(x, weight, bias),
            torch.nn.functional.gelu(torch.nn.functional.linear(x, weight, bias)),
        ),
        **encoder_trials(device, dtype),
        **decode_trials(device, dtype),
    }


def look_at_operators(device: torch.device) -> Iterator[Finding]:
    """Run every operator once on `device`; on a GPU the first time compiles its kernels, some seconds."""
    for name, trial in trials(device).items():
        yield look_at_operator(name, trial, kernel_for(name, device))
    if device.type == "cuda" and why_not_triton(device) is None:
        yield from look_at_many_rows(device)


def look_at_many_rows(device: torch.device) -> Iterator[Finding]:
    """Products of many rows and coded weights: the kernel of their own, or what runs instead and why."""
    from onegpu.kernels.gemm_codes import why_not_gemm

    reason = why_not_gemm(device, torch.float16)
    for name, trial in many_rows_trials(device, torch.float16).items():
        if reason is None:
            yield look_at_operator(name, trial, "CUDA C++ for this card")
        else:
            yield Finding(name, "note", f"runs: Triton and the vendor's library; a quicker kernel {reason}")


def look_at_operator(name: str, trial: Callable[[], tuple[Tensor, Tensor]], kernel: str) -> Finding:
    """One operator: runs and is right, or the sentence why not."""
    again = "run `onegpu --debug doctor`; it is worth an issue, with `onegpu env` in it"
    try:
        with torch.no_grad():
            got, expected = trial()
        error = float((got.float() - expected.float()).abs().max() / expected.float().abs().max())
    except Exception as failure:
        said = (str(failure).strip().splitlines() or [type(failure).__name__])[0]
        return Finding(name, "problem", f"does not run ({kernel}): {said}", again)
    # Two roundings to 8 bit, of weights and of inputs, cost linear_8bit more.
    if not error <= (2 if name.startswith("linear_8bit") else 1) * TOLERANCE:
        return Finding(name, "problem", f"gives wrong numbers ({kernel}): {error:.1%} off", again)
    cure = cure_for(kernel)
    return Finding(name, "note" if cure else "ok", f"runs: {kernel}", cure)


def look_at_attention(spec: VarlenSpec) -> Iterator[Finding]:
    """Each way to attend over unpadded tokens: can run, or why not."""
    for backend in BACKENDS:
        reason = backend.why_not(spec)
        if reason is None:
            yield Finding(backend.name, "ok", "can run")
        else:
            yield Finding(backend.name, "note", reason, cure_for(reason))
