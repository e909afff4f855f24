"""Where compiled kernels are kept, whether anything is there, and an empty place for a cold start."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from onegpu.config import cache_folder

__all__ = ["empty_caches", "is_cold"]

# Triton's own, and ours of kernels in CUDA C++; the driver's serves what torch and libraries bring along.
VARIABLES = ("TRITON_CACHE_DIR", "ONEGPU_CACHE")


def is_cold() -> bool:
    """Whether no kernel of Triton's or ours is kept from an earlier run."""
    triton = os.environ.get("TRITON_CACHE_DIR") or "~/.triton/cache"
    return not any(holds_files(folder) for folder in (Path(triton).expanduser(), cache_folder() / "cuda"))


def holds_files(folder: Path) -> bool:
    """Whether anything lies in a folder."""
    return folder.is_dir() and any(folder.iterdir())


@contextmanager
def empty_caches() -> Iterator[None]:
    """For a while kernels are kept in an empty folder. What this process compiled before stays with it."""
    before = {name: os.environ.get(name) for name in VARIABLES}
    with tempfile.TemporaryDirectory(prefix="onegpu-cold-", ignore_cleanup_errors=True) as folder:
        try:
            for name in VARIABLES:
                os.environ[name] = str(Path(folder) / name.lower())
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value
