"""Where there is no GPU, kernels run in Triton's interpreter, on CPU tensors; with one, the same tests compile them."""

from __future__ import annotations

import importlib.util
import os
import sys

import pytest
import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None


def interpret() -> None:
    """Turn the interpreter on; Triton asks for it once, when its own functions are made."""
    os.environ["TRITON_INTERPRET"] = "1"
    # Some library that another test imported may have brought Triton along, uninterpreted.
    for name in [name for name in sys.modules if name.partition(".")[0] == "triton"]:
        if not name.startswith("triton._C"):
            del sys.modules[name]
    from kernels.interpreter_bf16 import install

    install()


if HAS_TRITON and not torch.cuda.is_available():
    interpret()


@pytest.fixture
def device() -> torch.device:
    """Where the launchers run."""
    if not HAS_TRITON:
        pytest.skip("needs triton")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
