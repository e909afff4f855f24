"""The benchmark's arithmetic, and that it measures the same work for everyone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from onegpu.bench import encode as bench
from onegpu.encoder.optimize import encoder_report
from onegpu.errors import ConfigError


def test_lengths_are_those_of_the_anchors() -> None:
    lengths = bench.draw_lengths(512, 130, 512)
    assert lengths == bench.draw_lengths(512, 130, 512)
    assert min(lengths) >= 8
    assert max(lengths) <= 512
    assert np.mean(lengths) == pytest.approx(124, abs=3)
    texts = bench.make_texts(lengths, 64, 1000, torch.device("cpu"))
    assert texts.tokens == sum(lengths) == sum(int(b["attention_mask"].sum()) for b in texts.batches)
    assert texts.padding == pytest.approx(0.73, abs=0.01)
    ordered = bench.make_texts(sorted(lengths), 64, 1000, torch.device("cpu"))
    assert ordered.padding < 0.3
    assert ordered.tokens == texts.tokens


def test_work_is_counted_for_real_tokens() -> None:
    model = bench.random_model("minilm-l6", torch.float32, torch.device("cpu"))
    weights = 6 * (4 * 384 * 384 + 2 * 384 * 1536)
    assert bench.work_of(model, [10, 3]) == 2 * weights * 13 + 4 * 384 * 6 * (100 + 9)


def test_an_unknown_shape() -> None:
    with pytest.raises(ConfigError, match="no shape is called 'bert-huge'"):
        bench.random_model("bert-huge", torch.float32, torch.device("cpu"))


def test_compare() -> None:
    device = torch.device("cpu")
    model = bench.random_model("minilm-l6", torch.float32, device)
    sets = {"random": bench.make_texts([4, 9, 2, 3], 2, 1000, device)}
    said: list[str] = []
    rows = bench.compare_order(model, sets, 1e9, runs=2, warm_up=1, variants=True, progress=said.append)
    assert [row.contender for row in rows] == ["transformers sdpa", "onegpu"]
    assert encoder_report(model) is None
    for row in rows:
        assert row.padding == pytest.approx(1 - 18 / 24)
        assert row.tokens_per_second == pytest.approx(18 / (row.milliseconds / 1e3))
        assert row.share == pytest.approx(bench.work_of(model, [4, 9, 2, 3]) / 1e9 / (row.milliseconds / 1e3))
        assert row.fastest <= row.milliseconds <= row.slowest
        assert row.host_ms > 0
    assert rows[0].largest_difference == 0
    assert rows[1].largest_difference is not None
    assert rows[1].largest_difference < 1e-5
    assert "warming up onegpu" in said


def test_nested_tensors_take_part() -> None:
    device = torch.device("cpu")
    model = bench.random_model("minilm-l6", torch.float32, device)
    batch = bench.make_texts([4, 9], 2, 1000, device).batches[0]
    with torch.inference_mode():
        assert bench.nested(model)(batch).shape == (2, 9, 384)


def test_covered_time() -> None:
    assert bench.covered([(0, 2), (1, 3), (5, 6), (5.5, 5.75)]) == 4
    assert bench.covered([]) == 0


@pytest.mark.gpu
def test_kernels_take_no_longer_than_the_round() -> None:
    device = torch.device("cuda")
    model = bench.random_model("minilm-l6", torch.float16, device)
    sets = {"random": bench.make_texts([64] * 32, 16, 1000, device)}
    rows = bench.compare_order(model, sets, 1e12, runs=3, gaps=True)
    for row in rows:
        assert row.kernel_ms is not None
        assert 0 < row.kernel_ms <= 1.5 * row.slowest


def test_cosine() -> None:
    a, b = np.array([[1.0, 0.0], [1.0, 1.0]]), np.array([[2.0, 0.0], [1.0, 0.0]])
    assert bench.smallest_cosine(a, b) == pytest.approx(0.5**0.5)
