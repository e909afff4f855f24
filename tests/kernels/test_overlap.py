"""Which devices let a kernel begin before the one in front has ended."""

from __future__ import annotations

import pytest
import torch


def test_other_devices_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    overlap = pytest.importorskip("onegpu.kernels.overlap")
    gpu = torch.device("cuda", 0)
    for capability, expected in (((8, 9), False), ((9, 0), True), ((12, 0), True)):
        monkeypatch.setattr(overlap, "capability", lambda _, found=capability: found)
        assert overlap.overlaps(gpu, True) == expected
        assert not overlap.overlaps(gpu, False)
        assert not overlap.overlaps(torch.device("cpu"), True)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert not overlap.overlaps(gpu, True)
