from __future__ import annotations

import numpy as np
import pytest
import torch

from formats.vectors import CONSTANTS, sha256
from onegpu.errors import ConfigError
from onegpu.formats.codebooks import (
    SMALLEST_SCALE,
    ZERO_CODE,
    boundaries,
    codebook,
    dynamic_map,
    encode,
    nearest,
    reciprocal,
)

TYPES = ("nf4", "fp4")


def test_tables_are_the_recorded_bits() -> None:
    assert sha256(codebook("nf4")) == CONSTANTS["nf4_code"]["sha256"]
    assert sha256(codebook("fp4")) == CONSTANTS["fp4_code"]["sha256"]
    assert sha256(boundaries("nf4")) == CONSTANTS["nf4_thresholds"]["sha256"]
    assert sha256(boundaries("fp4")) == CONSTANTS["fp4_thresholds_cuda_abs"]["sha256"]
    assert sha256(dynamic_map()) == CONSTANTS["dynamic8_code"]["sha256"]


def test_dynamic_map_is_symmetric_about_its_zero() -> None:
    table = dynamic_map()
    assert table.shape == (256,)
    assert bool((table[1:] > table[:-1]).all())
    assert table[127] == 0
    assert table[255] == 1
    assert torch.equal(table[:127], -table[128:255].flip(0))
    assert table[0] > -1


@pytest.mark.parametrize("quant_type", TYPES)
def test_a_boundary_lies_between_its_neighbours(quant_type: str) -> None:
    values = codebook(quant_type) if quant_type == "nf4" else codebook("fp4")[:8].sort().values
    middles = (values[1:].double() + values[:-1].double()) / 2
    # FP4's compiled thresholds are up to a few units in the last place off the midpoints.
    torch.testing.assert_close(boundaries(quant_type).double(), middles, rtol=2e-6, atol=0)


@pytest.mark.parametrize("quant_type", TYPES)
def test_encode_takes_the_lower_code_at_a_boundary(quant_type: str) -> None:
    edge = boundaries(quant_type)
    above = torch.nextafter(edge, torch.tensor(2.0))
    order = torch.arange(16) if quant_type == "nf4" else torch.tensor([0, 1, 6, 7, 4, 5, 2, 3])
    assert encode(edge, quant_type).tolist() == order[: len(edge)].tolist()
    assert encode(above, quant_type).tolist() == order[1 : len(edge) + 1].tolist()


def test_fp4_keeps_the_sign_in_bit_three() -> None:
    values = torch.tensor([0.3, 0.9, 0.001, 0.0])
    assert encode(-values, "fp4").tolist() == [12, 11, 8, 0]
    assert encode(values, "fp4").tolist() == [4, 3, 0, 0]


@pytest.mark.parametrize("quant_type", TYPES)
def test_nearest_is_the_value_of_the_code(quant_type: str) -> None:
    scaled = torch.linspace(-1.2, 1.2, 4801)
    expected = codebook(quant_type)[encode(scaled, quant_type).long()]
    assert torch.equal(nearest(scaled, quant_type), expected)


@pytest.mark.parametrize("quant_type", TYPES)
def test_nearest_is_nearest(quant_type: str) -> None:
    scaled = torch.linspace(-1, 1, 20001, dtype=torch.float64)
    table = codebook(quant_type).double()
    best = (scaled[:, None] - table).abs().min(dim=1).values
    got = (scaled - nearest(scaled.float(), quant_type)).abs()
    # Off by no more than FP4's thresholds are off the midpoints.
    assert float((got - best).max()) < 2e-6


@pytest.mark.parametrize("quant_type", TYPES)
def test_zero_code_stands_for_zero(quant_type: str) -> None:
    assert codebook(quant_type)[ZERO_CODE[quant_type]] == 0
    assert encode(torch.zeros(3), quant_type).tolist() == [ZERO_CODE[quant_type]] * 3


def test_reciprocal_rounds_once_and_sends_zero_to_zero() -> None:
    scales = torch.tensor([3.0, -0.7, 1e-37, SMALLEST_SCALE, SMALLEST_SCALE / 2, 0.0])
    got = reciprocal(scales)
    expected = np.float32(1) / scales[:4].numpy()
    assert got[:4].tolist() == expected.tolist()
    assert got[4:].tolist() == [0, 0]


def test_an_unknown_type_is_named_with_its_nearest() -> None:
    with pytest.raises(
        ConfigError, match=r"quant_type must be one of 'nf4', 'fp4'; got 'nf5'[\s\S]*did you mean 'nf4'"
    ):
        codebook("nf5")
    with pytest.raises(ConfigError, match="quant_type must be"):
        boundaries("int8")
