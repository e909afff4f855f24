"""The recorded vectors: what bitsandbytes 0.50.2 gave on a CPU and on an H100, and hashes of a larger set.

`bnb_vectors.json` describes each case and names its tensors in `bnb_vectors.safetensors`; `bnb_hashes.json` has only
sha256 sums, over inputs that the recipe below makes again.
"""

from __future__ import annotations

import hashlib
import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

DATA = Path(__file__).parents[1] / "data"
CASES: list[dict[str, Any]] = json.loads((DATA / "bnb_vectors.json").read_text())["cases"]
CONSTANTS: dict[str, Any] = json.loads((DATA / "bnb_vectors.json").read_text())["constants"]
HASHES: dict[str, Any] = json.loads((DATA / "bnb_hashes.json").read_text())


def cases(*kinds: str) -> list[Any]:
    """The cases of these kinds, as pytest parameters named by their ids."""
    return [pytest.param(case, id=case["id"]) for case in CASES if case["kind"] in kinds]


def hash_id(case: dict[str, Any]) -> str:
    shape = "x".join(map(str, case["shape"]))
    return "_".join(str(part) for part in (case.get("quant_type", "int8"), shape, case.get("blocksize"), case["dtype"]))


@cache
def tensors() -> dict[str, Tensor]:
    return load_file(DATA / "bnb_vectors.safetensors")


@cache
def pool() -> np.ndarray:
    """The numbers that all inputs are cut from."""
    recipe = HASHES["pool"]
    numbers = np.random.default_rng(recipe["seed"]).standard_normal(recipe["elements"], dtype=np.float32)
    assert hashlib.sha256(numbers.tobytes()).hexdigest() == recipe["sha256"]
    return numbers


def made(case: dict[str, Any]) -> Tensor:
    """The input of a hashed case."""
    start = case["pool_offset"]
    numbers = pool()[start : start + math.prod(case["shape"])] * np.float32(case["scale"])
    return torch.from_numpy(numbers).view(case["shape"]).to(getattr(torch, case["dtype"]))


def sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
