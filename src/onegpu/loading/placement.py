"""Where the parts of a model go: device names checked, memory planned, offload announced.

Transformers and accelerate do the placing; this page says in time what cannot be, and what it will cost.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch

from onegpu.errors import ConfigError, DeviceError, DoesNotFitError

__all__ = [
    "announce_offload",
    "check_devices",
    "check_fits",
    "default_device_map",
    "device_in",
    "format_bytes",
    "target_in",
]

STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")
# What one PCIe 4.0 x16 slot moves to the card in practice; offloaded weights cross it once for every token.
PCIE_BYTES_PER_SECOND = 20e9

DeviceMap = str | int | torch.device | Mapping[str, Any] | None


def format_bytes(num_bytes: float) -> str:
    """Bytes for people: "512 B", "3.4 MiB", "5.66 GiB"."""
    value = float(num_bytes)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"


def check_devices(device_map: Any, max_memory: Any) -> None:
    """Refuse devices that are not there before anything is read.

    Raises:
        DeviceError: CUDA asked for and not there, or a GPU number beyond those that are.
        ConfigError: a device_map or max_memory of no known form.
    """
    if isinstance(device_map, str) and device_map in STRATEGIES:
        targets: list[Any] = []
    elif isinstance(device_map, Mapping):
        targets = list(device_map.values())
    else:
        targets = [] if device_map is None else [device_map]
    if max_memory is not None and not isinstance(max_memory, Mapping):
        raise ConfigError(
            f"max_memory must be a dict such as {{0: '6GiB', 'cpu': '20GiB'}}; got {max_memory!r}",
            "one entry for each device",
        )
    for key, value in (max_memory or {}).items():
        parse_bytes(key, value)
        if key not in ("cpu", "disk"):
            targets.append(key)
    for target in targets:
        check_device(target)


def check_device(target: Any) -> None:
    """One device of a map: "cpu", "disk", "meta", a GPU's number or a torch device."""
    if target in ("cpu", "disk", "meta"):
        return
    try:
        device = torch.device(f"cuda:{target}" if isinstance(target, int) and target >= 0 else target)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(
            f"{target!r} is not a device", f"use 'cpu', a GPU's number, 'cuda:0', or one of {', '.join(STRATEGIES)}"
        ) from error
    if device.type != "cuda":
        return
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        raise DeviceError(
            f"device {target!r} was asked for, but torch {torch.__version__} sees no CUDA device",
            "leave device_map out to run on the CPU, or install a torch build with CUDA and check `nvidia-smi`",
        )
    if device.index is not None and device.index >= count:
        raise DeviceError(f"device {target!r} was asked for, but there are {count} GPUs, 0 to {count - 1}")


def parse_bytes(key: Any, value: Any) -> int:
    """Bytes of one max_memory entry: an int, or a string such as "600MB" or "6GiB"."""
    from accelerate.utils import convert_file_size_to_int

    try:
        num_bytes = int(convert_file_size_to_int(value))
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"max_memory[{key!r}] must be bytes or a size such as '600MB' or '6GiB'; got {value!r}"
        ) from error
    if num_bytes < 0:
        raise ConfigError(f"max_memory[{key!r}] must not be negative; got {value!r}")
    return num_bytes


def default_device_map(max_memory: Mapping[Any, Any] | None) -> tuple[DeviceMap, Mapping[Any, Any] | None]:
    """Where a quantized model goes when nobody said: the current GPU, what does not fit there to the CPU.

    Without CUDA everything stays on the CPU. A user's `max_memory` is an answer to "where", so it is left as it is.
    """
    if not torch.cuda.is_available():
        return {"": "cpu"}, None
    if max_memory is not None:
        return "auto", max_memory
    from accelerate.utils import get_max_memory

    index = torch.cuda.current_device()
    free = get_max_memory()
    return "auto", {index: int(free[index] * 0.95), "cpu": int(free["cpu"] * 0.9)}


def target_in(device_map: Mapping[str, Any] | None, name: str) -> Any:
    """What a device map says of the parameter called `name`: the entry of its longest prefix, None without one."""
    parts = name.split(".")
    prefixes = [".".join(parts[:length]) for length in range(len(parts), -1, -1)]
    return next((device_map[prefix] for prefix in prefixes if prefix in device_map), None) if device_map else None


def device_in(device_map: Mapping[str, Any] | None, name: str, default: torch.device) -> torch.device:
    """The device a device map gives to the parameter called `name`; "disk" is read on the CPU."""
    target = target_in(device_map, name)
    if target is None:
        return default
    if target in ("disk", "cpu"):
        return torch.device("cpu")
    return torch.device(f"cuda:{target}") if isinstance(target, int) else torch.device(target)


def check_fits(
    device_map: Mapping[str, Any], max_memory: Mapping[Any, Any] | None, total_bytes: int, *, may_use_disk: bool
) -> None:
    """Refuse a placement that needs the disk when no folder for it was given.

    Raises:
        DoesNotFitError: says what the model needs, what there is, and what would fit.
    """
    on_disk = [name for name, target in device_map.items() if target == "disk"]
    if not on_disk or may_use_disk:
        return
    budget = {key: parse_bytes(key, value) for key, value in (max_memory or {}).items()}
    listed = " · ".join(f"{key}: {format_bytes(value)}" for key, value in budget.items()) or "no device"
    short = max(total_bytes - sum(budget.values()), 0)
    more = f"at least {format_bytes(short)} more" if short else "a little more, since a layer is not divided"
    raise DoesNotFitError(
        f"the model does not fit: it needs {format_bytes(total_bytes)}, max_memory allows "
        f"{format_bytes(sum(budget.values()))} ({listed})",
        f'allow {more}, for example by "cpu" in max_memory, choose load_in_4bit, or pass offload_folder for the disk',
    )


def announce_offload(device_map: Mapping[str, Any], bytes_on: Mapping[str, int]) -> None:
    """Say in one sentence what goes to the CPU or disk beside a GPU, and how fast that can be at best."""
    away = sum(bytes_on.get(name, 0) for name, target in device_map.items() if str(target) in ("cpu", "disk"))
    on_gpu = any(str(target) not in ("cpu", "disk") for target in device_map.values())
    if not away or not on_gpu:
        return
    where = "the CPU and the disk" if "disk" in device_map.values() else "the CPU"
    warnings.warn(
        f"{format_bytes(away)} of {format_bytes(sum(bytes_on.values()))} of weights do not fit on the GPU and stay on "
        f"{where}; they cross to it for every token, so expect at most "
        f"{PCIE_BYTES_PER_SECOND / away:.1f} tokens per second",
        stacklevel=2,
    )
