"""Which kernels a block allows, what it leaves behind, and its words when none can run."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as attend

import onegpu
from onegpu.attention.sdp_kernel import BACKEND_SWITCHES
from onegpu.errors import ConfigError, UnsupportedError

# Torch tells in warnings why it refuses a backend, in its own words; they end in the error.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def state() -> dict[str, bool]:
    return {name: is_on() for name, (is_on, _) in BACKEND_SWITCHES.items()}


def only(*names: str) -> dict[str, bool]:
    return {name: name in names for name in BACKEND_SWITCHES}


@pytest.fixture(autouse=True)
def left_as_found() -> Iterator[None]:
    before = state()
    yield
    assert state() == before


def qkv(dtype: torch.dtype = torch.float32, dim: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(1, 2, 4, dim).to(dtype) for _ in range(3))  # type: ignore[return-value]


def test_a_block_allows_what_it_names() -> None:
    with onegpu.sdp_kernel(enable_flash=True, enable_math=False, enable_mem_efficient=False, enable_cudnn=False):
        assert state() == only("flash")
        assert torch._fused_sdp_choice(*qkv()) == SDPBackend.FLASH_ATTENTION.value
    with onegpu.sdp_kernel(enable_flash=False):
        assert state() == only("math", "mem_efficient", "cudnn")
        assert torch._fused_sdp_choice(*qkv()) == SDPBackend.MATH.value


def test_blocks_nest_with_each_other_and_with_torchs_own() -> None:
    outer = state()
    with onegpu.sdp_kernel(False, True, False, False):
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            with onegpu.sdp_kernel(False, True, True, False):
                assert state() == only("math", "mem_efficient")
            assert state()["flash"]
            assert not state()["math"]
        assert state() == only("math")
    assert state() == outer


def test_a_block_ends_with_an_error_too() -> None:
    with pytest.raises(KeyError), onegpu.sdp_kernel(enable_flash=False):
        raise KeyError
    with pytest.raises(RuntimeError, match="mine"), onegpu.sdp_kernel(enable_flash=False):
        raise RuntimeError("mine")


def test_it_decorates_a_function() -> None:
    @onegpu.sdp_kernel(enable_flash=False)
    def inside() -> dict[str, bool]:
        return state()

    assert inside() == inside() == only("math", "mem_efficient", "cudnn")


def test_tasks_that_end_out_of_order_leave_nothing_behind() -> None:
    seen = []

    async def task(wait: float, **allowed: bool) -> None:
        with onegpu.sdp_kernel(**allowed):
            await asyncio.sleep(wait)
            seen.append(state())

    async def both() -> None:
        first = asyncio.create_task(task(0.01, enable_flash=False))
        await asyncio.sleep(0)
        await asyncio.gather(first, task(0.05, enable_math=False))

    before = state()
    asyncio.run(both())
    # The second was entered last, and ruled until it ended.
    assert seen == [only("flash", "mem_efficient", "cudnn")] * 2
    assert state() == before


def test_threads_leave_nothing_behind() -> None:
    def work(flash: bool) -> None:
        for _ in range(200):
            with onegpu.sdp_kernel(enable_flash=flash, enable_math=True):
                attend(*qkv())

    threads = [threading.Thread(target=work, args=(bool(index % 2),)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_nothing_allowed_is_an_error_at_once() -> None:
    with pytest.raises(ConfigError, match="enable_math=True runs everywhere"), onegpu.sdp_kernel(*[False] * 4):
        pass


def test_no_kernel_tells_each_reason_and_its_cure() -> None:
    q, k, v = qkv()
    with pytest.raises(UnsupportedError) as raised, onegpu.sdp_kernel(True, False, False, False):
        attend(q, k, v, dropout_p=0.5)
    text = str(raised.value)
    assert text.startswith(("No available kernel", "No viable backend"))
    assert "sdp_kernel allows only: flash; got query (1, 2, 4, 8), key (1, 2, 4, 8), value (1, 2, 4, 8)" in text
    assert "float32 on cpu" in text
    assert "has no dropout on a CPU; got 0.5" in text
    assert "-> model.eval() sets it to 0" in text
    assert "is switched off" in text
    assert "hint: allow another kernel" in text
    assert isinstance(raised.value, RuntimeError)
    assert isinstance(raised.value.__cause__, RuntimeError)


def test_keywords_and_other_names_are_read() -> None:
    arguments = {"dropout_p": 0.25}
    tensors = dict(zip(("query", "key", "value"), qkv(), strict=True))
    with (
        pytest.raises(UnsupportedError, match=r"has no dropout on a CPU; got 0\.25"),
        onegpu.sdp_kernel(enable_math=False),
    ):
        F.scaled_dot_product_attention(
            tensors["query"],
            key=tensors["key"],
            value=tensors["value"],
            **arguments,
        )


def test_arguments_that_can_not_be_read_again_are_not_guessed() -> None:
    calls = []

    def make() -> Tensor:
        calls.append(1)
        return torch.randn(1, 2, 4, 8)

    with (
        pytest.raises(UnsupportedError, match=r"onegpu\.explain_sdpa\(q, k, v, attn_mask\)") as raised,
        onegpu.sdp_kernel(enable_math=False),
    ):
        attend(make(), make(), make(), dropout_p=0.5)
    assert "sdp_kernel allows only: flash, mem_efficient, cudnn" in str(raised.value)
    assert len(calls) == 3


def test_inside_a_transformers_model() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, attention_dropout=0.5, **sizes)).train()
    with pytest.raises(UnsupportedError, match="has no dropout on a CPU"), onegpu.sdp_kernel(enable_math=False):
        model(torch.arange(4)[None])


@pytest.mark.gpu
def test_on_a_gpu_float32_has_no_flash() -> None:
    q, k, v = (tensor.cuda() for tensor in qkv(dim=64))
    with (
        pytest.raises(UnsupportedError, match="takes float16 and bfloat16, not float32"),
        onegpu.sdp_kernel(True, False, False, False),
    ):
        attend(q, k, v)
    q, k, v = q.half(), k.half(), v.half()
    with onegpu.sdp_kernel(True, False, False, False):
        expected = attend(q, k, v)
    with onegpu.sdp_kernel(False, True, False, False):
        torch.testing.assert_close(attend(q, k, v), expected, rtol=2e-2, atol=2e-2)
