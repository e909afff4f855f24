"""GPUs: what the table of the vendors' datasheets says of one, and what of its memory a model can have.

Memory that a process does not get: the driver's reserve (1.5 %), where error correction is kept in ordinary memory a
sixteenth of it, and 0.5 GiB for the CUDA context, the kernels' code and the allocator's slack.
"""

from __future__ import annotations

import difflib
import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from onegpu.errors import ConfigError

__all__ = ["CONTEXT_BYTES", "Gpu", "find_gpu", "known_gpus", "local_gpu"]

GIB = 2**30
CONTEXT_BYTES = GIB // 2
DRIVER_SHARE = 0.985
INLINE_ECC_SHARE = 15 / 16
UNITS = {"k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
# Words in a GPU's name that say nothing of which one it is.
NOISE = ("nvidia", "geforce", "quadro", "tesla", "amd", "instinct", "radeon", "graphics", "generation")


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU. Bandwidth in bytes per second, `tflops` dense bfloat16 (float16 before Ampere) with float32 sums.

    Bandwidth, `tflops` and `capability` are None where only a size is known.
    """

    name: str
    memory_bytes: int
    bandwidth: float | None = None
    tflops: float | None = None
    capability: str | None = None
    source: str = ""

    @property
    def free_bytes(self) -> int:
        """What a model can have when nothing else runs on it."""
        return max(self.memory_bytes - CONTEXT_BYTES, 0)


@cache
def known_gpus() -> tuple[Gpu, ...]:
    """The table, smallest memory first."""
    rows = json.loads(files("onegpu.memory").joinpath("gpus.json").read_text(encoding="utf-8"))["gpus"]
    gpus = [
        Gpu(
            row["name"],
            int(row["memory_gib"] * DRIVER_SHARE * (INLINE_ECC_SHARE if row.get("inline_ecc") else 1) * GIB),
            row["bandwidth_gbs"] * 1e9,
            row["tflops"],
            row["capability"],
            row["source"],
        )
        for row in rows
    ]
    return tuple(sorted(gpus, key=lambda gpu: (gpu.memory_bytes, gpu.name)))


def find_gpu(text: str) -> Gpu:
    """The GPU called `text` ("RTX 4090", "NVIDIA H100 80GB HBM3"), or one of a size ("24GiB", "24g") and nothing more.

    Raises:
        ConfigError: neither; with the nearest names.
    """
    if size := re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt])(?:i?b)?\s*", text.lower()):
        num_bytes = int(float(size[1]) * UNITS[size[2]])
        if num_bytes <= 0:
            raise ConfigError(f"a GPU has more than no memory; got {text!r}", "write for example 24GiB")
        return Gpu(f"GPU with {num_bytes / GIB:g} GiB", num_bytes)
    by_words = {words(gpu.name): gpu for gpu in known_gpus()}
    wanted = words(text)
    if wanted in by_words:
        return by_words[wanted]
    # "H100 80GB HBM3" is told by its first words; the longest name that fits is meant.
    held = [name for name in by_words if set(name) <= set(wanted)]
    if held:
        return by_words[max(held, key=len)]
    larger = [name for name in by_words if wanted and set(wanted) <= set(name)]
    if larger:
        return by_words[min(larger, key=lambda name: (len(name), by_words[name].memory_bytes))]
    names = {gpu.name.lower(): gpu.name for gpu in known_gpus()}
    near = difflib.get_close_matches(text.lower(), names, n=3, cutoff=0.4)
    listed = ", ".join(repr(names[name]) for name in near)
    raise ConfigError(
        f"no GPU called {text!r} is in the table",
        f"did you mean {listed}? A size does too: 24GiB" if near else "give its memory: 24GiB",
    )


def words(name: str) -> tuple[str, ...]:
    """The words that tell a GPU, in lower case: "NVIDIA GeForce RTX4090" is ("rtx", "4090"), "80GB" is "80gb"."""
    text = re.sub(r"(rtx|gtx|mi)[\s-]*(\d)", r"\1 \2", name.lower())
    text = re.sub(r"(\d)\s+(gb|gib|ti|super)\b", r"\1 \2", text)
    text = re.sub(r"(\d)(ti|super)\b", r"\1 \2", text)
    text = re.sub(r"(\d+)\s*gi?b\b", r"\1gb", text)
    return tuple(word for word in re.split(r"[^a-z0-9]+", text) if word and word not in NOISE)


def local_gpu() -> Gpu | None:
    """The first GPU of this machine as the driver's `nvidia-smi` tells it, None without one."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return parse_local(said)


def parse_local(said: str) -> Gpu | None:
    """The first line of the driver's answer, "NVIDIA L4, 23034": name, MiB."""
    name, _, mebibytes = (said.strip().splitlines() or [""])[0].rpartition(",")
    if not mebibytes.strip().isdigit():
        return None
    memory = int(mebibytes) * 2**20
    try:
        known = find_gpu(name)
    except ConfigError:
        return Gpu(name.strip(), memory)
    return Gpu(name.strip(), memory, known.bandwidth, known.tflops, known.capability, known.source)
