"""The page that people read."""

from __future__ import annotations

from dataclasses import replace

import pytest

from onegpu.memory import FitReport, FormatFit, find_gpu
from onegpu.memory.report import billions

ROW = FormatFit("nf4", 5 << 30, 1 << 30, 1 << 29, 13 << 29, True, 9000, 120.4, "RTX 3070", "onegpu run m")
REPORT = FitReport(
    "m", "llama, 2 layers", "config.json alone", 8 * 10**9, 8 * 10**9, 4096, 1, "16bit", None, [ROW], None
)


def test_a_row_that_fits() -> None:
    page = str(replace(REPORT, gpu=find_gpu("H100"), recommended="nf4", notes=["mind the gap"]))
    assert "nf4        5.00   1.00       0.50      6.50  yes            9000    120" in page
    assert "run it: onegpu run m" in page
    assert page.endswith("note: mind the gap")


def test_the_speed_of_what_does_not_fit_is_not_shown() -> None:
    page = str(replace(REPORT, gpu=find_gpu("H100"), formats=[replace(ROW, fits=False)]))
    assert "no             9000      -" in page
    assert "no format fits" in page


def test_without_a_gpu() -> None:
    page = str(replace(REPORT, formats=[replace(ROW, fits=None, max_context=None, tokens_per_second=None)]))
    assert "no GPU here" in page
    assert "RTX 3070" in page
    assert "run it" not in page


@pytest.mark.parametrize(("count", "words"), [(8_030_261_248, "8.03 B"), (134_515_008, "134.5 M"), (0, "0 M")])
def test_counts(count: int, words: str) -> None:
    assert billions(count) == words
