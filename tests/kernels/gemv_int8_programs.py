"""Compiles the few-row int8 kernel without a GPU, and prints one JSON line for each case.

    python gemv_int8_programs.py compile 80 90     each shipped configuration: registers, spills, instructions, ...
    python gemv_int8_programs.py run               PTX run by `ptx_machine` on odd shapes, against float64
    python gemv_int8_programs.py widen             all 256 codes, as the assembly widens them

Run as a program: Triton's interpreter must be off, hence a process of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compile_source

sys.path.insert(0, str(Path(__file__).parents[1]))

from kernels.gemv_4bit_programs import CANARY, TORCH, disassemble, emit, padded, round_of, waited_for
from kernels.ptx_machine import Machine, Memory, PtxError, launch, parse
from onegpu.formats import rowwise
from onegpu.kernels import asm_4bit, asm_int8
from onegpu.kernels.gemv_4bit_config import Config
from onegpu.kernels.gemv_int8 import constants, gemv_int8_kernel
from onegpu.kernels.gemv_int8_config import CONFIGS, configure
from onegpu.kernels.launch import NO_CONTRACTION
from onegpu.kernels.tail import apply_tail

SILU = {"gated": True, "activation": "silu"}


def compile_kernel(config: Config, M: int, K: int, arch: int, dtype: str, bias: str | None = None, **choices: Any):
    """The compiled kernel and its constants."""
    choices = {"activation": None, "gated": False, "overlap": False} | choices
    choices["has_residual"] = choices.pop("residual", False)
    settings = constants(config, M, K, has_bias=bias is not None, capability=divmod(arch, 10), **choices)
    options = {name: settings.pop(name) for name in ("num_warps", "launch_pdl")}
    types = {"weight_ptr": "*i8", "stats_ptr": "*fp32", "x_ptr": f"*{dtype}", "y_ptr": f"*{dtype}"}
    types |= {"residual_ptr": f"*{dtype}", "bias_ptr": f"*{bias or dtype}"}
    names = gemv_int8_kernel.arg_names
    signature = {name: "constexpr" if name in settings else types.get(name, "i32") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in types}
    source = ASTSource(fn=gemv_int8_kernel, signature=signature, constexprs=settings, attrs=aligned)
    return compile_source(source, target=GPUTarget("cuda", arch, 32), options={**options, **NO_CONTRACTION}), settings


def order_of(program: Any) -> str:
    """What a program does, in order, runs of one letter as one.

    w(eights) and s(tats and other elements) loaded, a(sked for in L2), L(ets others begin), W(ait), x.
    """
    found = ""
    for instruction in program.instructions:
        opcode = ".".join(instruction.opcode)
        letter = ""
        if opcode.startswith("ld.global.L1_no_allocate"):
            letter = "w"
        elif opcode.startswith("ld.global.v4"):
            letter = "x"
        elif opcode.startswith("ld.global"):
            letter = "s"
        elif opcode == "griddepcontrol.wait":
            letter = "W"
        elif opcode == "griddepcontrol.launch_dependents":
            letter = "L"
        elif opcode == "prefetch.global.L2":
            letter = "a"
        if letter and not found.endswith(letter):
            found += letter
    return found


def measure(M: int, config: Config, arch: int, *, overlap: bool, **tail: Any) -> dict[str, Any]:
    dtype = "fp16" if arch < 80 else "bf16"
    K = 64 * config.warps * config.unroll
    compiled, settings = compile_kernel(config, M, K, arch, dtype, overlap=overlap, **tail)
    lines, registers, shared = disassemble(compiled.asm["cubin"])
    program = parse(compiled.asm["ptx"])
    sums = 4 * settings["COLUMNS"] * config.tiles
    declared = asm_4bit.sum_bytes(config.warps, config.warps_n, config.tiles, sums, M == 1, False)
    return {
        "config": [config.warps, config.warps_n, config.tiles, config.unroll],
        "overlap": settings["OVERLAP"],
        "ahead": settings["AHEAD"],
        "mma": program.count("mma"),
        "expected_mma": 8 * settings["COLUMNS"] * config.tiles * config.unroll * (2 if arch < 80 else 1),
        "hmma": sum("HMMA" in line for line in lines),
        "spilled": sum(line.startswith(("STL", "LDL")) for line in lines),
        "registers": registers,
        "shared": shared,
        "declared": declared + compiled.metadata.shared,
        "waited_for": waited_for(round_of(lines), 2 * config.tiles * config.unroll),
        "instructions_per_weight": len(round_of(lines)) / (64 * config.tiles * config.unroll),
        "order": order_of(program),
    }


def shipped(arch: str) -> Iterator[tuple[str, int, Config, dict[str, Any]]]:
    """Name, rows of x, configuration and choices: each configuration once, for one architecture a decoder's tails too.

    From compute capability 9.0 on overlapping, and once more with the edges alone where it has that.
    """
    overlap = {"overlap": int(arch) >= 90}
    seen = set()
    for (M, shape), config in CONFIGS.items():
        key = (M, config.warps, config.warps_n, config.tiles, config.unroll, config.ahead)
        if key not in seen:
            seen.add(key)
            yield f"{M} rows, {shape}", M, config, overlap
            if config.edges and int(arch) >= 90:
                yield f"{M} rows, {shape}, edges", M, config, {"overlap": False}
    if arch == "90":
        for M in (1, 8, 16, 32):
            yield f"{M} rows, gated", M, configure(M, 28672, 4096, gated=True), SILU | overlap
            yield f"{M} rows, residual", M, configure(M, 4096, 4096), {"residual": True} | overlap


def compile_all(architectures: list[str]) -> None:
    for arch in architectures:
        for name, M, config, choices in shipped(arch):
            result: dict[str, Any] = {"arch": arch, "rows": M, "case": name, "tail": len(choices) > 1}
            try:
                result |= measure(M, config, int(arch), **choices)
            except Exception as error:  # a failure is a result here
                result["error"] = f"{type(error).__name__}: {error}"[-2000:]
            emit(result)


def run_case(config: Config, M: int, N: int, K: int, dtype: str, **choices: Any) -> dict[str, Any]:
    """The kernel's PTX on a CPU: its error, and that of dequantizing and multiplying in `dtype`."""
    grid, arch = choices.pop("grid", None), choices.pop("arch", 90)
    # Elements between the rows of x, of W and of the residual.
    wide, wide_w, wide_r = choices.pop("wide", 0), choices.pop("wide_w", 0), choices.pop("wide_r", 0)
    bias_dtype = choices.get("bias")
    gated, activation = choices.get("gated", False), choices.get("activation")
    generator = torch.Generator().manual_seed(N + K + M)
    compiled, _ = compile_kernel(config, M, K, arch, dtype, **choices)
    codes, row_stats, _ = rowwise.quantize_rows(torch.randn(N, K, generator=generator))
    codes[0, : min(K, 256)] = torch.arange(-128, 128, dtype=torch.int8)[: min(K, 256)]
    x = torch.randn(M, K + wide, generator=generator).to(TORCH[dtype])
    width = N // 2 if gated else N
    bias = torch.randn(N, generator=generator)
    bias = bias.to({**TORCH, "fp32": torch.float32}[bias_dtype]) if bias_dtype else torch.zeros(0)
    residual = torch.randn(M, width + wide_r, generator=generator).to(TORCH[dtype])
    y = np.full(2 * M * width + 2 * CANARY, 0xA5, np.uint8)
    memory = Memory()
    # What follows the last row's end is no memory at all.
    weight = torch.cat([codes, torch.full((N, wide_w), 99, dtype=torch.int8)], 1).view(-1)[: N * (K + wide_w) - wide_w]
    pieces = [weight, K + wide_w, row_stats, x, K + wide, bias, residual, width + wide_r]
    arguments = [memory.add(padded(piece)) if isinstance(piece, torch.Tensor) else piece for piece in pieces]
    program = parse(compiled.asm["ptx"])
    arguments += [memory.add(y) + CANARY, M, width, K]
    arguments += [0] * (len(program.parameters) - len(arguments))
    launch(program, grid or config.grid(N, 4), arguments, memory)
    assert (y[:CANARY] == 0xA5).all()
    assert (y[-CANARY:] == 0xA5).all()
    out = torch.from_numpy(y[CANARY:-CANARY].copy()).view(TORCH[dtype]).view(M, width).double()
    x, residual = x[:, :K], residual[:, :width]
    dense = codes.double() * row_stats.double()[:, None] / 127
    exact, plain = x.double() @ dense.T, x.double() @ dense.to(TORCH[dtype]).double().T
    if bias_dtype:
        exact, plain = exact + bias.double(), plain + bias.double()
    added = residual.double() if choices.get("residual") else None
    exact, plain = (apply_tail(t, added, activation, gated, torch.float64) for t in (exact, plain))
    plain, rounded = plain.to(TORCH[dtype]).double(), exact.to(TORCH[dtype]).double()
    return {
        "error": float((out - exact).norm() / exact.norm()),
        "plain": float((plain - exact).norm() / exact.norm()),
        "rounding": float((rounded - exact).norm() / exact.norm()),
    }


