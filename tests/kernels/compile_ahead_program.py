"""Kernels compiled ahead under a driver that has no device: what is compiled when, what is launched when. Prints JSON.

Run as a program: Triton's interpreter must be off, hence a process of its own. Code for compute capability 9.0 is
really compiled; loading and launching are counted.
"""

from __future__ import annotations

import json
import sys
import threading
from typing import Any

import torch
import triton
import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from onegpu.kernels import rms
from onegpu.kernels.compile_ahead import compile_ahead, rehearse_and_compile

CPU = torch.device("cpu")
launched: list[str] = []
loaded: list[str] = []
compiled: list[str] = []


class Launcher:
    def __init__(self, source: Any, _metadata: Any) -> None:
        self.name = source.fn.__name__

    def __call__(self, *_: Any) -> None:
        launched.append(self.name)


class Utils:
    def get_device_properties(self, _device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "warpSize": 32}

    def load_binary(self, name: str, *_: Any) -> tuple[int, ...]:
        loaded.append(name)
        return 1, 1, 32, 0, 1024


class NoDevice:
    launcher_cls = Launcher
    utils = Utils()

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return CPU


@triton.jit
def broken_kernel(out_ptr):
    tl.static_assert(False, "it cannot be compiled")


def norms() -> None:
    for K in (64, 4096, 64):
        rms.rms_norm(torch.zeros(2, K), torch.zeros(K), 1e-5)


def note(*, fn: Any, **_: Any) -> None:
    compiled.append(fn.name)


def main() -> None:
    driver.set_active(NoDevice())
    knobs.runtime.jit_post_compile_hook = note
    out: dict[str, Any] = {}
    out["off a GPU"] = compile_ahead(norms, CPU).kernels
    done = rehearse_and_compile(norms, CPU)
    out["ahead"] = {
        "kernels": done.kernels, "compiled": len(compiled), "loaded": len(loaded), "launched": len(launched)
    }  # fmt: skip
    norms()
    out["then"] = {"compiled": len(compiled), "loaded": len(loaded), "launched": len(launched)}
    out["again"] = rehearse_and_compile(norms, CPU).kernels

    # A launch in another thread, while this one rehearses, is a launch.
    def rehearse() -> None:
        rms.rms_norm(torch.zeros(2, 128), torch.zeros(128), 1e-5)
        thread = threading.Thread(target=rms.rms_norm, args=(torch.zeros(2, 128), torch.zeros(128), 1e-5))
        thread.start()
        thread.join()

    launched.clear()
    rehearse_and_compile(rehearse, CPU)
    out["elsewhere"] = len(launched)
    ran: list[int] = []

    def fails() -> None:
        broken_kernel[(1,)](torch.zeros(1))
        ran.append(1)
        raise ValueError

    launched.clear()
    out["broken"] = rehearse_and_compile(fails, CPU, [lambda: ran.append(2), lambda: 1 / 0]).kernels
    out["ran"] = sorted(ran)
    try:
        broken_kernel[(1,)](torch.zeros(1))
    except Exception as error:
        out["error"] = "it cannot be compiled" in str(error) or "it cannot be compiled" in str(error.__cause__)
    sys.stdout.write(json.dumps(out) + "\n")


if __name__ == "__main__":
    main()
