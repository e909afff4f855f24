"""Every error `onegpu` raises on purpose.

    OneGpuError                     has `.message` and `.hint`
    ├── ConfigError (ValueError)        an argument or option that cannot be: both flags, an unknown quant type
    ├── ArgumentError (ValueError)      a tensor given to an operator has the wrong shape, dtype or device
    ├── CheckpointError (ValueError)    files on disk that are damaged, incomplete, or say one thing and hold another
    │   └── UnsafeCheckpointError           files that would run code when read: pickle, remote code
    ├── NotFoundError (OSError)         no such model, folder or revision, or no network to ask
    ├── SaveError (OSError)             a save that could not be finished; what was there before is still there
    ├── DoesNotFitError (MemoryError)   the plan needs more memory than there is
    ├── DeviceError (RuntimeError)      a device that is not there, or tensors on different devices
    ├── NumericError (ArithmeticError)  a model computed something that is no number
    └── UnsupportedError (RuntimeError) a combination that this machine or model cannot run

A message says what happened, what was expected and what came; the hint says what to do next.
"""

from __future__ import annotations

__all__ = [
    "ArgumentError",
    "CheckpointError",
    "ConfigError",
    "DeviceError",
    "DoesNotFitError",
    "NotFoundError",
    "NumericError",
    "OneGpuError",
    "SaveError",
    "UnsafeCheckpointError",
    "UnsupportedError",
]


class OneGpuError(Exception):
    """Base of every error raised on purpose by `onegpu`.

    Args:
        message: what happened, what was expected, what came.
        hint: what to do next; printed after a blank line. May be empty.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n\nhint: {self.hint}" if self.hint else self.message

    def __reduce__(self) -> tuple[type[OneGpuError], tuple[str, str]]:
        return type(self), (self.message, self.hint)


class ConfigError(OneGpuError, ValueError):
    """An argument or option that cannot be: two exclusive flags, an unknown name, a value out of range."""


class ArgumentError(OneGpuError, ValueError):
    """A tensor given to an operator has the wrong shape, dtype, length or device."""


class CheckpointError(OneGpuError, ValueError):
    """Files on disk that are damaged, incomplete, or say one thing and hold another."""


class UnsafeCheckpointError(CheckpointError):
    """Files that would run code when read (pickle, remote code) and were not asked for."""


class NotFoundError(OneGpuError, OSError):
    """No such model, folder or revision, or no network to ask for it."""


class SaveError(OneGpuError, OSError):
    """A save that could not be finished. What was in the folder before is still there."""


class DoesNotFitError(OneGpuError, MemoryError):
    """The plan needs more memory than there is."""


class DeviceError(OneGpuError, RuntimeError):
    """A device that is not there, or tensors that live on different devices."""


class NumericError(OneGpuError, ArithmeticError):
    """A model computed something that is no number."""


class UnsupportedError(OneGpuError, RuntimeError):
    """A combination that this machine or this model cannot run."""
