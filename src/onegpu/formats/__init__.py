"""The stored forms of quantized weights: NF4, FP4, nested scales, int8 rows, and their names on disk.

    codebooks       value tables and decision thresholds
    packing         two codes to a byte
    blockwise       NF4 and FP4 weights, nested scales
    scale_search    better scales for the same format
    rowwise         LLM.int8() rows
    quant_state     the JSON text beside a 4-bit tensor
    bitsandbytes    tensors as bitsandbytes names, reads and writes them

Plain torch on any device: these are the definitions that the kernels are held to.
"""

from __future__ import annotations

from onegpu.formats.bitsandbytes import (
    COMPANIONS_4BIT,
    COMPANIONS_8BIT,
    bytes_of,
    from_tensors_4bit,
    from_tensors_8bit,
    quantized_name,
    to_tensors_4bit,
    to_tensors_8bit,
    view_storage,
)
from onegpu.formats.blockwise import (
    NestedAbsmax,
    check_finite,
    dequantize_4bit,
    dequantize_absmax,
    num_blocks,
    quantize_4bit,
    quantize_absmax,
)
from onegpu.formats.codebooks import boundaries, codebook, dynamic_map
from onegpu.formats.packing import pack, packed_bytes, unpack
from onegpu.formats.quant_state import QuantState, decode_quant_state, encode_quant_state
from onegpu.formats.rowwise import RowQuantized, dequantize_rows, quantize_rows
from onegpu.formats.scale_search import search_scale

__all__ = [
    "COMPANIONS_4BIT",
    "COMPANIONS_8BIT",
    "NestedAbsmax",
    "QuantState",
    "RowQuantized",
    "boundaries",
    "bytes_of",
    "check_finite",
    "codebook",
    "decode_quant_state",
    "dequantize_4bit",
    "dequantize_absmax",
    "dequantize_rows",
    "dynamic_map",
    "encode_quant_state",
    "from_tensors_4bit",
    "from_tensors_8bit",
    "num_blocks",
    "pack",
    "packed_bytes",
    "quantize_4bit",
    "quantize_absmax",
    "quantize_rows",
    "quantized_name",
    "search_scale",
    "to_tensors_4bit",
    "to_tensors_8bit",
    "unpack",
    "view_storage",
]
