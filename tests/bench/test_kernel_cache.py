from __future__ import annotations

import os
from pathlib import Path

import pytest

from onegpu.bench.kernel_cache import empty_caches, is_cold
from onegpu.config import cache_folder


def test_cold_means_that_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setenv("ONEGPU_CACHE", str(tmp_path / "own"))
    assert is_cold()
    (tmp_path / "triton" / "kernel").mkdir(parents=True)
    assert not is_cold()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "other"))
    assert is_cold()
    (tmp_path / "own" / "cuda" / "kernel").mkdir(parents=True)
    assert not is_cold()


def test_an_empty_place_for_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("ONEGPU_CACHE", raising=False)
    (tmp_path / "kernel").mkdir()
    home = cache_folder()
    with pytest.raises(ValueError, match="stop"), empty_caches():
        assert is_cold()
        place = Path(os.environ["TRITON_CACHE_DIR"])
        place.mkdir()
        (place / "kernel").touch()
        assert cache_folder() != home
        assert not is_cold()
        raise ValueError("stop")
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path)
    assert cache_folder() == home
    assert not place.exists()
