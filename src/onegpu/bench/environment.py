"""What every measured row says of where it came from: versions, device, threads."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["PACKAGES", "describe_device", "environment", "versions"]

PACKAGES = ("onegpu", "torch", "triton", "transformers", "accelerate", "safetensors", "bitsandbytes", "llvmlite")


def versions() -> dict[str, str | None]:
    """Versions of Python and of what the numbers depend on, from package metadata alone; None for what is absent."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def cpu_name() -> str:
    """The processor's marketing name where the system tells it, its architecture elsewhere."""
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def describe_device(device: torch.device) -> str:
    """`NVIDIA H100 80GB HBM3 (cuda:0)`, or the processor with the number of threads torch uses."""
    import torch

    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} ({device})"
    if device.type == "cpu":
        return f"{cpu_name()} (cpu, {torch.get_num_threads()} threads)"
    return str(device)


def environment(device: torch.device) -> dict[str, object]:
    """The facts to put beside a measurement: device, threads, cores, system, versions."""
    import torch

    return {
        "device": describe_device(device),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions(),
    }
