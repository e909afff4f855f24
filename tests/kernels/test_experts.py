"""Products with the chosen experts' weights: operators, both kernels, and the tiles that pairs are sorted into."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from kernels.cases import DTYPES, assert_no_worse, exact_product, normal, run_captured
from onegpu.errors import ArgumentError, DeviceError, UnsupportedError
from onegpu.formats import blockwise, rowwise
from onegpu.kernels import experts_ops
from onegpu.kernels.experts_ops import experts_4bit, experts_8bit

FORMATS = ("nf4", "fp4", "nested", "int8")


@dataclass(frozen=True)
class Stack:
    """Stacked weights [E, N, K], quantized expert by expert."""

    weight_format: str
    shape: tuple[int, int, int]
    tensors: tuple[Tensor, ...]
    blocksize: int

    def to(self, device: torch.device | str) -> Stack:
        return Stack(self.weight_format, self.shape, tuple(t.to(device) for t in self.tensors), self.blocksize)

    @property
    def args(self) -> tuple:
        if self.weight_format == "int8":
            return self.tensors
        kind = "nf4" if self.weight_format == "nested" else self.weight_format
        codes, absmax, *nested = self.tensors
        return (codes, absmax, *self.shape[:2], kind, self.blocksize, *nested)

    def multiply(self, x: Tensor, ids: Tensor, module=experts_ops) -> Tensor:
        operator = module.experts_8bit if self.weight_format == "int8" else module.experts_4bit
        return operator(x, ids, *self.args)

    def dense(self, dtype: torch.dtype) -> Tensor:
        E, N, K = self.shape
        if self.weight_format == "int8":
            codes, stats = self.tensors
            return rowwise.dequantize_rows(codes.view(E * N, K), stats.view(-1), dtype).view(self.shape)
        codes, absmax, *nested = self.tensors
        if nested:
            absmax = blockwise.dequantize_absmax(blockwise.NestedAbsmax(absmax, *nested))
        kind = "nf4" if self.weight_format == "nested" else self.weight_format
        return blockwise.dequantize_4bit(codes, absmax, self.shape, dtype, kind, self.blocksize)

    def expert(self, e: int) -> Stack:
        """Expert e alone; its scales are not nested."""
        _, N, K = self.shape
        if self.weight_format == "int8":
            return Stack("int8", (1, N, K), tuple(t[e : e + 1] for t in self.tensors), 1)
        codes, absmax, *nested = self.tensors
        if nested:
            absmax = blockwise.dequantize_absmax(blockwise.NestedAbsmax(absmax, *nested))
        n = N * K
        tensors = (codes[e * n // 2 : (e + 1) * n // 2], absmax.view(self.shape[0], -1)[e])
        return Stack("nf4" if nested else self.weight_format, (1, N, K), tensors, self.blocksize)


def stack(weight_format: str, E: int, N: int, K: int, blocksize: int = 64, device: torch.device | str = "cpu") -> Stack:
    weight = normal(E, N, K, seed=E + N + K, device=device).mul_(0.05)
    if weight_format == "int8":
        codes, stats, _ = rowwise.quantize_rows(weight.view(E * N, K), 0.0)
        return Stack(weight_format, (E, N, K), (codes.view(E, N, K), stats.view(E, N)), 1)
    kind = "nf4" if weight_format == "nested" else weight_format
    packed, absmax = blockwise.quantize_4bit(weight, kind, blocksize)
    tensors = (packed, *blockwise.quantize_absmax(absmax)) if weight_format == "nested" else (packed, absmax)
    return Stack(weight_format, (E, N, K), tuple(tensors), blocksize)


def routing(T: int, k: int, E: int, seed: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """k different experts for each token; some get none, one gets many."""
    scores = torch.rand(T, E, generator=torch.Generator(device).manual_seed(seed), device=device)
    scores[:, E // 2] += 0.3
    return scores.topk(k, dim=-1).indices


def product(x: Tensor, ids: Tensor, weight: Tensor) -> Tensor:
    """Row by row, in the dtype of the arguments."""
    pairs = ids.reshape(-1).tolist()
    top_k = len(pairs) // max(1, len(x))
    rows = [
        x[s // top_k] @ weight[e].T if 0 <= e < len(weight) else x.new_zeros(weight.shape[1])
        for s, e in enumerate(pairs)
    ]
    return torch.stack(rows) if rows else x.new_zeros(0, weight.shape[1])


def assert_right(y: Tensor, x: Tensor, ids: Tensor, weights: Stack) -> None:
    exact = product(x.double(), ids, weights.dense(torch.float32).double())
    assert_no_worse(y.cpu(), product(x, ids, weights.dense(x.dtype)), exact)


class TestOperator:
    @pytest.mark.parametrize("weight_format", FORMATS)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_is_the_product(self, weight_format: str, dtype: torch.dtype) -> None:
        weights = stack(weight_format, 5, 24, 128)
        for T, k in ((1, 2), (7, 3), (0, 2)):
            x, ids = normal(T, 128, dtype=dtype), routing(T, k, 5)
            y = weights.multiply(x, ids)
            assert y.shape == (T * k, 24)
            if T:
                assert_right(y, x, ids, weights)

    @pytest.mark.parametrize("weight_format", ["nested", "int8"])
    def test_opcheck(self, weight_format: str) -> None:
        weights = stack(weight_format, 3, 8, 64)
        operator = getattr(torch.ops.onegpu, "experts_8bit" if weight_format == "int8" else "experts_4bit").default
        torch.library.opcheck(operator, (normal(4, 64), routing(4, 2, 3), *weights.args))

    def test_no_such_expert(self) -> None:
        weights = stack("nf4", 3, 8, 64)
        ids = torch.tensor([[0, 3], [-1, 2]])
        y = weights.multiply(normal(2, 64), ids)
        assert (y[1] == 0).all()
        assert (y[2] == 0).all()
        assert (y[0] != 0).any()

    def test_without_asking_which_are_chosen(self) -> None:
        """The reference's way on a device that is no CPU is the same product."""
        weights, x, ids = stack("nf4", 4, 8, 64), normal(5, 64), routing(5, 2, 4)
        dense = weights.dense(torch.float32)

        class Elsewhere(Tensor):
            device = torch.device("meta")

        y = experts_ops._expert_by_expert(x.as_subclass(Elsewhere), ids, 4, 8, lambda expert: dense[expert])
        torch.testing.assert_close(y.as_subclass(Tensor), weights.multiply(x, ids))

    def test_refusals(self) -> None:
        weights, eight = stack("nf4", 3, 8, 64), stack("int8", 3, 8, 64)
        x, ids = normal(2, 64), routing(2, 2, 3)
        with pytest.raises(ArgumentError, match=r"x must be a matrix \[T, K\]; got shape \[1, 2, 64\]"):
            weights.multiply(x[None], ids)
        with pytest.raises(ArgumentError, match=r"expert_ids must be int32 or int64 \[2\] or \[2, k\].*got int64 \[3"):
            weights.multiply(x, routing(3, 2, 3))
        with pytest.raises(ArgumentError, match=r"expert_ids must be int32 or int64.*got float32"):
            weights.multiply(x, ids.float())
        with pytest.raises(ArgumentError, match=r"packed must be uint8 \[1024\] for a weight of shape \[4, 8, 64\]"):
            experts_4bit(x, ids, *weights.tensors, 4, 8, "nf4", 64)
        with pytest.raises(ArgumentError, match="in_features 64 is no multiple of blocksize 128"):
            experts_4bit(x, ids, *weights.tensors, 3, 8, "nf4", 128)
        with pytest.raises(ArgumentError, match="num_experts and out_features must be at least 1; got 0 and 8"):
            experts_4bit(x, ids, *weights.tensors, 0, 8, "nf4", 64)
        with pytest.raises(ArgumentError, match=r"codes must be int8 \[E, N, 64\]"):
            experts_8bit(x, ids, eight.tensors[0][..., :32], eight.tensors[1])
        with pytest.raises(ArgumentError, match=r"row_stats must be float32 \[3, 8\]"):
            experts_8bit(x, ids, eight.tensors[0], eight.tensors[1][:2])
        with pytest.raises(DeviceError, match="expert_ids on meta"):
            weights.multiply(x, ids.to("meta"))
        with pytest.raises(UnsupportedError, match="experts_4bit has no gradient"):
            weights.multiply(x.clone().requires_grad_(), ids)

    def test_larger_than_offsets(self) -> None:
        assert experts_ops.why_not_experts((8, 28672, 4096), "nf4", 64) is None
        assert "32-bit offsets" in str(experts_ops.why_not_experts((2, 2**20, 2**11), "int8", 1))


