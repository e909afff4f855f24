"""The operators of a decode step as torch sees them, and what they refuse."""

from __future__ import annotations

import pytest
import torch

from kernels.cases import DTYPES, normal
from onegpu.errors import ArgumentError, DeviceError
from onegpu.formats import rowwise
from onegpu.kernels import linear_8bit_rows, linear_16bit

OPS = torch.ops.onegpu
TAILS = (
    (),
    (normal(6, seed=8),),
    (None, normal(2, 3, 6, seed=9)),
    (normal(6, seed=8), normal(2, 3, 3, seed=9), "gelu_tanh", True, True),
)


def weight_8bit() -> tuple[torch.Tensor, torch.Tensor]:
    codes, row_stats, _ = rowwise.quantize_rows(normal(6, 16))
    return codes, row_stats


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_schemas(tail: tuple, dtype: torch.dtype) -> None:
    """`opcheck`: schema, fake implementation, tracing with static and dynamic shapes."""
    x = normal(2, 3, 16, dtype=dtype)
    tail = tuple(t.to(dtype) if isinstance(t, torch.Tensor) else t for t in tail)
    torch.library.opcheck(OPS.linear_16bit.default, (x, normal(6, 16, dtype=dtype), *tail))
    torch.library.opcheck(OPS.linear_8bit_rows.default, (x, *weight_8bit(), *tail))


@pytest.mark.parametrize("rest", [(1e-6,), (1e-6, 1.0, True)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_schema_of_rms_norm(rest: tuple, dtype: torch.dtype) -> None:
    torch.library.opcheck(OPS.rms_norm.default, (normal(2, 3, 16, dtype=dtype), normal(16, dtype=dtype), *rest))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"weight": normal(6, 15)},
            r"weight must be float32 \[N, 16\] for x of shape \[2, 16\]; got float32 \[6, 15\]",
        ),
        ({"weight": normal(6, 16).half()}, r"got float16 \[6, 16\]"),
        ({"weight": normal(0, 16)}, r"got float32 \[0, 16\]"),
        ({"x": normal(2, 16).double()}, "x must be bfloat16, float16 or float32; got float64"),
        ({"bias": normal(5)}, r"bias must be floating point \[6\]; got float32 \[5\]"),
        ({"residual": normal(2, 5)}, r"residual must be torch.float32 \[2, 6\], like the result"),
        ({"activation": "tanh"}, "activation must be None or one of 'silu'"),
        ({"gated": True}, "gated needs an activation"),
    ],
)
def test_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        linear_16bit(**{"x": normal(2, 16), "weight": normal(6, 16), **changes})  # type: ignore[arg-type]


def test_refused_8bit() -> None:
    codes, row_stats = weight_8bit()
    with pytest.raises(ArgumentError, match=r"linear_8bit_rows: codes must be int8 \[N, 16\].*got float32"):
        linear_8bit_rows(normal(2, 16), codes.float(), row_stats)
    with pytest.raises(ArgumentError, match=r"row_stats must be float32 \[6\].*got float32 \[5\]"):
        linear_8bit_rows(normal(2, 16), codes, row_stats[:5])
    with pytest.raises(DeviceError, match="on one device"):
        linear_8bit_rows(normal(2, 16), codes, row_stats.to("meta"))
    with pytest.raises(DeviceError, match="residual on meta"):
        linear_8bit_rows(normal(2, 16), codes, row_stats, residual=normal(2, 6).to("meta"))
