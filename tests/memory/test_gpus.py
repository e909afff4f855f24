"""The table of GPUs: plausible rows, and names found as drivers and people write them."""

from __future__ import annotations

import pytest

from onegpu.errors import ConfigError
from onegpu.memory import find_gpu, known_gpus
from onegpu.memory.gpus import CONTEXT_BYTES, parse_local


def test_the_table_is_whole() -> None:
    gpus = known_gpus()
    assert len(gpus) >= 25
    assert len({gpu.name for gpu in gpus}) == len(gpus)
    for gpu in gpus:
        assert gpu.source
        assert gpu.capability
        assert gpu.bandwidth is not None
        assert 100e9 < gpu.bandwidth < 20e12, gpu
        assert gpu.tflops is not None
        assert 10 < gpu.tflops < 5000, gpu
        assert 5 * 2**30 < gpu.memory_bytes < 300 * 2**30
        assert gpu.free_bytes == gpu.memory_bytes - CONTEXT_BYTES
        assert find_gpu(gpu.name) is gpu


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("4090", "RTX 4090"),
        ("rtx4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("rtx 4070ti super", "RTX 4070 Ti Super"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"),
        ("Tesla V100-SXM2-32GB", "Tesla V100 32GB"),
        ("t4", "Tesla T4"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("AMD Instinct MI300X", "MI300X"),
    ],
)
def test_a_gpu_is_found_by_its_names(said: str, meant: str) -> None:
    assert find_gpu(said).name == meant


@pytest.mark.parametrize(
    ("said", "num_bytes"),
    [("24GiB", 24 << 30), ("24 gb", 24 << 30), ("1.5g", 3 << 29), ("600MiB", 600 << 20)],
)
def test_a_size_is_a_gpu(said: str, num_bytes: int) -> None:
    gpu = find_gpu(said)
    assert gpu.memory_bytes == num_bytes
    assert gpu.bandwidth is None


def test_an_unknown_name_is_told_the_nearest() -> None:
    with pytest.raises(ConfigError, match="no GPU called 'RTX 490' is in the table") as caught:
        find_gpu("RTX 490")
    assert "did you mean 'RTX 4090'" in caught.value.hint
    with pytest.raises(ConfigError) as caught:
        find_gpu("???")
    assert caught.value.hint == "give its memory: 24GiB"


def test_no_memory_at_all() -> None:
    with pytest.raises(ConfigError, match="a GPU has more than no memory; got '0GiB'"):
        find_gpu("0GiB")


def test_what_the_driver_says() -> None:
    known = parse_local("NVIDIA L4, 23034\nNVIDIA L4, 23034\n")
    assert known is not None
    assert known.memory_bytes == 23034 << 20, "the driver's figure stands"
    assert known.bandwidth == 300e9
    unknown = parse_local("Foo 9000, 12000\n")
    assert unknown is not None
    assert unknown.bandwidth is None
    assert parse_local("") is None
    assert parse_local("NVIDIA-SMI has failed because it couldn't communicate with the driver") is None


def test_reported_memory_is_near_what_the_table_says() -> None:
    """What `nvidia-smi` reports as memory.total, MiB, and the table's figure are within 2 %."""
    for name, reported in {
        "RTX 4090": 24564,
        "H100": 81559,
        "Tesla T4": 15360,
        "L4": 23034,
        "A100 40GB": 40960,
    }.items():
        assert find_gpu(name).memory_bytes == pytest.approx(reported * 2**20, rel=0.02), name
