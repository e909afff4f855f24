"""Allow only some kernels of `scaled_dot_product_attention`, and say why when none of them can run."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch.backends import cuda as switches

from onegpu.attention.failed_call import failed_call
from onegpu.attention.sdpa import explain_sdpa
from onegpu.errors import ConfigError, UnsupportedError

__all__ = ["BACKEND_SWITCHES", "sdp_kernel"]

Allowed = dict[str, bool]
# How each backend is asked and switched in torch.
BACKEND_SWITCHES: dict[str, tuple[Callable[[], bool], Callable[[bool], None]]] = {
    "flash": (switches.flash_sdp_enabled, switches.enable_flash_sdp),
    "math": (switches.math_sdp_enabled, switches.enable_math_sdp),
    "mem_efficient": (switches.mem_efficient_sdp_enabled, switches.enable_mem_efficient_sdp),
    "cudnn": (switches.cudnn_sdp_enabled, switches.enable_cudnn_sdp),
}
# What torch says when no backend is left, in its several places.
NO_KERNEL = ("No available kernel", "No viable backend for scaled_dot_product_attention", "Invalid backend")


@dataclass(eq=False)
class Block:
    """An open block: what it allows, and what was allowed when it was entered."""

    allowed: Allowed
    before: Allowed = field(default_factory=dict)


class Switchboard:
    """The blocks that are open in this process, in the order in which they were entered.

    Torch's switches belong to the process. Where blocks of several threads or tasks overlap, the one entered last
    rules; in whatever order they end, torch is left as it was before the first of them.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.open: list[Block] = []

    def enter(self, block: Block) -> None:
        """Let a block rule."""
        with self.lock:
            block.before = {name: is_on() for name, (is_on, _) in BACKEND_SWITCHES.items()}
            self.open.append(block)
            switch(block.allowed)

    def leave(self, block: Block) -> None:
        """End a block: what was before it rules again, at once or when the blocks entered since have ended."""
        with self.lock:
            place = self.open.index(block)
            del self.open[place]
            if place == len(self.open):
                switch(block.before)
            else:
                self.open[place].before = block.before


@functools.cache
def switchboard() -> Switchboard:
    """The one of this process."""
    return Switchboard()


def switch(allowed: Allowed) -> None:
    """Set torch's switches."""
    for name, (_, turn) in BACKEND_SWITCHES.items():
        turn(allowed[name])


@contextmanager
def sdp_kernel(
    enable_flash: bool = True,
    enable_math: bool = True,
    enable_mem_efficient: bool = True,
    enable_cudnn: bool = True,
) -> Iterator[None]:
    """Allow these kernels for attention inside the block, or inside a function that it decorates.

    It switches what `torch.nn.attention.sdpa_kernel` switches, so that everything that heeds the one heeds the other:
    `torch.nn.functional.scaled_dot_product_attention` and all attention of this package. An inner block replaces an
    outer one. Torch's switches belong to the process: a block in one thread is felt by the others while it lasts.

    Raises:
        ConfigError: nothing is allowed.
        UnsupportedError: attention inside the block found no kernel; the message has the reason of each backend, and
            a cure where there is one. It is a RuntimeError, as torch's own is.
    """
    allowed = {
        "flash": bool(enable_flash),
        "math": bool(enable_math),
        "mem_efficient": bool(enable_mem_efficient),
        "cudnn": bool(enable_cudnn),
    }
    if not any(allowed.values()):
        raise ConfigError(
            "sdp_kernel: all of enable_flash, enable_math, enable_mem_efficient and enable_cudnn are False",
            "allow one of them at least; enable_math=True runs everywhere",
        )
    block = Block(allowed)
    switchboard().enter(block)
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith(NO_KERNEL):
            raise
        raise no_kernel(error, allowed) from error
    finally:
        switchboard().leave(block)


def no_kernel(error: RuntimeError, allowed: Allowed) -> UnsupportedError:
    """Torch's words, then each backend's reason; made while the switches stand as they stood for the call."""
    said = str(error).splitlines()[0]
    names = ", ".join(name for name, on in allowed.items() if on)
    hint = "allow another kernel: enable_math=True runs everywhere"
    found = failed_call(error.__traceback__)
    if found is None:
        return UnsupportedError(
            f"{said}\nsdp_kernel allows only: {names}",
            f"{hint}; onegpu.explain_sdpa(q, k, v, attn_mask) with the call's arguments tells why each can't run",
        )
    explained = explain_sdpa(
        found["query"],
        found["key"],
        found["value"],
        found.get("attn_mask"),
        found.get("dropout_p", 0.0),
        found.get("is_causal", False),
        found.get("enable_gqa", False),
    )
    shapes = ", ".join(f"{name} {tuple(found[name].shape)}" for name in ("query", "key", "value"))
    kind = f"{str(found['query'].dtype).removeprefix('torch.')} on {found['query'].device}"
    return UnsupportedError(f"{said}\nsdp_kernel allows only: {names}; got {shapes}, {kind}\n{explained}", hint)
