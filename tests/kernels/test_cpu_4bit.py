"""The compiled 4-bit product on a CPU: every form this processor can run, against float64."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from onegpu.config import BLOCKSIZES
from onegpu.errors import ArgumentError, ConfigError, UnsupportedError
from onegpu.formats import blockwise, codebooks, packing
from onegpu.kernels import cpu_4bit, linear_4bit, ops
from onegpu.kernels.cpu_4bit_forms import FORMS

pytest.importorskip("llvmlite", minversion="0.45")

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def runnable_forms() -> list[str]:
    from llvmlite import binding

    features = binding.get_host_cpu_features()
    return [form.name for form in FORMS.values() if all(features.get(name, False) for name in form.needs)]


@pytest.fixture(params=runnable_forms())
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Make products in this form, whatever the processor would get."""
    monkeypatch.setattr(cpu_4bit, "form_name", lambda: request.param)
    return request.param


@pytest.fixture
def keep_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Weight:
    """A random 4-bit weight and what it stands for."""

    def __init__(
        self, N: int, K: int, quant_type: str = "nf4", blocksize: int = 64, nested: bool = False, seed: int = 0
    ):
        generator = torch.Generator().manual_seed(seed)
        codes = torch.randint(0, 16, (N * K,), generator=generator, dtype=torch.uint8)
        self.packed = packing.pack(codes, pad=0)
        self.absmax = torch.rand(-(-N * K // blocksize), generator=generator) + 0.01
        self.nested: tuple[Tensor, ...] = ()
        plain = self.absmax
        if nested:
            nested_absmax = blockwise.quantize_absmax(self.absmax)
            plain = blockwise.dequantize_absmax(nested_absmax)
            self.absmax, self.nested = nested_absmax.codes, tuple(nested_absmax[1:])
        self.N, self.quant_type, self.blocksize = N, quant_type, blocksize
        values = codebooks.codebook(quant_type).double()[codes.long()]
        self.exact = (values * plain.double().repeat_interleave(blocksize)[: N * K]).view(N, K)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return cpu_4bit.linear_4bit(
            x, self.packed, self.absmax, bias, self.N, self.quant_type, self.blocksize, *self.nested
        )

    def assert_close(self, x: Tensor, bias: Tensor | None = None) -> None:
        """The sum's error by Higham's bound for the longest chain of additions, then half an ulp of the result."""
        exact = x.double() @ self.exact.T
        magnitude = x.double().abs() @ self.exact.T.abs()
        if bias is not None:
            exact, magnitude = exact + bias.double(), magnitude + bias.double().abs()
        # 8 per lane and group, one per group of at least 32 weights, the lanes, the scale and the bias.
        additions = 8 + -(-x.shape[-1] // 32) + 4 + 3
        summed = additions * 2.0**-24 * magnitude
        info = torch.finfo(x.dtype)
        rounded = (exact.abs() + summed) * info.eps / 2 + info.smallest_normal * info.eps
        y = self.linear(x, bias)
        assert y.dtype == x.dtype
        assert y.shape == (*x.shape[:-1], self.N)
        assert ((y.double() - exact).abs() <= summed + rounded).all()


def random_x(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_against_float64(form: str, dtype: torch.dtype, quant_type: str) -> None:
    for N, K in ((1, 8), (5, 64), (37, 192), (64, 576), (3, 1536)):
        if K % 64 == 0:
            weight = Weight(N, K, quant_type)
            for M in (1, 2, 3, 4, 7):
                weight.assert_close(random_x(M, K, dtype=dtype))


@pytest.mark.parametrize("M", range(1, 18))
def test_any_number_of_rows(form: str, M: int) -> None:
    Weight(11, 320).assert_close(random_x(M, 320))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_blocksizes(blocksize: int, nested: bool) -> None:
    for K in (blocksize, 3 * blocksize):
        Weight(9, K, blocksize=blocksize, nested=nested).assert_close(random_x(5, K))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("K", [8, 16, 24, 56, 80, 104, 136, 264])
def test_blocks_that_go_over_the_end_of_a_row(form: str, K: int, nested: bool) -> None:
    for N in (1, 2, 13):
        Weight(N, K, nested=nested).assert_close(random_x(3, K))


def test_nested_scales_of_several_blocks(form: str) -> None:
    weight = Weight(70, 576, nested=True)
    assert len(weight.nested[0]) > 2
    weight.assert_close(random_x(2, 576))


@pytest.mark.parametrize("bias_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bias(form: str, dtype: torch.dtype, bias_dtype: torch.dtype) -> None:
    Weight(37, 64).assert_close(random_x(3, 64, dtype=dtype), random_x(37, dtype=bias_dtype, seed=2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounds_once_to_nearest_even(form: str, dtype: torch.dtype) -> None:
    """With x = 0 the result is the float32 bias rounded: every bit must be that of torch's own rounding."""
    bits = torch.randint(-(2**31), 2**31, (4096,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    ties = torch.arange(4096, dtype=torch.int32) * 0x8000 + 0x3F000000
    half_ties = torch.arange(4096, dtype=torch.int32) * 0x1000 + 0x3F000000
    bias = torch.cat([bits, ties, half_ties]).view(torch.float32)
    bias = torch.cat([bias, torch.tensor([65519.996, 65520.0, 3.4e38, -3.4e38, torch.inf, -torch.inf, torch.nan])])
    y = Weight(len(bias), 64).linear(torch.zeros(1, 64, dtype=dtype), bias)[0]
    expected = (bias + 0.0).to(dtype)
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.nan_to_num(0.0), expected.nan_to_num(0.0))


def test_infinite_and_nan_x(form: str) -> None:
    weight = Weight(6, 192)
    x = random_x(3, 192)
    x[0, 5], x[1, 7] = torch.nan, torch.inf
    y = weight.linear(x)
    assert y[0].isnan().all()
    assert not y[1].isfinite().any()
    assert torch.equal(y[2], weight.linear(x[2:])[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("K", [192, 200])
def test_a_row_does_not_see_the_others(form: str, dtype: torch.dtype, K: int) -> None:
    weight = Weight(23, K, nested=True)
    x = random_x(17, K, dtype=dtype)
    alone = torch.cat([weight.linear(row[None]) for row in x])
    for M in range(1, 18):
        assert torch.equal(weight.linear(x[:M]), alone[:M])
    assert torch.equal(weight.linear(x[5:]), alone[5:])


def test_the_number_of_threads_changes_no_bit(form: str, keep_threads: None) -> None:
    weight = Weight(1001, 576)
    x = random_x(3, 576, dtype=torch.float32)
    torch.set_num_threads(1)
    one = weight.linear(x)
    for count in (2, 3, 5):
        torch.set_num_threads(count)
        assert torch.equal(weight.linear(x), one)
    weight.assert_close(x)


def test_threads_are_those_of_torch() -> None:
    threads = cpu_4bit._threads()
    if sys.platform != "linux":
        pytest.skip("GNU's OpenMP entry points are there on Linux")
    assert threads is not None
    import ctypes

    most = ctypes.CFUNCTYPE(ctypes.c_int)(threads.max_threads)
    assert most() == torch.get_num_threads()


def test_without_openmp(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = Weight(601, 576), random_x(2, 576)
    threaded = weight.linear(x)
    monkeypatch.setattr(cpu_4bit, "_threads", lambda: None)
    monkeypatch.setattr(cpu_4bit, "compiled", cpu_4bit.compiled.__wrapped__)
    assert torch.equal(weight.linear(x), threaded)


def test_several_python_threads_at_once(form: str) -> None:
    weights = [Weight(301, 576, seed=seed) for seed in range(4)]
    x = random_x(2, 576)
    expected = [weight.linear(x) for weight in weights]
    wrong: list[int] = []

    def work(place: int) -> None:
        for _ in range(30):
            if not torch.equal(weights[place].linear(x), expected[place]):
                wrong.append(place)

    workers = [threading.Thread(target=work, args=(place,)) for place in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_shapes_of_x(form: str) -> None:
    weight = Weight(7, 64)
    x = random_x(2, 3, 64)
    assert torch.equal(weight.linear(x), weight.linear(x.view(6, 64)).view(2, 3, 7))
    assert torch.equal(weight.linear(x[0, 0]), weight.linear(x)[0, 0])
    assert weight.linear(x[:0]).shape == (0, 3, 7)
    strided = random_x(64, 5).T
    assert not strided.is_contiguous()
    assert torch.equal(weight.linear(strided), weight.linear(strided.contiguous()))


def test_a_default_device_does_not_matter() -> None:
    weight, x = Weight(5, 64), random_x(1, 64)
    expected = weight.linear(x)
    cpu_4bit._codebook.cache_clear()
    with torch.device("meta"):
        assert torch.equal(weight.linear(x), expected)


def test_equals_dequantizing_and_multiplying() -> None:
    """The bytes as `quantize_4bit` writes them, not as this file makes them up."""
    weight = torch.randn(33, 576, generator=torch.Generator().manual_seed(3)) * 0.02
    packed, absmax = blockwise.quantize_4bit(weight, "nf4", 64)
    plain = blockwise.dequantize_4bit(packed, absmax, (33, 576), torch.float32, "nf4", 64)
    x = random_x(4, 576, dtype=torch.float32)
    y = cpu_4bit.linear_4bit(x, packed, absmax, None, 33, "nf4", 64)
    torch.testing.assert_close(y, x @ plain.T, rtol=1e-5, atol=1e-5)


class Seen(TorchDispatchMode):
    """Notes which operators pass the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[object] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operators.append(func)
        return func(*args, **(kwargs or {}))


READS_TO_THE_EDGE = """
import ctypes, mmap, torch
from onegpu.kernels import cpu_4bit, linear_4bit, ops
from onegpu.kernels.cpu_4bit_forms import FORMS

libc = ctypes.CDLL(None, use_errno=True)

def at_the_edge(data):
    # The bytes end where a page begins that nobody may read.
    page = mmap.PAGESIZE
    size = data.numel() * data.element_size()
    room = -(-size // page) * page
    memory = mmap.mmap(-1, room + page)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    part = whole[room - size : room].view(data.dtype)
    part.copy_(data)
    assert libc.mprotect(ctypes.c_void_p(whole.data_ptr() + room), page, 0) == 0
    kept.append(memory)
    return part

kept = []
cpu_4bit.form_name = lambda: {form!r}
for N, K, nested in [(3, 576, False), (4, 72, False), (5, 8, False), (3, 576, True), (9, 200, True)]:
    blocks = -(-N * K // 64)
    absmax = torch.zeros(blocks, dtype=torch.uint8) if nested else torch.ones(blocks)
    more = [at_the_edge(torch.ones(n)) for n in (-(-blocks // 256), 256)] + [torch.zeros(())] if nested else []
    x = at_the_edge(torch.ones(2 * K, dtype=torch.bfloat16)).view(2, K)
    y = cpu_4bit.linear_4bit(
        x, at_the_edge(torch.full((N * K // 2,), 0xFF, dtype=torch.uint8)), at_the_edge(absmax),
        at_the_edge(torch.ones(N)), N, "nf4", 64, *more
    )
    expected = torch.full((2, N), K + 1.0).bfloat16()
    assert torch.equal(y, expected), (N, K, y)
print("whole")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs mprotect")
@pytest.mark.parametrize("name", runnable_forms())
def test_reads_nothing_beyond_its_inputs(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", READS_TO_THE_EDGE.replace("{form!r}", repr(name))], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout.strip()) == (0, "whole"), done.stderr


class TestRefusals:
    """Each has its sentence, and the product says the same one."""

    @pytest.mark.parametrize(
        ("change", "sentence"),
        [
            ({"x": torch.zeros(1, 64, dtype=torch.float64)}, "x is torch.float64"),
            ({"x": torch.zeros(1, 64, device="meta")}, "on meta"),
            ({"x": torch.zeros(1, 60)}, "K = 60 is not a positive multiple of 8"),
            ({"x": torch.zeros(())}, "K = 0"),
            ({"blocksize": 48}, "blocksize = 48 is not one of"),
            (
                {"packed": torch.zeros(255, dtype=torch.uint8)},
                r"packed is torch.uint8 \[255\], not torch.uint8 \[256\]",
            ),
            ({"packed": torch.zeros(256, 1, dtype=torch.uint8)}, r"packed is torch.uint8 \[256, 1\]"),
            ({"packed": torch.zeros(512, dtype=torch.uint8)[::2]}, "packed is not contiguous"),
            ({"absmax": torch.zeros(7)}, r"absmax is torch.float32 \[7\], not torch.float32 \[8\]"),
            ({"absmax": torch.zeros(8, dtype=torch.bfloat16)}, "absmax is torch.bfloat16"),
            ({"bias": torch.zeros(9)}, r"bias is torch.float32 \[9\]"),
            ({"bias": torch.zeros(8, dtype=torch.float64)}, "bias is torch.float64"),
            ({"nested_absmax": torch.zeros(1)}, r"absmax is torch.float32 .* not torch.uint8"),
            (
                {"absmax": torch.zeros(8, dtype=torch.uint8), "nested_absmax": torch.zeros(1)},
                "nested_code is missing",
            ),
            ({"nested_code": torch.zeros(256)}, "nested_absmax is missing"),
        ],
    )
    def test_sentence(self, change: dict[str, object], sentence: str) -> None:
        given = {
            "x": torch.zeros(1, 64),
            "packed": torch.zeros(256, dtype=torch.uint8),
            "absmax": torch.zeros(8),
            "bias": None,
            "out_features": 8,
            "blocksize": 64,
        }
        assert cpu_4bit.why_not(**given) is None
        given |= change
        with pytest.raises(UnsupportedError, match=sentence) as caught:
            cpu_4bit.linear_4bit(**given, quant_type="nf4")
        assert cpu_4bit.why_not(**given) in caught.value.message

    @pytest.fixture
    def forget(self) -> Iterator[None]:
        def clear() -> None:
            for cached in (cpu_4bit.available, cpu_4bit.max_rows):
                cached.cache_clear()

        clear()
        yield
        clear()

    def test_without_llvmlite(self, forget: None, monkeypatch: pytest.MonkeyPatch) -> None:
        weight, x = Weight(8, 64), random_x(1, 64)
        monkeypatch.setitem(sys.modules, "llvmlite", None)
        assert not cpu_4bit.available()
        assert cpu_4bit.max_rows() == 0
        with pytest.raises(UnsupportedError, match="llvmlite is not importable"):
            weight.linear(x)

    def test_llvmlite_too_old(self, forget: None, monkeypatch: pytest.MonkeyPatch) -> None:
        import llvmlite

        monkeypatch.setattr(llvmlite, "__version__", "0.44.0")
        assert not cpu_4bit.available()
        assert "llvmlite is 0.44.0, needs 0.45 or newer" in str(
            cpu_4bit.why_not(random_x(1, 64), torch.empty(0), torch.empty(0), None, 8, 64)
        )

    def test_llvm_cannot_compile(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from llvmlite import binding

        def fail(*_: object) -> None:
            raise RuntimeError("no executable memory")

        cpu_4bit.compiled.cache_clear()
        monkeypatch.setattr(binding, "create_mcjit_compiler", fail)
        try:
            with pytest.raises(UnsupportedError, match=r"could not compile .*: no executable memory"):
                Weight(8, 64).linear(random_x(1, 64))
        finally:
            cpu_4bit.compiled.cache_clear()


class TestOperator:
    """Where `onegpu::linear_4bit` takes the compiled product, and where it does not."""

    def test_few_rows_are_compiled(self, monkeypatch: pytest.MonkeyPatch) -> None:
        weight, x = Weight(9, 64, nested=True), random_x(2, 64, dtype=torch.float32)
        calls: list[Tensor] = []
        product = cpu_4bit.linear_4bit
        monkeypatch.setattr(cpu_4bit, "linear_4bit", lambda *given: calls.append(given[0]) or product(*given))
        y = linear_4bit(x, weight.packed, weight.absmax, None, 9, "nf4", 64, *weight.nested)
        assert torch.equal(y, weight.linear(x))
        assert len(calls) == 2
        many = random_x(cpu_4bit.max_rows() + 1, 64, dtype=torch.float32)
        y = linear_4bit(many, weight.packed, weight.absmax, None, 9, "nf4", 64, *weight.nested)
        assert len(calls) == 2
        torch.testing.assert_close(y, weight.linear(many), rtol=1e-5, atol=1e-5)

    def test_what_it_refuses_is_multiplied_by_torch(self) -> None:
        weight, x = Weight(8, 60), random_x(2, 60, dtype=torch.float32)
        with pytest.raises(UnsupportedError, match="K = 60"):
            weight.linear(x)
        y = linear_4bit(x, weight.packed, weight.absmax, None, 8, "nf4", 64)
        torch.testing.assert_close(y.double(), x.double() @ weight.exact.T, rtol=1e-5, atol=1e-5)

    def test_without_gradients_it_is_called_straight(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Around the dispatcher, whose price is that of a small product; the bits are the same."""
        weight, x = Weight(9, 64), random_x(2, 64)
        given = (weight.packed, weight.absmax, None, 9, "nf4", 64)
        dispatched: list[object] = []
        operator = ops._linear_4bit
        monkeypatch.setattr(ops, "_linear_4bit", lambda *args: dispatched.append(args) or operator(*args))
        with_grad = linear_4bit(x, *given)
        assert len(dispatched) == 1
        with torch.no_grad():
            assert torch.equal(linear_4bit(x, *given), with_grad)
        with torch.inference_mode():
            assert torch.equal(linear_4bit(x, *given), with_grad)
        assert len(dispatched) == 1

    @torch.no_grad()
    def test_whoever_watches_sees_the_operator(self) -> None:
        weight, x = Weight(9, 64), random_x(2, 64)
        given = (weight.packed, weight.absmax, None, 9, "nf4", 64)
        with Seen() as seen:
            expected = linear_4bit(x, *given)
        assert torch.ops.onegpu.linear_4bit.default in seen.operators
        with FakeTensorMode() as mode:
            fakes = [mode.from_tensor(tensor) if isinstance(tensor, Tensor) else tensor for tensor in (x, *given)]
            assert linear_4bit(*fakes).shape == (2, 9)
        traced = make_fx(lambda x: linear_4bit(x, *given))(x)
        assert torch.equal(traced(2 * x), linear_4bit(2 * x, *given))
        assert not torch.equal(traced(2 * x), expected)
        scripted = torch.jit.trace(lambda x: linear_4bit(x, *given), x, check_trace=False)
        assert torch.equal(scripted(2 * x), linear_4bit(2 * x, *given))
        compiled = torch.compile(lambda x: linear_4bit(x, *given), backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(x), expected)
        with pytest.raises(ArgumentError, match="packed must be uint8"):
            linear_4bit(x, weight.packed[1:], *given[1:])
        with pytest.raises(ConfigError, match="quant_type"):
            linear_4bit(x, weight.packed, weight.absmax, None, 9, "nf5", 64)

    def test_gradient_of_x(self) -> None:
        weight, x = Weight(8, 64), random_x(2, 64, dtype=torch.float32).requires_grad_()
        linear_4bit(x, weight.packed, weight.absmax, None, 8, "nf4", 64).sum().backward()
        torch.testing.assert_close(x.grad.double(), weight.exact.sum(0).expand(2, 64), rtol=1e-5, atol=1e-5)
