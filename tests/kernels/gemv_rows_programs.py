"""Compiles the kernels of products with a tail without a GPU, and prints one JSON line for each case.

Run as a program: `python gemv_rows_programs.py 90 gfx942`. The interpreter must be off, hence a process of its own.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).parents[1]))

from kernels.gemv_4bit_programs import disassemble
from onegpu.kernels import gemv_rows, rms, tail_device
from onegpu.kernels.launch import NO_CONTRACTION, SHARED_BYTES

JUMP = re.compile(r"BRA.*?(\.L_x_\d+)")
# Shared memory that programs get of an H100, and of all others.
SHARED = {"90": 231424}
TAIL = {"has_bias": True, "has_residual": True, "activation": "silu"}


def products(arch: str) -> Iterator[tuple[str, Any, dict[str, Any], str]]:
    """Name, kernel, settings and dtype of W: what ships, all of it for one architecture and some for the others."""
    sixteen_bit = "fp16" if arch == "75" else "bf16"
    K = 14336
    seen = set()
    for (size, bucket, shape), wanted in gemv_rows.CONFIGS.items():
        if arch == "75" and wanted.stages:
            continue
        if arch != "90" and (shape, bucket) not in (("small", 1), ("small", 16), ("wide", 64)):
            continue
        if arch.startswith("gfx") and wanted.stages:
            wanted = gemv_rows.AMD
        for gated in (False, True)[: 2 if shape == "small" else 1]:
            config = wanted.fitted(bucket, K, size, SHARED.get(arch, SHARED_BYTES), gated=gated)
            key = (size, bucket, config, gated)
            if key in seen:
                continue
            seen.add(key)
            overlap = arch == "90" and bucket in (1, 16)
            settings = gemv_rows.constants(config, bucket, K, scaled=size == 1, gated=gated, overlap=overlap, **TAIL)
            kernel = gemv_rows.rows_kernel if config.stages else gemv_rows.one_row_kernel
            yield (
                f"{size} bytes, M={bucket}, {shape}, gated={gated}",
                kernel,
                settings,
                "i8" if size == 1 else sixteen_bit,
            )


def compile_for(kernel: Any, settings: dict[str, Any], weight: str, arch: str) -> Any:
    amd = arch.startswith("gfx")
    target = GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32) if amd else GPUTarget("cuda", int(arch), 32)
    dtype = "fp16" if arch == "75" else "bf16"
    types = {"weight_ptr": f"*{weight}", "stats_ptr": "*fp32", "t_ptr": "*fp32", "eps": "fp32"}
    types |= {"offset": "fp32", "factor": "fp32"}
    if kernel is gemv_rows.one_row_kernel:
        settings = settings | {"M": 1}
    names = kernel.arg_names
    signature = {}
    for name in names:
        default = f"*{dtype}" if name.endswith("_ptr") else "i32"
        signature[name] = "constexpr" if name in settings else types.get(name, default)
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(names)
        if signature[name].startswith("*") or (name in ("stride_xm", "stride_wn", "K") and name not in settings)
    }
    constants = {name: value for name, value in settings.items() if name in names}
    options = {name: value for name, value in settings.items() if name not in names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=target, options={**options, **NO_CONTRACTION})


def longest_loop(lines: list[str]) -> int:
    """Instructions of a step."""
    labels = {line: i for i, line in enumerate(lines) if line.startswith(".L")}
    jumps = [(i, labels[target.group(1)]) for i, line in enumerate(lines) if (target := JUMP.search(line))]
    return max(
        (sum(not line.startswith(".L") for line in lines[to : at + 1]) for at, to in jumps if to < at), default=0
    )


def order_of(ptx: str) -> str:
    """What the kernel does, in order: w(eights asked for), W(ait), r(eads), s(tores); runs of one letter as one."""
    found = []
    for line in ptx.splitlines():
        if "ld.global" in line or "cp.async.c" in line:
            found.append("w" if "evict_first" in line else "r")
        elif "prefetch.global" in line:
            found.append("w")
        elif "griddepcontrol.wait" in line:
            found.append("W")
        elif "st.global" in line:
            found.append("s")
    return re.sub(r"(.)\1+", r"\1", "".join(found))


def measure(compiled: Any, settings: dict[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {"shared": compiled.metadata.shared}
    if "cubin" not in compiled.asm:
        counts = re.findall(r"[sv]gpr_spill_count:\s+(\d+)", compiled.asm["amdgcn"])
        return result | {"spilled": sum(map(int, counts))}
    lines, registers, _ = disassemble(compiled.asm["cubin"])
    result["spilled"] = sum(line.startswith(("STL", "LDL")) for line in lines)
    result["registers"] = registers
    if "BLOCK_N" in settings and "EVEN_K" in settings:
        weights = settings["BLOCK_N"] * settings["BLOCK_K"] * (2 if settings["GATED"] else 1)
        result["instructions_per_weight"] = longest_loop(lines) / (weights / (32 * settings["num_warps"]))
        result["barriers"] = sum(line.startswith("BAR") for line in lines)
    if settings.get("OVERLAP"):
        result["order"] = order_of(compiled.asm["ptx"])
    return result


def others(arch: str) -> Iterator[tuple[str, Any, dict[str, Any], str]]:
    norm = {"HAS_OFFSET": True, "OVERLAP": arch == "90", "BLOCK_M": 1, "BLOCK_K": 8192, "num_warps": 16}
    if arch == "90":
        norm["launch_pdl"] = True
    yield "rms_norm", rms.rms_norm_kernel, norm, "bf16"
    long = {"HAS_OFFSET": False, "BLOCK_K": 4096, "num_warps": 8}
    yield "long rms_norm", rms.long_rms_norm_kernel, long, "bf16"
    tail = {"SCALED": True, "HAS_BIAS": True, "HAS_RESIDUAL": True, "ACTIVATION": "gelu", "GATED": True}
    yield "tail", tail_device.tail_kernel, tail | {"BLOCK_N": 1024, "num_warps": 4}, "bf16"


def main(architectures: list[str]) -> None:
    for arch in architectures:
        for name, kernel, settings, weight in (*products(arch), *others(arch)):
            result = {"arch": arch, "case": name}
            try:
                result |= measure(compile_for(kernel, settings, weight, arch), settings)
            except Exception as error:  # a failure is a result here, and the other cases are of interest too
                result["error"] = f"{type(error).__name__}: {error}"[:2000]
            sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
