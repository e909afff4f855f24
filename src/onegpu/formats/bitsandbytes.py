"""bitsandbytes' names on disk, and every check that its tensors fit together.

A 4-bit parameter `P` is a small family of tensors:

    P                                   packed codes, in any storage dtype, shape [bytes / itemsize, 1]
    P.absmax                            float32 [num_blocks], or uint8 if the scales are nested
    P.quant_map                         float32 [16], a copy of the codebook
    P.nested_absmax                     float32 [ceil(num_blocks / 256)]      nested only
    P.nested_quant_map                  float32 [256]                         nested only
    P.quant_state.bitsandbytes__nf4     uint8, JSON text: types, blocksize, shape, offset of the nested scales

An int8 module `M` has `M.weight` int8 [out, in], `M.SCB` float32 [out] (the row stats) and `M.weight_format`, uint8 0.
Reading believes nothing: what the JSON says is held against the lengths of the tensors before any memory is taken
by it. Writing gives the very bytes that bitsandbytes writes, JSON spelling included, because its own reader refuses
keys it does not know.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import NoReturn

import torch
from torch import Tensor

from onegpu.config import QUANT_STORAGE_DTYPES
from onegpu.errors import ArgumentError, CheckpointError
from onegpu.formats.blockwise import NestedAbsmax, num_blocks
from onegpu.formats.codebooks import QUANT_TYPES_4BIT, codebook
from onegpu.formats.packing import packed_bytes
from onegpu.formats.quant_state import QuantState, decode_quant_state, encode_quant_state

__all__ = [
    "COMPANIONS_4BIT",
    "COMPANIONS_8BIT",
    "bytes_of",
    "from_tensors_4bit",
    "from_tensors_8bit",
    "quantized_name",
    "to_tensors_4bit",
    "to_tensors_8bit",
    "view_storage",
]

# Suffixes of a 4-bit parameter's name, and names beside an int8 module's weight; longest first.
COMPANIONS_4BIT = (
    ".quant_state.bitsandbytes__nf4",
    ".quant_state.bitsandbytes__fp4",
    ".nested_quant_map",
    ".nested_absmax",
    ".quant_map",
    ".absmax",
)
COMPANIONS_8BIT = (".weight_format", ".SCB")

_STATE_KEY = re.compile(r"^(.*)\.quant_state\.bitsandbytes__(nf4|fp4)$")
_STORAGE_DTYPES = {name: getattr(torch, name) for name in QUANT_STORAGE_DTYPES}
_TILED_FORMATS = {1: "col32", 2: "col_turing", 3: "col_ampere"}


def quantized_name(key: str) -> tuple[str, str] | None:
    """The parameter name and quant type of a `….quant_state.bitsandbytes__nf4` key, None for any other key."""
    match = _STATE_KEY.match(key)
    return (match[1], match[2]) if match else None


def to_tensors_4bit(
    name: str,
    packed: Tensor,
    absmax: Tensor | NestedAbsmax,
    state: QuantState,
    storage_dtype: torch.dtype = torch.uint8,
) -> dict[str, Tensor]:
    """The tensors of the 4-bit parameter called `name`, under their names on disk, in bitsandbytes' order.

    With nested scales the offset written is the one that `absmax` holds, whatever `state` says.

    Args:
        packed: uint8 [ceil(n / 2)].
        absmax: float32 [num_blocks], or nested.

    Raises:
        ArgumentError: lengths that do not fit the state, or bytes that do not divide into the storage dtype.
    """
    m = num_blocks(state.num_elements, state.blocksize)
    nested = absmax if isinstance(absmax, NestedAbsmax) else None
    scales = absmax.codes if isinstance(absmax, NestedAbsmax) else absmax
    if packed.numel() != packed_bytes(state.num_elements) or scales.numel() != m:
        raise ArgumentError(
            f"{name!r}: shape {list(state.shape)} in blocks of {state.blocksize} takes "
            f"{packed_bytes(state.num_elements)} bytes and {m} scales; got {packed.numel()} and {scales.numel()}"
        )
    expected = torch.float32 if nested is None else torch.uint8
    if scales.dtype != expected:
        raise ArgumentError(f"{name!r}: scales must be {expected}; got {scales.dtype}")
    offset = None if nested is None else float(nested.offset)
    tensors = {
        name: view_storage(packed, storage_dtype),
        f"{name}.absmax": scales,
        f"{name}.quant_map": codebook(state.quant_type, packed.device),
    }
    if nested is not None:
        tensors[f"{name}.nested_absmax"] = nested.absmax
        tensors[f"{name}.nested_quant_map"] = nested.code
    key = f"{name}.quant_state.bitsandbytes__{state.quant_type}"
    tensors[key] = encode_quant_state(replace(state, nested_offset=offset, nested_dtype="float32"))
    return tensors


def from_tensors_4bit(name: str, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | NestedAbsmax, QuantState]:
    """Take the 4-bit parameter called `name` out of tensors under their names on disk.

    Returns:
        packed: uint8 [ceil(n / 2)], a view of the stored tensor where it can be.
        absmax: float32 [num_blocks], or `NestedAbsmax` with the stored map.
        state: what the JSON text says.

    Raises:
        CheckpointError: a tensor that is missing, too many, of another dtype or length than the state says, or not
            finite; a codebook that is not ours.
    """
    state = _read_state(name, tensors)
    n = state.num_elements
    m = num_blocks(n, state.blocksize)
    packed = _read_packed(name, _take(name, "", tensors), packed_bytes(n))
    _check_codebook(name, _take(name, ".quant_map", tensors), state.quant_type)
    absmax = _take(name, ".absmax", tensors)
    extra = [suffix for suffix in (".nested_absmax", ".nested_quant_map") if name + suffix in tensors]
    if not state.is_nested:
        if extra:
            _refuse(name, f"its quant_state says the scales are not nested, but there is {name + extra[0]!r}")
        return packed, _read_absmax(name, absmax, m), state
    nested_absmax = _take(name, ".nested_absmax", tensors)
    code = _take(name, ".nested_quant_map", tensors)
    _check_tensor(f"{name}.absmax", absmax, torch.uint8, m)
    _check_tensor(f"{name}.nested_absmax", nested_absmax, torch.float32, num_blocks(m, state.nested_blocksize))
    _check_tensor(f"{name}.nested_quant_map", code, torch.float32, 256)
    _check_all_finite(f"{name}.nested_absmax", nested_absmax)
    _check_all_finite(f"{name}.nested_quant_map", code)
    offset = torch.tensor(state.nested_offset, dtype=torch.float32, device=absmax.device)
    return packed, NestedAbsmax(absmax, nested_absmax, code, offset), state


def to_tensors_8bit(module_name: str, codes: Tensor, row_stats: Tensor) -> dict[str, Tensor]:
    """The tensors of an int8 module's weight under their names on disk; the bias is the caller's.

    Args:
        codes: int8 [out, in].
        row_stats: float32 [out].

    Raises:
        ArgumentError: a shape or dtype that does not fit.
    """
    if codes.dtype != torch.int8 or codes.dim() != 2:
        raise ArgumentError(f"codes must be int8 [out, in]; got {_describe(codes)}")
    if row_stats.dtype != torch.float32 or row_stats.shape != codes.shape[:1]:
        raise ArgumentError(f"row_stats must be float32 [{codes.shape[0]}]; got {_describe(row_stats)}")
    prefix = f"{module_name}." if module_name else ""
    return {
        f"{prefix}weight": codes,
        f"{prefix}SCB": row_stats,
        f"{prefix}weight_format": torch.zeros((), dtype=torch.uint8),
    }


def from_tensors_8bit(module_name: str, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Take an int8 module's weight out of tensors under their names on disk: codes [out, in], row_stats [out].

    Raises:
        CheckpointError: a tensor that is missing, of another dtype or shape, not finite, or in a tiled layout.
    """
    prefix = f"{module_name}." if module_name else ""
    codes = _take(f"{prefix}weight", "", tensors)
    if codes.dtype != torch.int8 or codes.dim() != 2:
        _refuse(f"{prefix}weight", f"expected int8 [out, in], got {_describe(codes)}")
    row_stats = _take(f"{prefix}SCB", "", tensors)
    _check_weight_format(f"{prefix}weight_format", tensors)
    _check_tensor(f"{prefix}SCB", row_stats, torch.float32, codes.shape[0])
    _check_all_finite(f"{prefix}SCB", row_stats)
    return codes, row_stats


