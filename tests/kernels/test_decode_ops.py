"""The operators of a decode step: their meaning against Transformers' own code, and their kernels against float64."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.cases import DTYPES, assert_no_worse, normal, run_captured
from onegpu.errors import ArgumentError, DeviceError
from onegpu.kernels import append_kv, decode_attention, rotary_decode_attention, why_not_kv_dtype
from onegpu.kernels import decode_reference as reference

OPS = torch.ops.onegpu
QUANTIZED = (torch.int8, torch.float8_e4m3fn)


@dataclass
class Cache:
    """Filled slots."""

    k: Tensor
    v: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None

    @property
    def scales(self) -> dict[str, Tensor | None]:
        return {"k_scale": self.k_scale, "v_scale": self.v_scale}

    def tensors(self) -> list[Tensor]:
        return [t for t in (self.k, self.v, self.k_scale, self.v_scale) if t is not None]

    def to(self, device: torch.device) -> Cache:
        """A copy."""
        moved = (None if t is None else t.clone().to(device) for t in (self.k, self.v, self.k_scale, self.v_scale))
        return Cache(*moved)  # type: ignore[arg-type]


def cache_of(
    slots: int,
    Hkv: int,
    capacity: int,
    D: int,
    DV: int,
    dtype: torch.dtype,
    kv: torch.dtype | None = None,
    made_on: torch.device | str = "cpu",
) -> Cache:
    k, v = (normal(slots, Hkv, capacity, n, seed=s, dtype=dtype, device=made_on) for n, s in ((D, 1), (DV, 2)))
    if kv is None:
        return Cache(k, v)
    (k, k_scale), (v, v_scale) = reference.quantize_kv(k, kv), reference.quantize_kv(v, kv)
    return Cache(k, v, k_scale, v_scale)


def attend(
    q: Tensor,
    cache: Cache,
    positions: list[int],
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """One row and head after another, in `dtype` throughout, where the cache is."""
    k = reference.dequantize_kv(cache.k, cache.k_scale).to(dtype)
    v = reference.dequantize_kv(cache.v, cache.v_scale).to(dtype)
    out = torch.empty(*q.shape[:2], v.shape[3], dtype=dtype, device=q.device)
    G = q.shape[1] // k.shape[1]
    for b, position in enumerate(positions):
        first = 0 if window is None else max(0, position + 1 - window)
        for h in range(q.shape[1]):
            keys, values = k[b, h // G, first : position + 1], v[b, h // G, first : position + 1]
            scores = keys @ q[b, h].to(dtype) * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            if sinks is not None:
                scores = torch.cat((scores, sinks[h : h + 1].to(dtype)))
            out[b, h] = scores.softmax(0)[: len(keys)] @ values
    return out


@dataclass
class Shape:
    positions: list[int]
    Hq: int = 4
    Hkv: int = 2
    D: int = 32
    DV: int | None = None
    capacity: int = 300
    kv: torch.dtype | None = None
    more: dict[str, Any] = field(default_factory=dict)


def check(
    device: torch.device,
    dtype: torch.dtype,
    shape: Shape,
    *,
    units: int | None = None,
    oracle_on: torch.device | str = "cpu",
) -> None:
    from onegpu.kernels import split_launch
    from onegpu.kernels.tickets import tickets_of

    B, DV = len(shape.positions), shape.DV or shape.D
    more = {"window": None, "softcap": None, "sinks": None} | shape.more
    cache = cache_of(B + 1, shape.Hkv, shape.capacity, shape.D, DV, dtype, shape.kv, oracle_on)
    for t in (cache.k, cache.v) if shape.kv is None else ():
        for b, position in enumerate(shape.positions):
            t[b, :, position + 1 :] = torch.nan  # beyond the end anything may stand
    q = normal(B, shape.Hq, shape.D, dtype=dtype, device=oracle_on)
    scale = shape.D**-0.5
    positions = torch.tensor(shape.positions, dtype=torch.int32, device=oracle_on)
    exact = attend(q, cache, shape.positions, scale, dtype=torch.float64, **more)
    plain = attend(q, cache, shape.positions, scale, dtype=dtype, **more)
    there = cache.to(device)
    moved = {name: t.to(device) if isinstance(t, Tensor) else t for name, t in more.items()}
    args = (q.to(device), there.k, there.v, positions.to(device), scale)
    got = split_launch.decode_attention(*args, **moved, **there.scales, units=units)
    again = split_launch.decode_attention(*args, **moved, **there.scales, units=units)
    assert torch.equal(got, again), "not deterministic"
    # Three TF32 products keep 21 bits of a float32's 24.
    # The kernel's tanh is 1 - 2 / (exp + 1): right to a bit of 1, not of its own size.
    factor = 8.0 if dtype == torch.float32 and (device.type == "cuda" or more["softcap"]) else 1.5
    assert_no_worse(got, plain, exact, factor)
    # The operator on a CPU; on a GPU it would be the kernel again.
    defined = decode_attention if exact.device.type == "cpu" else reference.decode_attention
    assert_no_worse(defined(q, cache.k, cache.v, positions, scale, **more, **cache.scales), plain, exact)
    assert not tickets_of(args[0].device).counters.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("positions", [[0], [63], [64], [299], [200, 7, 0, 65, 128]])
def test_lengths(device: torch.device, dtype: torch.dtype, positions: list[int]) -> None:
    check(device, dtype, Shape(positions))


@pytest.mark.parametrize("units", [1, 2, 5])
def test_units(device: torch.device, units: int) -> None:
    """Any number of units from B on gives the same."""
    check(device, torch.float32, Shape([299]), units=units)
    check(device, torch.float16, Shape([299, 130, 3]), units=units + 2)


@pytest.mark.parametrize(("Hq", "Hkv"), [(1, 1), (3, 3), (8, 1), (14, 2), (71, 1), (20, 1), (66, 2)])
def test_groups(device: torch.device, Hq: int, Hkv: int) -> None:
    check(device, torch.float16, Shape([150, 20], Hq=Hq, Hkv=Hkv, D=16, capacity=160))


@pytest.mark.parametrize(
    ("D", "DV"), [(8, 8), (64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (24, 40), (256, 256)]
)
def test_head_dims(device: torch.device, D: int, DV: int) -> None:
    check(device, torch.float32, Shape([99, 10], D=D, DV=DV, capacity=100))
    check(device, torch.bfloat16, Shape([99, 10], D=D, DV=DV, capacity=100))


@pytest.mark.parametrize("kv", [None, *QUANTIZED])
@pytest.mark.parametrize(
    "more",
    [
        {"window": 1},
        {"window": 70},
        {"window": 1000},
        {"softcap": 1.5},
        {"sinks": normal(4, seed=5) * 3},
        {"window": 33, "softcap": 20.0, "sinks": normal(4, seed=5)},
        {},
    ],
)
def test_what_is_done_to_scores(device: torch.device, kv: torch.dtype | None, more: dict[str, Any]) -> None:
    if device.type == "cuda" and kv is not None and why_not_kv_dtype(device, kv) is not None:
        pytest.skip("no such cache on this card")
    check(device, torch.bfloat16, Shape([250, 0, 90], kv=kv, more=more))
    check(device, torch.float32, Shape([250], kv=kv, more=more))


def test_slots_in_a_larger_cache(device: torch.device) -> None:
    """A view of the first keys of every slot is read where it lies."""
    from onegpu.kernels import split_launch

    cache = cache_of(3, 2, 400, 32, 32, torch.float32).to(device)
    q = normal(2, 4, 32).to(device)
    positions = torch.tensor([127, 3], dtype=torch.int32, device=device)
    whole = split_launch.decode_attention(q, cache.k, cache.v, positions, 0.2, units=4)
    part = split_launch.decode_attention(q, cache.k[:, :, :128], cache.v[:, :, :128], positions, 0.2, units=4)
    assert torch.equal(whole, part)


def test_positions_outside_read_nothing_outside(device: torch.device) -> None:
    from onegpu.kernels import split_launch

    cache = cache_of(3, 2, 16, 32, 32, torch.float32).to(device)
    q = normal(3, 4, 32).to(device)
    positions = torch.tensor([-1, 16, 4000], dtype=torch.int32, device=device)
    assert split_launch.decode_attention(q, cache.k, cache.v, positions, 0.2).isfinite().all()
    before = cache.to(device)
    qkv = normal(3, 8 * 32).to(device)
    out = split_launch.rotary_decode_attention(qkv, None, None, cache.k, cache.v, positions, 4, 0.2)
    assert out.isfinite().all()
    assert torch.equal(cache.k, before.k)
    assert torch.equal(cache.v, before.v)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kv", [None, *QUANTIZED])
def test_append(device: torch.device, dtype: torch.dtype, kv: torch.dtype | None) -> None:
    """Bit for bit what the definition writes, and nothing else."""
    from onegpu.kernels import kv_rows

    if device.type == "cuda" and kv is not None and why_not_kv_dtype(device, kv) is not None:
        pytest.skip("no such cache on this card")
    cache = cache_of(5, 3, 7, 40, 24, dtype, kv)
    there = cache.to(device)
    k, v = normal(4, 3, 40, seed=8, dtype=dtype) * 5, normal(4, 3, 24, seed=9, dtype=dtype)
    k[1, 0] = 0
    positions = torch.tensor([0, 6, 7, -1], dtype=torch.int32)
    append_kv(k, v, cache.k, cache.v, positions, **cache.scales)
    kv_rows.append_kv(k.to(device), v.to(device), there.k, there.v, positions.to(device), **there.scales)
    for here, written in zip(cache.tensors(), there.to(torch.device("cpu")).tensors(), strict=True):
        assert torch.equal(here.float(), written.float())
    got = reference.dequantize_kv(cache.k, cache.k_scale)[0, :, 0]
    step = 0.0 if kv is None else 1 / 254 if kv == torch.int8 else 1 / 16
    assert ((got - k[0].float()).abs() <= k[0].float().abs().amax(-1, keepdim=True) * step * 1.001).all()


class Turning:
    """Arguments of `rotary_decode_attention`, and what Transformers' own functions make of them."""

    def __init__(self, dtype: torch.dtype, positions: list[int], D: int, R: int, kv: torch.dtype | None = None) -> None:
        B, self.Hq, self.Hkv, self.D = len(positions), 4, 2, D
        self.cache = cache_of(B + 1, self.Hkv, 150, D, D, dtype, kv)
        self.qkv = normal(B, (self.Hq + 2 * self.Hkv) * D, dtype=dtype)
        self.positions = torch.tensor(positions, dtype=torch.int32)
        angles = self.positions[:, None] * 0.7 ** torch.arange(R // 2)
        angles = torch.cat((angles, angles), -1)
        self.cos, self.sin = angles.cos().to(dtype), angles.sin().to(dtype)

    def heads(self) -> tuple[Tensor, Tensor, Tensor]:
        rows = self.qkv.view(len(self.positions), -1, self.D)
        return rows[:, : self.Hq], rows[:, self.Hq : self.Hq + self.Hkv], rows[:, self.Hq + self.Hkv :]


def compare(device: torch.device, case: Turning, **options: Any) -> None:
    """The kernel beside the definition: what it appends and what it gives."""
    from onegpu.kernels import split_launch

    dtype = case.qkv.dtype
    here, there = case.cache.to(torch.device("cpu")), case.cache.to(device)
    moved = {name: t.to(device) if isinstance(t, Tensor) else t for name, t in options.items()}
    cos, sin = options.get("cos", case.cos), options.get("sin", case.sin)
    rest = {name: t for name, t in moved.items() if name not in ("cos", "sin")}
    got = split_launch.rotary_decode_attention(
        case.qkv.to(device),
        None if cos is None else cos.to(device),
        None if sin is None else sin.to(device),
        there.k,
        there.v,
        case.positions.to(device),
        case.Hq,
        0.2,
        **rest,
        **there.scales,
    ).cpu()
    same = {name: t for name, t in options.items() if name not in ("cos", "sin")}
    want = rotary_decode_attention(
        case.qkv, cos, sin, here.k, here.v, case.positions, case.Hq, 0.2, **same, **here.scales
    )
    eps = torch.finfo(dtype).eps
    # A norm's reciprocal root may differ in its last bit, and so may a rounding: of a code by one step.
    for mine, theirs, before in ((there.k.cpu(), here.k, case.cache.k), (there.v.cpu(), here.v, case.cache.v)):
        mine, theirs = mine.float(), theirs.float()
        if before.dtype == torch.int8:
            limit = torch.ones_like(theirs)
        elif before.dtype == torch.float8_e4m3fn:
            limit = theirs.abs() / 8 + 2.0**-9
        else:
            limit = theirs.abs().amax(-1, keepdim=True) * 4 * eps
        assert ((mine - theirs).abs() <= limit).all()
        assert (mine != before.float()).any(), "nothing was appended"
    for b, position in enumerate(case.positions.tolist()):
        for mine, before in ((there.k.cpu(), case.cache.k), (there.v.cpu(), case.cache.v)):
            others = [n for n in range(before.shape[2]) if n != position]
            assert torch.equal(mine[b][:, others].float(), before[b][:, others].float())
    torch.testing.assert_close(got.float(), want.float(), rtol=32 * eps, atol=32 * eps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("positions", [[0], [149], [64, 0, 127]])
def test_rotary(device: torch.device, dtype: torch.dtype, positions: list[int]) -> None:
    compare(device, Turning(dtype, positions, 32, 32))
    compare(device, Turning(dtype, positions, 32, 32), window=20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("D", "R"), [(80, 20), (96, 96), (64, 0), (24, 24), (16, 8)])
def test_partial_rotation(device: torch.device, dtype: torch.dtype, D: int, R: int) -> None:
    case = Turning(dtype, [100, 5], D, R)
    compare(device, case, interleaved=True)
    compare(device, case)
    if R == 0:
        compare(device, case, cos=None, sin=None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("wide", [False, True])
def test_norms(device: torch.device, dtype: torch.dtype, offset: float, wide: bool) -> None:
    case = Turning(dtype, [100, 5], 32, 32)
    if wide:
        case.cos, case.sin = case.cos.float(), case.sin.float()
    q_norm, k_norm = normal(32, seed=20, dtype=dtype), normal(32, seed=21, dtype=dtype)
    more = {"norm_eps": 1e-5, "norm_offset": offset, "softcap": 30.0, "sinks": normal(4, seed=22)}
    compare(device, case, q_norm=q_norm, k_norm=k_norm, **more)
    compare(device, case, k_norm=k_norm, **more)


@pytest.mark.parametrize("kv", QUANTIZED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rotary_quantized(device: torch.device, dtype: torch.dtype, kv: torch.dtype) -> None:
    if device.type == "cuda" and why_not_kv_dtype(device, kv) is not None:
        pytest.skip("no such cache on this card")
    compare(device, Turning(dtype, [100, 5], 32, 32, kv))


@pytest.mark.parametrize("dtype", DTYPES)
def test_meaning_is_that_of_transformers(dtype: torch.dtype) -> None:
    """Rotation and norm bit for bit as Llama, Qwen3, Gemma and Cohere do them."""
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    from transformers.models.cohere import modeling_cohere as cohere
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    case = Turning(dtype, [0, 7, 149], 32, 32)
    q, k, _ = case.heads()
    theirs = llama.apply_rotary_pos_emb(q, k, case.cos, case.sin, unsqueeze_dim=1)
    assert torch.equal(reference.rotate(q, case.cos, case.sin, False), theirs[0])
    assert torch.equal(reference.rotate(k, case.cos, case.sin, False), theirs[1])
    cos, sin = (t.float()[:, :16].repeat_interleave(2, -1) for t in (case.cos, case.sin))
    theirs = cohere.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1)
    assert torch.equal(reference.rotate(q, cos, sin, True), theirs[0])
    weight = normal(32, dtype=dtype)
    for kind, offset in ((Qwen3RMSNorm, 0.0), (Gemma3RMSNorm, 1.0)):
        norm = kind(32, eps=1e-6).to(dtype)
        norm.weight.data.copy_(weight)
        assert torch.equal(reference.head_norm(q, weight, 1e-6, offset), norm(q))


class TestSchemas:
    @pytest.mark.parametrize("kv", [None, torch.int8])
    def test_all(self, kv: torch.dtype | None) -> None:
        case = Turning(torch.float32, [3, 100, 0], 32, 16, kv)
        k, v = case.heads()[1:]
        cache, sinks = case.cache, normal(4)
        scales = (cache.k_scale, cache.v_scale)
        torch.library.opcheck(OPS.append_kv.default, (k, v, cache.k, cache.v, case.positions, *scales))
        args = (case.heads()[0], cache.k, cache.v, case.positions, 0.2, 9, 3.0, sinks, *scales)
        torch.library.opcheck(OPS.decode_attention.default, args)
        rows = (case.qkv, case.cos, case.sin, cache.k, cache.v, case.positions, 4, 0.2)
        norms = (False, normal(32), normal(32), 1e-6, 1.0, 9, 3.0, sinks)
        torch.library.opcheck(OPS.rotary_decode_attention.default, (*rows, *norms, *scales))

    def test_no_row(self) -> None:
        cache = cache_of(1, 2, 8, 16, 16, torch.float32)
        none = torch.zeros(0, dtype=torch.int32)
        assert decode_attention(torch.zeros(0, 4, 16), cache.k, cache.v, none, 1.0).shape == (0, 4, 16)
        out = rotary_decode_attention(torch.zeros(0, 128), None, None, cache.k, cache.v, none, 4, 1.0)
        assert out.shape == (0, 64)
        append_kv(torch.zeros(0, 2, 16), torch.zeros(0, 2, 16), cache.k, cache.v, none)


def test_what_does_not_fit_is_refused() -> None:
    cache = cache_of(2, 2, 8, 16, 16, torch.float32)
    q, at, k = normal(2, 4, 16), torch.zeros(2, dtype=torch.int32), normal(2, 2, 16)
    codes = cache.k.to(torch.int8)
    scale = torch.ones(2, 2, 8)
    attention = [
        ((q[0], cache.k, cache.v, at, 1.0), r"q must be \[B, Hq, D\]"),
        ((normal(3, 4, 16), cache.k, cache.v, at, 1.0), "at least 3 slots"),
        ((normal(2, 3, 16), cache.k, cache.v, at, 1.0), "Hq a multiple of Hkv"),
        ((q, cache.k.transpose(2, 3), cache.v.transpose(2, 3), at, 1.0), "side by side"),
        ((q, cache.k.half(), cache.v.half(), at, 1.0), "both float32, int8 or float8_e4m3fn; got float16"),
        ((q, codes, codes, at, 1.0), "int8 needs k_scale"),
        ((q, cache.k, cache.v, at, 1.0, None, None, None, scale), "float32 takes no k_scale"),
        ((q, codes, codes, at, 1.0, None, None, None, scale[:1], scale), r"k_scale must be float32 \[2, 2, 8\]"),
        ((q, cache.k, cache.v, at.long(), 1.0), r"positions must be int32 \[2\]"),
        ((q, cache.k, cache.v, at, 1.0, 0), "at least 1; got 0"),
        ((q, cache.k, cache.v, at, 1.0, None, 0.0), "softcap must be above 0"),
        ((q, cache.k, cache.v, at, 1.0, None, None, normal(3)), r"sinks must be floating point \[4\]"),
    ]
    for args, words in attention:
        with pytest.raises(ArgumentError, match=words):
            decode_attention(*args)
    wide = cache_of(2, 2, 8, 264, 264, torch.float32)
    with pytest.raises(ArgumentError, match="at most 256; got 264"):
        decode_attention(normal(2, 4, 264), wide.k, wide.v, at, 1.0)
    with pytest.raises(ArgumentError, match="heads and head dims of k"):
        append_kv(k[:, :1], k[:, :1], cache.k, cache.v, at)
    with pytest.raises(ArgumentError, match="in one floating dtype"):
        append_kv(k, k.half(), cache.k, cache.v, at)
    with pytest.raises(DeviceError, match="positions is on meta"):
        append_kv(k, k, cache.k, cache.v, at.to("meta"))
    qkv, half = normal(2, 128), normal(2, 16)
    turning = [
        ((qkv[0], None, None), r"qkv must be \[B, \(Hq \+ 2 Hkv\) \* D\]"),
        ((normal(2, 96), None, None), r"qkv \[B, 128\] for head dim 16"),
        ((qkv, half, None), "cos and sin go together"),
        ((qkv, half[:, :7], half[:, :7]), "R even and at most 16"),
        ((qkv, half.half(), half.half()), "in the dtype of qkv or float32; got float16"),
    ]
    for args, words in turning:
        with pytest.raises(ArgumentError, match=words):
            rotary_decode_attention(*args, cache.k, cache.v, at, 4, 1.0)
    with pytest.raises(ArgumentError, match=r"q_norm must be floating point \[16\]"):
        rotary_decode_attention(qkv, None, None, cache.k, cache.v, at, 4, 1.0, q_norm=normal(8))


def test_which_caches_are_fast() -> None:
    cpu = torch.device("cpu")
    for dtype in (*DTYPES, *QUANTIZED):
        assert why_not_kv_dtype(cpu, dtype) is None
    assert "not float64" in str(why_not_kv_dtype(cpu, torch.float64))


def test_units_follow_from_shapes_alone() -> None:
    from onegpu.kernels.split_launch import Config, num_units

    config = Config(64, 4, 2, 64, 2)
    assert num_units(config, 1, 8, 32768, 132) == 33
    assert num_units(config, 1, 8, 128, 132) == 2
    assert num_units(config, 32, 8, 32768, 132) == 64
    assert num_units(config, 64, 8, 40, 132) == 64


def test_tickets_are_kept_apart() -> None:
    from onegpu.kernels.tickets import NUM_TICKETS, Tickets

    tickets = Tickets(torch.device("cpu"))
    taken = [tickets.take(40) for _ in range(3)]
    places = [t.storage_offset() for t in taken]
    assert places == [0, 64, 128]
    tickets.next = NUM_TICKETS - 10
    assert tickets.take(40).storage_offset() == 0


@pytest.mark.gpu
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("kv", [None, torch.int8])
def test_captured(overlap: bool, kv: torch.dtype | None) -> None:
    """A graph serves every length: positions change, nothing is captured again."""
    case = Turning(torch.bfloat16, [3, 60, 0, 9], 32, 32, kv)
    there = case.cache.to(torch.device("cuda"))
    qkv, cos, sin = (t.cuda() for t in (case.qkv, case.cos, case.sin))
    positions = case.positions.cuda()
    other = torch.tensor([149, 5, 80, 0], dtype=torch.int32)

    def call() -> Tensor:
        return rotary_decode_attention(
            qkv, cos, sin, there.k, there.v, positions, 4, 0.2, **there.scales, overlap=overlap
        )

    got = run_captured(call, lambda: positions.copy_(other))
    # The runs before wrote their rows at the old positions.
    here = case.cache.to(torch.device("cpu"))
    args = (case.qkv, case.cos, case.sin, here.k, here.v)
    rotary_decode_attention(*args, case.positions, 4, 0.2, **here.scales)
    want = rotary_decode_attention(*args, other, 4, 0.2, **here.scales)
    torch.testing.assert_close(got.cpu().float(), want.float(), rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
def test_long_on_a_device() -> None:
    """Lengths at which every unit has work, in a ragged batch."""
    device = torch.device("cuda")
    for shape in (
        Shape([8190], Hq=32, Hkv=8, D=128, capacity=8192),
        Shape([8190, 3, 1000, 77], Hq=8, Hkv=2, D=128, capacity=8192),
    ):
        check(device, torch.bfloat16, shape, oracle_on=device)
