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

import json
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from torch import Tensor

from onegpu.config import BLOCKSIZES, NESTED_BLOCKSIZE, QUANT_STORAGE_DTYPES
from onegpu.errors import ArgumentError, CheckpointError
from onegpu.formats.blockwise import NestedAbsmax, num_blocks
from onegpu.formats.codebooks import QUANT_TYPES_4BIT, codebook
from onegpu.formats.packing import packed_bytes

__all__ = [
    "COMPANIONS_4BIT",
    "COMPANIONS_8BIT",
    "QuantState",
    "bytes_of",
    "decode_quant_state",
    "encode_quant_state",
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
_WEIGHT_DTYPES = ("float16", "bfloat16", "float32")
_STORAGE_DTYPES = {name: getattr(torch, name) for name in QUANT_STORAGE_DTYPES}
_MAX_JSON_BYTES = 64 * 1024
_MAX_RANK = 8
_MAX_ELEMENTS = 2**63 - 1
_TILED_FORMATS = {1: "col32", 2: "col_turing", 3: "col_ampere"}


@dataclass(frozen=True, slots=True)
class QuantState:
    """What bitsandbytes writes beside a 4-bit tensor.

    `dtype` is the name of the weight's dtype before quantization, `shape` its shape. `nested_offset` is the float32
    mean of the scales if those are nested, None otherwise.
    """

    quant_type: str
    blocksize: int
    dtype: str
    shape: tuple[int, ...]
    nested_offset: float | None = None
    nested_blocksize: int = NESTED_BLOCKSIZE
    nested_dtype: str = "float32"

    @property
    def num_elements(self) -> int:
        """Weights: the product of `shape`."""
        return math.prod(self.shape)

    @property
    def is_nested(self) -> bool:
        """Whether the scales are stored in 8 bit."""
        return self.nested_offset is not None


def quantized_name(key: str) -> tuple[str, str] | None:
    """The parameter name and quant type of a `….quant_state.bitsandbytes__nf4` key, None for any other key."""
    match = _STATE_KEY.match(key)
    return (match[1], match[2]) if match else None


def encode_quant_state(state: QuantState) -> Tensor:
    """The state as bitsandbytes spells it: JSON text, one byte to a uint8 element, uint8 [L]."""
    fields: dict[str, Any] = {
        "quant_type": state.quant_type,
        "blocksize": state.blocksize,
        "dtype": state.dtype,
        "shape": list(state.shape),
    }
    if state.is_nested:
        fields["nested_blocksize"] = state.nested_blocksize
        fields["nested_dtype"] = state.nested_dtype
        fields["nested_offset"] = state.nested_offset
    text = json.dumps(fields, allow_nan=False)
    return torch.tensor(list(text.encode("utf-8")), dtype=torch.uint8)


def decode_quant_state(blob: Tensor, name: str) -> QuantState:
    """Read the JSON text beside the 4-bit tensor `name`. Unknown keys are passed over.

    Raises:
        CheckpointError: not bounded UTF-8 JSON of an object, or a field that is missing or out of its range.
    """
    fields = _parse_json(blob, name)
    quant_type = _one_of(fields, "quant_type", QUANT_TYPES_4BIT, name)
    blocksize = _one_of(fields, "blocksize", BLOCKSIZES, name)
    dtype = _one_of(fields, "dtype", _WEIGHT_DTYPES, name)
    shape = _shape(fields, name)
    if not any(key.startswith("nested_") for key in fields):
        return QuantState(quant_type, blocksize, dtype, shape)
    # Written by 256 everywhere; another size would need kernels of its own.
    nested_blocksize = _one_of(fields, "nested_blocksize", (NESTED_BLOCKSIZE,), name)
    nested_dtype = _one_of(fields, "nested_dtype", _WEIGHT_DTYPES, name)
    return QuantState(quant_type, blocksize, dtype, shape, _offset(fields, name), nested_blocksize, nested_dtype)


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


def _parse_json(blob: Tensor, name: str) -> dict[str, Any]:
    if blob.dtype != torch.uint8 or blob.dim() != 1:
        _refuse(name, f"its quant_state must be uint8 [L], got {_describe(blob)}")
    if blob.numel() > _MAX_JSON_BYTES:
        _refuse(name, f"its quant_state must have at most {_MAX_JSON_BYTES} bytes, got {blob.numel()}")
    try:
        fields = json.loads(bytes(blob.tolist()).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"quantized tensor {name!r}: its quant_state is not JSON text: {error}") from error
    if not isinstance(fields, dict):
        _refuse(name, f"its quant_state must be a JSON object, got {type(fields).__name__}")
    return fields


def _one_of(fields: dict[str, Any], key: str, known: tuple[Any, ...], name: str) -> Any:
    value = fields.get(key)
    # `True == 1` and `64.0 == 64`, so the type is asked too.
    if type(value) is not type(known[0]) or value not in known:
        _refuse(name, f"its {key} must be {' or '.join(map(repr, known))}, got {_shown(fields, key)}")
    return value


def _shape(fields: dict[str, Any], name: str) -> tuple[int, ...]:
    value = fields.get("shape")
    sizes = value if isinstance(value, list) else [None]
    if len(sizes) > _MAX_RANK or not all(type(size) is int and 0 <= size <= _MAX_ELEMENTS for size in sizes):
        rule = f"a list of at most {_MAX_RANK} sizes from 0 to {_MAX_ELEMENTS}"
        _refuse(name, f"its shape must be {rule}, got {_shown(fields, 'shape')}")
    return tuple(sizes)


def _shown(fields: dict[str, Any], key: str) -> str:
    """A field for an error message, however odd or long."""
    if key not in fields:
        return "nothing"
    return json.dumps(fields[key])[:80]


def _offset(fields: dict[str, Any], name: str) -> float:
    value = fields.get("nested_offset")
    single = _as_float32(value)
    if not math.isfinite(single):
        _refuse(name, f"its nested_offset must be a finite float32, got {_shown(fields, 'nested_offset')}")
    return single


def _as_float32(value: object) -> float:
    """A JSON number rounded to float32; NaN for anything else, infinity beyond its range."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return math.nan
    try:
        return float(struct.unpack("<f", struct.pack("<f", float(value)))[0])
    except OverflowError:
        return math.inf


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
