"""Compiles every kernel for given targets without a GPU, and prints a line of JSON for each: spills, memory, registers.

Run as a program: `python ahead_of_time.py 90 gfx942`. The interpreter must be off, hence a process of its own.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from onegpu.kernels import dequantize, experts, gemm_int8, matmul_4bit, matmul_8bit, quantize, quantize_rows
from onegpu.kernels.launch import NO_CONTRACTION

NVDISASM = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
# The oldest, the one most used, and one AMD target get every form; the rest differ from these in degree.
THOROUGH = ("75", "90", "gfx942")
FLOATS = ("absmax_ptr", "nested_absmax_ptr", "nested_code_ptr", "nested_offset_ptr", "x_stats_ptr", "row_stats_ptr")
BYTES = ("packed_ptr", "outlier_ptr")
CODES = ("codes_ptr", "x_codes_ptr", "codes_out_ptr")
INTS = ("columns_ptr", "count_ptr", "counters_ptr", "starts_ptr")
LONGS = ("expert_ids_ptr", "order_ptr")


@dataclass(frozen=True)
class Case:
    """One way to compile one kernel: constants and launch settings as its launcher would give them."""

    name: str
    kernel: Any
    settings: dict[str, Any]  # constexpr arguments, num_warps, num_stages
    dtype: str  # of x, weight, out, bias and y
    aligned: bool = True  # sizes are multiples of 16


def cases(sixteen_bit: str, *, has_dot: bool, narrow: bool, thorough: bool, overlaps: bool) -> Iterator[Case]:
    """What each launcher asks for on real shapes; every kernel at least once, more of its forms if `thorough`."""
    four_bit = {"QUANT_TYPE": "nf4", "BLOCKSIZE": 64}
    fp4 = {**four_bit, "QUANT_TYPE": "fp4"}
    plain = {"SCALE_SEARCH": False, "HAS_IMPORTANCE": False, "WHOLE": True, **quantize.tile_of(64, False)}
    search = {"SCALE_SEARCH": True, "HAS_IMPORTANCE": True, "WHOLE": True, **quantize.tile_of(64, True)}
    for nested in (False, True)[not thorough :]:
        settings = {**four_bit, "NESTED": nested, "WHOLE": True, **dequantize.tile_of(64)}
        yield Case(f"dequantize nested={nested}", dequantize.dequantize_kernel, settings, sixteen_bit)
    yield Case("quantize nf4", quantize.quantize_4bit_kernel, {**four_bit, **plain}, sixteen_bit)
    yield Case("quantize fp4 search", quantize.quantize_4bit_kernel, {**fp4, **search}, sixteen_bit)
    if thorough:
        yield Case("quantize nf4 search", quantize.quantize_4bit_kernel, {**four_bit, **search}, "fp32")
        longest = {**fp4, **plain, "BLOCKSIZE": 4096, "WHOLE": False, **quantize.tile_of(4096, False)}
        yield Case("quantize long", quantize.quantize_4bit_kernel, longest, "fp32")
        longest = {**fp4, "BLOCKSIZE": 4096, "NESTED": True, "WHOLE": False, **dequantize.tile_of(4096)}
        yield Case("dequantize long", dequantize.dequantize_kernel, longest, "fp32")
    for K, outliers in ((4096, True), (28672, True), (4096, False), (28672, False), (14336, True))[
        : 5 if thorough else 2
    ]:
        # Marks are the operator's, which lets nothing begin before it has ended.
        lead = K != 28672 and outliers and overlaps
        forms = {"OUTLIERS": outliers, "MARK": K == 28672, "LEAD": lead, "num_stages": 1}
        settings = {**forms, **quantize_rows.row_settings(K)}
        yield Case(f"quantize rows {K} {outliers}", quantize_rows.quantize_rows_kernel, settings, sixteen_bit)
    clear = {"BLOCK_M": quantize_rows.CLEAR_ROWS, "BLOCK_O": quantize_rows.CLEAR_COLUMNS}
    yield Case("clear columns", quantize_rows.clear_columns_kernel, clear, sixteen_bit)
    for M, K, nested, dtype in ((1, 4096, True, sixteen_bit), (64, 4096, True, sixteen_bit), (4, 4095, False, "fp32")):
        if (M > matmul_4bit.GEMV_ROWS and not has_dot) or (K == 4095 and not thorough):
            continue
        kernel, settings = matmul_4bit._configure(M, 4096, K, 64)
        settings = {**four_bit, "NESTED": nested, "HAS_BIAS": True, "WIDE": K % 2 == 1, **settings}
        yield Case(f"linear_4bit {M}x{K}", kernel, settings, dtype, K % 16 == 0)
    for weight_format in ("nf4", "int8", "fp4")[: 3 if thorough else 2]:
        nested = weight_format == "fp4"
        stack = {"FORMAT": weight_format, "BLOCKSIZE": 1 if weight_format == "int8" else 64, "NESTED": nested}
        settings = {**stack, **experts.pair_settings(8, 28672, 4096)}
        yield Case(f"experts few {weight_format}", experts.pair_kernel, settings, sixteen_bit)
        if has_dot:
            stack |= {"EXPERTS": 16, "NUM_EXPERTS": 8}
            for S in (64, 4096):
                settings = {**stack, **experts.tile_settings(S, 8, 4096, narrow=narrow)}
                yield Case(f"experts {S} {weight_format}", experts.tile_kernel, settings, sixteen_bit)
    if not has_dot:
        return
    if overlaps:
        gather = {"CAPACITY": gemm_int8.CAPACITY, "OVERLAP": True, "num_stages": 1, "launch_pdl": True}
        gather |= {"BLOCK": gemm_int8.GATHER_ROWS, "TILE": gemm_int8.GATHER_COLUMNS}
        yield Case("gather columns", gemm_int8.gather_columns_kernel, gather, sixteen_bit)
    for M, dtype in ((512, sixteen_bit), (512, "fp32"), (1, sixteen_bit), (64, "fp32"))[: 4 if thorough else 2]:
        settings = matmul_8bit._configure(M, narrow=narrow or dtype == "fp32")
        settings = {
            "HAS_OUTLIERS": True,
            "HAS_BIAS": True,
            "EVEN": True,
            "BLOCK_O": matmul_8bit.OUTLIER_TILE,
        } | settings
        yield Case(f"linear_8bit {M} {dtype}", matmul_8bit.int8_kernel, settings, dtype)


def signature(case: Case) -> dict[str, str]:
    types = dict.fromkeys(FLOATS, "*fp32") | dict.fromkeys(BYTES, "*u8") | dict.fromkeys(CODES, "*i8")
    types |= dict.fromkeys(INTS, "*i32") | dict.fromkeys(LONGS, "*i64") | {"importance_ptr": "*fp32", "limit": "fp32"}
    if "FORMAT" in case.settings:
        four_bit = "*i32" if case.kernel is experts.pair_kernel else "*u8"
        types["weight_ptr"] = "*i8" if case.settings["FORMAT"] == "int8" else four_bit
    if case.settings.get("NESTED"):
        types["absmax_ptr"] = "*u8"
    out = {}
    for name in case.kernel.arg_names:
        default = f"*{case.dtype}" if name.endswith("_ptr") else "i32"
        out[name] = "constexpr" if name in case.settings else types.get(name, default)
    return out


def compile_for(case: Case, target: GPUTarget) -> dict[str, int]:
    types = signature(case)
    divisible = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(types)
        if types[name].startswith("*") or (case.aligned and name in ("stride_xm", "stride_xt", "N", "K"))
    }
    constants = {name: value for name, value in case.settings.items() if name in types}
    options = {name: value for name, value in case.settings.items() if name not in types}
    source = ASTSource(fn=case.kernel, signature=types, constexprs=constants, attrs=divisible)
    compiled = triton.compile(source, target=target, options={**options, **NO_CONTRACTION})
    sass = disassembled(compiled)
    return {
        "case": case.name,
        "target": str(target.arch),
        "shared": compiled.metadata.shared,
        "spilled": spilled(compiled, sass),
        "registers": max(map(int, re.findall(r"\bR(\d+)\b", sass)), default=-1) + 1,
    }


def disassembled(compiled: Any) -> str:
    """Its machine code (CUDA), or nothing."""
    if "cubin" not in compiled.asm:
        return ""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run([str(NVDISASM), "-c", file.name], capture_output=True, text=True, check=True).stdout
    assert "EXIT" in text
    return text


def spilled(compiled: Any, sass: str) -> int:
    """Instructions (CUDA, of its machine code) or registers (AMD) that go through memory because registers ran out."""
    if sass:
        return len(re.findall(r"\b(?:STL|LDL)\b", sass))
    return sum(int(count) for count in re.findall(r"[sv]gpr_spill_count:\s+(\d+)", compiled.asm["amdgcn"]))


def main(architectures: list[str]) -> None:
    for arch in architectures:
        amd = arch.startswith("gfx")
        target = (
            GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32) if amd else GPUTarget("cuda", int(arch), 32)
        )
        sixteen_bit, has_dot = ("fp16", False) if arch == "75" else ("bf16", True)
        for case in cases(sixteen_bit, has_dot=has_dot, narrow=amd, thorough=arch in THOROUGH, overlaps=arch == "90"):
            result = {"arch": arch, "case": case.name}
            try:
                result |= compile_for(case, target)
            except Exception as error:  # a failure is a result here, and the other targets are of interest too
                result["error"] = f"{type(error).__name__}: {error}"[:2000]
            sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
