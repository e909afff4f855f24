"""Compiles the small-M 4-bit kernel without a GPU, and prints one JSON line for each case.

    python gemv_4bit_programs.py compile 80 90     each shipped configuration: registers, spills, instructions, ...
    python gemv_4bit_programs.py fitted 90         what each K makes of them: registers, spills
    python gemv_4bit_programs.py run               PTX run by `ptx_machine` on odd shapes, against float64

Run as a program: Triton's interpreter must be off, hence a process of its own.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).parents[1]))

from kernels.ptx_machine import Memory, PtxError, launch, parse
from onegpu.formats import blockwise, tiling
from onegpu.kernels import asm_4bit
from onegpu.kernels.gemv_4bit import constants, gemv_4bit_kernel
from onegpu.kernels.gemv_4bit_config import (
    ALONE,
    ALONE_NESTED,
    GUARDED,
    INSTEAD,
    OVERLAPPED,
    OVERLAPPED_NESTED,
    Config,
    configure,
    instead,
)
from onegpu.kernels.launch import NO_CONTRACTION
from onegpu.kernels.tail import apply_tail

BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TORCH = {"bf16": torch.bfloat16, "fp16": torch.float16}
POINTERS = {
    "tiled_ptr": "*i32",
    "nested_absmax_ptr": "*fp32",
    "nested_code_ptr": "*fp32",
    "nested_offset_ptr": "*fp32",
}
CANARY = 64
JUMP = re.compile(r"BRA.*?(\.L_x_\d+)")


def compile_kernel(config: Config, M: int, K: int, arch: int, dtype: str, bias: str | None = None, **choices: Any):
    """The compiled kernel and its constants."""
    quant_type, blocksize = choices.pop("quant_type", "nf4"), choices.pop("blocksize", 64)
    choices = {"nested": False, "overlap": False} | choices
    choices["has_residual"] = choices.pop("residual", False)
    settings = constants(
        config, M, K, quant_type, blocksize, has_bias=bias is not None, capability=divmod(arch, 10), **choices
    )
    options = {name: settings.pop(name) for name in ("num_warps", "launch_pdl")}
    types = POINTERS | {"absmax_ptr": "*u8" if choices["nested"] else "*fp32"}
    types |= {"x_ptr": f"*{dtype}", "y_ptr": f"*{dtype}", "residual_ptr": f"*{dtype}", "bias_ptr": f"*{bias or dtype}"}
    names = gemv_4bit_kernel.arg_names
    signature = {name: "constexpr" if name in settings else types.get(name, "i32") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in types}
    source = ASTSource(fn=gemv_4bit_kernel, signature=signature, constexprs=settings, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options={**options, **NO_CONTRACTION}), settings


def disassemble(cubin: bytes) -> tuple[list[str], int, int]:
    """Instructions and labels; registers; bytes of shared memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = lambda *command: subprocess.run(command, capture_output=True, text=True, check=True).stdout  # noqa: E731
        text = run(str(BIN / "nvdisasm"), "-c", file.name)
        usage = run(str(BIN / "cuobjdump"), "-res-usage", file.name)
    lines = []
    for line in text.splitlines():
        label = re.match(r"(\.L_x_\d+):", line)
        found = re.match(r"\s+(?:/\*[0-9a-f]+\*/)?\s*(?:@!?U?P\d+\s+)?([A-Z][A-Z0-9_.]+.*?);", line)
        if label or found:
            lines.append(label.group(1) if label else found.group(1))
    registers, shared = (int(re.search(rf"{name}:(\d+)", usage).group(1)) for name in ("REG", "SHARED"))
    return lines, registers, shared


def round_of(lines: list[str]) -> list[str]:
    """The instructions of a round: the smallest loop around the tensor core, less what it mostly jumps over."""
    labels = {line: i for i, line in enumerate(lines) if line.startswith(".L")}
    jumps = [(i, labels[target.group(1)]) for i, line in enumerate(lines) if (target := JUMP.search(line))]
    loops = [(to, at) for at, to in jumps if to < at and any("HMMA" in line for line in lines[to:at])]
    start, end = min(loops, key=lambda loop: loop[1] - loop[0])
    skipped = {i for at, to in jumps if start < at < to <= end for i in range(at + 1, to)}
    return [line for i, line in enumerate(lines[start : end + 1], start) if i not in skipped and line[0] != "."]