# name: configuration, M, N, K, dtype, choices. Between them every branch of the kernel, and every tail.
CASES: dict[str, tuple[Config, int, int, int, str, dict[str, Any]]] = {
    "one row": (Config(4, 1, 1, 4), 1, 48, 1024, "bf16", {}),
    "one row, fewer programs": (Config(4, 1, 1, 4, ahead=False), 1, 100, 1024, "bf16", {"grid": 3, "bias": "fp32"}),
    "one row, one row of W": (Config(4, 1, 1, 4), 1, 1, 64, "fp16", {"bias": "fp16"}),
    "one row, 16 columns": (Config(2, 1, 1, 1), 1, 5, 16, "bf16", {}),
    "one row, 16 warps": (Config(16, 1, 2, 1), 1, 41, 2048, "bf16", {"grid": 1, "wide_w": 16}),
    "one row, 8 warps, guarded": (Config(8, 1, 1, 2), 1, 33, 1472, "bf16", {"overlap": True}),
    "one row, K no multiple of 64": (Config(4, 1, 1, 2, ahead=False), 1, 20, 528, "bf16", {"bias": "bf16"}),
    "one row, residual": (Config(4, 1, 1, 4), 1, 50, 1024, "bf16", {"residual": True, "bias": "bf16", "grid": 2}),
    "one row, gated": (Config(4, 1, 2, 2), 1, 106, 1024, "bf16", {**SILU, "grid": 2}),
    "one row, four tiles gated": (
        Config(8, 1, 4, 1),
        1,
        98,
        512,
        "fp16",
        {"gated": True, "activation": "relu", "residual": True, "bias": "fp32"},
    ),
    "three rows, guarded": (Config(4, 1, 2, 2), 3, 50, 592, "fp16", {"bias": "fp32", "wide": 8}),
    "eight rows": (Config(4, 1, 1, 4), 8, 50, 1024, "bf16", {"bias": "bf16", "grid": 2, "wide_w": 64}),
    "strided everything": (
        Config(4, 1, 1, 2),
        5,
        23,
        512,
        "bf16",
        {"wide": 16, "wide_w": 48, "wide_r": 3, "residual": True},
    ),
    "eight rows, gated": (Config(4, 1, 2, 2, ahead=False), 8, 150, 512, "bf16", {**SILU, "grid": 2}),
    "nine rows": (Config(8, 1, 1, 2, ahead=False), 9, 40, 1024, "bf16", {"residual": True}),
    "thirteen rows side by side, gated": (
        Config(8, 2, 2, 1),
        13,
        214,
        512,
        "bf16",
        {**SILU, "residual": True, "bias": "bf16"},
    ),
    "sixteen rows": (Config(4, 2, 2, 1), 16, 77, 256, "bf16", {"grid": 1}),
    "seventeen rows, guarded": (Config(8, 2, 1, 1), 17, 45, 320, "fp16", {"bias": "fp16"}),
    "31 rows, no sums over warps": (Config(4, 4, 2, 1), 31, 130, 128, "bf16", {"overlap": True, "grid": 1}),
    "32 rows": (Config(8, 1, 2, 1), 32, 60, 512, "bf16", {"bias": "bf16", "residual": True}),
    "32 rows, four tiles gated": (Config(4, 1, 4, 1), 32, 102, 256, "fp16", {**SILU, "bias": "fp32"}),
    "activation alone": (Config(4, 1, 1, 2), 3, 50, 512, "bf16", {"activation": "silu", "residual": True}),
    "Turing": (Config(4, 1, 1, 2), 7, 30, 512, "fp16", {"arch": 75, "bias": "fp16"}),
    "Ampere": (Config(4, 1, 1, 4), 1, 30, 1024, "bf16", {"arch": 80, "bias": "bf16"}),
    "overlapping": (Config(4, 1, 2, 2), 1, 70, 1024, "bf16", {"overlap": True, "grid": 2}),
    "edges": (Config(4, 1, 2, 2, edges=True), 1, 70, 1024, "bf16", {"grid": 2}),
    "edges, gated, guarded": (
        Config(8, 2, 2, 2, ahead=False, edges=True),
        13,
        214,
        592,
        "bf16",
        {**SILU, "wide_w": 48, "grid": 2},
    ),
    "edges, 16 columns": (Config(4, 1, 1, 2, edges=True), 1, 5, 16, "fp16", {}),
}


