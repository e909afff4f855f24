from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from formats.vectors import cases, sha256, tensors
from onegpu.errors import ArgumentError, CheckpointError
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
    dequantize_4bit,
    dequantize_absmax,
    quantize_4bit,
    quantize_absmax,
)
from onegpu.formats.quant_state import QuantState
from onegpu.formats.rowwise import quantize_rows

STORAGE = (torch.uint8, torch.int8, torch.float16, torch.bfloat16, torch.float32, torch.float64)
NAME = "model.layers.0.mlp.up_proj.weight"


def linear_4bit(nested: bool = False, quant_type: str = "nf4", shape: tuple[int, ...] = (24, 80)) -> dict[str, Tensor]:
    """A valid family of tensors of a 4-bit weight called `NAME`."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    packed, absmax = quantize_4bit(weight, quant_type, 64)
    scales = quantize_absmax(absmax) if nested else absmax
    return to_tensors_4bit(NAME, packed, scales, QuantState(quant_type, 64, "bfloat16", shape))


def with_state(family: dict[str, Tensor], **changes: Any) -> dict[str, Tensor]:
    """The family with fields of its JSON text changed; a field set to `...` is taken out."""
    key = next(key for key in family if "quant_state" in key)
    fields = json.loads(bytes(family[key].tolist()))
    fields.update(changes)
    fields = {name: value for name, value in fields.items() if value is not ...}
    return {**family, key: blob(json.dumps(fields))}


def blob(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


# --- against recorded state dicts ---


@pytest.mark.parametrize("case", [c for c in cases("state_dict") if "linear4bit" in c.id])
def test_4bit_state_dicts_round_trip_to_the_byte(case: dict[str, Any]) -> None:
    stored = {key: tensors()[value["tensor"]] for key, value in case["keys"].items() if key != "bias"}
    packed, absmax, state = from_tensors_4bit("weight", stored)
    written = to_tensors_4bit("weight", packed, absmax, state, stored["weight"].dtype)
    assert list(written) == list(stored)
    for key, tensor in written.items():
        assert (tensor.dtype, tensor.shape) == (stored[key].dtype, stored[key].shape)
        assert sha256(tensor) == case["keys"][key]["sha256"]


def test_8bit_state_dict_round_trips_to_the_byte() -> None:
    (case,) = (c.values[0] for c in cases("state_dict") if "8bit" in c.id)
    stored = {key: tensors()[value["tensor"]] for key, value in case["keys"].items() if key != "bias"}
    written = to_tensors_8bit("", *from_tensors_8bit("", stored))
    assert set(written) == set(stored)
    for key, tensor in written.items():
        assert (tensor.dtype, tensor.shape) == (stored[key].dtype, stored[key].shape)
        assert sha256(tensor) == case["keys"][key]["sha256"]


@pytest.mark.parametrize("case", cases("quant_storage"))
def test_storage_views_hold_the_same_bytes(case: dict[str, Any]) -> None:
    packed, _ = quantize_4bit(tensors()[case["input"]["tensor"]], case["quant_type"], case["blocksize"])
    stored = view_storage(packed, getattr(torch, case["packed"]["dtype"]))
    assert list(stored.shape) == case["packed"]["shape"]
    assert sha256(stored) == case["packed"]["sha256"]
    assert torch.equal(bytes_of(stored), packed)


# --- against bitsandbytes itself ---


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("scale_search", [False, True])
@pytest.mark.parametrize("shape", [(64, 128), (48, 80), (33, 97)])
def test_bitsandbytes_reads_what_we_write(nested: bool, scale_search: bool, shape: tuple[int, int]) -> None:
    """Negative scales of the search included: its layer gives the product with the very weights we dequantize."""
    bnb = pytest.importorskip("bitsandbytes")
    packed, absmax = quantize_4bit(torch.randn(shape) * 0.02, "nf4", 64, scale_search=scale_search)
    assert bool((absmax < 0).any()) == scale_search
    scales = quantize_absmax(absmax) if nested else absmax
    family = to_tensors_4bit("weight", packed, scales, QuantState("nf4", 64, "float32", shape))
    statistics = {key.removeprefix("weight."): value for key, value in family.items() if key != "weight"}
    parameter = bnb.nn.Params4bit.from_prequantized(family["weight"], statistics, device="cpu")
    layer = bnb.nn.Linear4bit(shape[1], shape[0], bias=False, compute_dtype=torch.float32)
    layer.weight = parameter

    used = dequantize_absmax(scales) if isinstance(scales, NestedAbsmax) else absmax
    ours = dequantize_4bit(packed, used, shape, torch.float32, "nf4", 64)
    x = torch.eye(shape[1])
    # On a CPU its fast path reads scales wrongly unless rows are whole blocks; its plain torch op never does.
    if shape[1] % 64 == 0:
        assert torch.equal(layer.train()(x).detach(), ours.t())
    read_codes, _, read_state = from_tensors_4bit(
        "weight", {key: value.clone() for key, value in layer.state_dict().items()}
    )
    assert torch.equal(read_codes, packed)
    assert read_state.shape == shape
    op = torch.ops.bitsandbytes.dequantize_4bit.default
    plain = op._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, packed, used, 64, "nf4", shape, torch.float32)
    assert torch.equal(plain, ours)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("storage", STORAGE, ids=str)
def test_we_read_what_bitsandbytes_writes(quant_type: str, double_quant: bool, storage: torch.dtype) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(
        128, 64, bias=False, quant_type=quant_type, compress_statistics=double_quant, quant_storage=storage
    ).to("cpu")
    stored = layer.state_dict()
    packed, absmax, state = from_tensors_4bit("weight", stored)
    assert state.shape == (64, 128)
    assert isinstance(absmax, NestedAbsmax) == double_quant
    written = to_tensors_4bit("weight", packed, absmax, state, storage)
    assert set(written) == set(stored)
    for key, tensor in written.items():
        assert sha256(tensor) == sha256(stored[key])


def test_we_read_int8_that_bitsandbytes_writes() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear8bitLt(128, 64, bias=False, has_fp16_weights=False)
    weight = layer.weight.data.clone()
    codes, row_stats = from_tensors_8bit("", layer.to("cpu").state_dict())
    expected = quantize_rows(weight)
    assert torch.equal(codes, expected.codes)
    assert torch.equal(row_stats, expected.row_stats)


# --- names ---


def test_a_residual_dtype_of_16_bit_is_widened() -> None:
    family = with_state(linear_4bit(nested=True), nested_dtype="bfloat16")
    assert from_tensors_4bit(NAME, family)[2].nested_dtype == "bfloat16"


def test_quantized_names_are_found() -> None:
    assert quantized_name(f"{NAME}.quant_state.bitsandbytes__nf4") == (NAME, "nf4")
    assert quantized_name("x.gate_up.quant_state.bitsandbytes__fp4") == ("x.gate_up", "fp4")
    for key in (
        NAME,
        f"{NAME}.absmax",
        f"{NAME}.quant_state.bitsandbytes__int8",
        f"{NAME}.quant_state.bitsandbytes__nf4x",
    ):
        assert quantized_name(key) is None


def test_companions_cover_all_names_longest_first() -> None:
    for family in (linear_4bit(), linear_4bit(nested=True, quant_type="fp4")):
        assert all(key == NAME or key.removeprefix(NAME) in COMPANIONS_4BIT for key in family)
    written = to_tensors_8bit("m", torch.zeros(2, 3, dtype=torch.int8), torch.zeros(2))
    assert {key.removeprefix("m") for key in written} == {*COMPANIONS_8BIT, ".weight"}
    for suffixes in (COMPANIONS_4BIT, COMPANIONS_8BIT):
        assert sorted(suffixes, key=len, reverse=True) == list(suffixes)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(24, 80), (1,), (7,), (3, 5, 7), (2, 1), (0, 64)])
def test_families_round_trip(nested: bool, shape: tuple[int, ...]) -> None:
    family = linear_4bit(nested, shape=shape)
    packed, absmax, state = from_tensors_4bit(NAME, family)
    assert state.shape == shape
    again = to_tensors_4bit(NAME, packed, absmax, state)
    assert {key: sha256(value) for key, value in again.items()} == {key: sha256(value) for key, value in family.items()}


def test_the_offset_written_is_that_of_the_scales() -> None:
    family = linear_4bit(nested=True)
    packed, absmax, state = from_tensors_4bit(NAME, family)
    assert isinstance(absmax, NestedAbsmax)
    moved = absmax._replace(offset=absmax.offset + 1)
    assert from_tensors_4bit(NAME, to_tensors_4bit(NAME, packed, moved, state))[2].nested_offset == float(moved.offset)


def test_older_files_are_read() -> None:
    """Scales in 16 bit are widened; a dynamic map that begins with -1 is used as stored."""
    family = linear_4bit()
    family[f"{NAME}.absmax"] = family[f"{NAME}.absmax"].bfloat16()
    absmax = from_tensors_4bit(NAME, family)[1]
    assert isinstance(absmax, Tensor)
    assert absmax.dtype == torch.float32
    family = linear_4bit(nested=True)
    family[f"{NAME}.nested_quant_map"][0] = -1.0
    nested = from_tensors_4bit(NAME, family)[1]
    assert isinstance(nested, NestedAbsmax)
    assert nested.code[0] == -1


def test_headers_alone_are_enough_to_check_lengths() -> None:
    """Tensors on the meta device pass but for their values."""
    family = linear_4bit(nested=True)
    state_key = f"{NAME}.quant_state.bitsandbytes__nf4"
    headers = {key: value if key == state_key else value.to("meta") for key, value in family.items()}
    assert from_tensors_4bit(NAME, headers)[2].shape == (24, 80)
    headers[f"{NAME}.absmax"] = torch.empty(29, dtype=torch.uint8, device="meta")
    with pytest.raises(CheckpointError, match=r"must be uint8 \[30\]; got uint8 \[29\]"):
        from_tensors_4bit(NAME, headers)


# --- refusals ---


HUGE = 10**30


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quant_type": "int8"}, "its quant_type must be 'nf4' or 'fp4', got \"int8\""),
        ({"quant_type": "fp4"}, "its key says nf4, its quant_state says fp4"),
        ({"blocksize": 63}, "its blocksize must be 32 or 64 or .*, got 63"),
        ({"blocksize": 64.0}, "its blocksize must be .*, got 64.0"),
        ({"blocksize": "64"}, 'its blocksize must be .*, got "64"'),
        ({"blocksize": ...}, "its blocksize must be .*, got nothing"),
        ({"blocksize": 32}, r"up_proj.weight.absmax' must be float32 \[60\]|must be uint8 \[60\]"),
        ({"dtype": "float64"}, "its dtype must be 'float16' or 'bfloat16' or 'float32', got \"float64\""),
        ({"shape": None}, "its shape must be a list of at most 8 sizes from 0 to 9223372036854775807, got null"),
        ({"shape": ...}, "its shape must be a list .*, got nothing"),
        ({"shape": [24, -80]}, r"its shape must be a list .*, got \[24, -80\]"),
        ({"shape": [24, 80.0]}, r"its shape must be a list .*, got \[24, 80.0\]"),
        ({"shape": [True, 80]}, "its shape must be a list"),
        ({"shape": [1] * 9}, "its shape must be a list"),
        ({"shape": [0, HUGE]}, "its shape must be a list"),
        ({"shape": [2**62, 2**62]}, "its shape takes 10633823966279326983230456482242756608 packed bytes, got 960"),
        ({"shape": [24, 81]}, "its shape takes 972 packed bytes, got 960"),
    ],
    ids=str,
)
@pytest.mark.parametrize("nested", [False, True])
def test_states_that_lie(nested: bool, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=words) as caught:
        from_tensors_4bit(NAME, with_state(linear_4bit(nested), **changes))
    assert NAME in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"nested_blocksize": 128}, "its nested_blocksize must be 256, got 128"),
        ({"nested_dtype": "float64"}, "its nested_dtype must be 'float16' or 'bfloat16' or 'float32'"),
        ({"nested_offset": math.nan}, "its nested_offset must be a finite float32, got NaN"),
        ({"nested_offset": 1e39}, r"its nested_offset must be a finite float32, got 1e\+39"),
        pytest.param({"nested_offset": 10**400}, "got 1000", id="an offset beyond float64"),
        ({"nested_offset": 10**50}, "its nested_offset must be a finite float32, got 1000"),
        ({"nested_offset": "0.1"}, 'its nested_offset must be a finite float32, got "0.1"'),
        ({"nested_offset": True}, "its nested_offset must be a finite float32, got true"),
        ({"nested_offset": ...}, "its nested_offset must be a finite float32, got nothing"),
        (
            {"nested_offset": ..., "nested_blocksize": ..., "nested_dtype": ...},
            "says the scales are not nested, but there is '.*nested_absmax'",
        ),
    ],
    ids=str,
)
def test_nested_states_that_lie(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=words) as caught:
        from_tensors_4bit(NAME, with_state(linear_4bit(nested=True), **changes))
    assert NAME in str(caught.value)


def replaced(suffix: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda family: {**family, NAME + suffix: change(family[NAME + suffix])}


def not_finite(tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    tensor[-1] = math.inf
    return tensor


@pytest.mark.parametrize(
    ("nested", "change", "words"),
    [
        (False, replaced("", lambda t: t[:-1]), "its shape takes 960 packed bytes, got 959"),
        (
            False,
            replaced("", lambda t: t.view(2, -1)),
            r"expected packed bytes of shape \[length, 1\], got uint8 \[2, 480\]",
        ),
        (False, replaced("", lambda t: t.to(torch.int32)), "expected packed bytes as one of uint8, int8, .*got int32"),
        (False, replaced("", lambda t: t[0, 0]), r"expected packed bytes of shape \[length, 1\], got uint8 \[\]"),
        (False, replaced(".absmax", lambda t: t[1:]), r"absmax' must be float32 \[30\]; got float32 \[29\]"),
        (False, replaced(".absmax", lambda t: t.double()), r"absmax' must be float32 \[30\], got float64 \[30\]"),
        (
            False,
            replaced(".absmax", lambda t: t.to(torch.uint8)),
            r"holds nested scales \(uint8\), but .* no nested_offset",
        ),
        (False, replaced(".absmax", lambda t: t.view(2, 15)), r"absmax' must be float32 \[30\]; got float32 \[2, 15\]"),
        (
            False,
            replaced(".absmax", lambda t: t.view(2, 15).bfloat16()),
            r"got bfloat16 \[2, 15\]: scales that bitsandbytes rounded and transposed[\s\S]*save the checkpoint again",
        ),
        (False, replaced(".absmax", not_finite), "absmax' holds NaN or infinity; expected finite values"),
        (False, replaced(".quant_map", lambda t: t * 0.5), "quant_map' is not the nf4 codebook"),
        (False, replaced(".quant_map", lambda t: t[:8]), r"quant_map' must be float32 \[16\]; got float32 \[8\]"),
        (True, replaced(".absmax", lambda t: t.float()), r"absmax' must be uint8 \[30\]; got float32 \[30\]"),
        (
            True,
            replaced(".nested_absmax", lambda t: t.repeat(2)),
            r"nested_absmax' must be float32 \[1\]; got float32 \[2\]",
        ),
        (True, replaced(".nested_absmax", not_finite), "nested_absmax' holds NaN or infinity"),
        (True, replaced(".nested_quant_map", lambda t: t[1:]), r"nested_quant_map' must be float32 \[256\]"),
        (True, replaced(".nested_quant_map", not_finite), "nested_quant_map' holds NaN or infinity"),
    ],
)
def test_tensors_that_lie(nested: bool, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], words: str) -> None:
    with pytest.raises(CheckpointError, match=words) as caught:
        from_tensors_4bit(NAME, change(linear_4bit(nested)))
    assert NAME in str(caught.value)


@pytest.mark.parametrize("suffix", ["", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map"])
def test_a_missing_tensor_is_named(suffix: str) -> None:
    family = linear_4bit(nested=True)
    del family[NAME + suffix]
    with pytest.raises(CheckpointError, match=rf"tensor '{NAME}{suffix}' is missing[\s\S]*another shard"):
        from_tensors_4bit(NAME, family)


def test_one_state_is_expected() -> None:
    family = linear_4bit()
    key = f"{NAME}.quant_state.bitsandbytes__nf4"
    both = {**family, f"{NAME}.quant_state.bitsandbytes__fp4": family[key]}
    with pytest.raises(CheckpointError, match=r"expected one of '.*__nf4' and '.*__fp4', got both"):
        from_tensors_4bit(NAME, both)
    del family[key]
    with pytest.raises(CheckpointError, match=r"expected one of '.*__nf4' and '.*__fp4', got neither"):
        from_tensors_4bit(NAME, family)


def test_another_codebook_is_refused_but_the_sign_of_zero_is_not() -> None:
    family = linear_4bit(quant_type="fp4")
    family[f"{NAME}.quant_map"][8] = -0.0
    from_tensors_4bit(NAME, family)
    family[f"{NAME}.quant_map"][1] = 0.0052
    with pytest.raises(
        CheckpointError, match=r"is not the fp4 codebook[\s\S]*dequantize with the program that wrote it"
    ):
        from_tensors_4bit(NAME, family)


@pytest.mark.parametrize(("number", "layout"), [(1, "col32"), (2, "col_turing"), (3, "col_ampere"), (9, "unknown")])
def test_tiled_int8_is_refused(number: int, layout: str) -> None:
    family = to_tensors_8bit("m", torch.zeros(2, 3, dtype=torch.int8), torch.zeros(2))
    family["m.weight_format"] = torch.tensor(number, dtype=torch.uint8)
    words = rf"'m.weight_format' must be 0 .*; got {number} \({layout} layout\)[\s\S]*bitsandbytes 0.45"
    with pytest.raises(CheckpointError, match=words):
        from_tensors_8bit("m", family)


def test_int8_that_lies() -> None:
    family = to_tensors_8bit("m", torch.zeros(2, 3, dtype=torch.int8), torch.zeros(2))
    del family["m.weight_format"]
    from_tensors_8bit("m", family)
    for key, bad, words in (
        ("m.weight", torch.zeros(2, 3), r"'m.weight': expected int8 \[out, in\], got float32 \[2, 3\]"),
        ("m.weight", torch.zeros(6, dtype=torch.int8), r"expected int8 \[out, in\], got int8 \[6\]"),
        ("m.SCB", torch.zeros(3), r"'m.SCB' must be float32 \[2\]; got float32 \[3\]"),
        ("m.SCB", torch.zeros(2).half(), r"'m.SCB' must be float32 \[2\]; got float16 \[2\]"),
        ("m.SCB", torch.tensor([1.0, math.inf]), "'m.SCB' holds NaN or infinity"),
        ("m.weight_format", torch.zeros(2, dtype=torch.uint8), r"expected one uint8, got uint8 \[2\]"),
    ):
        with pytest.raises(CheckpointError, match=words):
            from_tensors_8bit("m", {**family, key: bad})
    for key in ("m.weight", "m.SCB"):
        with pytest.raises(CheckpointError, match=f"tensor '{key}' is missing"):
            from_tensors_8bit("m", {name: value for name, value in family.items() if name != key})


def test_writing_what_does_not_fit() -> None:
    packed, absmax = quantize_4bit(torch.randn(6, 3), "nf4", 64)
    state = QuantState("nf4", 64, "float32", (6, 3))
    with pytest.raises(ArgumentError, match=r"9 packed bytes do not divide into torch.float16, 2 bytes each"):
        to_tensors_4bit("w", packed, absmax, state, torch.float16)
    with pytest.raises(
        ArgumentError, match=r"'w': shape \[7, 3\] in blocks of 64 takes 11 bytes and 1 scales; got 9 and 1"
    ):
        to_tensors_4bit("w", packed, absmax, QuantState("nf4", 64, "float32", (7, 3)))
    with pytest.raises(ArgumentError, match=r"'w': scales must be torch.float32; got torch.bfloat16"):
        to_tensors_4bit("w", packed, absmax.bfloat16(), state)
    with pytest.raises(ArgumentError, match=r"quant_storage must be one of uint8, int8, .*; got torch.int32"):
        view_storage(packed, torch.int32)
    with pytest.raises(ArgumentError, match=r"packed must be uint8; got torch.int8"):
        view_storage(packed.view(torch.int8), torch.uint8)
    with pytest.raises(ArgumentError, match=r"codes must be int8 \[out, in\]; got uint8 \[9\]"):
        to_tensors_8bit("m", packed, absmax)
    with pytest.raises(ArgumentError, match=r"row_stats must be float32 \[2\]; got float32 \[1\]"):
        to_tensors_8bit("m", torch.zeros(2, 3, dtype=torch.int8), absmax)


def test_a_slice_of_odd_offset_can_be_viewed() -> None:
    packed = torch.arange(9, dtype=torch.uint8)[1:]
    assert bytes_of(view_storage(packed, torch.float32)).tolist() == packed.tolist()
