"""Runs the PTX of a kernel on a CPU: all threads of a program in step, every access to memory checked.

For kernels written in inline assembly, which Triton's interpreter cannot run. It knows the instructions that such a
kernel and Triton around it use, and stops at any other. Branches must be taken by all threads alike. Registers are
uint64 arrays over the threads, predicates bool arrays; floats are kept as their bits. An `mma` sums in float64 and
rounds once to float32, which is within what the hardware's own order of sums may give.

Memory is a set of tensors at made-up addresses far apart; reading or writing anywhere else is an error, as is shared
memory that nobody wrote. Instructions are described in NVIDIA's PTX ISA.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np

GAP = 1 << 40
MASKS = {8: 0xFF, 16: 0xFFFF, 32: 0xFFFFFFFF, 64: 0xFFFFFFFFFFFFFFFF}
SHARED_START = 0x400
PAIRS = ("f16x2", "bf16x2")
OPERAND = re.compile(r"\{[^{}]*\}|\[[^\[\]]*\]|[^,\s][^,]*")


class PtxError(Exception):
    """The program does what it must not, or what this machine does not know."""


@dataclass
class Instruction:
    guard: str | None
    opcode: list[str]
    operands: list[str]


@dataclass
class Program:
    """Parsed PTX: instructions, where labels are, parameters in order, static shared memory."""

    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    parameters: list[str] = field(default_factory=list)
    shared: dict[str, int] = field(default_factory=dict)  # name to offset
    shared_bytes: int = 0
    threads: int = 0

    def count(self, opcode: str) -> int:
        return sum(".".join(instruction.opcode).startswith(opcode) for instruction in self.instructions)


def parse(text: str) -> Program:
    text = re.sub(r"//[^\n]*", "", text.partition("// -- End function")[0])
    program = Program()
    body = text.partition(".entry")[2]
    program.parameters = re.findall(r"\.param[^,)]*?\s(\w+_param_\d+)", body.partition("{")[0])
    program.threads = int(re.search(r"\.reqntid (\d+)", body).group(1))
    body = body[body.index("{") + 1 :]
    scopes: list[dict[str, str]] = [{}]
    made = 0
    # Braces open a scope, except inside an operand list.
    tokens = re.findall(r"\s*([$\w]+:(?!:)|\.loc[^\n]*|[{}]|[^;{}]+(?:\{[^{};]*\}[^;{}]*)*;)", body)
    for token in tokens:
        if token == "{":
            scopes.append({})
        elif token == "}":
            if len(scopes) == 1:
                break
            scopes.pop()
        elif token.endswith(":"):
            program.labels[token[:-1]] = len(program.instructions)
        elif token.startswith(".loc"):
            continue
        elif token.startswith(".reg"):
            for name in re.sub(r"^\.reg\s+\.\w+\s+", "", token[:-1]).split(","):
                made += 1
                scopes[-1][name.strip()] = f"{name.strip()}#{made}"
        elif token.startswith(".shared"):
            match = re.match(r"\.shared \.align (\d+) \.b8 (\w+)\[(\d+)\]", token)
            align, name, size = int(match.group(1)), match.group(2), int(match.group(3))
            if name in program.shared:
                raise PtxError(f"shared memory {name} is declared twice")
            start = -(-program.shared_bytes // align) * align
            program.shared[name] = start
            program.shared_bytes = start + size
        elif not token.startswith("."):
            program.instructions.append(parse_instruction(token[:-1].strip(), scopes))
    return program


def parse_instruction(text: str, scopes: list[dict[str, str]]) -> Instruction:
    def resolve(match: re.Match[str]) -> str:
        for scope in reversed(scopes):
            if match.group(0) in scope:
                return scope[match.group(0)]
        return match.group(0)

    match = re.match(r"(?:@(!?[%\w]+)\s+)?([\w.:]+)\s*(.*)", text, re.S)
    guard, opcode, rest = match.groups()
    name = re.compile(r"(?<![\w%$.])[A-Za-z_]\w*")
    rest = name.sub(resolve, rest)
    if guard is not None:
        guard = name.sub(resolve, guard)
    return Instruction(guard, opcode.replace("::", "_").split("."), [item.strip() for item in OPERAND.findall(rest)])


@dataclass
class Memory:
    """Tensors (numpy arrays, changed in place) at made-up addresses."""

    buffers: list[tuple[int, np.ndarray]] = field(default_factory=list)

    def add(self, array: np.ndarray, offset: int = 0) -> int:
        """The address of an array's first byte; `offset` shifts it off its natural alignment."""
        address = GAP * (len(self.buffers) + 1) + offset
        self.buffers.append((address, array.reshape(-1).view(np.uint8)))
        return address

    def find(self, addresses: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        """The buffer of all addresses, and offsets in it."""
        if (addresses % size).any():
            raise PtxError(f"an access of {size} bytes is not aligned: {int(addresses[addresses % size > 0][0]):#x}")
        first = int(addresses[0]) // GAP - 1
        if not 0 <= first < len(self.buffers):
            raise PtxError(f"no memory at {int(addresses[0]):#x}")
        base, data = self.buffers[first]
        offsets = addresses.astype(np.int64) - base
        if (offsets < 0).any() or (offsets + size > data.size).any():
            bad = int(offsets[(offsets < 0) | (offsets + size > data.size)][0])
            raise PtxError(f"{size} bytes at offset {bad} of a buffer of {data.size}")
        return data, offsets


class Machine:
    """One program of a grid."""

    def __init__(self, program: Program, arguments: list[int], memory: Memory, index: int, grid: int) -> None:
        if len(arguments) != len(program.parameters):
            raise PtxError(f"{len(program.parameters)} parameters; got {len(arguments)}")
        self.program, self.memory = program, memory
        self.threads = program.threads
        self.arguments = dict(zip(program.parameters, arguments, strict=True))
        self.registers: dict[str, np.ndarray] = {
            "%tid.x": np.arange(self.threads, dtype=np.uint64),
            "%ctaid.x": np.full(self.threads, index, np.uint64),
            "%nctaid.x": np.full(self.threads, grid, np.uint64),
        }
        self.shared = np.zeros(program.shared_bytes, np.uint8)
        self.written = np.zeros(program.shared_bytes, bool)
        self.everyone = np.ones(self.threads, bool)

    def run(self, limit: int = 2_000_000) -> None:
        at = 0
        for _ in range(limit):
            instruction = self.program.instructions[at]
            at += 1
            active = self.everyone
            if instruction.guard is not None:
                active = self.registers[instruction.guard.lstrip("!")]
                active = ~active if instruction.guard.startswith("!") else active
            kind = instruction.opcode[0]
            if kind == "ret":
                return
            if kind == "bra":
                if active.any() != active.all():
                    raise PtxError("threads part at a branch")
                if active.all():
                    at = self.program.labels[instruction.operands[0]]
                continue
            with np.errstate(over="ignore", invalid="ignore"):
                getattr(self, f"do_{kind}", self.unknown)(instruction, active)
        raise PtxError("the program does not end")

    def unknown(self, instruction: Instruction, _: np.ndarray) -> None:
        raise PtxError(f"unknown instruction {'.'.join(instruction.opcode)}")

    # Operands

    def bits(self, operand: str, width: int = 64) -> np.ndarray:
        if operand.startswith("{"):
            parts = [self.bits(part.strip(), 16) for part in operand[1:-1].split(",")]
            return parts[0] | parts[1] << np.uint64(16)
        if operand in self.registers:
            return self.registers[operand] & np.uint64(MASKS[width])
        if operand.startswith("0f"):
            value = int(operand[2:], 16)
        elif operand in self.program.shared:
            value = SHARED_START + self.program.shared[operand]
        elif re.fullmatch(r"-?(0x[0-9A-Fa-f]+|\d+)", operand):
            value = int(operand, 0)
        else:
            raise PtxError(f"{operand} was never written")
        return np.full(self.threads, value & MASKS[width], np.uint64)

    def signed(self, operand: str, width: int) -> np.ndarray:
        value = self.bits(operand, width)
        return (value << np.uint64(64 - width)).view(np.int64) >> (64 - width)

    def number(self, operand: str, type_: str) -> np.ndarray:
        if type_ == "f32":
            return self.float32(operand)
        width = int(type_[1:])
        return self.signed(operand, width) if type_[0] == "s" else self.bits(operand, width)

    def float32(self, operand: str) -> np.ndarray:
        return self.bits(operand, 32).astype(np.uint32).view(np.float32)

    def pair(self, operand: str, type_: str) -> np.ndarray:
        """Both halves of a register in float64: [threads, 2]."""
        bits = np.stack([self.bits(operand, 32) >> np.uint64(16 * i) & np.uint64(0xFFFF) for i in (0, 1)], 1)
        if type_ == "f16x2":
            return bits.astype(np.uint16).view(np.float16).astype(np.float64)
        return (bits << np.uint64(16)).astype(np.uint32).view(np.float32).astype(np.float64)

    def put_pair(self, operand: str, exact: np.ndarray, active: np.ndarray, type_: str) -> None:
        """Results that need no rounding; any other would be rounded twice here."""
        if type_ == "f16x2":
            bits, held = exact.astype(np.float16).view(np.uint16), exact.astype(np.float16)
        else:
            bits = exact.astype(np.float32).view(np.uint32) >> 16
            held = (bits << 16).view(np.float32)
        if (held != exact).any():
            raise PtxError(f"a result of {type_} is not exact")
        bits = bits.astype(np.uint64)
        self.put(operand, bits[:, 0] | bits[:, 1] << np.uint64(16), active, 32)

    def put(self, operand: str, value: np.ndarray, active: np.ndarray, width: int = 64) -> None:
        if value.dtype == np.float32:
            value = value.view(np.uint32)
        value = value.astype(np.int64).view(np.uint64) if value.dtype.kind == "i" else value.astype(np.uint64)
        value = value & np.uint64(MASKS[width])
        if not active.all():
            old = self.registers.get(operand)
            if old is None:
                # Left undefined for the rest; reading it there would be a mistake that a poison shows.
                old = np.full(self.threads, 0x7FDEADBEEF7FDEAD & MASKS[width], np.uint64)
            value = np.where(active, value, old)
        self.registers[operand] = value

    # Arithmetic

    def binary(self, instruction: Instruction, active: np.ndarray, function) -> None:
        type_ = instruction.opcode[-1]
        d, a, b = instruction.operands
        if type_ == "pred":
            self.registers[d] = function(self.registers[a], self.registers[b])
        elif type_ == "f32":
            self.put(d, function(self.float32(a), self.float32(b)), active)
        elif "wide" in instruction.opcode:
            self.put(d, function(self.number(a, type_), self.number(b, type_)), active)
        else:
            self.put(d, function(self.number(a, type_), self.number(b, type_)), active, int(type_[1:]))

    def do_add(self, instruction: Instruction, active: np.ndarray) -> None:
        self.binary(instruction, active, np.add)

    def do_sub(self, instruction: Instruction, active: np.ndarray) -> None:
        self.binary(instruction, active, np.subtract)

    def do_mul(self, instruction: Instruction, active: np.ndarray) -> None:
        self.binary(instruction, active, np.multiply)

    def do_ex2(self, instruction: Instruction, active: np.ndarray) -> None:
        d, a = instruction.operands
        self.put(d, np.exp2(self.float32(a)), active)

    def do_min(self, instruction: Instruction, active: np.ndarray) -> None:
        self.binary(instruction, active, np.minimum)

    def do_max(self, instruction: Instruction, active: np.ndarray) -> None:
        self.binary(instruction, active, np.maximum)

    def do_and(self, instruction: Instruction, active: np.ndarray) -> None:
        self.binary(instruction, active, np.bitwise_and)

    def do_or(self, instruction: Instruction, active: np.ndarray) -> None:
        self.binary(instruction, active, np.bitwise_or)

    def do_xor(self, instruction: Instruction, active: np.ndarray) -> None:
        self.binary(instruction, active, np.bitwise_xor)

    def do_not(self, instruction: Instruction, active: np.ndarray) -> None:
        type_ = instruction.opcode[-1]
        d, a = instruction.operands
        if type_ == "pred":
            self.registers[d] = ~self.registers[a]
        else:
            self.put(d, ~self.bits(a), active, int(type_[1:]))

    def do_div(self, instruction: Instruction, active: np.ndarray) -> None:
        type_ = instruction.opcode[-1]
        d, a, b = instruction.operands
        x, y = self.number(a, type_), self.number(b, type_)
        if type_ == "f32":
            self.put(d, x / y, active)
            return
        if type_[0] == "s":
            quotient = np.abs(x) // np.abs(y) * np.sign(x) * np.sign(y)
        else:
            quotient = x // y
        self.put(d, quotient, active, int(type_[1:]))

    def do_rem(self, instruction: Instruction, active: np.ndarray) -> None:
        type_ = instruction.opcode[-1]
        d, a, b = instruction.operands
        self.put(d, np.fmod(self.number(a, type_), self.number(b, type_)), active, int(type_[1:]))

    def do_mad(self, instruction: Instruction, active: np.ndarray) -> None:
        type_ = instruction.opcode[-1]
        d, a, b, c = instruction.operands
        width = 64 if "wide" in instruction.opcode else int(type_[1:])
        product = self.number(a, type_) * self.number(b, type_)
        self.put(d, product.astype(np.int64) + self.signed(c, width), active, width)

    def do_fma(self, instruction: Instruction, active: np.ndarray) -> None:
        d, a, b, c = instruction.operands
        type_ = instruction.opcode[-1]
        if type_ in PAIRS:
            self.put_pair(d, self.pair(a, type_) * self.pair(b, type_) + self.pair(c, type_), active, type_)
            return
        exact = self.float32(a).astype(np.float64) * self.float32(b) + self.float32(c)
        self.put(d, exact.astype(np.float32), active)

    def do_shl(self, instruction: Instruction, active: np.ndarray) -> None:
        width = int(instruction.opcode[-1][1:])
        d, a, b = instruction.operands
        self.put(d, self.bits(a, width) << self.bits(b, 32), active, width)

    def do_shr(self, instruction: Instruction, active: np.ndarray) -> None:
        type_ = instruction.opcode[-1]
        d, a, b = instruction.operands
        self.put(
            d, self.number(a, type_) >> self.bits(b, 32).astype(self.number(a, type_).dtype), active, int(type_[1:])
        )

    def do_bfe(self, instruction: Instruction, active: np.ndarray) -> None:
        d, a, start, length = instruction.operands
        count = self.bits(length, 32)
        field_ = self.bits(a, 32) >> self.bits(start, 32) & ((np.uint64(1) << count) - np.uint64(1))
        if instruction.opcode[-1] == "s32":
            top = field_ >> (count - np.uint64(1)) & np.uint64(1)
            field_ = np.where(top == 1, field_ | ~((np.uint64(1) << count) - np.uint64(1)), field_)
        self.put(d, field_, active, 32)

    def do_prmt(self, instruction: Instruction, active: np.ndarray) -> None:
        d, a, b, selector = instruction.operands
        both = self.bits(a, 32) | self.bits(b, 32) << np.uint64(32)
        choice = self.bits(selector, 32)
        out = np.zeros(self.threads, np.uint64)
        for i in range(4):
            nibble = choice >> np.uint64(4 * i) & np.uint64(15)
            if (nibble & np.uint64(8)).any():
                raise PtxError("prmt with sign")
            out |= (both >> nibble * np.uint64(8) & np.uint64(255)) << np.uint64(8 * i)
        self.put(d, out, active, 32)

    def do_dp4a(self, instruction: Instruction, active: np.ndarray) -> None:
        d, a, b, c = instruction.operands
        x, y, total = self.bits(a, 32), self.bits(b, 32), self.bits(c, 32)
        for i in range(4):
            shift = np.uint64(8 * i)
            total = total + (x >> shift & np.uint64(255)) * (y >> shift & np.uint64(255))
        self.put(d, total, active, 32)

    def do_shfl(self, instruction: Instruction, active: np.ndarray) -> None:
        d, a, index, segments, members = instruction.operands
        if instruction.opcode[1:] != ["sync", "idx", "b32"] or not active.all() or int(members, 0) != MASKS[32]:
            raise PtxError("a shuffle other than by index among all lanes")
        kept = np.uint64(int(segments, 0) >> 8)
        if int(segments, 0) & 31 != 31:
            raise PtxError("a shuffle with a limit")
        thread = np.arange(self.threads, dtype=np.uint64)
        lane = thread & kept | self.bits(index, 32) & ~kept & np.uint64(31)
        self.put(d, self.bits(a, 32)[thread & ~np.uint64(31) | lane], active, 32)

    def do_setp(self, instruction: Instruction, active: np.ndarray) -> None:
        compare, type_ = instruction.opcode[1], instruction.opcode[-1]
        d, a, b = instruction.operands
        functions = {
            "eq": np.equal,
            "ne": np.not_equal,
            "lt": np.less,
            "le": np.less_equal,
            "gt": np.greater,
            "ge": np.greater_equal,
        }
        self.registers[d] = functions[compare](self.number(a, type_), self.number(b, type_))

    def do_selp(self, instruction: Instruction, active: np.ndarray) -> None:
        width = int(instruction.opcode[-1][1:])
        d, a, b, p = instruction.operands
        self.put(d, np.where(self.registers[p], self.bits(a, width), self.bits(b, width)), active, width)

    def do_mov(self, instruction: Instruction, active: np.ndarray) -> None:
        type_ = instruction.opcode[-1]
        d, a = instruction.operands
        if type_ == "pred":
            self.registers[d] = self.registers[a]
        elif d.startswith("{"):
            value = self.bits(a, 32)
            for i, part in enumerate(d[1:-1].split(",")):
                self.put(part.strip(), value >> np.uint64(16 * i), active, 16)
        else:
            self.put(d, self.bits(a, int(type_[1:])), active, int(type_[1:]))

    def do_cvt(self, instruction: Instruction, active: np.ndarray) -> None:
        to, source = instruction.opcode[-2:]
        d, a = instruction.operands
        if to == "bf16":
            bits = self.bits(a, 32)
            rounded = bits + np.uint64(0x7FFF) + (bits >> np.uint64(16) & np.uint64(1)) >> np.uint64(16)
            self.put(d, np.where(np.isnan(self.float32(a)), np.uint64(0x7FFF), rounded), active, 16)
        elif to == "f16":
            self.put(d, self.float32(a).astype(np.float16).view(np.uint16), active, 16)
        elif source == "f16":
            half = self.bits(a, 16).astype(np.uint16).view(np.float16)
            self.put(d, half.astype(np.float32), active, 32)
        elif to[0] in "su" and source[0] in "su":
            self.put(d, self.number(a, source), active, int(to[1:]))
        else:
            self.unknown(instruction, active)

    # Memory

    def do_ld(self, instruction: Instruction, active: np.ndarray) -> None:
        d, address = instruction.operands
        opcode = instruction.opcode
        if "param" in opcode:
            self.put(d, np.full(self.threads, self.arguments[address[1:-1]] & MASKS[64], np.uint64), active)
            return
        names = [part.strip() for part in d[1:-1].split(",")] if d.startswith("{") else [d]
        width = int(opcode[-1][1:])
        places = self.address(address)[active]
        size = width // 8 * len(names)
        if not len(places):
            for name in names:
                self.put(name, np.zeros(self.threads, np.uint64), active, width)
            return
        if "shared" in opcode:
            data, offsets = self.shared, self.shared_offsets(places, size)
            if not all(self.written[offsets + i].all() for i in range(size)):
                raise PtxError("shared memory is read before it is written")
        else:
            data, offsets = self.memory.find(places, size)
        for n, name in enumerate(names):
            value = np.zeros(self.threads, np.uint64)
            for i in range(width // 8):
                value[active] |= data[offsets + n * width // 8 + i].astype(np.uint64) << np.uint64(8 * i)
            self.put(name, value, active, width)

    def do_st(self, instruction: Instruction, active: np.ndarray) -> None:
        address, source = instruction.operands
        opcode = instruction.opcode
        names = [part.strip() for part in source[1:-1].split(",")] if source.startswith("{") else [source]
        width = int(opcode[-1][1:])
        places = self.address(address)[active]
        size = width // 8 * len(names)
        if not len(places):
            return
        if "shared" in opcode:
            data, offsets = self.shared, self.shared_offsets(places, size)
            for i in range(size):
                self.written[offsets + i] = True
        else:
            data, offsets = self.memory.find(places, size)
        for n, name in enumerate(names):
            value = self.bits(name, width)[active]
            for i in range(width // 8):
                data[offsets + n * width // 8 + i] = (value >> np.uint64(8 * i) & np.uint64(255)).astype(np.uint8)

    def do_prefetch(self, instruction: Instruction, active: np.ndarray) -> None:
        """Nothing happens; but an address where nothing lies would be a mistake."""
        places = self.address(instruction.operands[0])[active]
        if len(places):
            self.memory.find(places, 1)

    def address(self, operand: str) -> np.ndarray:
        base, _, offset = operand[1:-1].partition("+")
        return self.bits(base.strip()) + np.uint64(int(offset.strip() or "0", 0))

    def shared_offsets(self, places: np.ndarray, size: int) -> np.ndarray:
        offsets = places.astype(np.int64) - SHARED_START
        if (offsets % size).any() or (offsets < 0).any() or (offsets + size > len(self.shared)).any():
            raise PtxError("outside shared memory, or not aligned in it")
        return offsets

    # Warps

    def do_bar(self, _: Instruction, active: np.ndarray) -> None:
        if not active.all():
            raise PtxError("not all threads reach a barrier")

    def do_griddepcontrol(self, _: Instruction, active: np.ndarray) -> None:
        if not active.all():
            raise PtxError("not all threads reach griddepcontrol")

    def do_mma(self, instruction: Instruction, active: np.ndarray) -> None:
        if not active.all():
            raise PtxError("not all lanes reach mma")
        bf16 = "bf16" in instruction.opcode
        d, a, b, c = [[part.strip() for part in operand[1:-1].split(",")] for operand in instruction.operands]
        warps = self.threads // 32
        g, t = np.arange(32) // 4, np.arange(32) % 4
        depth = 8 * len(b)

        def halves(name: str) -> list[np.ndarray]:
            bits = self.bits(name, 32).reshape(warps, 32)
            if bf16:
                return [
                    ((bits >> np.uint64(16 * e) & np.uint64(0xFFFF)) << np.uint64(16))
                    .astype(np.uint32)
                    .view(np.float32)
                    for e in (0, 1)
                ]
            return [(bits >> np.uint64(16 * e) & np.uint64(0xFFFF)).astype(np.uint16).view(np.float16) for e in (0, 1)]

        left, right = np.zeros((warps, 16, depth)), np.zeros((warps, depth, 8))
        for i, name in enumerate(a):
            for e, value in enumerate(halves(name)):
                left[:, g + 8 * (i % 2), 2 * t + e + 8 * (i // 2)] = value
        for i, name in enumerate(b):
            for e, value in enumerate(halves(name)):
                right[:, 2 * t + e + 8 * i, g] = value
        out = left @ right
        for i, name in enumerate(c):
            row, column = g + 8 * (i // 2), 2 * t + i % 2
            out[:, row, column] += self.float32(name).reshape(warps, 32)
        for i, name in enumerate(d):
            row, column = g + 8 * (i // 2), 2 * t + i % 2
            self.put(name, out[:, row, column].astype(np.float32).reshape(-1), active, 32)


def launch(program: Program, grid: int, arguments: list[int | np.ndarray], memory: Memory | None = None) -> None:
    """Run every program of a grid, one after the other; arrays stand for their addresses."""
    memory = Memory() if memory is None else memory
    values = [memory.add(value) if isinstance(value, np.ndarray) else int(value) for value in arguments]
    for index in range(grid):
        Machine(program, values, memory, index, grid).run()
