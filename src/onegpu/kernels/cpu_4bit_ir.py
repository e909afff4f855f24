"""Machine code for `x @ W.T` with a 4-bit W on a CPU: the product written as LLVM IR, compiled in this process.

The idea. Eight neighbouring weights are one 32-bit word of the packed bytes. A vector of `lanes` such words is a
*group* of 8 * lanes weights, and its nibble s is reached by one shift: `word >> 4 s`. Where a vector register holds
the whole codebook, the shifted words themselves are the indices of one shuffle (it reads only their lowest bits), so
`lanes` weights cost one shift, one shuffle and one multiply-add: nothing is widened or interleaved. The price is that
lane j of nibble s meets element 8 j + (s ^ 1) of the group (the even element sits in the high nibble, and the lowest
byte comes first), so x is brought into that order once per call (`spread`), as float32, padded with zeros to whole
groups.

The sum. Inside a group each lane adds its 8 products code * x; that times the block's absmax goes to the lane's total;
lanes are added pairwise at the end, then the bias; one rounding to the dtype of x. Every output is made this way
whatever the number of rows or threads, so its bits depend on neither.

The forms differ in the lookup and the number of lanes alone: `avx512` (one shuffle of 16), `avx2` (two of 8, the
nibble's top bit choosing), `generic` (loads from the table).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir

from onegpu.kernels.cpu_4bit_forms import Threads, Variant
from onegpu.kernels.llvm import (
    F32,
    I8,
    I32,
    I64,
    PTR,
    Values,
    call_address,
    constants,
    element_at,
    load_float32,
    loop,
    splat,
    store_rounded,
)

__all__ = ["ARGUMENTS", "build_module"]

# The caller's 64-bit words, in order. Addresses unless capital; `x`, `bias`, `out` contiguous.
ARGUMENTS = (
    "x",  # [M, K]
    "packed",  # uint8 [N K / 2]
    "absmax",  # float32 or, nested, uint8 [ceil(N K / blocksize)]
    "bias",  # [N] or null
    "out",  # [M, N]
    "codebook",  # float32 [16]
    "nested_absmax",  # float32 [ceil(len(absmax) / 256)]
    "nested_code",  # float32 [256]
    "nested_offset",  # float32 []
    "M",
    "N",
    "K",
    "scratch",  # filled in by the entry: float32 [M, K rounded up to whole groups]
)
NESTED_SHIFT = 8
NIBBLES = 8
CACHE_LINE = 64
# Below this many multiply-adds a thread's share is done before it has woken up.
WORK_PER_THREAD = 1 << 17
# Rows of W taken together, and rows of x that go over all of W before the next ones do (48 KiB at K = 1536).
ROW_TILE = 4
X_ROWS = 8
# Bytes of W asked for ahead of use. On one core of a Zen 5 server, weights of 60 MB beyond the caches: 5.8 ms without,
# 4.1 with 4 KiB, 3.9 with 8 or 12, 4.1 with 16.
PREFETCH_BYTES = 8192


def build_module(variant: Variant, threads: Threads | None) -> ir.Module:
    """A module with `i64 entry(ptr arguments)`: 0 when done, 1 when there was no memory for the scratch."""
    module = ir.Module(name="linear_4bit")
    rows = _Rows(module, variant).function
    worker = _worker(module, rows, threads) if threads else None
    _entry(module, variant, rows, worker, threads)
    return module


def _arguments(b: Any, pointer: Any) -> dict[str, Any]:
    """The caller's words by name; those with small names as pointers."""
    found = {}
    for place, name in enumerate(ARGUMENTS):
        word = b.load(element_at(b, pointer, I64(place), I64), typ=I64)
        found[name] = word if name.isupper() else b.inttoptr(word, PTR)
    return found


