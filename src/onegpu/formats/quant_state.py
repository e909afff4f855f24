"""The JSON text that bitsandbytes writes beside a 4-bit tensor: what was quantized, and how.

It arrives from a file, so nothing in it is believed before its type and range are checked, and its length is bounded
before it is parsed.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from onegpu.config import BLOCKSIZES, NESTED_BLOCKSIZE
from onegpu.errors import CheckpointError
from onegpu.formats.codebooks import QUANT_TYPES_4BIT

__all__ = ["QuantState", "decode_quant_state", "encode_quant_state"]

_WEIGHT_DTYPES = ("float16", "bfloat16", "float32")
_MAX_JSON_BYTES = 64 * 1024
_MAX_RANK = 8
_MAX_ELEMENTS = 2**63 - 1


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


def _parse_json(blob: Tensor, name: str) -> dict[str, Any]:
    if blob.dtype != torch.uint8 or blob.dim() != 1:
        dtype = str(blob.dtype).removeprefix("torch.")
        _refuse(name, f"its quant_state must be uint8 [L], got {dtype} {list(blob.shape)}")
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


def _refuse(name: str, what: str) -> NoReturn:
    raise CheckpointError(f"quantized tensor {name!r}: {what}")
