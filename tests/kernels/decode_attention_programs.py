"""Compiles what prompts and decode steps do between products without a GPU, and prints one JSON line for each case.

Run as a program: `python decode_attention_programs.py 90 gfx942`. Triton's interpreter must be off, hence a process of
its own.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).parents[1]))

from kernels.ahead_of_time import disassembled, spilled
from kernels.gemv_4bit_programs import disassemble
from onegpu.kernels import causal_attention, prompt_gate, prompt_rotation
from onegpu.kernels.kv_rows import append_kv_kernel
from onegpu.kernels.launch import NO_CONTRACTION, SHARED_BYTES
from onegpu.kernels.split_attention import split_attention_kernel
from onegpu.kernels.split_launch import configure, constants

# Every case for these, some for the rest; all of them with the argument `all`.
THOROUGH = ("90",)
SOME = ("llama rotary", "llama rotary int8", "gemma", "stablelm 80", "float32 256")
CACHE = {"bf16": 2, "fp16": 2, "fp32": 4, "i8": 1, "fp8e4nv": 1}
FLAGS = {
    "R": 0, "ROTARY": False, "INTERLEAVED": False, "HAS_Q_NORM": False, "HAS_K_NORM": False, "HAS_OFFSET": False,
    "HAS_WINDOW": False, "HAS_SOFTCAP": False, "HAS_SINKS": False,
}  # fmt: skip
ROTARY = {"ROTARY": True, "R": 128}


@dataclass(frozen=True)
class Case:
    """One model's attention: its shapes, dtypes and what it adds to the scores."""

    name: str
    dtype: str
    B: int = 1
    Hkv: int = 8
    G: int = 4
    D: int = 128
    DV: int = 128
    cache: str | None = None
    flags: dict[str, Any] = field(default_factory=dict)
    overlap: bool = False


def cases(dtype: str, *, overlap: bool, float8: bool) -> Iterator[Case]:
    llama = Case("llama", dtype, overlap=overlap)
    rotary = replace(llama, name="llama rotary", flags=ROTARY)
    yield llama
    yield rotary
    yield replace(rotary, name="llama rotary 32", B=32)
    yield replace(llama, name="llama int8", cache="i8")
    yield replace(rotary, name="llama rotary int8", cache="i8")
    norms = {**ROTARY, "HAS_Q_NORM": True, "HAS_K_NORM": True}
    yield replace(rotary, name="qwen3", G=2, flags=norms)
    gemma = {**norms, "R": 256, "HAS_OFFSET": True, "HAS_WINDOW": True, "HAS_SOFTCAP": True}
    yield replace(rotary, name="gemma", Hkv=4, G=2, D=256, DV=256, flags=gemma)
    yield replace(rotary, name="phi 96", Hkv=32, G=1, D=96, DV=96, flags={**ROTARY, "R": 96})
    yield replace(rotary, name="stablelm 80", Hkv=32, G=1, D=80, DV=80, flags={**ROTARY, "R": 20})
    yield replace(rotary, name="cohere", G=8, flags={**ROTARY, "INTERLEAVED": True})
    yield replace(rotary, name="gpt-oss", G=8, D=64, DV=64, flags={**ROTARY, "R": 64, "HAS_SINKS": True})
    yield replace(rotary, name="falcon 71", Hkv=1, G=71, D=64, DV=64, flags={**ROTARY, "R": 64})
    yield replace(rotary, name="gemma mqa", Hkv=1, G=8, D=256, DV=256, flags={**ROTARY, "R": 256})
    yield replace(llama, name="float32", dtype="fp32")
    yield replace(rotary, name="float32 256", dtype="fp32", D=256, DV=256, flags={**ROTARY, "R": 256})
    if float8:
        yield replace(rotary, name="llama rotary float8", cache="fp8e4nv")


def compile_case(case: Case, target: GPUTarget, **changes: int) -> Any:
    cache = case.cache or case.dtype
    q_bytes = CACHE[case.dtype]
    shared = {90: 232448 - 1024}.get(target.arch, SHARED_BYTES)
    hip = target.backend == "hip"
    config = replace(configure(case.G, case.D, case.DV, CACHE[cache], q_bytes, hip=hip, shared=shared), **changes)
    precision = "tf32x3" if q_bytes == 4 and target.backend == "cuda" else "ieee"
    flags = {**FLAGS, **case.flags, "QUANTIZED": case.cache is not None, "OVERLAP": case.overlap}
    settings = constants(config, case.B, case.Hkv, case.G, case.D, case.DV, precision=precision, **flags)
    types = {"k_cache_ptr": f"*{cache}", "v_cache_ptr": f"*{cache}", "positions_ptr": "*i32", "tickets_ptr": "*i32"}
    types |= dict.fromkeys(("k_scale_ptr", "v_scale_ptr", "partial_ptr", "stats_ptr"), "*fp32")
    types |= dict.fromkeys(("scale", "softcap", "eps", "offset"), "fp32")
    return compile_kernel(split_attention_kernel, settings, types, case.dtype, target)


def compile_append(dtype: str, cache: str | None, target: GPUTarget) -> Any:
    settings = {"D": 128, "DV": 96, "BLOCK_D": 128, "BLOCK_DV": 128, "QUANTIZED": cache is not None, "num_warps": 1}
    types = {"k_cache_ptr": f"*{cache or dtype}", "v_cache_ptr": f"*{cache or dtype}", "positions_ptr": "*i32"}
    return compile_kernel(
        append_kv_kernel, settings, types | {"k_scale_ptr": "*fp32", "v_scale_ptr": "*fp32"}, dtype, target
    )


