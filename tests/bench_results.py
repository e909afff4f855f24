"""Results such as the commands of `onegpu bench` print with --json, small."""

from __future__ import annotations

from typing import Any

FACTS: dict[str, Any] = {
    "device": "NVIDIA Foo <cuda:0>",
    "threads": 2,
    "versions": {"python": "3.11.7", "onegpu": "0.1.0", "bitsandbytes": None},
}


def kernel_row(operator: str, M: int, us: float | None) -> dict[str, Any]:
    found = {"shape": "qkv", "N": 6144, "K": 4096, "M": M, "operator": operator, "us": us, "note": ""}
    if us is None:
        return found | dict.fromkeys(("gb_s", "tflop_s", "roofline_percent", "times_bf16")) | {"note": "broke"}
    num_bytes, operations = 6144 * 4096 / 2, 2 * M * 6144 * 4096
    return found | {
        "gb_s": num_bytes / us / 1e3,
        "tflop_s": operations / us / 1e6,
        "roofline_percent": 50.0,
        "times_bf16": 2.0,
    }


def generate_row(format: str, batch: int, speed: float | None) -> dict[str, Any]:
    return {
        "format": format,
        "system": "onegpu",
        "batch": batch,
        "prompt_tokens": 128,
        "new_tokens": 128,
        "ttft_ms": 10.0,
        "tokens_per_second": speed,
        "weight_bytes": 5 << 30,
        "bandwidth_percent": None if speed is None else 61.0,
        "peak_bytes": None if speed is None else 6 << 30,
        "error": "" if speed else "broke",
    }


KERNELS = FACTS | {
    "ceilings": {"read_bandwidth": 3.1e12, "flops": 8.0e14},
    "rows": [
        kernel_row("nf4", 1, 8.0),
        kernel_row("nf4", 16, 9.0),
        kernel_row("int8", 1, 12.0),
        kernel_row("x", 1, None),
    ],
    "chain": [],
}
GENERATE = FACTS | {
    "model": "org/name",
    "rows": [
        generate_row("nf4", 1, 150.0),
        generate_row("nf4", 8, 900.0),
        generate_row("16bit", 1, 80.0),
        generate_row("bitsandbytes:nf4", 1, None),
    ],
    "memory": [{"format": "nf4", "context": c, "bytes": (5 << 30) + c * 131072} for c in (512, 1024, 2048)],
}
ENCODE = FACTS | {
    "model": "bert-base",
    "rows": [
        {"contender": "plain", "order": "random", "tokens_per_second": 4.5e5, "share": 0.1},
        {"contender": "onegpu", "order": "random", "tokens_per_second": 1.6e6, "share": 0.37},
        {"contender": "onegpu", "order": "sorted", "tokens_per_second": 1.7e6, "share": 0.4},
    ],
}
LOAD = FACTS | {
    "model": "org/name",
    "rows": [
        {"format": "nf4", "seconds": 0.55, "weight_bytes": 925 << 20, "peak_bytes": 950 << 20},
        {"format": "16bit", "seconds": 0.48, "weight_bytes": 2650 << 20, "peak_bytes": 2650 << 20},
    ],
}
RESULTS = {"kernels": KERNELS, "generate": GENERATE, "encode": ENCODE, "load": LOAD}
TITLES = {
    "kernels": ["Roofline"],
    "generate": ["Tokens per second against batch", "Share of the memory bandwidth", "Memory against context"],
    "encode": ["Encoding, random", "Encoding, sorted"],
    "load": ["Time to load", "Memory to load"],
}
