"""Each sentence about scaled_dot_product_attention comes with the cure that fits it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from onegpu.attention.sdpa_rules import RULES, Call


class OnGpu(Call):
    """A call with CPU tensors, judged as if they were on a GPU."""

    on_gpu = True  # type: ignore[assignment]


def tensors(head_dim: int = 64, **changes: Any) -> dict[str, Any]:
    dtype = changes.pop("dtype", torch.bfloat16)
    shapes = {"q": (1, 4, 8, head_dim), "k": (1, 4, 8, head_dim), "v": (1, 4, 8, head_dim)} | changes
    return {name: torch.zeros(shape, dtype=dtype) for name, shape in shapes.items()}


def told(backend: str, cls: type[Call] = OnGpu, **changes: Any) -> dict[str, str]:
    """Every reason of a backend with its cure."""
    arguments = tensors() | {
        "mask": None,
        "dropout_p": 0.0,
        "is_causal": False,
        "enable_gqa": False,
        "capability": (9, 0) if cls is OnGpu else None,
    }
    call = cls(**(arguments | changes))
    return {reason: cure for rule in RULES[backend] for reason, cure in rule(call)}


MASK = torch.zeros(8, 8, dtype=torch.bool)
META = torch.zeros(1, 4, 8, 64, dtype=torch.bfloat16, device="meta")


@pytest.mark.parametrize(
    ("backend", "changes", "reason", "cure"),
    [
        ("flash", {n: t[0] for n, t in tensors().items()}, "takes 4 dimensions", "q.unsqueeze(0) adds a batch of one"),
        ("flash", {"k": tensors(dtype=torch.float32)["k"]}, "q, k, v of one dtype", "cast them: k.to(q.dtype)"),
        ("flash", {"mask": MASK.float()}, "takes a mask of bool or bfloat16", "cast it: mask.to(q.dtype)"),
        ("math", {"k": META}, "takes tensors on one device; they are on cpu, meta", "move them: k.to(q.device)"),
        ("math", {"mask": MASK, "is_causal": True}, "exclude each other", "put the causal part into the mask"),
        ("math", tensors(k=(1, 2, 8, 64), v=(1, 2, 8, 64)), "q has 4 heads, k has 2", "pass enable_gqa=True"),
        (
            "math",
            tensors(k=(1, 3, 8, 64), v=(1, 3, 8, 64)) | {"enable_gqa": True},
            "are no multiple of the 3 of k",
            "check how the heads were split",
        ),
        ("math", tensors(k=(1, 4, 8, 32)), "q has head dim 64, k has 32", "they must be equal to be multiplied"),
        ("flash", {"capability": (7, 5)}, "needs compute capability 8.0", "efficient is next in line here"),
        ("flash", tensors(dtype=torch.float32), "takes float16 and bfloat16", "load the model in bfloat16"),
        ("flash", {"mask": MASK}, "takes no attn_mask", "without padding leave the mask out; onegpu.optimize(model)"),
        (
            "flash",
            tensors(q=(1, 4, 4, 64)) | {"is_causal": True},
            "takes is_causal only",
            "for one query leave is_causal out; else torch.nn.attention.bias.causal_lower_right",
        ),
        ("flash", tensors(264), "takes head dims up to 256", "efficient takes larger ones"),
        ("cudnn", tensors(68), "multiples of 8, not 68", "pad q, k, v with zeros and pass scale"),
        ("flash", tensors(v=(1, 4, 8, 32)), "takes one head dim", "pad v with zeros"),
        ("flash", {"q": torch.zeros(1, 4, 64, 8).mT.bfloat16()}, "stride 1; q differ", "q = q.contiguous()"),
        ("flash", tensors(k=(1, 4, 0, 64), v=(1, 4, 0, 64)), "at least one query", "skip the call for an empty batch"),
        ("cudnn", tensors(k=(1, 4, 1, 64), v=(1, 4, 1, 64)), "more than one key", "flash and efficient take a single"),
    ],
)
def test_on_a_gpu(backend: str, changes: dict[str, Any], reason: str, cure: str) -> None:
    found = [value for key, value in told(backend, **changes).items() if reason in key]
    assert len(found) == 1
    assert cure in found[0]


@pytest.mark.parametrize(
    ("changes", "reason", "cure"),
    [
        (tensors(dtype=torch.int32), "takes floating dtypes, not int32", "cast to bfloat16 or float32"),
        ({"dropout_p": 0.1}, "has no dropout on a CPU; got 0.1", "model.eval() sets it to 0"),
    ],
)
def test_on_a_cpu(changes: dict[str, Any], reason: str, cure: str) -> None:
    assert told("flash", Call, **changes)[reason] == cure


def test_what_is_left_out_in_deterministic_mode() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        said = told("cudnn")
    finally:
        torch.use_deterministic_algorithms(False)
    assert said == {"is left out in deterministic mode": "torch.use_deterministic_algorithms(False)"}