@pytest.fixture
def experts(device: torch.device):
    from onegpu.kernels import experts

    return experts


class TestTiles:
    @pytest.mark.parametrize(("S", "E"), [(1, 3), (40, 3), (40, 7), (5, 64)])
    def test_sorted(self, S: int, E: int, device: torch.device, experts) -> None:
        ids = torch.randint(-1, E + 2, (S,), generator=torch.Generator().manual_seed(S))
        order, starts = experts.sort_pairs(ids.to(device), E)
        order, starts = order.cpu(), starts.cpu()
        assert sorted(order.tolist()) == list(range(S))
        assert starts[0] == 0
        assert starts[-1] == S
        for e in range(E):
            assert (ids[order[starts[e] : starts[e + 1]]] == e).all()

    def test_never_more_than_launched(self, experts) -> None:
        for S, E, block in ((1, 8, 16), (17, 8, 16), (64, 3, 16), (1000, 5, 64), (33, 32, 16)):
            for seed in range(20):
                ids = torch.randint(0, E + 1, (S,), generator=torch.Generator().manual_seed(seed))
                counts = torch.bincount(ids, minlength=E + 1)
                assert int((-(-counts // block)).sum()) <= experts.num_tiles(S, E, block)


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_few_pairs(weight_format: str, dtype: torch.dtype, device: torch.device, experts) -> None:
    for E, N, K in ((4, 10, 128), (3, 5, 320)):
        weights = stack(weight_format, E, N, K)
        x, ids = normal(2, K, dtype=dtype), routing(2, 2, E)
        assert_right(weights.to(device).multiply(x.to(device), ids.to(device), experts), x, ids, weights)


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize(("T", "k", "E", "N", "K"), [(12, 2, 3, 70, 128), (30, 3, 5, 64, 192), (9, 1, 2, 16, 96)])
def test_many_pairs(
    weight_format: str, dtype: torch.dtype, T: int, k: int, E: int, N: int, K: int, device: torch.device, experts
) -> None:
    if weight_format != "int8" and K % 64:
        pytest.skip("blocks straddle rows")
    weights = stack(weight_format, E, N, K)
    x, ids = normal(T, K, dtype=dtype), routing(T, k, E)
    if T * k > experts.FEW_PAIRS:
        assert_right(weights.to(device).multiply(x.to(device), ids.to(device), experts), x, ids, weights)


@pytest.mark.parametrize("blocksize", [32, 128, 512])
@pytest.mark.parametrize("T", [2, 12])
def test_blocksizes(blocksize: int, T: int, device: torch.device, experts) -> None:
    weights = stack("nf4", 3, 20, 512, blocksize)
    x, ids = normal(T, 512, dtype=torch.float16), routing(T, 2, 3)
    assert_right(weights.to(device).multiply(x.to(device), ids.to(device), experts), x, ids, weights)


@pytest.mark.parametrize("T", [2, 12])
def test_codes_that_begin_anywhere(T: int, device: torch.device, experts) -> None:
    """Codes are read in words: some that begin between two are right all the same."""
    weights = stack("nf4", 3, 20, 128)
    x, ids = normal(T, 128, dtype=torch.float16), routing(T, 2, 3)
    there = weights.to(device)
    packed = there.tensors[0]
    moved = torch.cat((packed[:3], packed.view(-1)))[3:]
    assert moved.data_ptr() % 4
    shifted = Stack("nf4", there.shape, (moved, *there.tensors[1:]), there.blocksize)
    assert_right(shifted.multiply(x.to(device), ids.to(device), experts), x, ids, weights)


@pytest.mark.parametrize("T", [3, 15])
def test_no_such_expert(T: int, device: torch.device, experts) -> None:
    """Its pairs get zeros and the others are right, in either kernel; ids of 32 bits and a view of x too."""
    weights = stack("nested", 3, 20, 128)
    ids = torch.randint(-1, 5, (T, 2), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    x = normal(128, T, dtype=torch.float16).t()
    y = weights.to(device).multiply(x.to(device), ids.to(device), experts)
    assert_right(y, x, ids, weights)
    missing = (ids.view(-1) < 0) | (ids.view(-1) >= 3)
    assert (y.cpu()[missing] == 0).all()


def test_tall_tiles(device: torch.device, experts) -> None:
    """Tiles of every height that the launcher chooses."""
    heights = {experts.tile_settings(S, 2, 64)["BLOCK_M"] for S in (16, 32, 128, 400)}
    assert heights == {16, 32, 64, 128}
    weights = stack("nf4", 2, 33, 64)
    for T in (9, 20, 70, 130):
        x, ids = normal(T, 64, dtype=torch.float16), routing(T, 2, 2, seed=T)
        assert_right(weights.to(device).multiply(x.to(device), ids.to(device), experts), x, ids, weights)


@pytest.mark.gpu
@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize(("E", "k", "N", "K"), [(8, 2, 1024, 4096), (128, 8, 1536, 2048), (128, 8, 2048, 768)])
def test_real_shapes(weight_format: str, E: int, k: int, N: int, K: int) -> None:
    weights = stack(weight_format, E, N, K, device="cuda")
    dense = {e: weights.expert(e).dense(torch.float32)[0] for e in range(0, E, max(1, E // 8))}
    for T in (1, 2, 7, 33, 200, 1500):
        x, ids = normal(T, K, dtype=torch.bfloat16, device="cuda"), routing(T, k, E, device="cuda")
        y = weights.multiply(x, ids)
        rows = x.repeat_interleave(k, 0)
        for e, weight in dense.items():
            pairs = (ids.view(-1) == e).nonzero().view(-1)
            if len(pairs):
                plain = rows[pairs] @ weight.bfloat16().T
                assert_no_worse(
                    y[pairs], plain, exact_product(rows[pairs], weight, None), what=f"of {T} tokens, expert {e}"
                )


@pytest.mark.gpu
@pytest.mark.parametrize("weight_format", ["nested", "int8"])
@pytest.mark.parametrize("T", [1, 64, 700])
def test_captured_and_without_waiting(weight_format: str, T: int) -> None:
    weights = stack(weight_format, 8, 256, 512).to("cuda")
    x, ids, others = normal(T, 512, dtype=torch.bfloat16).cuda(), routing(T, 2, 8).cuda(), routing(T, 2, 8, seed=5)
    out = run_captured(lambda: weights.multiply(x, ids), lambda: ids.copy_(others))
    assert torch.equal(out, weights.multiply(x, others.cuda()))
