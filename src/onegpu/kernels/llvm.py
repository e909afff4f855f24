"""A few words of LLVM that the IR builder of llvmlite has not: loops, constant vectors, addresses, 16-bit floats."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir

__all__ = [
    "F32",
    "I8",
    "I32",
    "I64",
    "PTR",
    "Values",
    "call_address",
    "constants",
    "element_at",
    "load_float32",
    "loop",
    "splat",
    "store_rounded",
]

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()
PTR = ir.PointerType()

Values = list[Any]


def loop(b: Any, count: Any, carried: Sequence[Any], body: Callable[[Any, Values], Sequence[Any]]) -> Values:
    """`for i in range(count): carried = body(i, carried)`; returns what is carried out."""
    before = b.block
    head, inner, done = (b.append_basic_block(name) for name in ("head", "body", "done"))
    b.branch(head)
    b.position_at_end(head)
    i = b.phi(I64)
    i.add_incoming(I64(0), before)
    phis = [b.phi(value.type) for value in carried]
    for phi, value in zip(phis, carried, strict=True):
        phi.add_incoming(value, before)
    b.cbranch(b.icmp_signed("<", i, count), inner, done)
    b.position_at_end(inner)
    results = body(i, phis)
    i.add_incoming(b.add(i, I64(1)), b.block)
    for phi, value in zip(phis, results, strict=True):
        phi.add_incoming(value, b.block)
    b.branch(head)
    b.position_at_end(done)
    return phis


def constants(element: Any, values: Sequence[Any]) -> Any:
    return ir.Constant(ir.VectorType(element, len(values)), list(values))


def splat(b: Any, scalar: Any, lanes: int) -> Any:
    one = b.insert_element(ir.Constant(ir.VectorType(scalar.type, lanes), ir.Undefined), scalar, I32(0))
    return b.shuffle_vector(one, one, constants(I32, [0] * lanes))


def element_at(b: Any, pointer: Any, index: Any, element: Any) -> Any:
    return b.gep(pointer, [index], source_etype=element)


def load_float32(b: Any, dtype: str, pointer: Any, index: Any, lanes: int) -> Any:
    """`lanes` neighbouring elements as float32, exactly."""
    element = {"float32": F32, "float16": F16, "bfloat16": I16}[dtype]
    vector = b.load(element_at(b, pointer, index, element), typ=ir.VectorType(element, lanes), align=_bytes(dtype))
    if dtype == "float32":
        return vector
    if dtype == "float16":
        return b.fpext(vector, ir.VectorType(F32, lanes))
    wide = ir.VectorType(I32, lanes)
    return b.bitcast(b.shl(b.zext(vector, wide), constants(I32, [16] * lanes)), ir.VectorType(F32, lanes))


def _bytes(dtype: str) -> int:
    return 4 if dtype == "float32" else 2


def store_rounded(b: Any, dtype: str, value: Any, pointer: Any, index: Any) -> None:
    """One float32 rounded to nearest even into `dtype`; NaN stays NaN."""
    if dtype == "float32":
        b.store(value, element_at(b, pointer, index, F32))
        return
    if dtype == "float16":
        b.store(b.fptrunc(value, F16), element_at(b, pointer, index, F16))
        return
    bits = b.bitcast(value, I32)
    odd = b.and_(b.lshr(bits, I32(16)), I32(1))
    rounded = b.lshr(b.add(b.add(bits, I32(0x7FFF)), odd), I32(16))
    kept = b.select(b.fcmp_unordered("uno", value, value), I32(0x7FC0), rounded)
    b.store(b.trunc(kept, I16), element_at(b, pointer, index, I16))


def call_address(b: Any, address: int, result: Any, arguments: Sequence[tuple[Any, Any]]) -> Any:
    kind = ir.FunctionType(result, [type_ for type_, _ in arguments])
    pointer = b.inttoptr(I64(address), kind.as_pointer())
    return b.call(pointer, [value for _, value in arguments])
