"""Kernels compiled side by side before they are needed, instead of one after another when each is first launched.

    compile_ahead(run)   1. run once; launches of Triton kernels that are not compiled yet are noted and left out
                         2. compile all of them in a few threads, and load them on the device

The launches themselves say what is to be compiled, so there is no list that could differ from them: the later launch
finds the very same entry of Triton's cache. Most of a compilation is outside Python (passes, the assembler, on older
Triton a C compiler for each launcher), so threads do help.

This rests on the mode in which Triton compiles asynchronously (`triton.AsyncCompileMode`, Triton 3.5 and up): while
one is set in this context, `submit` is called in place of the compiler. Where a Triton is otherwise, nothing is
compiled ahead, and each kernel waits for its first launch.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, Final

import torch

__all__ = ["Compiled", "compile_ahead"]

# More threads wait for Python's lock more than they compile.
MOST_THREADS: Final = 6


@dataclass(frozen=True, slots=True)
class Compiled:
    """What was compiled, or read from Triton's cache: `kernels` of them in `seconds` altogether."""

    kernels: int = 0
    seconds: float = 0.0


class Pending:
    """Stands for a kernel until it is compiled. A launch in the rehearsing thread does nothing.

    Newer Triton keeps it among the compiled kernels meanwhile: a launch in another thread compiles, and runs.
    """

    def __init__(
        self, compile_it: Callable[[], Any], finish: Callable[[Any], Any], forget: Callable[[Any], Any]
    ) -> None:
        self._thread = threading.get_ident()
        self._lock = threading.Lock()
        self._compile = compile_it
        self._finish = finish
        self._forget = forget
        self._kernel: Any = None
        self._rehearsing = True

    def real(self) -> Any:
        """The compiled kernel, in Triton's table of them from now on."""
        with self._lock:
            if self._kernel is None:
                kernel = self._compile()
                self._finish(kernel)
                self._kernel = kernel
            return self._kernel

    def prepare(self, device: torch.device) -> bool:
        """Compile and load; False where it fails, so that the launch itself does it again and says why."""
        try:
            with current(device):
                # To ask for how it is run makes its launcher and brings it to the device.
                _ = self.real().run
        except Exception:
            self._forget(self)
            return False
        return True

    def __getattr__(self, name: str) -> Any:
        if name == "result":  # what only asynchronous kernels have
            raise AttributeError(name)
        if self._rehearsing and threading.get_ident() == self._thread:
            return nothing
        return getattr(self.real(), name)


def nothing(*_: Any, **__: Any) -> None:
    """A launch that is left out."""


class Rehearsal:
    """What Triton takes for its mode of asynchronous compilation: notes what is to be compiled."""

    def __init__(self) -> None:
        self.pending: dict[Hashable, Pending] = {}

    def submit(
        self,
        key: Hashable,
        compile_fn: Callable[[], Any],
        finalize_fn: Callable[[Any], Any],
        cleanup_fn: Callable[[Any], Any] = nothing,
    ) -> Pending:
        """The kernel of this key."""
        if key not in self.pending:
            self.pending[key] = Pending(compile_fn, finalize_fn, cleanup_fn)
        return self.pending[key]


def active_mode() -> Any:
    """Triton's variable for the mode; None where there is none, one is set, or kernels are interpreted."""
    try:
        from triton import knobs
        from triton.runtime._async_compile import active_mode as mode
    except ImportError:
        return None
    if knobs.runtime.interpret or mode.get() is not None:
        return None
    return mode


def compile_ahead(
    run: Callable[[], object], device: torch.device, beside: Sequence[Callable[[], object]] = ()
) -> Compiled:
    """Compile what `run` launches on `device`, side by side. Off a GPU nothing happens.

    Args:
        run: is run once, with what launches left out would have written undefined: no value of it may become an
            address. Whatever it raises is left to the real run.
        beside: more to do in the same threads, such as products whose kernels another compiler makes.
    """
    if device.type != "cuda":
        return Compiled()
    return rehearse_and_compile(run, device, beside)


def rehearse_and_compile(
    run: Callable[[], object], device: torch.device, beside: Sequence[Callable[[], object]] = ()
) -> Compiled:
    """See `compile_ahead`."""
    began = time.perf_counter()
    mode = active_mode()
    with ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1), "onegpu-compile") as pool:
        others = [pool.submit(quietly, task, device) for task in beside]
        rehearsal = Rehearsal()
        if mode is not None:
            token = mode.set(rehearsal)
            try:
                with suppress(Exception):
                    run()
            finally:
                mode.reset(token)
                for pending in rehearsal.pending.values():
                    pending._rehearsing = False
        done = sum(pool.map(lambda pending: pending.prepare(device), rehearsal.pending.values()))
        for other in others:
            other.result()
    return Compiled(done, time.perf_counter() - began)


def current(device: torch.device) -> AbstractContextManager[Any]:
    """The device of this thread becomes `device`."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def quietly(task: Callable[[], object], device: torch.device) -> None:
    """Run a task in a thread; what it raises will be raised again where it is needed."""
    with suppress(Exception), torch.no_grad(), current(device):
        task()
