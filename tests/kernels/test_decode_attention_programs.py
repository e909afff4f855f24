"""The kernels of attention compile for every GPU family, without spills and within its shared memory."""

from __future__ import annotations

import pytest

from kernels.program import results_of
from kernels.test_ahead_of_time import SHARED

# Triton keeps tensor core operands of RDNA 3 twice in registers: with 512 bytes a row they do not fit.
KNOWN_SPILLS = {("gfx1100", name) for name in ("gemma", "float32 256")}
# ptxas sets two addresses aside before the loop over keys and takes them back after it.
KNOWN_SPILLS |= {("90", "llama"), ("90", "llama rotary 32")}
# Prompts: nothing was found that fits AMD's registers with rows of 256 bytes, at sixteen keys or sixty-four.
KNOWN_SPILLS |= {(arch, f"prompt {kind} 128") for arch in ("gfx942", "gfx1100") for kind in ("bf16", "fp32")}
ARCHITECTURES = [arch for arch in SHARED if arch != "75"]  # `tl.dot` there has no tensor cores, so torch runs instead


@pytest.fixture(scope="module")
def results() -> list[dict]:
    return results_of("decode_attention_programs.py", *ARCHITECTURES)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_compiles(arch: str, results: list[dict]) -> None:
    mine = [result for result in results if result["arch"] == arch]
    assert len(mine) == (36 if arch == "90" else 14)
    assert not [result for result in mine if "error" in result]
    assert not [r["case"] for r in mine if r["spilled"] and (arch, r["case"]) not in KNOWN_SPILLS]
    assert not [result for result in mine if result["shared"] > SHARED[arch]]


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["80", "90", "120"])
def test_reads_wide_and_waits_where_it_can(arch: str, results: list[dict]) -> None:
    """Keys and values come 16 bytes a thread, past the registers; from capability 9.0 on each kernel waits once."""
    for result in results:
        if result["arch"] != arch or result["case"].startswith(("append", "prompt", "rows")):
            continue
        assert result["wide_loads"] > 0
        assert result["tensor_core"] > 0
        assert result["waits"] == (1 if arch != "80" else 0)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["80", "90", "120"])
def test_prompts_move_wide_pieces(arch: str, results: list[dict]) -> None:
    """Between products a thread reads and writes 16 bytes at once, but for pairs side by side and weights of norms."""
    rows = {r["case"]: r["narrow"] for r in results if r["arch"] == arch and r["case"].startswith("rows")}
    assert rows["rows gated"] == rows["rows llama rotary"] == 0