def run_all() -> None:
    for name, (config, M, N, K, dtype, choices) in CASES.items():
        result: dict[str, Any] = {"case": name}
        try:
            result |= run_case(config, M, N, K, dtype, **dict(choices))
        except (PtxError, AssertionError) as error:
            result["failure"] = f"{type(error).__name__}: {error}"
        emit(result)
    for M in range(1, 33, 3):
        emit({"case": f"M={M}"} | run_case(configure(M, 40, 512), M, 40, 512, "bf16"))


def widen_all(dtype: str) -> list[float]:
    """What the assembly makes of the codes -128 to 127, four to a word."""
    words = torch.arange(-128, 128, dtype=torch.int8).numpy().view(np.uint32)
    text = asm_int8.multiply(1, dtype, 16)
    # All that comes before the first step of the tensor core, which has its first word in register 4.
    text = text.partition("mma.sync")[0].replace("$", "r")
    text = text.replace("{ .reg", ".visible .entry k()\n.reqntid 64\n{ .reg", 1) + "ret; }\n// -- End function"
    machine = Machine(parse(text), [], Memory(), 0, 1)
    for i in range(8):
        machine.registers[f"r{4 + i}"] = words.astype(np.uint64)
    machine.run()
    pairs = [next(value for name, value in machine.registers.items() if name.startswith(f"w{i}#")) for i in (0, 2)]
    bits = np.stack(pairs, 1).astype(np.uint32).view(np.uint16).reshape(-1)
    return torch.from_numpy(bits.view(np.int16).copy()).view(TORCH[dtype]).double().tolist()


if __name__ == "__main__":
    if sys.argv[1] == "compile":
        compile_all(sys.argv[2:])
    elif sys.argv[1] == "run":
        run_all()
    else:
        for dtype in TORCH:
            emit({"dtype": dtype, "codes": widen_all(dtype)})
