"""The operators of prompts: their meaning against those of a decode step, their kernels against their meaning."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.cases import DTYPES, normal, run_captured
from onegpu.errors import ArgumentError, DeviceError
from onegpu.kernels import append_kv, gated_activation, rotate_and_append
from onegpu.kernels import decode_reference as reference
from onegpu.kernels.tail import ACTIVATIONS

OPS = torch.ops.onegpu
SLOTS, CAPACITY = 3, 40


def inputs(
    T: int, Hq: int, Hkv: int, D: int, R: int, dtype: torch.dtype, kv: torch.dtype | None = None, **more: Any
) -> dict[str, Any]:
    """Arguments of `rotate_and_append`, tokens of all slots mixed; `q_norm` and `k_norm` may be True."""
    generator = torch.Generator().manual_seed(T)
    places = torch.randperm(SLOTS * CAPACITY, generator=generator)[:T].to(torch.int32)
    angles = normal(T, max(R, 1), seed=3)[:, :R]
    found: dict[str, Any] = {
        "qkv": normal(T, (Hq + 2 * Hkv) * D, dtype=dtype) * 3,
        "cos": angles.cos().to(dtype) if R else None,
        "sin": angles.sin().to(dtype) if R else None,
        "k_cache": torch.zeros(SLOTS, Hkv, CAPACITY, D, dtype=kv or dtype),
        "v_cache": torch.zeros(SLOTS, Hkv, CAPACITY, D, dtype=kv or dtype),
        "slots": places // CAPACITY,
        "places": places % CAPACITY,
        "num_heads": Hq,
    }
    if kv is not None:
        found |= {name: torch.zeros(SLOTS, Hkv, CAPACITY) for name in ("k_scale", "v_scale")}
    for name in ("q_norm", "k_norm"):
        if more.pop(name, False):
            found[name] = normal(D, seed=5).to(dtype)
    return found | more


def moved(arguments: dict[str, Any], device: torch.device | str) -> dict[str, Any]:
    """A copy on a device."""
    return {name: value.clone().to(device) if isinstance(value, Tensor) else value for name, value in arguments.items()}


def written(arguments: dict[str, Any]) -> dict[str, Tensor]:
    names = ("qkv", "k_cache", "v_cache", "k_scale", "v_scale")
    return {name: arguments[name].cpu() for name in names if name in arguments}


def one_by_one(arguments: dict[str, Any]) -> dict[str, Tensor]:
    """The same by the operators of a decode step, a token at a time."""
    given = moved(arguments, "cpu")
    Hq, Hkv, D = given["num_heads"], given["k_cache"].shape[1], given["k_cache"].shape[3]
    eps, offset = given.get("norm_eps", 1e-6), given.get("norm_offset", 0.0)
    for row in range(given["qkv"].shape[0]):
        part = slice(row, row + 1)
        q, k, v = torch.split(given["qkv"][part].view(1, -1, D), [Hq, Hkv, Hkv], 1)
        angles = (None, None) if given["cos"] is None else (given["cos"][part], given["sin"][part])
        for heads, name in ((q, "q_norm"), (k, "k_norm")):
            normed = reference.head_norm(heads, given.get(name), eps, offset)
            heads.copy_(reference.rotate(normed, *angles, given.get("interleaved", False)))
        slot = int(given["slots"][row])
        cache = [given[name][slot : slot + 1] for name in ("k_cache", "v_cache")]
        scales = [given[name][slot : slot + 1] for name in ("k_scale", "v_scale") if name in given]
        append_kv(k, v, *cache, given["places"][part], *scales)
    return written(given)


def check(device: torch.device, arguments: dict[str, Any]) -> None:
    from onegpu.kernels import prompt_rotation

    expected = one_by_one(arguments)
    plain = moved(arguments, "cpu")
    rotate_and_append(**plain)
    for name, got in written(plain).items():
        assert torch.equal(got.float(), expected[name].float()), name
    there = moved(arguments, device)
    prompt_rotation.rotate_and_append(**there)
    dtype = arguments["qkv"].dtype
    has_norm = "q_norm" in arguments or "k_norm" in arguments
    for name, got in written(there).items():
        want = expected[name]
        if not has_norm:
            assert torch.equal(got.float(), want.float()), name
        elif name in ("k_scale", "v_scale", "qkv") or got.dtype == dtype:
            # A sum in another order may round a head's norm to the other side, and the products after it.
            scale = float(want.float().abs().max())
            torch.testing.assert_close(got.float(), want.float(), rtol=0, atol=4 * torch.finfo(dtype).eps * scale)
        else:
            steps = 2.0 if got.dtype == torch.int8 else 64.0
            assert float((got.float() - want.float()).abs().max()) <= steps, name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("T", "Hq", "Hkv", "D", "R"),
    [
        (1, 1, 1, 2, 2),
        (17, 4, 2, 32, 32),
        (33, 6, 2, 24, 12),
        (20, 3, 1, 80, 20),
        (5, 8, 8, 16, 0),
        (7, 4, 4, 128, 128),
    ],
)
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation(
    device: torch.device, dtype: torch.dtype, T: int, Hq: int, Hkv: int, D: int, R: int, interleaved: bool
) -> None:
    check(device, inputs(T, Hq, Hkv, D, R, dtype, interleaved=interleaved))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("R", [0, 16, 40])
def test_norms(device: torch.device, dtype: torch.dtype, offset: float, R: int) -> None:
    check(device, inputs(19, 4, 2, 40, R, dtype, q_norm=True, k_norm=True, norm_eps=1e-5, norm_offset=offset))
    check(device, inputs(19, 4, 2, 40, R, dtype, k_norm=True, norm_offset=offset))


@pytest.mark.parametrize("kv", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("norms", [False, True])
def test_caches_in_8_bit(device: torch.device, kv: torch.dtype, norms: bool) -> None:
    if kv == torch.float8_e4m3fn and device.type == "cpu":
        pytest.skip("the interpreter rounds no float8")
    check(device, inputs(21, 4, 2, 48, 32, torch.bfloat16, kv, q_norm=norms, k_norm=norms))


def test_float32_angles(device: torch.device) -> None:
    given = inputs(9, 2, 1, 32, 32, torch.bfloat16)
    angles = normal(9, 32, seed=3)
    check(device, given | {"cos": angles.cos(), "sin": angles.sin()})


def test_strides_and_nothing(device: torch.device) -> None:
    """A row may be part of a wider one, slots part of a larger cache; what was not named is not touched."""
    from onegpu.kernels import prompt_rotation

    given = inputs(11, 4, 2, 16, 8, torch.float32)
    expected = one_by_one(given)
    there = moved(given, device)
    wide = torch.zeros(11, 200, device=device)
    wide[:, 8:136] = there["qkv"]
    large = torch.zeros(SLOTS, 5, CAPACITY, 48, device=device)
    there |= {"qkv": wide[:, 8:136], "k_cache": large[:, :2, :, :16], "v_cache": large[:, 2:4, :, 16:32]}
    prompt_rotation.rotate_and_append(**there)
    for name, got in written(there).items():
        assert torch.equal(got, expected[name]), name
    assert not wide[:, :8].any()
    assert not wide[:, 136:].any()
    assert not large[..., 32:].any()
    assert not large[:, 4].any()
    empty = moved(inputs(0, 4, 2, 16, 8, torch.float32), device)
    prompt_rotation.rotate_and_append(**empty)
    rotate_and_append(**moved(empty, "cpu"))
    assert not empty["k_cache"].any()


def test_what_does_not_fit_is_refused() -> None:
    given = inputs(5, 4, 2, 16, 8, torch.float32)
    for changes, words in (
        ({"qkv": given["qkv"][:, :-1]}, r"qkv must be \[T, 128\] for 4 heads"),
        ({"qkv": given["qkv"].double()}, "qkv must be .* in a floating dtype"),
        ({"qkv": given["qkv"].T.contiguous().T}, "elements of a row side by side"),
        ({"sin": None}, "cos and sin go together"),
        ({"cos": given["cos"][:3]}, r"cos and sin must be \[5, R\], R even and at most 16"),
        ({"slots": given["slots"].long()}, r"slots must be int32 \[5\]"),
        ({"places": given["places"][:4]}, r"places must be int32 \[5\]"),
        ({"q_norm": normal(8)}, r"q_norm must be floating point \[16\]"),
        ({"k_scale": normal(SLOTS, 2, CAPACITY)}, "takes no k_scale"),
    ):
        with pytest.raises(ArgumentError, match=words):
            rotate_and_append(**(given | changes))
    with pytest.raises(DeviceError, match="all tensors must be on"):
        rotate_and_append(**(given | {"cos": given["cos"].to("meta")}))


def test_schemas() -> None:
    given = inputs(5, 4, 2, 16, 8, torch.float32, q_norm=True, k_norm=True)
    torch.library.opcheck(OPS.rotate_and_append.default, (), given)
    torch.library.opcheck(OPS.gated_activation.default, (normal(3, 10), "silu"))


ORACLES = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda t: F.gelu(t, approximate="tanh"),
    "relu": F.relu,
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(1, 2), (3, 5, 62), (2, 2048), (7, 2062), (0, 8)])
def test_gates(device: torch.device, dtype: torch.dtype, activation: str, shape: tuple[int, ...]) -> None:
    from onegpu.kernels import prompt_gate

    x = normal(*shape, dtype=dtype) * 2
    gate, up = x.double().chunk(2, -1)
    exact = ORACLES[activation](gate) * up
    tolerance = torch.finfo(dtype).eps / 2 * 1.01 + 2e-6
    for y in (prompt_gate.gated_activation(x.to(device), activation).cpu(), gated_activation(x, activation)):
        assert y.dtype == dtype
        # 1 + erf cancels where z is far below 0: right to a bit of 1, times z and up.
        torch.testing.assert_close(y.double(), exact, rtol=tolerance, atol=1e-5)


def test_gates_of_strided_rows(device: torch.device) -> None:
    from onegpu.kernels import prompt_gate

    wide = normal(6, 50).to(device)
    for x in (wide[:, 3:37], wide[::2, :20], wide[:, ::5]):
        assert torch.equal(
            prompt_gate.gated_activation(x, "silu"), prompt_gate.gated_activation(x.contiguous(), "silu")
        )


def test_bad_gates() -> None:
    with pytest.raises(ArgumentError, match="activation must be one of 'silu'"):
        gated_activation(normal(2, 4), "tanh")
    with pytest.raises(ArgumentError, match=r"x must be \[\.\.\., 2 F\]"):
        gated_activation(normal(2, 5), "silu")


@pytest.mark.gpu
def test_captured() -> None:
    given = moved(inputs(33, 32, 8, 128, 128, torch.bfloat16), "cuda")
    fresh = given["qkv"].clone()
    other = torch.randn_like(fresh)

    def call() -> Tensor:
        qkv = fresh + 0
        rotate_and_append(**(given | {"qkv": qkv}))
        return gated_activation(qkv, "silu")

    out = run_captured(call, lambda: fresh.copy_(other))
    expected = one_by_one(given | {"qkv": other})
    assert torch.equal(given["k_cache"].cpu(), expected["k_cache"])
    want = gated_activation(expected["qkv"], "silu").float()
    torch.testing.assert_close(out.cpu().float(), want, rtol=2**-7, atol=1e-4)
