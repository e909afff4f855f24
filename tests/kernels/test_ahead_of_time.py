"""Every kernel compiles for every GPU family, without register spills and within its shared memory, on any machine."""

from __future__ import annotations

import pytest

from kernels.program import results_of

# Bytes of shared memory that one program may have.
SHARED = {
    "75": 65536,
    "80": 166912,
    "86": 101376,
    "89": 101376,
    "90": 232448,
    "120": 101376,
    "gfx942": 65536,
    "gfx1100": 65536,
}
# Turing has no int8 `tl.dot`, and a slow one in 16 bit; the launchers do not use it there.
NUM_CASES = {"75": 18, "90": 30, "gfx942": 29}


@pytest.fixture(scope="module")
def results() -> list[dict]:
    return results_of("ahead_of_time.py", *SHARED)


@pytest.mark.slow
@pytest.mark.parametrize("arch", SHARED)
def test_compiles(arch: str, results: list[dict]) -> None:
    mine = [result for result in results if result["arch"] == arch]
    assert len(mine) == NUM_CASES.get(arch, 16)
    assert not [result for result in mine if "error" in result]
    assert not [result for result in mine if result["spilled"]]
    assert not [result for result in mine if result["shared"] > SHARED[arch]]


@pytest.mark.slow
def test_rows_are_quantized_side_by_side(results: list[dict]) -> None:
    """As many programs as the launcher counts on have room in a Hopper's 64 Ki registers."""
    whole = [result for result in results if result["case"] in ("quantize rows 4096 True", "quantize rows 14336 True")]
    assert len([result for result in whole if result["arch"] == "90"]) == 2
    assert not [result for result in whole if result["arch"] == "90" and result["registers"] > 64]