def compile_prefill(dtype: str, D: int, target: GPUTarget) -> Any:
    itemsize, hip = CACHE[dtype], target.backend == "hip"
    precision = "tf32x3" if itemsize == 4 and not hip else "ieee"
    flags = {"HAS_WINDOW": True, "HAS_SOFTCAP": True, "HAS_SINKS": True}
    settings = causal_attention.constants(4, D, D, itemsize, precision=precision, **flags)
    types = {"cu_q_ptr": "*i32", "cu_k_ptr": "*i32", "scale": "fp32", "softcap": "fp32"}
    return compile_kernel(causal_attention.causal_attention_kernel, settings, types, dtype, target)


def compile_rotation(case: Case, target: GPUTarget) -> Any:
    names = {"HAS_Q_NORM", "HAS_K_NORM", "HAS_OFFSET", "INTERLEAVED"}
    flags = {name: bool(case.flags.get(name)) for name in names} | {"QUANTIZED": case.cache is not None}
    settings = prompt_rotation.constants(case.Hkv * case.G, case.Hkv, case.D, case.flags["R"], **flags)
    types = {"k_cache_ptr": f"*{case.cache or case.dtype}", "v_cache_ptr": f"*{case.cache or case.dtype}"}
    types |= {"slots_ptr": "*i32", "places_ptr": "*i32", "k_scale_ptr": "*fp32", "v_scale_ptr": "*fp32"}
    types |= {"eps": "fp32", "offset": "fp32"}
    return compile_kernel(prompt_rotation.rotate_and_append_kernel, settings, types, case.dtype, target)


def compile_gate(dtype: str, target: GPUTarget) -> Any:
    settings = {"ACTIVATION": "gelu_tanh", "BLOCK_N": prompt_gate.BLOCK, "num_warps": 4}
    return compile_kernel(prompt_gate.gated_activation_kernel, settings, {}, dtype, target)


def compile_kernel(kernel: Any, settings: dict[str, Any], types: dict[str, str], dtype: str, target: GPUTarget) -> Any:
    names = kernel.arg_names
    signature = {}
    for name in names:
        default = f"*{dtype}" if name.endswith("_ptr") else "i32"
        signature[name] = "constexpr" if name in settings else types.get(name, default)
    # Strides along the last dimension of scales are 1 and the rest even; no sizes but F are specialized.
    ones = [name for name in ("stride_sn", "stride_ksn", "stride_vsn") if name in names]
    signature |= dict.fromkeys(ones, "constexpr")
    constexprs = {name: settings[name] for name in names if name in settings} | dict.fromkeys(ones, 1)
    even = [n for n in names if signature[n].startswith("*") or (n.startswith(("stride", "F")) and n not in ones)]
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in even}
    options = {name: value for name, value in settings.items() if name not in names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attrs)
    return triton.compile(source, target=target, options={**options, **NO_CONTRACTION})


def report(compiled: Any) -> dict[str, Any]:
    out = {"shared": compiled.metadata.shared, "spilled": spilled(compiled, disassembled(compiled))}
    if "cubin" in compiled.asm:
        lines, registers, _ = disassemble(compiled.asm["cubin"])
        out |= {
            "registers": registers,
            "instructions": sum(not line.startswith(".L") for line in lines),
            "barriers": sum(line.startswith("BAR") for line in lines),
            "tensor_core": sum(line.startswith(("HMMA", "HGMMA")) for line in lines),
            "narrow": sum("LDG.E.U" in line or "STG.E.U" in line for line in lines),
            "waits": sum("ACQBULK" in line for line in lines),
            "wide_loads": sum(
                line.startswith(("LDGSTS.E.BYPASS.128", "LDGSTS.E.BYPASS.LTC128B.128")) for line in lines
            ),
        }
    return out


def main(architectures: list[str], *, everything: bool = False) -> None:
    for arch in architectures:
        amd = arch.startswith("gfx")
        target = (
            GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32) if amd else GPUTarget("cuda", int(arch), 32)
        )
        newest, float8 = not amd and int(arch) >= 90, not amd and int(arch) >= 89
        thorough = arch in THOROUGH or everything
        todo: list[tuple[str, Any]] = [
            (case.name, functools.partial(compile_case, case, target))
            for case in cases("bf16", overlap=newest, float8=float8)
            if thorough or case.name in SOME
        ]
        if thorough:
            todo.append(("append", functools.partial(compile_append, "bf16", None, target)))
        prompts = [("bf16", 80), ("bf16", 128), ("bf16", 256), ("fp32", 128), ("fp32", 256)]
        for dtype, D in prompts if thorough else prompts[1:4:2]:
            todo.append((f"prompt {dtype} {D}", functools.partial(compile_prefill, dtype, D, target)))
        for case in cases("bf16", overlap=False, float8=float8):
            if case.flags.get("ROTARY") and case.B == 1 and (thorough or case.name in SOME):
                todo.append((f"rows {case.name}", functools.partial(compile_rotation, case, target)))
        todo.append(("rows gated", functools.partial(compile_gate, "bf16", target)))
        todo.append(("append int8", functools.partial(compile_append, "bf16", "i8", target)))
        for name, compile_it in todo:
            result: dict[str, Any] = {"arch": arch, "case": name}
            try:
                result |= report(compile_it())
            except Exception as error:  # a failure is a result here, and the others are of interest too
                result["error"] = f"{type(error).__name__}: {error}"[-2000:]
            sys.stdout.write(json.dumps(result) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main([name for name in sys.argv[1:] if name != "all"], everything="all" in sys.argv)
