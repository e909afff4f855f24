# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""y = tail(x @ W.T + bias) for a W stored as 4-bit or 8-bit codes and many rows of x, on Hopper's warpgroup products.

The kernel is `cuda/gemm_codes.cu`, which says how it works: W is decoded in registers, never in memory. Scales of 4-bit
codes are float32 here; nested ones are evaluated before it, into tile order.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from onegpu.errors import DeviceError
from onegpu.formats.codebooks import FP4_CODE, NF4_CODE
from onegpu.formats.tiling import TILE_ROWS
from onegpu.kernels import nvrtc
from onegpu.kernels.asm_4bit import TABLE_SCALE
from onegpu.kernels.gemm_codes_config import (
    Config,
    Shape,
    configure,
    leaving,
    scales_sums,
    shared_bytes,
    stages,
)
from onegpu.kernels.launch import NO_CONTRACTION, capability, on_device_of, processors
from onegpu.kernels.tickets import tickets

__all__ = ["gemm_4bit", "gemm_8bit", "source", "why_not_8bit", "why_not_gemm"]

# Warpgroup products are in no other architecture, newer ones included.
CAPABILITY: Final = (9, 0)
ARCHITECTURE: Final = "sm_90a"
WARPGROUP: Final = 128
CODEBOOKS: Final = {"nf4": NF4_CODE, "fp4": FP4_CODE}
# Below 2**15, so that the codebook times it is nearest to whole numbers: 7e-6 of NF4's root mean square; FP4 is exact.
WHOLE_SCALE: Final = {"nf4": 25545.0, "fp4": 20160.0}
ACTIVATIONS: Final = {None: 0, "silu": 1, "gelu": 2, "gelu_tanh": 3, "relu": 4}
BIAS_KINDS: Final = {None: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
KINDS: Final = {torch.bfloat16: "BFLOAT16", torch.float16: "FLOAT16", torch.int8: "UINT8"}
# From so many tokens on it is quicker to wait for parts of K than that all are written and the last one adds them up.
WAITED_TOKENS: Final = 96
# Of two parts the first has so many tiles less than half: its sums are on their way while the second multiplies.
WAITED_TILES: Final = 2
# Columns that codes of x leave out and that are multiplied as a tile; any more are multiplied one by one.
CAPACITY: Final = 256


class Codebook(ctypes.Structure):
    """The 16 values of a code, times what makes them fit a table, and one over that. Codes of 8 bits need none."""

    _fields_ = (("value", ctypes.c_float * 16), ("inverse", ctypes.c_float))


class Problem(ctypes.Structure):
    """One product: the struct of this name in the source."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("bias", "row_stats", "residual", "y", "parts", "tickets")),
        *((name, ctypes.c_void_p) for name in ("x_stats", "outlier_count", "outlier_columns", "x", "codes")),
        *((name, ctypes.c_longlong) for name in ("residual_stride", "y_stride", "x_stride", "code_stride")),
        *((name, ctypes.c_int) for name in ("M", "N", "K", "scale_shift", "whole", "splits", "tiles_each")),
        *((name, ctypes.c_int) for name in ("in_order", "bias_kind", "vectors", "early")),
    )


@dataclass(frozen=True, slots=True)
class LeftOut:
    """The columns of x that its codes leave out, and what scales the codes.

    Attributes:
        x: [M, K], bfloat16 or float16.
        x_stats: float32 [M], 127 times what a row's codes are multiplied by.
        codes: int8 [N, K], of W.
        count, columns: int32 [1] and [K]: which columns, the first `count`.
        outlier_x: [M, CAPACITY] as x, those columns of x; after them zeros to a multiple of 64.

    The last three are None where nothing is left out.
    """

    x: Tensor
    x_stats: Tensor
    codes: Tensor
    count: Tensor | None = None
    columns: Tensor | None = None
    outlier_x: Tensor | None = None

    def fields(self) -> dict[str, int | None]:
        """Those of `Problem`."""
        return {
            "x_stats": self.x_stats.data_ptr(),
            "outlier_count": None if self.count is None else self.count.data_ptr(),
            "outlier_columns": None if self.columns is None else self.columns.data_ptr(),
            "x": self.x.data_ptr(),
            "codes": self.codes.data_ptr(),
            "x_stride": self.x.stride(0) * self.x.element_size(),
            "code_stride": self.codes.stride(0),
        }


@functools.cache
def why_not_gemm(device: torch.device, dtype: torch.dtype) -> str | None:
    """None where the kernel runs, else the reason in a sentence."""
    if device.type != "cuda":
        return f"needs a CUDA device, the tensors are on {device}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"takes bfloat16 and float16, not {dtype}"
    if capability(device) != CAPABILITY:
        return "needs compute capability 9.0 exactly: warpgroup products are Hopper's alone"
    reason = nvrtc.why_not_nvrtc()
    if reason is not None:
        return reason
    try:
        kernel(Kind(32, 4, 1, dtype, gated=False, activation=None), device)
    except DeviceError as error:
        return str(error)
    return None


@dataclass(frozen=True, slots=True)
class Kind:
    """What the kernel is compiled for.

    Attributes:
        tokens: rows of x of a work.
        bits: of a code.
        groups: scales of a row in 64 columns, 2 for blocks of 32.
        blocks: programs of a processor at a time.
        x_bits: of x: 16, or 8 where it is codes as well.
        warpgroups: that multiply, 64 rows of W each: 2, or 3 where nothing is gated.
    """

    tokens: int
    bits: int
    groups: int
    dtype: torch.dtype
    gated: bool
    activation: str | None
    blocks: int = 1
    x_bits: int = 16
    warpgroups: int = 2

    @property
    def shape(self) -> Shape:
        """What decides how much shared memory it takes."""
        return Shape(
            self.tokens, self.bits, self.groups, self.gated, self.blocks, self.x_bits, self.warpgroups
        )  # fmt: skip


def source(kind: Kind) -> nvrtc.Source:
    """The source for a kind of product."""
    is_bfloat = kind.dtype == torch.bfloat16
    # Beside sums of int8 products, three warpgroups have registers for fewer tokens of the outliers' at a time.
    wide = kind.tokens if kind.x_bits == 16 else 32 if kind.warpgroups == 2 else 16
    macros: nvrtc.Macros = (
        ("BITS", kind.bits),
        ("X_BITS", kind.x_bits),
        ("CAPACITY", CAPACITY),
        ("TOKENS", kind.tokens),
        ("WIDE", wide),
        ("CONSUMERS", kind.warpgroups),
        ("STAGES", stages(kind.shape)),
        ("BLOCKS", kind.blocks),
        ("GROUPS", kind.groups),
        ("SCALE_SUMS", int(scales_sums(kind.shape))),
        ("GATED", int(kind.gated)),
        ("ACTIVATION", ACTIVATIONS[kind.activation]),
        ("BFLOAT", int(is_bfloat)),
        ("PRODUCT", product(wide, "bf16" if is_bfloat else "f16")),
        ("SUMS", ", ".join(f'"+f"(sum[{i}])' for i in range(wide // 2))),
        ("X_PRODUCT", product_of_codes(kind.tokens)),
        ("X_SUMS", ", ".join(f'"+r"(sum[{i}])' for i in range(kind.tokens // 2))),
    )
    return nvrtc.Source("gemm_codes", macros)


def product(tokens: int, kind: str) -> str:
    """One wgmma: sums in operands 0 to n - 1, then the left operand's four registers, the right one's place, keep."""
    n = tokens // 2
    sums = ", ".join(f"%{i}" for i in range(n))
    return (
        f'"{{ .reg .pred keep; setp.ne.b32 keep, %{n + 5}, 0; '
        f"wgmma.mma_async.sync.aligned.m64n{tokens}k16.f32.{kind}.{kind} {{{sums}}}, "
        f'{{%{n}, %{n + 1}, %{n + 2}, %{n + 3}}}, %{n + 4}, keep, 1, 1, 0; }}"'
    )


def product_of_codes(tokens: int) -> str:
    """One wgmma of int8: sums in operands 0 to n - 1, then the places of both sides, keep."""
    n = tokens // 2
    sums = ", ".join(f"%{i}" for i in range(n))
    return (
        f'"{{ .reg .pred keep; setp.ne.b32 keep, %{n + 2}, 0; '
        f'wgmma.mma_async.sync.aligned.m64n{tokens}k32.s32.s8.s8 {{{sums}}}, %{n}, %{n + 1}, keep; }}"'
    )


@functools.cache
def kernel(kind: Kind, device: torch.device) -> nvrtc.Function:
    """The compiled kernel on a device."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return nvrtc.load(source(kind), ARCHITECTURE, WARPGROUP * (kind.warpgroups + 1), shared_bytes(kind.shape), index)


@functools.cache
def codebook(quant_type: str, dtype: torch.dtype, of_sums: bool) -> Codebook:
    """What the kernel fills its table from, for scales that multiply sums or weights."""
    values: tuple[float, ...] = CODEBOOKS[quant_type]
    if of_sums:
        factor = TABLE_SCALE[quant_type, "bf16" if dtype == torch.bfloat16 else "fp16"]
        values = tuple(value * factor for value in values)
    else:
        factor = WHOLE_SCALE[quant_type]
        values = tuple(float(round(value * factor)) for value in values)
    return Codebook((ctypes.c_float * 16)(*values), 1.0 / factor)


@triton.jit
def expand_scales_kernel(
    out_ptr,  # float32 [row tiles, blocks, 16]
    absmax_ptr,  # uint8 of the same shape
    nested_absmax_ptr,
    nested_code_ptr,
    nested_offset_ptr,
    count,
    N,
    blocks,
    OFFSETS: tl.constexpr,  # 1 for an offset of each row tile, 0 for one of all
    BLOCK: tl.constexpr,
):
    """map[code] * factor + offset, product and sum each rounded, as everywhere."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = place < count
    lane = place % 16
    row_tile = place // 16 // blocks
    row = row_tile * 16 + lane % 2 * 8 + lane // 2
    mask_row = mask & (row < N)
    flat = row * blocks + place // 16 % blocks
    code = tl.load(absmax_ptr + place, mask=mask, other=0).to(tl.int32)
    scale = tl.load(nested_code_ptr + code) * tl.load(nested_absmax_ptr + flat // 256, mask=mask_row, other=0.0)
    scale += tl.load(nested_offset_ptr + row_tile * OFFSETS, mask=mask, other=0.0)
    tl.store(out_ptr + place, tl.where(mask_row, scale, 0.0), mask=mask)


def expand_scales(absmax: Tensor, nested: tuple[Tensor, Tensor, Tensor], N: int, blocks: int) -> Tensor:
    """float32 scales in tile order from nested ones, whose codes are in tile order."""
    scales = torch.empty(absmax.shape, dtype=torch.float32, device=absmax.device)
    block = 1024
    with on_device_of(absmax):
        expand_scales_kernel[(triton.cdiv(scales.numel(), block),)](
            scales, absmax, *nested, scales.numel(), N, blocks,
            OFFSETS=int(nested[2].dim() == 1), BLOCK=block, num_warps=4, **NO_CONTRACTION,
        )  # fmt: skip
    return scales


def gemm_4bit(
    y: Tensor,
    rows: Tensor,
    tiled: Tensor,
    absmax: Tensor,
    bias: Tensor | None,
    quant_type: str,
    blocksize: int,
    nested: tuple[Tensor, Tensor, Tensor] | None = None,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
    gated: bool = False,
    overlap: bool = False,
    config: Config | None = None,
) -> None:
    """Write the tail of rows @ W.T + bias into y.

    Args:
        y: [M, N], or [M, N / 2] if gated; contiguous, in the dtype of `rows`.
        rows: [M, K], bfloat16 or float16, M at least 1; elements of a row side by side, rows on 16-byte boundaries.
        tiled, absmax: `onegpu.formats.tiling`'s codes and scales of W [N, K], contiguous.
        nested: `nested_absmax`, `nested_code`, `nested_offset` where absmax is uint8; the last one for all, or one
            for each row tile.
        residual: as y.
        activation, gated: of `onegpu.kernels.tail`; gated needs N to be a multiple of 32.
        overlap: read W before the kernel in front has ended. The kernel begins before that anyway, and has what it
            will read of W fetched to L2, which is safe even where W is being written.
        config: instead of `configure`'s choice.

    Raises:
        DeviceError: the kernel does not compile or the driver refuses it.
    """
    N, K = 2 * y.shape[1] if gated else y.shape[1], rows.shape[1]
    groups = 2 if blocksize == 32 else 1
    config = config or configure(rows.shape[0], N, K, processors(rows.device), gated=gated)
    kind = Kind(
        config.tokens, 4, groups, rows.dtype, gated, activation, config.blocks, warpgroups=config.warpgroups
    )  # fmt: skip
    if nested is not None:
        absmax = expand_scales(absmax, nested, N, K // blocksize)
        # Weights are read before the kernel in front has ended, and that one writes the scales.
        overlap = False
    maps = map_tiles(tiled.data_ptr(), absmax.data_ptr(), -(-N // TILE_ROWS), K, blocksize, copied_rows(kind))
    values = codebook(quant_type, rows.dtype, scales_sums(kind.shape))
    multiply(y, rows, maps, values, bias, residual, kind, config.splits, overlap=overlap, blocksize=blocksize)


def gemm_8bit(
    y: Tensor,
    rows: Tensor,
    codes: Tensor,
    row_stats: Tensor,
    bias: Tensor | None,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
    gated: bool = False,
    overlap: bool = False,
    config: Config | None = None,
) -> None:
    """Write the tail of rows @ (codes * row_stats / 127).T + bias into y.

    Args:
        y, rows, residual, activation, gated, overlap, config: as in `gemm_4bit`; gated needs N to be even.
        codes: int8 [N, K], `why_not_8bit` of which is None.
        row_stats: float32 [N], contiguous.

    Raises:
        DeviceError: as `gemm_4bit`.
    """
    N, K = codes.shape
    config = config or configure(rows.shape[0], N, K, processors(rows.device), bits=8, gated=gated)
    kind = Kind(config.tokens, 8, 1, rows.dtype, gated, activation, config.blocks, warpgroups=config.warpgroups)
    maps = (map_codes(codes, copied_rows(kind)), map_nothing())
    multiply(y, rows, maps, Codebook(), bias, residual, kind, config.splits, overlap=overlap, row_stats=row_stats)


def why_not_8bit(codes: Tensor) -> str | None:
    """None where `gemm_8bit` takes the codes, else the reason in a sentence."""
    if codes.stride(1) != 1 or codes.stride(0) % 16 or codes.data_ptr() % 16:
        return "rows of codes do not lie on 16 bytes"
    return None


def multiply(
    y: Tensor,
    rows: Tensor,
    maps: tuple[Any, Any],
    values: Codebook,
    bias: Tensor | None,
    residual: Tensor | None,
    kind: Kind,
    splits: int,
    *,
    overlap: bool,
    blocksize: int = 64,
    row_stats: Tensor | None = None,
    left_out: LeftOut | None = None,
) -> None:
    """Launch the kernel of a kind, K of works that fill no whole round cut into `splits` parts or fewer."""
    M, K = rows.shape
    N = 2 * y.shape[1] if kind.gated else y.shape[1]
    device, width = rows.device, y.element_size()
    columns = kind.shape.columns
    steps = -(-K // columns)
    tiles_each = -(-steps // splits)
    splits = -(-steps // tiles_each)
    works, room = -(-N // kind.shape.rows) * -(-M // kind.tokens), kind.blocks * processors(device)
    whole = works if splits == 1 else works // room * room
    cut = works - whole
    in_order = cut * splits <= room and kind.tokens >= WAITED_TOKENS
    if in_order and splits == 2 and steps >= 8 * WAITED_TILES:
        tiles_each -= WAITED_TILES
    counters = tickets(cut, device) if cut else None
    size = cut * splits * kind.tokens * kind.shape.rows
    parts = torch.empty(size, dtype=torch.float32, device=device) if cut else None
    strides = [tensor.stride(0) * width for tensor in (y, residual) if tensor is not None]
    starts = [tensor.data_ptr() for tensor in (y, residual) if tensor is not None]
    problem = Problem(
        bias=None if bias is None else bias.data_ptr(),
        row_stats=None if row_stats is None else row_stats.data_ptr(),
        residual=None if residual is None else residual.data_ptr(),
        y=y.data_ptr(),
        parts=None if parts is None else parts.data_ptr(),
        tickets=None if counters is None else counters.data_ptr(),
        **({} if left_out is None else left_out.fields()),
        residual_stride=0 if residual is None else residual.stride(0) * width,
        y_stride=y.stride(0) * width,
        M=M,
        N=N,
        K=columns * steps,
        scale_shift=max(0, (blocksize // 64).bit_length() - 1),
        whole=whole,
        splits=splits,
        tiles_each=tiles_each,
        in_order=int(in_order),
        bias_kind=BIAS_KINDS[None if bias is None else bias.dtype],
        vectors=int(all(value % 16 == 0 for value in (*strides, *starts))),
        early=int(overlap),
    )
    left = map_rows(y, leaving(kind.shape)) if problem.vectors else map_nothing()
    outlier_x = None if left_out is None else left_out.outlier_x
    outliers = map_nothing() if outlier_x is None else map_rows(outlier_x, kind.tokens)
    every = (map_rows(rows, kind.tokens), *maps, outliers, left)
    arguments = (*(address_of(each) for each in every), ctypes.addressof(problem), ctypes.addressof(values))
    grid = min(whole + cut * splits, room)
    with on_device_of(rows):
        nvrtc.launch(kernel(kind, device), grid, arguments, device, overlap=True)


@functools.cache
def map_nothing() -> Any:
    """What a kernel is given that does not use its map."""
    return ctypes.create_string_buffer(128)


def address_of(argument: Any) -> int:
    """Where a parameter lies, to be copied by a launch."""
    return ctypes.addressof(argument) if isinstance(argument, ctypes.Array) else int(argument.getPtr())


def map_rows(rows: Tensor, tokens: int) -> Any:
    """Boxes of `tokens` rows by 128 bytes of x or y."""
    M, K = rows.shape
    size = rows.element_size()
    pitch = rows.stride(0) * size if M > 1 else K * size
    return nvrtc.tensor_map(KINDS[rows.dtype], rows.data_ptr(), (K, M), (pitch,), (128 // size, tokens), swizzle=128)


def copied_rows(kind: Kind) -> int:
    """Rows of W that are copied at a time: all of a work's, unless half of them lie apart."""
    return kind.shape.rows // 2 if kind.gated else kind.shape.rows


def map_codes(codes: Tensor, rows: int, columns: int = 64) -> Any:
    """Boxes of `rows` rows by `columns` columns of int8, 64 or 128."""
    N, K = codes.shape
    pitch = codes.stride(0) if N > 1 else -(-K // 16) * 16
    return nvrtc.tensor_map("UINT8", codes.data_ptr(), (K, N), (pitch,), (columns, rows), swizzle=columns)


def map_tiles(tiled: int, absmax: int, row_tiles: int, K: int, blocksize: int, rows: int) -> tuple[Any, Any]:
    """Boxes of `rows` rows by one tile's codes, four lines of 128 bytes a row tile, and by its scales."""
    columns, blocks, high = K // 64, K // blocksize, rows // TILE_ROWS
    codes = nvrtc.tensor_map(
        "UINT8", tiled, (128, 4 * columns, row_tiles), (128, 512 * columns), (128, 4, high), swizzle=128
    )
    groups = 2 if blocksize == 32 else 1
    sizes, strides = (16, blocks, row_tiles), (64, 64 * blocks)
    return codes, nvrtc.tensor_map("FLOAT32", absmax, sizes, strides, (16, groups, high), swizzle=0)
