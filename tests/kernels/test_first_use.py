"""What libraries are used for first is what decoders do, sized as the model is; off a GPU nothing is begun."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from onegpu.decoder import prove
from onegpu.kernels import first_use
from onegpu.kernels.first_use import FirstUse, begin_for

CPU = torch.device("cpu")


class Tiny(nn.Module):
    """What is asked of a model."""

    dtype = torch.bfloat16

    def __init__(self) -> None:
        super().__init__()
        text = SimpleNamespace(hidden_size=64, num_attention_heads=4, num_key_value_heads=2)
        self.config = SimpleNamespace(get_text_config=lambda: text)
        self.up = nn.Linear(64, 96, dtype=self.dtype)
        self.more = nn.Linear(64, 96, dtype=self.dtype)
        self.down = nn.Linear(96, 64)

    def can_generate(self) -> bool:
        return True


def test_nothing_is_begun_off_a_gpu() -> None:
    ran: list[int] = []
    started = FirstUse(CPU)
    started.begin(lambda: ran.append(1))
    started.wait()
    assert ran == []
    assert begin_for(Tiny()).threads == []


def test_sizes_come_once_with_a_weight_where_it_is_in_the_dtype() -> None:
    model = Tiny()
    found = first_use.weights_by_size(model, torch.bfloat16)
    assert set(found) == {(96, 64), (64, 96)}
    weight = found[96, 64]
    assert weight is not None
    assert weight.data_ptr() == model.up.weight.data_ptr()
    assert found[64, 96] is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_every_task_is_what_torch_can_do(dtype: torch.dtype) -> None:
    weights = first_use.weights_by_size(Tiny(), dtype)
    first_use.products(weights, (3, 1), dtype, CPU)
    first_use.attention(4, 2, 16, 9, dtype, CPU)
    first_use.attention(4, 4, 16, 9, dtype, CPU)
    first_use.layers(64, 16, dtype, CPU)
    first_use.proofs(dtype, CPU)
    first_use.choices(CPU)


def test_what_is_too_large_is_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[tuple[int, ...]] = []
    made = torch.empty

    def note(*size: Any, **options: Any) -> torch.Tensor:
        sizes.append(size)
        return made(*size, **options)

    monkeypatch.setattr(first_use.torch, "empty", note)
    first_use.products({(2**15, 2**14): None, (8, 4): None}, (2,), torch.float32, CPU)
    assert sizes == [(8, 4), (2, 4)]


def test_rows_are_those_of_proofs() -> None:
    width = max(prove.GPU_LENGTHS) + prove.STEPS
    assert width == first_use.PROOF_TOKENS
    assert (len(prove.GPU_LENGTHS) * width, 2) == first_use.PROOF_ROWS


def test_launchers_are_those_of_operators() -> None:
    source = "".join(path.read_text() for path in Path(first_use.__file__).parent.glob("*_ops.py"))
    source += (Path(first_use.__file__).parent / "decode_products.py").read_text()
    source += (Path(first_use.__file__).parent / "ops.py").read_text()
    for name in first_use.LAUNCHERS:
        assert f'cuda="onegpu.kernels.{name}"' in source


@pytest.mark.gpu
def test_on_a_gpu_no_task_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    failed: list[BaseException] = []

    def run(self: FirstUse, task: Any) -> None:
        try:
            with torch.no_grad(), torch.cuda.device(self.device):
                task()
        except Exception as error:
            failed.append(error)

    monkeypatch.setattr(FirstUse, "run", run)
    libraries = begin_for(Tiny().cuda())
    assert len(libraries.threads) == 6
    libraries.wait()
    torch.cuda.synchronize()
    assert failed == []
    assert libraries.threads == []
