from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from onegpu.errors import CheckpointError
from onegpu.formats.quant_state import QuantState, decode_quant_state, encode_quant_state


def blob(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def test_the_json_is_spelled_as_bitsandbytes_does() -> None:
    state = QuantState("nf4", 64, "bfloat16", (64, 128))
    assert bytes(encode_quant_state(state).tolist()).decode() == (
        '{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [64, 128]}'
    )
    nested = QuantState("fp4", 128, "float16", (3,), nested_offset=0.05335426330566406)
    assert bytes(encode_quant_state(nested).tolist()).decode() == (
        '{"quant_type": "fp4", "blocksize": 128, "dtype": "float16", "shape": [3], "nested_blocksize": 256, '
        '"nested_dtype": "float32", "nested_offset": 0.05335426330566406}'
    )


@settings(deadline=None)
@given(
    shape=st.lists(st.integers(0, 2**40), max_size=8),
    blocksize=st.sampled_from([32, 64, 4096]),
    offset=st.none() | st.floats(width=32, allow_nan=False, allow_infinity=False),
)
def test_states_round_trip(shape: list[int], blocksize: int, offset: float | None) -> None:
    state = QuantState("fp4", blocksize, "float32", tuple(shape), offset)
    assert decode_quant_state(encode_quant_state(state), "w") == state
    assert state.num_elements == math.prod(shape)


def test_unknown_keys_and_any_whitespace_are_read() -> None:
    text = '{ "future":[1],\n"shape":[2,3],"dtype":"float16", "blocksize":64,"quant_type":"nf4"}'
    assert decode_quant_state(blob(text), "w") == QuantState("nf4", 64, "float16", (2, 3))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not JSON text: Expecting value"),
        ("{", "not JSON text"),
        ("[1]", "must be a JSON object, got list"),
        ("nul", "not JSON text"),
        ("[" * 50000, "not JSON text"),
        ("\x00", "not JSON text"),
        ('{"quant_type": ' + "1" * 5000 + "}", "its quant_(state is not JSON text|type must be 'nf4' or 'fp4', got 1)"),
        (" " * 65537, "its quant_state must have at most 65536 bytes, got 65537"),
        ("{}", "its quant_type must be 'nf4' or 'fp4', got nothing"),
    ],
    ids=["empty", "cut", "list", "word", "deep", "zero", "long number", "long", "bare"],
)
def test_text_that_is_no_state(text: str, words: str) -> None:
    with pytest.raises(CheckpointError, match=f"quantized tensor 'w'.*{words}"):
        decode_quant_state(blob(text), "w")


def test_bytes_that_are_no_text() -> None:
    with pytest.raises(CheckpointError, match="not JSON text: 'utf-8' codec"):
        decode_quant_state(torch.tensor([0xFF, 0xFE], dtype=torch.uint8), "w")
    with pytest.raises(CheckpointError, match=r"its quant_state must be uint8 \[L\], got float32 \[2\]"):
        decode_quant_state(torch.zeros(2), "w")


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=200))
def test_no_bytes_do_worse_than_a_refusal(data: bytes) -> None:
    with pytest.raises(CheckpointError):
        decode_quant_state(torch.tensor(list(data), dtype=torch.uint8), "w")