def waited_for(lines: list[str], loads_of_step: int) -> list[str]:
    """Loads of weights that a round reads before its next step has asked for its own, which then waits for them."""
    loads = [i for i, line in enumerate(lines) if line.startswith("LDG.E.NA.128")]
    found = []
    for n, i in enumerate(loads):
        following = (n // loads_of_step + 1) * loads_of_step
        end = loads[following] if following < len(loads) else len(lines)
        first = int(re.search(r"R(\d+)", lines[i]).group(1))
        names = {f"R{first + j}" for j in range(4)}
        readers = [line for line in lines[i + 1 : end] if names & set(re.findall(r"\bR\d+\b", line))]
        found += [f"{lines[i]} before {line}" for line in readers[:1]]
    return found


def first_of(lines: list[str], name: str) -> int:
    return next(i for i, line in enumerate(lines) if name in line)


def before_wait(lines: list[str]) -> dict[str, int]:
    """Instructions in front of the wait for the kernel in front, by kind: loads, requests to L2, leaves for others."""
    at = next((i for i, line in enumerate(lines) if "ACQBULK" in line), 0)
    kinds = {"loads": ("LDG", "LD."), "requests": ("CCTL",), "leaves": ("PREEXIT",)}
    return {kind: sum(line.startswith(names) for line in lines[:at]) for kind, names in kinds.items()}


def measure(
    name: tuple[int, str], config: Config, arch: int, nested: bool, steps: int, overlap: bool
) -> dict[str, Any]:
    M = name[0]
    dtype = "fp16" if arch < 80 else "bf16"
    K = 64 * config.warps * config.unroll * steps
    compiled, settings = compile_kernel(config, M, K, arch, dtype, dtype, nested=nested, overlap=overlap)
    lines, registers, shared = disassemble(compiled.asm["cubin"])
    ptx = compiled.asm["ptx"]
    # Without a loop all of the program, and what it asks for before it looks anything up.
    round_ = [line for line in lines if line[0] != "."] if settings["ONCE"] else round_of(lines)
    sums = config.tiles * asm_4bit.num_products(settings["COLUMNS"], M == 1, 1)
    once = settings["ONCE"]
    static = asm_4bit.static_bytes(config.warps, config.warps_n, config.tiles, sums, M == 1, nested, once)
    return {
        "config": [config.warps, config.warps_n, config.tiles, config.unroll],
        "overlap": settings["OVERLAP"],
        "mma": parse(ptx).count("mma"),
        "expected_mma": 4
        * settings["COLUMNS"]
        * config.tiles
        * config.unroll
        * settings["ROUND"]
        * (2 if arch < 80 else 1),
        "tables": ptx.count("onegpu_table["),
        "codes_first": sum(line.startswith("LDG.E.NA.128") for line in lines[: first_of(lines, "HMMA")]),
        "hmma": sum("HMMA" in line for line in lines),
        "spilled": sum(line.startswith(("STL", "LDL")) for line in lines),
        "registers": registers,
        "shared": shared,
        "declared": static + compiled.metadata.shared,
        "dynamic": compiled.metadata.shared,
        "instructions_per_weight": len(round_) / (32 * config.tiles * config.unroll * settings["ROUND"]),
        "once": once,
        "twice": config.twice,
        "ahead": settings["AHEAD"],
        "waited_for": waited_for(round_, config.tiles * config.unroll),
        "waits": sum("ACQBULK" in line for line in lines),
        "before_wait": before_wait(lines),
    }


# What configurations may ask for and none that is shipped does.
UNSHIPPED = {
    (1, "shares"): Config(8, 1, 1, 2, ahead=False, shares=True, edges=True),
    (8, "shares"): Config(4, 1, 1, 4, ahead=False, shares=True),
    (16, "shares"): Config(4, 1, 1, 2, ahead=False, shares=True),
    (1, "once"): Config(8, 1, 1, 8, ahead=False, shares=True, once=True, edges=True),
    (8, "once"): Config(16, 1, 2, 4, shares=True, once=True, edges=True),
    (16, "once"): Config(16, 1, 2, 4, ahead=False, shares=True, once=True),
}


def compile_all(architectures: list[str]) -> None:
    shipped = {("alone", *key): value for key, value in ALONE.items()}
    shipped |= {("overlapped", *key): value for key, value in OVERLAPPED.items() if ALONE.get(key) != value}
    shipped |= {("alone nested", *key): value for key, value in ALONE_NESTED.items() if ALONE[key] != value}
    shipped |= {
        ("overlapped nested", *key): value for key, value in OVERLAPPED_NESTED.items() if OVERLAPPED[key] != value
    }
    for (overlap, nested), table in INSTEAD.items():
        kind = f"instead {'overlapped' if overlap else 'alone'} {'nested' if nested else 'plain'}"
        shipped |= {(kind, *key): value for key, value in table.items()}
    shipped |= {("guarded", *key): value for key, (_, value) in GUARDED.items()}
    shipped |= {("unshipped", *key): value for key, value in UNSHIPPED.items()}
    for arch in architectures:
        seen = set()
        for (kind, *name), config in shipped.items():
            shape = (name[0], config.warps, config.warps_n, config.tiles, config.unroll, config.ahead, config.twice)
            shape += (config.edges and int(arch) >= 90, config.shares, config.once)
            shape += (int(arch) >= 90 and kind.startswith("instead") and kind.endswith("nested"),)
            if shape in seen:
                continue
            seen.add(shape)
            # Three steps a row: blocks that do not divide 256, so that a factor does not stand for whole rows.
            forms = [(False, 1, int(arch) >= 90), (True, 1, True), (True, 3, True)]
            forms = forms[: 3 if arch == "90" and config.tiles <= 2 else 1]
            if int(arch) >= 90 and config.edges:
                forms += [(False, 1, False), (True, 3, False)]
            if kind.endswith("nested"):
                overlaps = "overlapped" in kind and int(arch) >= 90
                forms = [(True, 1, overlaps), (True, 3, overlaps)]
            elif kind.endswith("plain") or kind == "guarded":
                forms = [(False, 1, "overlapped" in kind and int(arch) >= 90)]
            if config.once:
                # With more steps it would be in a loop, for which it is not made.
                forms = list(dict.fromkeys((nested, 1, overlap) for nested, _, overlap in forms))
            for nested, steps, overlap in forms:
                case = f"{kind} {name} {nested=} {steps=} {overlap=}"
                result = {"arch": arch, "rows": name[0], "nested": nested, "case": case}
                try:
                    result |= measure(tuple(name), config, int(arch), nested, steps, overlap)
                except Exception as error:  # a failure is a result here
                    result["error"] = f"{type(error).__name__}: {error}"[-2000:]
                emit(result)


def compile_fitted(architectures: list[str]) -> None:
    """Every form that some K up to 16384 takes at 8 and 16 rows where scales are plain and nothing overlaps; and all
    that stand instead of others, with a residual as a decoder's products have."""
    kinds = [(M, N, False, False) for M, N in itertools.product((8, 16), (4096, 28672))]
    kinds += itertools.product((1, 8, 16), (1024, 4096, 6144, 8192), (False, True), (False, True))
    for arch in architectures:
        seen = {}
        for M, N, overlap, nested in kinds:
            shape = "wide" if N >= 16384 else "narrow" if N <= 4096 else "small"
            for K in range(64, 16384 + 1, 64):
                config = configure(M, N, K, overlap, nested=nested)
                other = instead(M, "deep" if K >= 8192 and shape != "wide" else shape, N, K, overlap, nested)
                if (overlap or nested or N not in (4096, 28672)) and other is None:
                    continue
                form = (M, overlap, nested, replace(config, per_sm=0, even=False), config.is_even_k(K))
                form += (config.holds(K), other is not None, nested and 256 % (K // 64) == 0)
                seen.setdefault(form, (config, K))
        for (M, overlap, nested, _, even, once, residual, by_row), (config, K) in seen.items():
            choices = {"overlap": overlap, "nested": nested, "residual": residual}
            compiled, _ = compile_kernel(config, M, K, int(arch), "bf16", **choices)
            lines, registers, _ = disassemble(compiled.asm["cubin"])
            spilled = sum(line.startswith(("STL", "LDL")) for line in lines)
            emit(
                {"case": f"{M=} {K=} {overlap=} {nested=} {even=} {once=} {by_row=} {config}", "rows": M}
                | {"warps": config.warps, "registers": registers, "spilled": spilled, "once": once}
            )


def padded(tensor: torch.Tensor) -> np.ndarray:
    """A tensor's bytes."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().copy()


def run_case(config: Config, M: int, N: int, K: int, dtype: str, **choices: Any) -> dict[str, Any]:
    """The kernel's PTX on a CPU: its error, and that of dequantizing and multiplying in `dtype`."""
    grid = choices.pop("grid", None)
    wide = choices.pop("wide", 0)
    arch = choices.pop("arch", 90)
    bias_dtype = choices.get("bias")
    quant_type, blocksize = choices.get("quant_type", "nf4"), choices.get("blocksize", 64)
    generator = torch.Generator().manual_seed(N + K + M)
    compiled, _ = compile_kernel(config, M, K, arch, dtype, **choices)
    packed, absmax = blockwise.quantize_4bit(torch.randn(N, K, generator=generator), quant_type, blocksize)
    nested = [torch.zeros(0)] * 3
    codes = absmax
    if choices.get("nested"):
        codes, *nested = blockwise.quantize_absmax(absmax)
        # Factors far apart, so that another's shows.
        nested[0] *= 2.0 ** (torch.arange(len(nested[0])) % 4)
        absmax = blockwise.dequantize_absmax(blockwise.NestedAbsmax(codes, *nested))
        if choices.get("offsets"):
            offsets = nested[2] * torch.linspace(0.5, 2, -(-N // 16))
            absmax = (absmax - nested[2]).view(N, -1) + offsets.repeat_interleave(16)[:N, None]
            absmax, nested[2] = absmax.reshape(-1), offsets
    x = torch.randn(M, K + wide, generator=generator).to(TORCH[dtype])
    gated, activation = choices.get("gated", False), choices.get("activation")
    width = N // 2 if gated else N
    bias = torch.randn(N, generator=generator)
    bias = bias.to({**TORCH, "fp32": torch.float32}[bias_dtype]) if bias_dtype else torch.zeros(0)
    residual = torch.randn(M, width, generator=generator).to(TORCH[dtype])
    y = np.full(2 * M * width + 2 * CANARY, 0xA5, np.uint8)
    memory = Memory()
    tensors = [
        tiling.tile_codes(packed, N, K),
        tiling.tile_scales(codes, N, K, blocksize),
        *nested,
        x,
    ]
    arguments = [memory.add(padded(tensor)) for tensor in tensors] + [K + wide, memory.add(padded(bias))]
    arguments.append(memory.add(padded(residual)))
    program = parse(compiled.asm["ptx"])
    arguments += [memory.add(y) + CANARY, M, N, K]
    arguments += [0] * (len(program.parameters) - len(arguments))
    launch(program, grid or config.grid(N, 4), arguments, memory)
    assert (y[:CANARY] == 0xA5).all()
    assert (y[-CANARY:] == 0xA5).all()
    out = torch.from_numpy(y[CANARY:-CANARY].copy()).view(TORCH[dtype]).view(M, width).double()
    x = x[:, :K]
    weight = blockwise.dequantize_4bit(packed, absmax, (N, K), torch.float32, quant_type, blocksize).double()
    exact, plain = x.double() @ weight.T, x.double() @ weight.to(TORCH[dtype]).double().T
    if bias_dtype:
        exact, plain = exact + bias.double(), plain + bias.double()
    added = residual.double() if choices.get("residual") else None
    exact, plain = (apply_tail(t, added, activation, gated, torch.float64) for t in (exact, plain))
    plain = plain.to(TORCH[dtype]).double()
    return {
        "bits": hashlib.sha256(y.tobytes()).hexdigest(),
        "error": float((out - exact).norm() / exact.norm()),
        "plain": float((plain - exact).norm() / exact.norm()),
        "largest": float((out - exact).abs().max() / exact.abs().max()),
    }


PLAIN_ALONE, PLAIN_OVERLAPPED = INSTEAD[False, False], INSTEAD[True, False]
NESTED_ALONE, NESTED_OVERLAPPED = INSTEAD[False, True], INSTEAD[True, True]
# name: configuration, M, N, K, dtype, choices. Between them every branch of the kernel, and every tail.
CASES: dict[str, tuple[Config, int, int, int, str, dict[str, Any]]] = {
    "one row": (Config(4, 1, 1, 4), 1, 48, 1024, "bf16", {}),
    "one row, fewer programs": (Config(4, 1, 1, 4), 1, 100, 1024, "bf16", {"grid": 3, "bias": "fp32"}),
    "one row, one tile": (Config(4, 1, 1, 4), 1, 1, 64, "fp16", {"nested": True, "bias": "fp16"}),
    "one row, 16 warps": (Config(16, 1, 2, 2), 1, 41, 2048, "bf16", {"nested": True, "grid": 1}),
    "one row, 8 warps, guarded": (Config(8, 1, 1, 2), 1, 33, 1472, "bf16", {"quant_type": "fp4"}),
    "blocks of 32": (Config(4, 1, 1, 2), 1, 20, 512, "bf16", {"blocksize": 32, "nested": True}),
    "blocks of 256": (Config(4, 1, 1, 2), 1, 20, 512, "bf16", {"blocksize": 256, "nested": True}),
    "blocks of 4096": (Config(4, 1, 1, 4), 2, 17, 4096, "fp16", {"blocksize": 4096}),
    "eight rows": (Config(4, 1, 1, 4), 8, 50, 1024, "bf16", {"bias": "bf16", "grid": 2}),
    "three rows, guarded": (Config(4, 1, 2, 2), 3, 50, 576, "fp16", {"nested": True, "bias": "fp32"}),
    "strided rows": (Config(4, 1, 1, 2), 5, 16, 512, "bf16", {"wide": 8}),
    "sixteen rows": (Config(4, 2, 2, 1), 16, 77, 256, "bf16", {"nested": True, "grid": 1}),
    "eleven rows": (Config(4, 1, 1, 2), 11, 40, 512, "fp16", {"blocksize": 32, "bias": "fp16"}),
    "32 rows": (Config(8, 1, 2, 1), 32, 60, 512, "bf16", {"bias": "bf16"}),
    "31 rows, no sums over warps": (Config(4, 4, 2, 1), 31, 130, 128, "bf16", {"overlap": True, "grid": 1}),
    "17 rows, guarded": (Config(8, 2, 1, 1), 17, 45, 320, "fp16", {"blocksize": 64, "quant_type": "fp4"}),
    "Turing": (Config(4, 1, 1, 2), 7, 30, 512, "fp16", {"arch": 75, "nested": True, "bias": "fp16"}),
    "Ampere": (Config(4, 1, 1, 4), 1, 30, 1024, "bf16", {"arch": 80, "bias": "bf16"}),
    "one row, gated": (Config(4, 1, 2, 2), 1, 96, 1024, "bf16", {"gated": True, "activation": "silu", "grid": 2}),
    "one row, four tiles gated": (
        Config(8, 1, 4, 1),
        1,
        96,
        512,
        "fp16",
        {"gated": True, "activation": "relu", "residual": True, "bias": "fp32", "nested": True},
    ),
    "one row, residual": (Config(4, 1, 1, 4), 1, 50, 1024, "bf16", {"residual": True, "bias": "bf16", "grid": 2}),
    "eight rows, gated": (Config(4, 1, 2, 2), 8, 160, 512, "bf16", {"gated": True, "activation": "silu", "grid": 2}),
    "rows side by side, gated": (
        Config(8, 2, 2, 1),
        13,
        224,
        512,
        "bf16",
        {"gated": True, "activation": "silu", "residual": True, "bias": "bf16"},
    ),
    "activation alone": (Config(4, 1, 1, 2), 3, 50, 512, "bf16", {"activation": "silu", "residual": True}),
    "joined": (Config(4, 1, 1, 2), 1, 70, 512, "bf16", {"nested": True, "offsets": True, "grid": 2}),
    "joined, gated": (
        Config(4, 1, 2, 2),
        9,
        128,
        512,
        "bf16",
        {"nested": True, "offsets": True, "gated": True, "activation": "silu"},
    ),
    "joined, 90 blocks a row": (
        Config(4, 1, 2, 2),
        1,
        128,
        5760,
        "bf16",
        {"nested": True, "offsets": True, "gated": True, "activation": "silu"},
    ),
    "two factors a row": (Config(16, 1, 1, 2), 1, 37, 14336, "bf16", {"nested": True, "overlap": True, "grid": 2}),
    "two factors a row, guarded": (Config(4, 1, 1, 4), 5, 45, 5760, "bf16", {"nested": True, "grid": 1}),
    "300 blocks a row": (Config(4, 1, 2, 2), 1, 41, 9600, "bf16", {"nested": True, "blocksize": 32, "grid": 1}),
    "a factor for eight rows": (Config(8, 1, 1, 1), 5, 45, 2048, "bf16", {"nested": True, "grid": 1}),
    "eight tiles a step": (Config(4, 1, 2, 4), 1, 77, 1024, "bf16", {"nested": True, "blocksize": 32, "grid": 2}),
    "eight tiles a step, two factors": (Config(4, 1, 2, 4), 1, 41, 6144, "bf16", {"nested": True, "grid": 1}),
    "x not ahead": (Config(4, 1, 1, 2, ahead=False), 7, 30, 512, "bf16", {"nested": True}),
    "overlapping": (Config(4, 1, 2, 2), 1, 70, 1024, "bf16", {"overlap": True, "nested": True, "grid": 2}),
    "two steps a round, one too many": (Config(4, 1, 1, 4, ahead=False, twice=True), 1, 48, 1024, "bf16", {"grid": 1}),
    "two steps a round, nested": (
        Config(4, 1, 2, 2, ahead=False, twice=True),
        1,
        77,
        1472,
        "fp16",
        {"nested": True, "bias": "fp32", "residual": True, "grid": 2},
    ),
    "two steps a round, two factors a row": (
        Config(8, 1, 1, 2, ahead=False, twice=True),
        5,
        45,
        14336,
        "bf16",
        {"nested": True, "grid": 2, "residual": True},
    ),
    "two steps a round, x ahead, gated": (
        Config(4, 2, 2, 2, twice=True),
        8,
        160,
        640,
        "bf16",
        {"gated": True, "activation": "silu", "residual": True, "bias": "bf16", "grid": 1},
    ),
    "two steps a round, sixteen rows": (
        Config(4, 1, 1, 2, ahead=False, twice=True, edges=True),
        16,
        56,
        1024,
        "bf16",
        {"blocksize": 32, "bias": "bf16", "grid": 3},
    ),
    "edges": (Config(4, 1, 1, 4, edges=True), 1, 41, 1024, "bf16", {"grid": 2}),
    "edges, nested, guarded, gated": (
        Config(8, 1, 2, 2, edges=True),
        8,
        160,
        576,
        "fp16",
        {"nested": True, "gated": True, "activation": "silu"},
    ),
    "edges, rows side by side, blocks of 32": (Config(8, 4, 2, 2, edges=True), 5, 77, 320, "bf16", {"blocksize": 32}),
    "edges, two factors a row": (Config(16, 1, 1, 2, edges=True), 1, 37, 14336, "bf16", {"nested": True, "grid": 3}),
    "shared": (Config(4, 1, 1, 4, shares=True), 1, 41, 1024, "bf16", {"grid": 2}),
    "shared, one tile a step": (Config(4, 1, 1, 1, shares=True), 5, 33, 512, "bf16", {"grid": 2}),
    "shared, one tile a step, blocks of 32": (Config(4, 1, 1, 1, shares=True), 1, 33, 320, "fp16", {"blocksize": 32}),
    "shared, two tiles a step, guarded": (
        Config(8, 1, 1, 2, ahead=False, shares=True, edges=True),
        1,
        77,
        1472,
        "bf16",
        {"grid": 2, "bias": "fp32"},
    ),
    "shared, two tiles along rows, blocks of 32": (
        Config(4, 1, 2, 1, shares=True),
        9,
        45,
        512,
        "fp16",
        {"blocksize": 32, "residual": True},
    ),
    "shared, eight tiles a step, blocks of 32": (
        Config(4, 1, 2, 4, ahead=False, shares=True),
        8,
        77,
        1472,
        "bf16",
        {"blocksize": 32, "grid": 2},
    ),
    "shared, blocks of 128": (Config(4, 1, 1, 4, shares=True), 1, 20, 640, "bf16", {"blocksize": 128}),
    "shared, blocks of 4096": (Config(4, 1, 2, 2, shares=True), 16, 37, 8192, "bf16", {"blocksize": 4096, "grid": 1}),
    "shared, gated, two steps a round": (
        Config(4, 2, 2, 2, shares=True, twice=True, edges=True),
        8,
        160,
        640,
        "bf16",
        {"gated": True, "activation": "silu", "residual": True, "bias": "bf16", "grid": 1},
    ),
    "shared, 32 rows": (Config(4, 2, 4, 1, ahead=False, shares=True), 29, 150, 320, "fp16", {"quant_type": "fp4"}),
    "shared, Turing": (Config(4, 1, 1, 4, shares=True), 7, 30, 1024, "fp16", {"arch": 75, "bias": "fp16"}),
    "at once, one row": (Config(8, 1, 1, 8, ahead=False, shares=True, once=True), 1, 41, 4096, "bf16", {}),
    "at once, one row, gated, guarded": (
        Config(8, 1, 2, 4, once=True, edges=True),
        1,
        96,
        1472,
        "fp16",
        {"gated": True, "activation": "silu", "bias": "fp32", "residual": True},
    ),
    "at once, eight rows": (
        Config(4, 1, 2, 4, shares=True, once=True),
        8,
        77,
        1024,
        "bf16",
        {"bias": "bf16", "residual": True},
    ),
    "at once, sixteen rows": (
        Config(16, 1, 2, 4, ahead=False, shares=True, once=True, edges=True),
        16,
        45,
        4096,
        "bf16",
        {"residual": True, "bias": "fp32"},
    ),
    "at once, sixteen rows, eight tiles along K": (PLAIN_ALONE[16, "narrow"], 16, 39, 4096, "bf16", {"bias": "bf16"}),
    "at once, eight rows, scales of its own": (PLAIN_ALONE[8, "narrow"], 8, 41, 4096, "fp16", {"residual": True}),
    "shared, edges, rounds of two": (PLAIN_ALONE[8, "wide"], 8, 100, 512, "bf16", {"grid": 1}),
    "shared, edges, eight warps": (PLAIN_ALONE[8, "deep"], 8, 33, 6144, "bf16", {"grid": 1}),
    "edges, shared, one tile along K": (PLAIN_ALONE[16, "deep"], 16, 45, 3072, "bf16", {"grid": 1, "residual": True}),
    "shared, no edges": (PLAIN_ALONE[8, "large"], 8, 33, 1024, "fp16", {"grid": 1}),
    "at once, all of x ahead": (PLAIN_ALONE[16, "short"], 15, 33, 4096, "bf16", {"residual": True, "bias": "bf16"}),
    "at once, eight rows, guarded": (GUARDED[8, "narrow"][1], 8, 33, 3072, "bf16", {"residual": True}),
    "at once, sixteen rows, guarded": (GUARDED[16, "narrow"][1], 16, 33, 3584, "bf16", {"bias": "fp32"}),
    "at once, overlapping": (PLAIN_OVERLAPPED[16, "narrow"], 16, 33, 2048, "bf16", {"overlap": True}),
    "edges alone may overlap": (PLAIN_OVERLAPPED[16, "small"], 16, 33, 1024, "bf16", {"overlap": True, "grid": 1}),
    "one row, nested, 16 warps, edges": (NESTED_ALONE[1, "narrow"], 1, 33, 4096, "bf16", {"nested": True, "grid": 2}),
    "one row, nested, x ahead in rounds": (NESTED_ALONE[1, "small"], 1, 101, 3072, "bf16", {"nested": True, "grid": 1}),
    "nested, x ahead in rounds of two": (
        NESTED_ALONE[8, "deep"],
        8,
        33,
        9216,
        "bf16",
        {"nested": True, "grid": 2, "residual": True},
    ),
    "nested, sixteen rows, 16 warps": (NESTED_ALONE[16, "deep"], 16, 45, 9216, "bf16", {"nested": True, "grid": 1}),
    "nested, at once, overlapping": (
        NESTED_OVERLAPPED[8, "narrow"],
        8,
        45,
        4096,
        "bf16",
        {"nested": True, "overlap": True, "residual": True},
    ),
    "nested, overlapping, eight warps": (
        NESTED_OVERLAPPED[8, "deep"],
        8,
        33,
        10240,
        "bf16",
        {"nested": True, "overlap": True, "residual": True, "grid": 2},
    ),
    "at once, sixteen rows, guarded, blocks of 32": (
        Config(8, 1, 2, 4, ahead=False, shares=True, once=True),
        13,
        50,
        1472,
        "fp16",
        {"blocksize": 32, "activation": "silu"},
    ),
    "at once, fewer results than warps": (Config(16, 1, 1, 1, once=True), 3, 50, 960, "bf16", {"blocksize": 64}),
    "at once, rows side by side, gated": (
        Config(8, 2, 2, 2, ahead=False, shares=True, once=True),
        11,
        160,
        512,
        "bf16",
        {"gated": True, "activation": "silu", "bias": "bf16", "residual": True, "overlap": True},
    ),
    "at once, nested": (Config(8, 1, 2, 2, once=True), 5, 45, 1024, "bf16", {"nested": True}),
    "at once, nested, factors for each step, 32 rows": (
        Config(4, 1, 1, 8, ahead=False, once=True, twice=True),
        31,
        45,
        1984,
        "fp16",
        {"nested": True, "blocksize": 32},
    ),
    "at once, every warp rows of its own": (Config(4, 4, 1, 4, shares=True, once=True), 6, 130, 256, "bf16", {}),
    "not at once, too long": (Config(4, 1, 1, 4, shares=True, once=True), 8, 40, 2048, "bf16", {"grid": 2}),
    "not at once, too many sums": (Config(16, 1, 2, 1, shares=True, once=True), 32, 40, 1024, "bf16", {}),
}


def run_plainly(config: Config, M: int, N: int, K: int, dtype: str, choices: dict[str, Any]) -> dict[str, Any]:
    """The bits of a case in a loop, each lane with scales of its own."""
    plain = replace(config, shares=False, once=False)
    return {"plain_bits": run_case(plain, M, N, K, dtype, **dict(choices))["bits"]} if plain != config else {}


def run_all() -> None:
    for name, (config, M, N, K, dtype, choices) in CASES.items():
        result: dict[str, Any] = {"case": name}
        try:
            result |= run_case(config, M, N, K, dtype, **dict(choices))
            result |= run_plainly(config, M, N, K, dtype, choices)
        except (PtxError, AssertionError) as error:
            result["failure"] = f"{type(error).__name__}: {error}"
        emit(result)
    for M in range(1, 33, 2):
        for nested in (False, True):
            config = configure(M, 40, 512, overlap=False, nested=nested)
            emit({"case": f"{M=} {nested=}"} | run_case(config, M, 40, 512, "bf16", nested=nested))


def emit(result: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    commands = {"run": lambda _: run_all(), "compile": compile_all, "fitted": compile_fitted}
    commands[sys.argv[1]](sys.argv[2:])