def view_storage(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """The same bytes as `dtype`, [bytes / itemsize, 1]. The values mean nothing: never cast them.

    Raises:
        ArgumentError: not uint8, another storage dtype than bitsandbytes has, or bytes that do not divide.
    """
    if packed.dtype != torch.uint8:
        raise ArgumentError(f"packed must be uint8; got {packed.dtype}")
    if dtype not in _STORAGE_DTYPES.values():
        raise ArgumentError(f"quant_storage must be one of {', '.join(_STORAGE_DTYPES)}; got {dtype}")
    flat = packed.reshape(-1)
    if flat.numel() % dtype.itemsize:
        raise ArgumentError(
            f"{flat.numel()} packed bytes do not divide into {dtype}, {dtype.itemsize} bytes each",
            "use quant_storage uint8 for this tensor",
        )
    if flat.storage_offset() % dtype.itemsize:
        flat = flat.clone()
    return flat.view(dtype).view(-1, 1)


def bytes_of(storage: Tensor) -> Tensor:
    """The packed bytes of a storage tensor of any dtype: uint8, flat."""
    return storage.reshape(-1).view(torch.uint8)


def _read_state(name: str, tensors: Mapping[str, Tensor]) -> QuantState:
    keys = {quant_type: f"{name}.quant_state.bitsandbytes__{quant_type}" for quant_type in QUANT_TYPES_4BIT}
    found = [quant_type for quant_type, key in keys.items() if key in tensors]
    if len(found) != 1:
        got = "both" if found else "neither"
        _refuse(name, f"expected one of {keys['nf4']!r} and {keys['fp4']!r}, got {got}")
    state = decode_quant_state(tensors[keys[found[0]]], name)
    if state.quant_type != found[0]:
        _refuse(name, f"its key says {found[0]}, its quant_state says {state.quant_type}")
    return state


def _take(name: str, suffix: str, tensors: Mapping[str, Tensor]) -> Tensor:
    key = name + suffix
    if key not in tensors:
        raise CheckpointError(
            f"tensor {key!r} is missing",
            "it may be in another shard of the checkpoint: is every file of the index there?",
        )
    return tensors[key]


def _read_packed(name: str, storage: Tensor, expected: int) -> Tensor:
    if storage.dtype not in _STORAGE_DTYPES.values():
        _refuse(name, f"expected packed bytes as one of {', '.join(_STORAGE_DTYPES)}, got {_describe(storage)}")
    if storage.dim() == 0 or sum(size != 1 for size in storage.shape) > 1:
        _refuse(name, f"expected packed bytes of shape [length, 1], got {_describe(storage)}")
    if storage.numel() * storage.element_size() != expected:
        got = storage.numel() * storage.element_size()
        _refuse(name, f"its shape takes {expected} packed bytes, got {got} ({_describe(storage)})")
    return bytes_of(storage)


def _read_absmax(name: str, absmax: Tensor, expected: int) -> Tensor:
    key = f"{name}.absmax"
    if absmax.dtype == torch.uint8:
        _refuse(name, f"{key!r} holds nested scales (uint8), but its quant_state has no nested_offset")
    if absmax.dim() == 2 and absmax.numel() == expected and absmax.dtype != torch.float32:
        raise CheckpointError(
            f"tensor {key!r} must be float32 [{expected}]; got {_describe(absmax)}: scales that bitsandbytes "
            "rounded and transposed on a CPU before saving",
            "save the checkpoint again from the original weights",
        )
    if absmax.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        _refuse(name, f"{key!r} must be float32 [{expected}], got {_describe(absmax)}")
    _check_tensor(key, absmax, absmax.dtype, expected)
    _check_all_finite(key, absmax)
    return absmax.float()


def _check_codebook(name: str, quant_map: Tensor, quant_type: str) -> None:
    key = f"{name}.quant_map"
    _check_tensor(key, quant_map, torch.float32, 16)
    # By value, not bit: the two zeros of FP4 may differ in sign.
    if not quant_map.is_meta and not torch.equal(quant_map, codebook(quant_type, quant_map.device)):
        raise CheckpointError(
            f"tensor {key!r} is not the {quant_type} codebook",
            "another table was used to quantize; dequantize with the program that wrote it",
        )


def _check_weight_format(key: str, tensors: Mapping[str, Tensor]) -> None:
    if key not in tensors:
        return
    value = tensors[key]
    if value.dtype != torch.uint8 or value.numel() != 1:
        _refuse(key, f"expected one uint8, got {_describe(value)}")
    number = 0 if value.is_meta else int(value.reshape(()))
    if number != 0:
        layout = _TILED_FORMATS.get(number, "unknown")
        raise CheckpointError(
            f"tensor {key!r} must be 0 (row-major weight); got {number} ({layout} layout)",
            "load and save it with bitsandbytes 0.45, which reads the tiled layouts and writes rows",
        )


def _check_tensor(key: str, tensor: Tensor, dtype: torch.dtype, length: int) -> None:
    if tensor.dtype != dtype or tensor.dim() != 1 or tensor.numel() != length:
        expected = f"{str(dtype).removeprefix('torch.')} [{length}]"
        raise CheckpointError(f"tensor {key!r} must be {expected}; got {_describe(tensor)}")


def _check_all_finite(key: str, tensor: Tensor) -> None:
    # On the meta device there are headers only: the values are checked when they are read.
    if not tensor.is_meta and not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(f"tensor {key!r} holds NaN or infinity; expected finite values")


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _refuse(name: str, what: str) -> NoReturn:
    raise CheckpointError(f"quantized tensor {name!r}: {what}")