class _Rows:
    """`void rows(ptr arguments, i64 first, i64 last)`: all rows of x against rows first..last-1 of W."""

    def __init__(self, module: ir.Module, variant: Variant) -> None:
        self.module = module
        self.variant = variant
        self.lanes = variant.form.lanes
        self.group = NIBBLES * self.lanes
        self.words = ir.VectorType(I32, self.lanes)
        self.floats = ir.VectorType(F32, self.lanes)
        self.function = ir.Function(module, ir.FunctionType(ir.VoidType(), [PTR, I64, I64]), "rows")
        self.function.linkage = "internal"
        arguments, first, last = self.function.args
        self.b = ir.IRBuilder(self.function.append_basic_block())
        self.given = _arguments(self.b, arguments)
        self.table = self._load_table()
        K = self.given["K"]
        self.groups = self.b.udiv(K, I64(self.group))
        self.tail_lanes = self.b.udiv(self.b.urem(K, I64(self.group)), I64(NIBBLES))
        self.has_tail = self.b.zext(self.b.icmp_unsigned("!=", self.tail_lanes, I64(0)), I64)
        self.spread_K = self.b.mul(self.b.add(self.groups, self.has_tail), I64(self.group))
        self._walk(first, last)
        self.b.ret_void()

    def _walk(self, first: Any, last: Any) -> None:
        """Some rows of x at a time, which stay in the nearer caches, against all tiles of W's rows."""
        b = self.b
        whole = b.udiv(b.sub(last, first), I64(ROW_TILE))
        done = b.add(first, b.mul(whole, I64(ROW_TILE)))

        def chunk(i: Any, _: Values) -> Values:
            m = b.mul(i, I64(X_ROWS))
            left = b.sub(self.given["M"], m)
            count = b.select(b.icmp_unsigned("<", left, I64(X_ROWS)), left, I64(X_ROWS))
            loop(b, whole, [], lambda i, _: self._tiles(b.add(first, b.mul(i, I64(ROW_TILE))), ROW_TILE, m, count))
            loop(b, b.sub(last, done), [], lambda i, _: self._tiles(b.add(done, i), 1, m, count))
            return []

        loop(b, b.udiv(b.add(self.given["M"], I64(X_ROWS - 1)), I64(X_ROWS)), [], chunk)

    def _tiles(self, n: Any, tile_rows: int, m: Any, left: Any) -> Values:
        """`tile_rows` rows of W from n against `left` rows of x from m."""
        b = self.b
        for x_rows, w_rows in self.variant.form.tiles:
            step = min(w_rows, tile_rows)
            whole = b.udiv(left, I64(x_rows))

            def body(i: Any, _: Values, m: Any = m, x_rows: int = x_rows, step: int = step) -> Values:
                for row in range(0, tile_rows, step):
                    self._tile(b.add(n, I64(row)), step, b.add(m, b.mul(i, I64(x_rows))), x_rows)
                return []

            loop(b, whole, [], body)
            taken = b.mul(whole, I64(x_rows))
            m, left = b.add(m, taken), b.sub(left, taken)
        return []

    def _tile(self, n: Any, w_rows: int, m: Any, x_rows: int) -> None:
        """Outputs [m : m + x_rows, n : n + w_rows]."""
        b, K = self.b, self.given["K"]
        starts = [b.mul(b.add(n, I64(row)), K) for row in range(w_rows)]
        xs = [
            element_at(b, self.given["scratch"], b.mul(b.add(m, I64(row)), self.spread_K), F32) for row in range(x_rows)
        ]
        totals: Values = [ir.Constant(self.floats, [0.0] * self.lanes)] * (w_rows * x_rows)
        totals = loop(b, self.groups, totals, lambda g, kept: self._add_group(g, kept, starts, xs, None))
        mask = self._first_lanes(self.tail_lanes)
        totals = loop(b, self.has_tail, totals, lambda _, kept: self._add_group(self.groups, kept, starts, xs, mask))
        for place, total in enumerate(totals):
            row, column = b.add(m, I64(place % x_rows)), b.add(n, I64(place // x_rows))
            self._finish(total, row, column)

    def _add_group(self, g: Any, totals: Values, starts: Values, xs: Values, mask: Any) -> Values:
        """One group of each row of W against each row of x. `mask`: the lanes that are still in the row."""
        b = self.b
        offset = b.mul(g, I64(self.group))
        words = [self._words(b.add(start, offset), mask) for start in starts]
        scales = [self._scales(b.add(start, offset), mask) for start in starts]
        sums: Values = [None] * len(totals)
        for nibble in range(NIBBLES):
            start = b.add(offset, I64(nibble * self.lanes))
            x = [b.load(element_at(b, pointer, start, F32), typ=self.floats, align=4 * self.lanes) for pointer in xs]
            for row, word in enumerate(words):
                weight = self._lookup(word, nibble)
                for column, value in enumerate(x):
                    place = row * len(xs) + column
                    kept = sums[place]
                    sums[place] = b.fmul(weight, value) if kept is None else self._fma(weight, value, kept)
        return [
            self._fma(part, scales[place // len(xs)], total)
            for place, (part, total) in enumerate(zip(sums, totals, strict=True))
        ]

    def _words(self, flat: Any, mask: Any) -> Any:
        pointer = element_at(self.b, self.given["packed"], self.b.lshr(flat, I64(1)), I8)
        if mask is None:
            prefetch = self._intrinsic("llvm.prefetch.p0", ir.VoidType(), [PTR, I32, I32, I32])
            ahead = element_at(self.b, pointer, I64(PREFETCH_BYTES), I8)
            self.b.call(prefetch, [ahead, I32(0), I32(3), I32(1)])
            return self.b.load(pointer, typ=self.words, align=1)
        load = self._intrinsic(f"llvm.masked.load.v{self.lanes}i32.p0", self.words, [PTR, I32, mask.type, self.words])
        return self.b.call(load, [pointer, I32(1), mask, ir.Constant(self.words, [0] * self.lanes)])

    def _scales(self, flat: Any, mask: Any) -> Any:
        """The absmax of each lane of the group that begins at element `flat`."""
        b, size = self.b, self.variant.blocksize
        shift = size.bit_length() - 1
        step, count = (size, max(1, self.group // size)) if self.variant.aligned else (NIBBLES, self.lanes)
        if self.variant.aligned and not self.variant.nested and mask is None:
            values = load_float32(b, "float32", self.given["absmax"], b.lshr(flat, I64(shift)), count)
        else:
            first, places = splat(b, flat, count), constants(I64, range(0, count * step, step))
            elements = b.add(first, places)
            if mask is not None:
                # Beyond the row's end the lane's words are zeros and so is x; any scale of this row will do.
                left = splat(b, b.mul(self.tail_lanes, I64(NIBBLES)), count)
                elements = b.select(b.icmp_unsigned("<", places, left), elements, first)
            values = self._absmax(b.lshr(elements, constants(I64, [shift] * count)), count)
        return b.shuffle_vector(values, values, constants(I32, [lane * NIBBLES // step for lane in range(self.lanes)]))

    def _absmax(self, index: Any, count: int) -> Any:
        """absmax at these block numbers; nested: the product is rounded before the offset is added."""
        b = self.b
        if not self.variant.nested:
            return self._gather(self.given["absmax"], index, F32, count)
        codes = b.zext(self._gather(self.given["absmax"], index, I8, count), index.type)
        values = self._gather(self.given["nested_code"], codes, F32, count)
        outer = self._gather(
            self.given["nested_absmax"], b.lshr(index, constants(I64, [NESTED_SHIFT] * count)), F32, count
        )
        offset = b.load(self.given["nested_offset"], typ=F32)
        return b.fadd(b.fmul(values, outer), splat(b, offset, count))

    def _gather(self, pointer: Any, index: Any, element: Any, count: int) -> Any:
        b = self.b
        values = ir.Constant(ir.VectorType(element, count), ir.Undefined)
        for place in range(count):
            address = element_at(b, pointer, b.extract_element(index, I32(place)), element)
            values = b.insert_element(values, b.load(address, typ=element), I32(place))
        return values

    def _load_table(self) -> Values:
        """The codebook: one register of 16, two of 8, or nothing where it is read from memory."""
        if self.variant.form.name == "generic":
            return []
        return [
            load_float32(self.b, "float32", self.given["codebook"], I64(place), self.lanes)
            for place in range(0, 16, self.lanes)
        ]

    def _lookup(self, word: Any, nibble: int) -> Any:
        b = self.b
        shifted = b.lshr(word, constants(I32, [4 * nibble] * self.lanes)) if nibble else word
        if self.variant.form.name == "avx512":
            permute = self._intrinsic("llvm.x86.avx512.permvar.sf.512", self.floats, [self.floats, self.words])
            return b.call(permute, [self.table[0], shifted])
        if self.variant.form.name == "avx2":
            permute = self._intrinsic("llvm.x86.avx2.permps", self.floats, [self.floats, self.words])
            top = b.shl(word, constants(I32, [28 - 4 * nibble] * self.lanes))
            high = b.icmp_signed("<", top, ir.Constant(self.words, [0] * self.lanes))
            low_half, high_half = (b.call(permute, [half, shifted]) for half in self.table)
            return b.select(high, high_half, low_half)
        index = b.zext(b.and_(shifted, constants(I32, [15] * self.lanes)), ir.VectorType(I64, self.lanes))
        return self._gather(self.given["codebook"], index, F32, self.lanes)

    def _finish(self, total: Any, row: Any, column: Any) -> None:
        b, lanes = self.b, self.lanes
        while lanes > 1:
            lanes //= 2
            low = b.shuffle_vector(total, total, constants(I32, range(lanes)))
            high = b.shuffle_vector(total, total, constants(I32, range(lanes, 2 * lanes)))
            total = b.fadd(low, high)
        value = b.extract_element(total, I32(0))
        if self.variant.bias_dtype:
            bias = load_float32(b, self.variant.bias_dtype, self.given["bias"], column, 1)
            value = b.fadd(value, b.extract_element(bias, I32(0)))
        store_rounded(b, self.variant.x_dtype, value, self.given["out"], b.add(b.mul(row, self.given["N"]), column))

    def _first_lanes(self, count: Any) -> Any:
        return self.b.icmp_unsigned("<", constants(I64, range(self.lanes)), splat(self.b, count, self.lanes))

    def _fma(self, x: Any, y: Any, z: Any) -> Any:
        fma = self._intrinsic(f"llvm.fmuladd.v{self.lanes}f32", self.floats, [self.floats] * 3)
        return self.b.call(fma, [x, y, z])

    def _intrinsic(self, name: str, result: Any, operands: Sequence[Any]) -> Any:
        known = self.module.globals.get(name)
        return known or ir.Function(self.module, ir.FunctionType(result, operands), name)


def _worker(module: ir.Module, rows: Any, threads: Threads) -> Any:
    """`void worker(ptr arguments)`: this thread's share of W's rows, in whole tiles."""
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [PTR]), "worker")
    b = ir.IRBuilder(function.append_basic_block())
    given = _arguments(b, function.args[0])
    team = b.sext(call_address(b, threads.num_threads, I32, []), I64)
    mine = b.sext(call_address(b, threads.thread_num, I32, []), I64)
    tiles = b.udiv(b.add(given["N"], I64(ROW_TILE - 1)), I64(ROW_TILE))

    def border(number: Any) -> Any:
        row = b.mul(b.udiv(b.mul(tiles, number), team), I64(ROW_TILE))
        return b.select(b.icmp_unsigned("<", row, given["N"]), row, given["N"])

    b.call(rows, [function.args[0], border(mine), border(b.add(mine, I64(1)))])
    b.ret_void()
    return function


def _entry(module: ir.Module, variant: Variant, rows: Any, worker: Any, threads: Threads | None) -> None:
    function = ir.Function(module, ir.FunctionType(I64, [PTR]), "entry")
    b = ir.IRBuilder(function.append_basic_block())
    arguments = b.bitcast(b.alloca(I64, size=len(ARGUMENTS)), PTR)
    for place in range(len(ARGUMENTS) - 1):
        b.store(
            b.load(element_at(b, function.args[0], I64(place), I64), typ=I64, align=1),
            element_at(b, arguments, I64(place), I64),
        )
    given = _arguments(b, arguments)
    group = NIBBLES * variant.form.lanes
    spread_K = b.mul(b.udiv(b.add(given["K"], I64(group - 1)), I64(group)), I64(group))
    size = b.add(b.mul(b.mul(given["M"], spread_K), I64(4)), I64(CACHE_LINE))
    malloc = ir.Function(module, ir.FunctionType(PTR, [I64]), "malloc")
    free = ir.Function(module, ir.FunctionType(ir.VoidType(), [PTR]), "free")
    memory = b.call(malloc, [size])
    with b.if_then(b.icmp_unsigned("==", memory, ir.Constant(PTR, None)), likely=False):
        b.ret(I64(1))
    start = b.and_(b.add(b.ptrtoint(memory, I64), I64(CACHE_LINE - 1)), I64(-CACHE_LINE))
    b.store(start, element_at(b, arguments, I64(ARGUMENTS.index("scratch")), I64))
    _spread(b, variant, given, b.inttoptr(start, PTR), spread_K)
    if threads is None:
        b.call(rows, [arguments, I64(0), given["N"]])
    else:
        work = b.mul(b.mul(given["M"], given["N"]), given["K"])
        wanted = b.udiv(work, I64(WORK_PER_THREAD))
        most = b.sext(call_address(b, threads.max_threads, I32, []), I64)
        team = b.select(b.icmp_signed("<", wanted, most), wanted, most)
        with b.if_else(b.icmp_signed(">", team, I64(1))) as (many, one):
            with many:
                given_to_pool = [(PTR, worker), (PTR, arguments), (I32, b.trunc(team, I32)), (I32, I32(0))]
                call_address(b, threads.parallel, ir.VoidType(), given_to_pool)
            with one:
                b.call(rows, [arguments, I64(0), given["N"]])
    b.call(free, [memory])
    b.ret(I64(0))


def _spread(b: Any, variant: Variant, given: dict[str, Any], scratch: Any, spread_K: Any) -> None:
    """x to float32 [M, groups, nibble, lane], zeros behind each row's end."""
    lanes = variant.form.lanes
    chunks, chunks_spread = b.udiv(given["K"], I64(NIBBLES)), b.udiv(spread_K, I64(NIBBLES))

    def put(row: Any, chunk: Any, values: Values) -> None:
        group, lane = b.udiv(chunk, I64(lanes)), b.urem(chunk, I64(lanes))
        start = b.add(b.mul(row, spread_K), b.add(b.mul(group, I64(lanes * NIBBLES)), lane))
        for nibble in range(NIBBLES):
            b.store(values[nibble ^ 1], element_at(b, scratch, b.add(start, I64(nibble * lanes)), F32))

    def copy(row: Any, chunk: Any) -> Values:
        first = b.add(b.mul(row, given["K"]), b.mul(chunk, I64(NIBBLES)))
        values = load_float32(b, variant.x_dtype, given["x"], first, NIBBLES)
        put(row, chunk, [b.extract_element(values, I32(place)) for place in range(NIBBLES)])
        return []

    def clear(row: Any, chunk: Any) -> Values:
        put(row, b.add(chunks, chunk), [F32(0.0)] * NIBBLES)
        return []

    def fill(row: Any, _: Values) -> Values:
        loop(b, chunks, [], lambda chunk, _: copy(row, chunk))
        loop(b, b.sub(chunks_spread, chunks), [], lambda chunk, _: clear(row, chunk))
        return []

    loop(b, given["M"], [], fill)
