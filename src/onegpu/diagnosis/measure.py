"""What a GPU really reaches: bytes a second and matrix products a second, in about a second of its time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from onegpu.diagnosis.finding import Finding
from onegpu.errors import ConfigError
from onegpu.memory import find_gpu

__all__ = ["measure"]

BUFFER_BYTES = 1 << 30
MATRIX = 8192
RUNS = 10
# Below this share of the datasheet something is wrong: power, heat, a shared GPU, a narrow slot.
EXPECTED_SHARE = 0.6


def measure(index: int) -> Iterator[Finding]:
    """Bandwidth by copying 1 GiB (read and written once), and the peak of 8192 x 8192 products in 16 bit."""
    device = torch.device("cuda", index)
    half = torch.float16 if torch.cuda.get_device_capability(device) < (8, 0) else torch.bfloat16
    free, _ = torch.cuda.mem_get_info(device)
    size = min(BUFFER_BYTES, free // 4)
    if size < 64 << 20:
        yield Finding(f"gpu {index} speed", "note", "too little free memory to measure", "close what uses the GPU")
        return
    bandwidth, rate = copy_bandwidth(size, device), matrix_rate(half, device)
    yield judged(f"gpu {index} speed", torch.cuda.get_device_name(device), bandwidth, rate)


def copy_bandwidth(size: int, device: torch.device) -> float:
    """Bytes a second, of those read and those written."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / seconds(lambda: target.copy_(source), device)


def matrix_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Operations a second of a square product."""
    a = torch.randn(MATRIX, MATRIX, dtype=dtype, device=device)
    b, out = torch.randn_like(a), torch.empty_like(a)
    return 2 * MATRIX**3 / seconds(lambda: torch.mm(a, b, out=out), device)


def judged(subject: str, name: str, bandwidth: float, rate: float) -> Finding:
    """Measured figures beside those of the datasheet, where the GPU is in the table."""
    text = f"{bandwidth / 1e9:.0f} GB/s copying, {rate / 1e12:.0f} TFLOP/s in 16-bit products"
    try:
        known = find_gpu(name)
    except ConfigError:
        return Finding(subject, "ok", text)
    assert known.bandwidth is not None
    assert known.tflops is not None
    shares = bandwidth / known.bandwidth, rate / 1e12 / known.tflops
    text += f": {shares[0]:.0%} and {shares[1]:.0%} of the datasheet of {known.name}"
    if min(shares) < EXPECTED_SHARE:
        cure = "look at clocks, power limit and other processes: nvidia-smi -q -d CLOCK,POWER,PERFORMANCE"
        return Finding(subject, "note", text, cure)
    return Finding(subject, "ok", text)


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Median time of a call on the device, by its own clock, after warming up."""
    times = []
    with torch.cuda.device(device):
        for _ in range(3):
            call()
        for _ in range(RUNS):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            call()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
    return sorted(times)[len(times) // 2]
