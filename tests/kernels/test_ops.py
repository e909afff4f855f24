"""The operators as torch sees them: schemas, refusals, shapes under tracing, gradients; and what importing costs."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import onegpu.kernels
from kernels.cases import DTYPES, normal, weight_4bit
from onegpu.errors import ArgumentError, ConfigError, DeviceError
from onegpu.formats import rowwise
from onegpu.kernels import dequantize_4bit, linear_4bit, linear_8bit, quantize_4bit, quantize_8bit_rows

OPS = torch.ops.onegpu


def weight_8bit(N: int, K: int) -> tuple[torch.Tensor, torch.Tensor]:
    codes, row_stats, _ = rowwise.quantize_rows(normal(N, K, seed=7))
    return codes, row_stats


class TestSchemas:
    """`opcheck`: schema, fake implementation, autograd registration, tracing with static and dynamic shapes."""

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("importance", [False, True])
    def test_quantize_4bit(self, dtype: torch.dtype, importance: bool) -> None:
        extra = (True, torch.rand(13)) if importance else ()
        torch.library.opcheck(OPS.quantize_4bit.default, (normal(5, 13, dtype=dtype), "nf4", 64, *extra))

    @pytest.mark.parametrize("nested", [False, True])
    def test_dequantize_4bit(self, nested: bool) -> None:
        weight = weight_4bit(5, 13, nested=nested)
        args = (weight.packed, weight.absmax, [5, 13], torch.bfloat16, "nf4", 64, *weight.nested)
        torch.library.opcheck(OPS.dequantize_4bit.default, args)

    @pytest.mark.parametrize("nested", [False, True])
    @pytest.mark.parametrize("with_bias", [False, True])
    def test_linear_4bit(self, nested: bool, with_bias: bool) -> None:
        weight = weight_4bit(6, 32, nested=nested)
        x = normal(2, 3, 32).requires_grad_()
        bias = normal(6).requires_grad_() if with_bias else None
        torch.library.opcheck(OPS.linear_4bit.default, (x, weight.packed, weight.absmax, bias, *weight.args))

    @pytest.mark.parametrize("threshold", [0.0, 1.5])
    def test_quantize_8bit_rows(self, threshold: float) -> None:
        torch.library.opcheck(OPS.quantize_8bit_rows.default, (normal(4, 9), threshold))

    @pytest.mark.parametrize("threshold", [0.0, 1.5])
    def test_linear_8bit(self, threshold: float) -> None:
        x, bias = normal(2, 3, 16).requires_grad_(), normal(6).requires_grad_()
        torch.library.opcheck(OPS.linear_8bit.default, (x, *weight_8bit(6, 16), bias, threshold))

    def test_callables_are_the_public_names(self) -> None:
        for name in onegpu.kernels.__all__:
            assert callable(getattr(onegpu.kernels, name))


class TestRefusals:
    """A wrong argument is named, with what was expected and what came, before anything runs."""

    def linear(self, **changes: object) -> torch.Tensor:
        nested = changes.pop("nested", False)
        weight = weight_4bit(6, 33, nested=nested)
        given = {
            "x": normal(2, 33),
            "packed": weight.packed,
            "absmax": weight.absmax,
            "bias": None,
            "out_features": 6,
            "quant_type": "nf4",
            "blocksize": 64,
        }
        given.update(zip(("nested_absmax", "nested_code", "nested_offset"), weight.nested, strict=False))
        given.update(changes)
        return linear_4bit(**given)  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"x": torch.zeros(2, 33, dtype=torch.float64)}, "x must be bfloat16, float16 or float32; got float64"),
            ({"x": torch.zeros(())}, r"x must have shape \[\.\.\., K\] with K > 0; got \[\]"),
            ({"x": torch.zeros(4, 0)}, r"K > 0; got \[4, 0\]"),
            ({"x": torch.zeros(2, 34)}, r"packed must be uint8 \[102\] for a weight of shape \[6, 34\]; got .* \[99\]"),
            ({"packed": torch.zeros(98, dtype=torch.uint8)}, r"packed must be uint8 \[99\].*got uint8 \[98\]"),
            ({"packed": torch.zeros(99, 1, dtype=torch.uint8)}, r"got uint8 \[99, 1\]"),
            ({"packed": torch.zeros(99, dtype=torch.int8)}, "got int8"),
            ({"absmax": torch.zeros(3)}, r"absmax must be float32 \[4\] .*size 64, without nested.*got float32 \[3\]"),
            ({"absmax": torch.zeros(4, dtype=torch.float16)}, r"got float16 \[4\]"),
            ({"absmax": torch.zeros(4, dtype=torch.uint8)}, r"without nested scales; got uint8 \[4\]"),
            ({"bias": torch.zeros(5)}, r"bias must be floating point \[6\]; got float32 \[5\]"),
            ({"bias": torch.zeros(6, dtype=torch.int32)}, "got int32"),
            ({"out_features": 0}, "out_features must be at least 1; got 0"),
            ({"nested_code": torch.zeros(256)}, "nested_absmax, nested_offset came as None"),
            ({"nested": True, "nested_offset": None}, "go together; nested_offset came as None"),
            ({"nested": True, "absmax": torch.zeros(4)}, r"absmax must be uint8 \[4\].*with nested.*; got float32"),
            ({"nested": True, "nested_absmax": torch.zeros(2)}, r"nested_absmax must be float32 \[1\].*float32 \[2\]"),
            ({"nested": True, "nested_code": torch.zeros(16)}, r"nested_code must be float32 \[256\]"),
            ({"nested": True, "nested_offset": torch.zeros(1)}, r"scalar tensor \[\]; got float32 \[1\]"),
        ],
    )  # fmt: skip
    def test_linear_4bit(self, changes: dict[str, object], words: str) -> None:
        with pytest.raises(ArgumentError, match=words):
            self.linear(**changes)

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"quant_type": "nf5"}, "quant_type must be one of 'nf4', 'fp4'; got 'nf5'"),
            ({"quant_type": "int8"}, "got 'int8'"),
            ({"blocksize": 48}, "blocksize must be one of 32, 64, .*; got 48"),
        ],
    )
    def test_names(self, changes: dict[str, object], words: str) -> None:
        with pytest.raises(ConfigError, match=words):
            self.linear(**changes)
        weight = weight_4bit(6, 33)
        names = {"quant_type": "nf4", "blocksize": 64, **changes}
        with pytest.raises(ConfigError, match=words):
            quantize_4bit(normal(4, 4), **names)
        with pytest.raises(ConfigError, match=words):
            dequantize_4bit(weight.packed, weight.absmax, (6, 33), torch.float32, **names)

    @pytest.mark.parametrize("name", ["packed", "absmax", "bias"])
    def test_devices(self, name: str) -> None:
        weight = weight_4bit(6, 33)
        given = {"packed": weight.packed, "absmax": weight.absmax, "bias": torch.zeros(6)}
        with pytest.raises(DeviceError, match=f"on one device; .* is on cpu, {name} on meta"):
            self.linear(**{name: given[name].to("meta")})

    def test_dequantize_4bit(self) -> None:
        weight = weight_4bit(6, 33)
        with pytest.raises(ArgumentError, match="dtype must be bfloat16, float16 or float32; got float64"):
            dequantize_4bit(weight.packed, weight.absmax, (6, 33), torch.float64, "nf4", 64)
        with pytest.raises(ArgumentError, match=r"must not have negative sizes; got \[-6, -33\]"):
            dequantize_4bit(weight.packed, weight.absmax, (-6, -33), torch.float32, "nf4", 64)

    def test_quantize_4bit(self) -> None:
        with pytest.raises(ArgumentError, match="weight must be bfloat16, float16 or float32; got int64"):
            quantize_4bit(torch.zeros(4, 4, dtype=torch.int64), "nf4", 64)
        with pytest.raises(ArgumentError, match="importance was given without scale_search"):
            quantize_4bit(normal(4, 4), "nf4", 64, importance=torch.ones(4))
        with pytest.raises(ArgumentError, match=r"importance must be float32 \[4\] or \[3, 4\]; got float32 \[3\]"):
            quantize_4bit(normal(3, 4), "nf4", 64, True, torch.ones(3))

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"codes": torch.zeros(6, 17, dtype=torch.int8)}, r"codes must be int8 \[N, 16\] .*got int8 \[6, 17\]"),
            ({"codes": torch.zeros(6, 16)}, "got float32"),
            ({"row_stats": torch.zeros(5)}, r"row_stats must be float32 \[6\], one per row.*got float32 \[5\]"),
            ({"bias": torch.zeros(7)}, r"bias must be floating point \[6\]"),
            ({"threshold": -1.0}, "threshold must not be negative; got -1.0"),
            ({"threshold": float("nan")}, "threshold must not be negative; got nan"),
            ({"x": torch.zeros(3, 16, dtype=torch.int8)}, "x must be bfloat16"),
        ],
    )
    def test_linear_8bit(self, changes: dict[str, object], words: str) -> None:
        codes, row_stats = weight_8bit(6, 16)
        given = {"x": normal(2, 16), "codes": codes, "row_stats": row_stats, "bias": None, "threshold": 0.0, **changes}
        with pytest.raises(ArgumentError, match=words):
            linear_8bit(**given)  # type: ignore[arg-type]

    def test_quantize_8bit_rows(self) -> None:
        with pytest.raises(ArgumentError, match=r"x must be a matrix \[M, K\]; got shape \[2, 3, 4\]"):
            quantize_8bit_rows(normal(2, 3, 4))

    def test_tracing_refuses_too(self) -> None:
        weight = weight_4bit(6, 33)
        with pytest.raises(ArgumentError, match="packed must be uint8"):
            linear_4bit(*(t.to("meta") for t in (normal(2, 34), weight.packed, weight.absmax)), None, *weight.args)


class TestGradients:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("nested", [False, True])
    def test_linear_4bit(self, dtype: torch.dtype, nested: bool) -> None:
        weight = weight_4bit(12, 40, nested=nested)
        x = normal(2, 3, 40, dtype=dtype).requires_grad_()
        bias = normal(12, seed=1, dtype=dtype).requires_grad_()
        grad = normal(2, 3, 12, seed=2, dtype=dtype)
        linear_4bit(x, weight.packed, weight.absmax, bias, *weight.args).backward(grad)
        torch.testing.assert_close(x.grad, grad @ weight.dense(dtype), rtol=0, atol=0)
        expected = grad.double().sum(dim=(0, 1))
        torch.testing.assert_close(bias.grad.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)

    @pytest.mark.parametrize("threshold", [0.0, 1.0])
    def test_linear_8bit(self, threshold: float) -> None:
        codes, row_stats = weight_8bit(12, 40)
        x, bias = normal(5, 40).requires_grad_(), normal(12, seed=1).requires_grad_()
        grad = normal(5, 12, seed=2)
        linear_8bit(x, codes, row_stats, bias, threshold).backward(grad)
        dense = codes.double() * row_stats.double()[:, None] / 127
        torch.testing.assert_close(x.grad.double(), grad.double() @ dense, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(bias.grad, grad.sum(0))

    def test_against_finite_differences(self) -> None:
        """The product is linear in x, so a wide step measures its slope far above float32 noise."""
        weight = weight_4bit(7, 33)
        x, direction = normal(1, 33).requires_grad_(), normal(1, 33, seed=5)
        grad = normal(1, 7, seed=6)
        linear_4bit(x, weight.packed, weight.absmax, None, *weight.args).backward(grad)
        ends = [
            linear_4bit(x.detach() + step * direction, weight.packed, weight.absmax, None, *weight.args)
            for step in (-4, 4)
        ]
        slope = float(((ends[1] - ends[0]).double() / 8 * grad).sum())
        assert slope == pytest.approx(float((x.grad.double() * direction).sum()), rel=1e-4)

    def test_only_what_is_asked(self) -> None:
        weight = weight_4bit(12, 40)
        bias = normal(12).requires_grad_()
        y = linear_4bit(normal(3, 40), weight.packed, weight.absmax, bias, *weight.args)
        y.sum().backward()
        torch.testing.assert_close(bias.grad, torch.full((12,), 3.0))
        assert not linear_4bit(normal(3, 40), weight.packed, weight.absmax, None, *weight.args).requires_grad

    def test_other_bias_dtype(self) -> None:
        weight = weight_4bit(12, 40)
        bias = normal(12).requires_grad_()
        x = normal(3, 40, dtype=torch.bfloat16)
        y = linear_4bit(x, weight.packed, weight.absmax, bias, *weight.args)
        y.sum().backward()
        assert y.dtype == torch.bfloat16
        assert bias.grad.dtype == torch.float32


class TestCompile:
    @pytest.mark.parametrize("backend", ["eager", "aot_eager"])
    @pytest.mark.parametrize("dynamic", [False, True])
    def test_whole_graph(self, backend: str, dynamic: bool) -> None:
        weight = weight_4bit(12, 40, nested=True)
        codes, row_stats = weight_8bit(12, 40)

        def forward(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
            a = linear_4bit(x, weight.packed, weight.absmax, bias, *weight.args)
            return a + linear_8bit(x, codes, row_stats, None, 1.0)

        compiled = torch.compile(forward, fullgraph=True, backend=backend, dynamic=dynamic)
        for rows in (3, 5):
            ours, theirs = (normal(2, rows, 40).requires_grad_() for _ in range(2))
            bias_ours, bias_theirs = (normal(12).requires_grad_() for _ in range(2))
            y = compiled(ours, bias_ours)
            expected = forward(theirs, bias_theirs)
            torch.testing.assert_close(y, expected, rtol=0, atol=0)
            y.sum().backward()
            expected.sum().backward()
            torch.testing.assert_close(ours.grad, theirs.grad)
            torch.testing.assert_close(bias_ours.grad, bias_theirs.grad)
        torch._dynamo.reset()


IMPORTS_NOTHING_HEAVY = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in ('triton', 'numba', 'llvmlite', 'transformers'):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocked())
import torch
before = set(sys.modules)
from onegpu.kernels import linear_4bit, quantize_4bit
weight = torch.ones(4, 64)
packed, absmax = quantize_4bit(weight, 'nf4', 64)
assert torch.equal(linear_4bit(weight, packed, absmax, None, 4, 'nf4', 64), torch.full((4, 4), 64.0))
heavy = {name.partition('.')[0] for name in set(sys.modules) - before} & {'triton', 'numba', 'transformers'}
assert not heavy, heavy
"""


def test_runs_without_triton_and_numba() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORTS_NOTHING_HEAVY], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_import_loads_no_compiler() -> None:
    code = "import sys, onegpu.kernels; print(sorted({'triton', 'numba', 'llvmlite'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
