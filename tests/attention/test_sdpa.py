"""Each refusal by its words, and the choice against what torch really takes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import onegpu
from onegpu.attention.sdpa_rules import RULES, Call
from onegpu.diagnosis import explain_sdpa
from onegpu.errors import ArgumentError


def call(
    heads: int = 4,
    kv_heads: int | None = None,
    queries: int = 8,
    keys: int = 8,
    head_dim: int = 64,
    value_dim: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Any]:
    kv_heads = heads if kv_heads is None else kv_heads
    return {
        "q": torch.zeros(1, heads, queries, head_dim, dtype=dtype),
        "k": torch.zeros(1, kv_heads, keys, head_dim, dtype=dtype),
        "v": torch.zeros(1, kv_heads, keys, value_dim or head_dim, dtype=dtype),
    }


class OnGpu(Call):
    """A call with CPU tensors, judged as if they were on a GPU of compute capability 9.0 or the one given."""

    on_gpu = True  # type: ignore[assignment]


def reasons_on_gpu(backend: str, capability: tuple[int, int] = (9, 0), **changes: Any) -> list[str]:
    arguments = call() | {"mask": None, "dropout_p": 0.0, "is_causal": False, "enable_gqa": False} | changes
    judged = OnGpu(**arguments, capability=capability)
    return [reason for rule in RULES[backend] for reason, cure in rule(judged) if cure]


@pytest.mark.parametrize(
    ("backend", "changes", "words"),
    [
        ("flash", {"mask": torch.zeros(8, 8, dtype=torch.bool)}, "takes no attn_mask"),
        ("flash", call(dtype=torch.float32), "takes float16 and bfloat16, not float32"),
        ("flash", call(head_dim=264), "takes head dims up to 256, not 264"),
        ("flash", call(value_dim=32), "takes one head dim; q has 64, v has 32"),
        (
            "flash",
            call(queries=4) | {"is_causal": True},
            "takes is_causal only for as many queries as keys; got 4 and 8",
        ),
        ("flash", {"capability": (7, 5)}, "needs compute capability 8.0, this GPU has 7.5"),
        ("flash", call(keys=0), "takes at least one query and one key"),
        ("cudnn", call(dtype=torch.float32), "takes float16 and bfloat16, not float32"),
        ("cudnn", call(head_dim=68), "takes head dims that are multiples of 8, not 68"),
        ("cudnn", call(head_dim=160) | {"capability": (8, 0)}, "takes head dims up to 128, not 160"),
        ("cudnn", call(keys=1), "takes more than one key"),
        ("efficient", call(head_dim=68), "takes head dims that are multiples of 8, not 68"),
        ("efficient", call(kv_heads=2), "q has 4 heads, k has 2"),
        ("math", call(kv_heads=3) | {"enable_gqa": True}, "4 heads of q are no multiple of the 3 of k"),
        (
            "math",
            {"mask": torch.zeros(8, 8, dtype=torch.bool), "is_causal": True},
            "attn_mask and is_causal exclude each other",
        ),
        ("efficient", {"k": torch.zeros(1, 4, 8, 64)}, "takes q, k, v of one dtype; got bfloat16, float32"),
        ("math", {"k": torch.zeros(1, 4, 8, 32, dtype=torch.bfloat16)}, "q has head dim 64, k has 32"),
        ("efficient", {"mask": torch.zeros(8, 8)}, "takes a mask of bool or bfloat16; got float32"),
        (
            "efficient",
            {name: torch.zeros(4, 8, 64, dtype=torch.bfloat16) for name in "qkv"},
            "takes 4 dimensions [batch, heads, tokens, head_dim]; q, k, v have 3, 3, 3",
        ),
        (
            "efficient",
            {"v": torch.zeros(1, 4, 64, 8, dtype=torch.bfloat16).transpose(2, 3)},
            "takes head dims with stride 1; v differ",
        ),
    ],
)
def test_each_refusal_on_a_gpu(backend: str, changes: dict[str, Any], words: str) -> None:
    assert words in reasons_on_gpu(backend, **changes)


def test_nothing_to_refuse_on_a_gpu() -> None:
    for backend in RULES:
        assert reasons_on_gpu(backend) == []
    assert reasons_on_gpu("cudnn", **call(head_dim=160)) == [], "a 9.0 takes 256"


def test_cudnn_in_deterministic_mode() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        assert reasons_on_gpu("cudnn") == ["is left out in deterministic mode"]
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("arguments", "chosen"),
    [
        (call(), "flash"),
        (call() | {"is_causal": True}, "flash"),
        (call(dtype=torch.float32) | {"attn_mask": torch.zeros(8, 8)}, "flash"),
        (call() | {"dropout_p": 0.1}, "math"),
        (call(value_dim=32), "math"),
        (call(kv_heads=2) | {"enable_gqa": True}, "flash"),
    ],
)
def test_the_choice_on_a_cpu_is_torchs(arguments: dict[str, Any], chosen: str) -> None:
    said = explain_sdpa(**arguments)
    assert said.chosen == chosen
    assert said.verdict(chosen).runs
    if chosen == "math":
        assert not said.verdict("flash").runs
    q, k, v = (arguments.pop(name) for name in "qkv")
    backend = {"flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH}[chosen]
    with sdpa_kernel([backend]):
        scaled_dot_product_attention(q, k, v, **arguments)


def test_gpu_kernels_on_a_cpu() -> None:
    said = explain_sdpa(**call())
    for backend in ("cudnn", "efficient"):
        assert said.verdict(backend).reasons[0] == (
            "is a kernel for GPUs, and q is on cpu",
            "move q, k, v to a GPU: q.to('cuda')",
        )
    assert "torch takes flash" in str(said)


@pytest.fixture
def only_cudnn() -> Iterator[None]:
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):
        yield


@pytest.mark.usefixtures("only_cudnn")
def test_what_is_switched_off_says_how_to_switch_it_on() -> None:
    said = explain_sdpa(**call())
    for backend, switch in (("flash", "enable_flash_sdp"), ("math", "enable_math_sdp")):
        reason, cure = said.verdict(backend).reasons[0]
        assert reason == "is switched off"
        assert cure == f"torch.backends.cuda.{switch}(True), or leave the sdpa_kernel() block that excludes it"
    assert said.chosen is None
    assert "torch can run none of them" in str(said)


def test_every_reason_is_told_not_only_the_first() -> None:
    reasons = [reason for reason, _ in explain_sdpa(**call(head_dim=68, keys=1)).verdict("cudnn").reasons]
    assert len(reasons) == 3


def test_it_takes_tensors() -> None:
    with pytest.raises(ArgumentError, match="takes the tensors q, k, v"):
        onegpu.explain_sdpa(1, 2, 3)  # type: ignore[arg-type]


def test_plain_values() -> None:
    values = explain_sdpa(**call()).to_dict()
    assert [row["backend"] for row in values["backends"]] == ["flash", "cudnn", "efficient", "math"]


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "arguments",
    [call(), call() | {"is_causal": True}, call(dtype=torch.float32), call(head_dim=72), call(queries=1)],
    ids=["half", "causal", "float32", "72", "one query"],
)
def test_on_a_gpu_a_backend_that_can_run_runs_and_one_that_cannot_does_not(arguments: dict[str, Any]) -> None:
    given = {key: value.cuda() if isinstance(value, torch.Tensor) else value for key, value in arguments.items()}
    said = explain_sdpa(**given)
    kinds = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "math": SDPBackend.MATH,
    }
    q, k, v = (given.pop(name) for name in "qkv")
    for backend, kind in kinds.items():
        verdict = said.verdict(backend)
        with sdpa_kernel([kind]):
            if verdict.runs:
                scaled_dot_product_attention(q, k, v, **given)
            else:
                assert verdict.reasons
                with pytest.raises(RuntimeError):
                    scaled_dot_product_attention(q, k, v, **given)
