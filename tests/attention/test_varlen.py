"""Every way to compute attention over unpadded tokens gives the same, and says why it can't where it can't."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from onegpu.attention.unpadded import AttentionView, RelativeBias, UnpaddedBatch
from onegpu.attention.varlen import BACKENDS, VarlenSpec, choose, varlen_attention
from onegpu.errors import UnsupportedError
from onegpu.kernels.encoder_ops import reference_varlen_attention

CPU = torch.device("cpu")


def mask(kind: str) -> Tensor:
    rows = torch.arange(12)[None] < torch.tensor([12, 5, 0, 5, 1])[:, None]
    if kind == "holes":
        rows[0, 4:7] = False
        rows[1, 2] = False
    return rows.flip(1) if kind == "left" else rows


def bias_of(H: int, S: int) -> RelativeBias:
    table = torch.randn(H, 2 * S - 1, generator=torch.Generator().manual_seed(1))
    return RelativeBias(table, lambda: table)


@pytest.mark.parametrize("name", ["grouped", "padded"])
@pytest.mark.parametrize("kind", ["right", "left", "holes"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("biased", [False, True])
def test_backends_agree(name: str, kind: str, causal: bool, window: int | None, biased: bool) -> None:
    batch = UnpaddedBatch.from_mask(mask(kind))
    q, k, v = torch.randn(3, batch.total, 2, 8, generator=torch.Generator().manual_seed(0))
    bias = bias_of(2, 12) if biased else None
    table = None if bias is None else bias.table
    want = reference_varlen_attention(
        q, k, v, batch.cu_seqlens, batch.positions, batch.max_seqlen, 0.3, causal, window, table
    )
    got = varlen_attention(q, k, v, AttentionView(batch, causal, window, name), 0.3, bias)
    torch.testing.assert_close(got, want, rtol=0, atol=2e-6)


def test_fewer_key_heads() -> None:
    batch = UnpaddedBatch.from_lengths([5, 3], 5)
    q, k, v = torch.randn(8, 4, 8), torch.randn(8, 2, 8), torch.randn(8, 2, 8)
    want = varlen_attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), AttentionView(batch), 1.0)
    for name in ("grouped", "padded"):
        got = varlen_attention(q, k, v, AttentionView(batch, backend=name), 1.0)
        torch.testing.assert_close(got, want, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", ["grouped", "padded"])
def test_gradients(name: str) -> None:
    batch = UnpaddedBatch.from_mask(mask("right"))
    q, k, v = (torch.randn(batch.total, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    view = AttentionView(batch, backend=name)
    assert torch.autograd.gradcheck(lambda *args: varlen_attention(*args, view, 0.3), (q, k, v), atol=1e-4)


def test_every_refusal_has_a_reason() -> None:
    cuda = torch.device("cuda", 0)
    reasons = {
        "torch_varlen": [
            (VarlenSpec(CPU, torch.float16, 64), "needs a CUDA device, the tokens are on cpu"),
            (VarlenSpec(cuda, torch.float16, 64, flash_allowed=False), "flash attention is switched off"),
            (VarlenSpec(cuda, torch.float32, 64), "takes float16 and bfloat16, not torch.float32"),
            (VarlenSpec(cuda, torch.float16, 64, has_bias=True), "takes no bias"),
            (VarlenSpec(cuda, torch.float16, 64, has_window=True, has_holes=True), "a mask has holes"),
            (VarlenSpec(cuda, torch.float16, 60), "multiples of 8 up to 256, not 60"),
        ],
        "onegpu_varlen": [
            (VarlenSpec(CPU, torch.float32, 64), "needs a CUDA device"),
            (VarlenSpec(cuda, torch.float32, 64, needs_grad=True), "has no backward"),
            (VarlenSpec(cuda, torch.float32, 160), "head dims up to 128, not 160"),
        ],
        "grouped": [
            (VarlenSpec(cuda, torch.float32, 64), "needs the lengths on the host"),
            (VarlenSpec(CPU, torch.float32, 64, lengths_on_host=True, fixed=True), "depends on the lengths"),
        ],
        "padded": [(VarlenSpec(CPU, torch.float32, 64, fixed=True), "depends on the lengths")],
    }
    assert set(reasons) == {backend.name for backend in BACKENDS}
    for backend in BACKENDS:
        for spec, sentence in reasons[backend.name]:
            assert sentence in str(backend.why_not(spec))


def test_choosing() -> None:
    assert choose(VarlenSpec(CPU, torch.float32, 64, lengths_on_host=True)).name == "grouped"
    assert choose(VarlenSpec(CPU, torch.float32, 64)).name == "padded"
    with pytest.raises(UnsupportedError, match="torch_varlen: needs a CUDA device"):
        choose(VarlenSpec(CPU, torch.float32, 64), "torch_varlen")
    with pytest.raises(UnsupportedError, match="no attention backend is called 'flash'"):
        choose(VarlenSpec(CPU, torch.float32, 64), "flash")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("D", [32, 64, 80, 96, 128])
@pytest.mark.parametrize("kind", ["right", "holes"])
def test_on_a_device(dtype: torch.dtype, D: int, kind: str) -> None:
    batch = UnpaddedBatch.from_mask(mask(kind).cuda())
    q, k, v = torch.randn(3, batch.total, 4, D, generator=torch.Generator().manual_seed(0)).to(dtype)
    for causal, window in ((False, None), (True, None), (False, 3)):
        want = reference_varlen_attention(
            q, k, v, batch.cu_seqlens.cpu(), batch.positions.cpu(), batch.max_seqlen, 0.1, causal, window
        )
        for backend in BACKENDS:
            spec = VarlenSpec(
                torch.device("cuda", 0), dtype, D, has_window=window is not None, has_holes=batch.has_holes
            )
            if backend.why_not(spec) is None:
                view = AttentionView(batch, causal, window, backend.name)
                got = varlen_attention(q.cuda(), k.cuda(), v.cuda(), view, 0.1).cpu()
                limit = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
                torch.testing.assert_close(got.float(), want.float(), rtol=0, atol=limit)
