"""Kernels in CUDA C++, for what Triton cannot say: compiled when first used, kept in the cache folder, launched.

NVRTC and the bindings to it come with torch's CUDA builds (`cuda-bindings`); no compiler is needed. A source may use no
header, so that none is needed either: what it does beyond C++ is written in PTX.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import torch

from onegpu.config import cache_folder
from onegpu.errors import DeviceError

__all__ = ["Function", "Source", "compile_source", "launch", "load", "tensor_map", "why_not_nvrtc"]

Macros = tuple[tuple[str, str | int], ...]
FOLDER: Final = "cuda"


@dataclass(frozen=True, slots=True)
class Source:
    """A file of `onegpu/kernels/cuda` with the macros it is compiled with; its one kernel is called as the file."""

    name: str
    macros: Macros

    @property
    def text(self) -> str:
        """The file, after its macros."""
        defines = "".join(f"#define {name} {value}\n" for name, value in self.macros)
        return defines + (resources.files("onegpu.kernels") / FOLDER / f"{self.name}.cu").read_text()


@dataclass(frozen=True, slots=True)
class Function:
    """A kernel on one device, to be launched with so many threads and bytes of shared memory."""

    handle: Any
    threads: int
    shared: int


@functools.cache
def why_not_nvrtc() -> str | None:
    """None where CUDA C++ can be compiled and launched, else the reason in a sentence."""
    if torch.version.hip is not None:
        return "AMD GPUs have no NVRTC"
    if find_spec("cuda") is None or find_spec("cuda.bindings") is None:
        return "the package cuda-bindings, which torch's CUDA builds bring along, is not installed"
    try:
        from cuda.bindings import nvrtc

        checked(nvrtc.nvrtcVersion())
    except (ImportError, OSError, RuntimeError) as error:
        return f"NVRTC could not be loaded: {error}"
    return None


def checked(result: tuple[Any, ...]) -> Any:
    """What a call of the bindings gave, without its status.

    Raises:
        DeviceError: the status is an error.
    """
    status, *values = result
    if int(status) != 0:
        raise DeviceError(f"{type(status).__name__}: {status.name}")
    return values[0] if len(values) == 1 else tuple(values)


def compile_source(source: Source, architecture: str) -> bytes:
    """The machine code of a source for one architecture, as "sm_90a"; from the cache folder where it is there.

    Raises:
        DeviceError: the source does not compile, with the compiler's words.
    """
    from cuda.bindings import nvrtc

    version = checked(nvrtc.nvrtcVersion())
    key = hashlib.sha256(repr((source.text, architecture, version)).encode()).hexdigest()
    kept = cache_folder() / FOLDER / f"{source.name}-{key[:32]}.cubin"
    try:
        return kept.read_bytes()
    except OSError:
        pass
    program = checked(nvrtc.nvrtcCreateProgram(source.text.encode(), f"{source.name}.cu".encode(), 0, [], []))
    try:
        options = [f"--gpu-architecture={architecture}".encode(), b"--std=c++17"]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        if int(status) != 0:
            log = b" " * checked(nvrtc.nvrtcGetProgramLogSize(program))
            checked(nvrtc.nvrtcGetProgramLog(program, log))
            raise DeviceError(f"{source.name}.cu does not compile for {architecture}: {log.decode().strip()}")
        code = b" " * checked(nvrtc.nvrtcGetCUBINSize(program))
        checked(nvrtc.nvrtcGetCUBIN(program, code))
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    keep(kept, code)
    return code


def keep(path: Path, code: bytes) -> None:
    """Write a file whole or not at all. A cache that cannot be written costs time only."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(descriptor, "wb") as file:
            file.write(code)
        os.replace(name, path)
    except OSError:
        return


@functools.lru_cache(maxsize=256)
def load(source: Source, architecture: str, threads: int, shared: int, device_index: int) -> Function:
    """A source's kernel on a device, ready to be launched.

    Raises:
        DeviceError: it does not compile, or the device does not take it.
    """
    from cuda.bindings import driver

    code = compile_source(source, architecture)
    with torch.cuda.device(device_index):
        enter_context(device_index)
        module = checked(driver.cuModuleLoadData(code))
        handle = checked(driver.cuModuleGetFunction(module, source.name.encode()))
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        checked(driver.cuFuncSetAttribute(handle, attribute, shared))
    return Function(handle, threads, shared)


def enter_context(device_index: int) -> None:
    """Make torch's context current in a thread in which torch has not yet called the device."""
    from cuda.bindings import driver

    if int(checked(driver.cuCtxGetCurrent())) == 0:
        torch.cuda.init()  # type: ignore[no-untyped-call]
        context = checked(driver.cuDevicePrimaryCtxRetain(checked(driver.cuDeviceGet(device_index))))
        checked(driver.cuCtxSetCurrent(context))


@functools.lru_cache(maxsize=8192)
def tensor_map(
    kind: str,
    address: int,
    sizes: tuple[int, ...],
    strides: tuple[int, ...],
    box: tuple[int, ...],
    *,
    swizzle: int,
) -> Any:
    """How the tensor memory accelerator finds a box in a tensor: a CUtensorMap. What is outside is read as zeros.

    Args:
        kind: of the elements, as in CUtensorMapDataType: "BFLOAT16".
        address: of the first element, a multiple of 16.
        sizes: of the tensor, the dimension with elements side by side first.
        strides: bytes, of all dimensions but the first; multiples of 16.
        box: elements along each dimension.
        swizzle: 16-byte pieces are exchanged within so many bytes, 64 or 128, by the 128-byte row; 0 for not.

    Raises:
        DeviceError: the driver refuses.
    """
    from cuda.bindings import driver

    swizzled = f"CU_TENSOR_MAP_SWIZZLE_{swizzle}B" if swizzle else "CU_TENSOR_MAP_SWIZZLE_NONE"
    wide, narrow = driver.cuuint64_t, driver.cuuint32_t
    return checked(
        driver.cuTensorMapEncodeTiled(
            getattr(driver.CUtensorMapDataType, f"CU_TENSOR_MAP_DATA_TYPE_{kind}"),
            len(sizes),
            address,
            [wide(size) for size in sizes],
            [wide(stride) for stride in strides],
            [narrow(size) for size in box],
            [narrow(1)] * len(sizes),
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            getattr(driver.CUtensorMapSwizzle, swizzled),
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )


def launch(
    function: Function,
    grid: int,
    arguments: Sequence[int],
    device: torch.device,
    *,
    overlap: bool = False,
) -> None:
    """Start a kernel on the device's current stream, which must be the current device's.

    Args:
        grid: how many programs.
        arguments: addresses of the kernel's parameters, which are copied from there.
        overlap: it may begin before the kernel in front has ended (programmatic dependent launch).

    Raises:
        DeviceError: the driver refuses.
    """
    from cuda.bindings import driver

    enter_context(torch.cuda.current_device())
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = grid, 1, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = function.threads, 1, 1
    config.sharedMemBytes = function.shared
    config.hStream = torch.cuda.current_stream(device).cuda_stream
    attributes = []
    if overlap:
        attribute = driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        attributes.append(attribute)
    config.attrs, config.numAttrs = attributes, len(attributes)
    pointers = (ctypes.c_void_p * len(arguments))(*arguments)
    checked(driver.cuLaunchKernelEx(config, function.handle, ctypes.addressof(pointers), 0))
