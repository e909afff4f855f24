"""The machine and what is installed: driver, GPUs, and versions that fit together or do not."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version

import torch
from packaging.requirements import Requirement
from packaging.version import Version

from onegpu.diagnosis.finding import Finding

__all__ = ["look_at_gpus", "look_at_system", "look_at_versions"]

INSTALL_CUDA = "install a torch build for CUDA: https://pytorch.org/get-started/locally"


def installed(name: str) -> str | None:
    """The version of a package by its metadata, None where it is absent."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def look_at_system() -> Iterator[Finding]:
    """Operating system and Python."""
    yield Finding("system", "ok", f"{platform.system()} {platform.release()}, {platform.machine()}")
    yield Finding("python", "ok", platform.python_version())


def needed() -> Iterator[Requirement]:
    """What our own metadata asks for, extras left out."""
    try:
        lines = requires("onegpu") or []
    except PackageNotFoundError:
        return  # run from a source tree: nothing says what we ask for
    for line in lines:
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield requirement


def look_at_versions() -> Iterator[Finding]:
    """Whether what is installed is what we ask for, and torch and Triton belong together."""
    yield Finding("onegpu", "ok", installed("onegpu") or "not installed as a package")
    for requirement in needed():
        yield against(requirement, installed(requirement.name))
    yield from look_at_triton(requires("torch") or [], installed("triton"), torch.version.cuda or torch.version.hip)
    found = installed("bitsandbytes")
    yield Finding("bitsandbytes", "ok" if found else "note", found or "not installed, and not needed")


def against(requirement: Requirement, found: str | None) -> Finding:
    """One installed version against what is asked of it."""
    if found is None:
        return Finding(
            requirement.name, "problem", "is not installed", f'pip install "{requirement.name}{requirement.specifier}"'
        )
    if not requirement.specifier.contains(Version(found).base_version):
        return Finding(
            requirement.name,
            "problem",
            f"{found} is installed, {requirement.specifier} is needed",
            f'pip install "{requirement.name}{requirement.specifier}"',
        )
    return Finding(requirement.name, "ok", found)


def look_at_triton(torch_requires: list[str], found: str | None, accelerator: str | None) -> Iterator[Finding]:
    """Triton beside the torch that was built against one version of it."""
    if found is None:
        if accelerator is None:
            yield Finding("triton", "note", "is not installed; a CPU needs none")
        else:
            cure = "pip install triton (Linux) or triton-windows; without it the torch reference runs, slower"
            yield Finding("triton", "problem", "is not installed, and our GPU kernels are written in it", cure)
        return
    wanted = [Requirement(line) for line in torch_requires if re.match(r"(pytorch-)?triton\b", line)]
    wanted = [one for one in wanted if one.name == "triton" and (one.marker is None or one.marker.evaluate())]
    for one in wanted:
        if not one.specifier.contains(Version(found).base_version):
            cure = f'pip install "triton{one.specifier}"'
            text = f"{found} is installed, torch {torch.__version__} was built for triton{one.specifier}"
            yield Finding("triton", "note", text, cure)
            return
    yield Finding("triton", "ok", found)


def driver_version() -> str | None:
    """NVIDIA's driver as `nvidia-smi` tells it, None without one."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(said.strip().splitlines()), None)


def look_at_gpus() -> Iterator[Finding]:
    """The driver, and each GPU that torch sees."""
    driver = driver_version()
    accelerator = torch.version.cuda or torch.version.hip
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    yield from look_at_driver(driver, accelerator, count)
    for index in range(count):
        yield look_at_gpu(index)


def look_at_driver(driver: str | None, accelerator: str | None, count: int) -> Iterator[Finding]:
    """Whether driver and torch build see the same."""
    if driver is None and not count:
        yield Finding("driver", "note", "no NVIDIA driver here; everything runs on the CPU")
    elif driver is not None:
        yield Finding("driver", "ok", driver)
    if count:
        return
    if driver is not None and accelerator is None:
        text = f"torch {torch.__version__} is a build for the CPU, though there is a GPU"
        yield Finding("gpu", "problem", text, INSTALL_CUDA)
    elif driver is not None:
        text = f"torch {torch.__version__} (CUDA {accelerator}) sees no GPU under driver {driver}"
        cure = "update the driver, look at CUDA_VISIBLE_DEVICES, or " + INSTALL_CUDA
        yield Finding("gpu", "problem", text, cure)


def look_at_gpu(index: int) -> Finding:
    """Name, memory and capability of one GPU, and whether torch was built for it."""
    properties = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    text = f"{properties.name}, {total / 2**30:.1f} GiB ({free / 2**30:.1f} free)"
    if torch.version.hip:
        return Finding(f"gpu {index}", "ok", text)
    capability = (properties.major, properties.minor)
    text += f", compute capability {capability[0]}.{capability[1]}"
    built = torch.cuda.get_arch_list()
    if not is_built_for(capability, built):
        text += f"; torch was built for {' '.join(built)} only, so its kernels do not start"
        return Finding(f"gpu {index}", "problem", text, INSTALL_CUDA + " with the newest CUDA")
    return Finding(f"gpu {index}", "ok", text)


def is_built_for(capability: tuple[int, int], built: list[str]) -> bool:
    """Whether machine code (same major, no newer minor) or portable code (no newer) for this GPU is in the build."""
    for name in built:
        found = re.fullmatch(r"(sm|compute)_(\d+)(\d)[a-z]?", name)
        if not found:
            continue
        major, minor = int(found[2]), int(found[3])
        if found[1] == "sm" and major == capability[0] and minor <= capability[1]:
            return True
        if found[1] == "compute" and (major, minor) <= capability:
            return True
    return False
