from __future__ import annotations

import json

from onegpu.bench.kernel_tables import document, tables
from onegpu.bench.kernels import Ceilings, Row

CEILINGS = Ceilings(read_bandwidth=1e12, flops=1e14)
ROWS = [
    Row("qkv", 48, 1024, 1, "bf16 cuBLAS", 10.0, 100.0, 1.0, 50.0, 1.0),
    Row("qkv", 48, 1024, 1, "peer", 12.0, 100.0, 1.0, 50.0, 0.8, "not captured: reason"),
    Row("qkv", 48, 1024, 0, "absent", None, note="ImportError: no"),
]


def test_document_and_tables() -> None:
    stack = {"model": "m", "experts": 8, "top_k": 2, "N": 48, "K": 64, "operator": "onegpu nf4", "note": ""}
    fault = {"shape": "odd", "N": 3, "K": 5, "inputs": "normal", "dtype": "float16", "operator": "o"}
    found = document(
        CEILINGS,
        ROWS,
        {"device": "d"},
        chain=[
            {"model": "m", "operator": "o", "layers": 2, "overlap": True, "us": 10.0, "roofline_percent": 80.0}
            | {"difference": 0.0, "finite": True, "repeats": True},
            {"model": "m", "operator": "o", "layers": 2, "overlap": False, "us": None, "note": "broke"},
        ],
        storage=[
            {"task": "t", "N": 4, "K": 8, "us": 1.0, "gb_s": 3.0, "percent": 71.2, "note": ""},
            {"task": "u", "N": 4, "K": 8, "us": None, "note": "broke"},
        ],
        experts=[
            stack | {"tokens": 4, "us": 7.0, "tflop_s": 2.0, "roofline_percent": 66.0, "times_bf16": 2.0},
            stack | {"tokens": 0, "us": None, "times_bf16": None, "note": "broke"},
        ],
        errors=[
            fault | {"M": 1, "error": 2e-3, "allowed": 1e-3, "ratio": 2.0},
            fault | {"M": 0, "error": None, "note": "broke"},
        ],
    )
    assert json.loads(json.dumps(found))["ceilings"]["flops"] == 1e14
    text = tables(found)
    for line in (
        "| qkv 48x1024 | 1 | bf16 cuBLAS | 10.00 | 100 | 1.0 | 50 | 1.00 |",
        "| qkv 48x1024 | 1 | peer (not captured: reason) | 12.00 | 100 | 1.0 | 50 | 0.80 |",
        "| qkv 48x1024 | - | absent | failed: ImportError: no | | | | |",
        "| m o x 2 | yes | 10.0 | 5.00 | 80.0 | 0.0e+00 | yes |",
        "| m o x 2 | no | failed: broke | | | | |",
        "| t 4x8 | 1.0 | 3 | 71 |",
        "| u 4x8 | failed: broke | | |",
        "| m 8x48x64 top 2 | 4 | onegpu nf4 | 7.0 | 2.0 | 66 | 2.00 |",
        "| m 8x48x64 top 2 | - | onegpu nf4 | failed: broke | | | |",
        "| o | 1 | 2.00e-03 | 1.00e-03 | 2.000 | odd 3x5, normal, float16 | NO |",
        "| o | - | failed: broke | | | odd 3x5, normal, float16 | NO |",
    ):
        assert line in text.splitlines(), line


def test_what_was_not_measured_has_no_table() -> None:
    assert tables(document(CEILINGS, [], {})).strip() == ""
    text = tables(document(CEILINGS, ROWS[:1], {}))
    assert text.count("| --- ") == 8
