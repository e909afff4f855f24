"""Run any Transformers model small and fast on the one GPU you have.

Importing this package loads neither torch nor Transformers and patches nothing; each name below is imported when
it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onegpu.config import QuantConfig

__version__ = "0.1.0"

_HOMES = {
    "QuantConfig": "onegpu.config",
}

__all__ = ["QuantConfig", "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'onegpu' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
