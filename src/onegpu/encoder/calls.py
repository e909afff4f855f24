"""Methods set on one module in place of its class's own, and taken away again.

Each is an object, not a closure, so that a deep copy of the model has copies that belong to the copy.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from typing import Any

from torch import nn

__all__ = ["MethodCall"]


class MethodCall(ABC):
    """Stands for `module.name`. `plain` is what was there before, whether of the class or set on the instance."""

    def __init__(self, module: nn.Module, name: str = "forward") -> None:
        self.module = module
        self.name = name
        self.previous = module.__dict__.get(name)
        self.removed = False
        # What others read off `model.forward` (Trainer, pipelines, sentence-transformers) is the original's.
        self.__signature__ = inspect.signature(getattr(module, name))

    def plain(self, *args: Any, **kwargs: Any) -> Any:
        """Call what was there before."""
        if self.previous is not None:
            return self.previous(*args, **kwargs)
        return getattr(type(self.module), self.name)(self.module, *args, **kwargs)

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Called in place of what was there; may call `plain`."""

    def install(self) -> None:
        """Set this on the module, past `nn.Module`'s own bookkeeping."""
        self.module.__dict__[self.name] = self

    def remove(self) -> None:
        """Put back what was there. Where someone has wrapped this since, it stays as a mere passage."""
        self.removed = True
        if self.module.__dict__.get(self.name) is not self:
            return
        if self.previous is None:
            del self.module.__dict__[self.name]
        else:
            self.module.__dict__[self.name] = self.previous
