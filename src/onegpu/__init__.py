"""Run any Transformers model small and fast on the one GPU you have.

Importing this package loads neither torch nor Transformers and patches nothing; each name below is imported when
it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from onegpu.config import AUTO_CLASSES

if TYPE_CHECKING:
    from onegpu.attention.sdp_kernel import sdp_kernel
    from onegpu.compat import install, uninstall
    from onegpu.config import QuantConfig
    from onegpu.diagnosis import explain_sdpa
    from onegpu.encoder import Encoder
    from onegpu.errors import OneGpuError
    from onegpu.fastpath import optimize, restore
    from onegpu.memory import fit
    from onegpu.reporting import report

__version__ = "0.1.0"

_HOMES = {
    **dict.fromkeys(AUTO_CLASSES, "onegpu.loading.auto"),
    "Encoder": "onegpu.encoder",
    "OneGpuError": "onegpu.errors",
    "QuantConfig": "onegpu.config",
    "explain_sdpa": "onegpu.diagnosis",
    "fit": "onegpu.memory",
    "install": "onegpu.compat",
    "optimize": "onegpu.fastpath",
    "report": "onegpu.reporting",
    "restore": "onegpu.fastpath",
    "sdp_kernel": "onegpu.attention.sdp_kernel",
    "uninstall": "onegpu.compat",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'onegpu' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
