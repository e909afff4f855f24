"""What libraries do when they are used for the first time, in threads beside other work.

The first product makes a handle of the vendor's library and brings its kernels to the device, the first attention and
the first elementwise operation of each kind their own; Triton reads all of itself to name its cache, NVRTC is loaded.
Most of that is outside Python. Nothing that is computed here is looked at, and none of it must be done here: whoever
comes first to a library does it.

    libraries = begin_for(model)      ...      libraries.wait()
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["FirstUse", "begin_for"]

# How many rows plain models are run on by the proofs of decoders: libraries choose kernels by that.
PROOF_ROWS: Final = (729, 2)
# Of the head, whose results are large.
HEAD_ROWS: Final = (54, 2)
HEAD_SIZE: Final = 2**15
PROOF_TOKENS: Final = 243
# Where the launchers of a decoder's operators are: they are imported when each is first called, at the latest.
LAUNCHERS: Final = ("dequantize", "matmul_4bit_tiled", "rms", "split_launch", "prompt_rotation", "gemv_16bit")
# Of a weight made for a product that is thrown away, and what must be free so that nobody misses it.
MOST_BYTES: Final = 2**28
FREE_BYTES: Final = 2**31


class FirstUse:
    """Threads that use `device`; begin none that a graph is captured beside, and wait before one is."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.threads: list[threading.Thread] = []

    def begin(self, *tasks: Callable[[], object]) -> None:
        """Run each in a thread of its own. Off a GPU nothing happens; what a task raises is left to the real use."""
        if self.device.type != "cuda":
            return
        for task in tasks:
            thread = threading.Thread(target=self.run, args=(task,), name="onegpu-first-use", daemon=True)
            thread.start()
            self.threads.append(thread)

    def run(self, task: Callable[[], object]) -> None:
        """One task on the device."""
        with suppress(Exception), torch.no_grad(), torch.cuda.device(self.device):
            # A launch makes the device's context that of this thread, which cuBLAS would do with a warning.
            torch.zeros(1, device=self.device)
            task()

    def wait(self) -> None:
        """Until all are done."""
        while self.threads:
            self.threads.pop().join()


def begin_for(model: Any) -> FirstUse:
    """Begin with what a decoder's plain forward needs, by its weights' sizes and its config. Changes nothing.

    Nothing is begun for a model that does not generate, or that lies elsewhere than on one GPU, or nearly fills it.
    """
    devices = {tensor.device for tensor in model.parameters()}
    device = devices.pop() if len(devices) == 1 else torch.device("cpu")
    libraries = FirstUse(device)
    can_generate = getattr(model, "can_generate", None)
    if device.type != "cuda" or not callable(can_generate) or not can_generate():
        return libraries
    if torch.cuda.mem_get_info(device)[0] < FREE_BYTES:
        return libraries
    libraries.begin(compilers)
    with suppress(AttributeError, TypeError):
        config = model.config.get_text_config()
        dtype, width, heads = model.dtype, int(config.hidden_size), int(config.num_attention_heads)
        head_dim = int(getattr(config, "head_dim", None) or width // heads)
        kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
        libraries.begin(
            partial(products, weights_by_size(model, dtype), PROOF_ROWS, dtype, device),
            partial(attention, heads, kv_heads, head_dim, PROOF_TOKENS, dtype, device),
            partial(layers, width, head_dim, dtype, device),
            partial(proofs, dtype, device),
            partial(choices, device),
        )
    return libraries


Weights = Mapping[tuple[int, int], Tensor | None]


def weights_by_size(model: Any, dtype: torch.dtype) -> Weights:
    """A weight of each size [N, K] of the linear layers, None where it is not in `dtype`."""
    found: dict[tuple[int, int], Tensor | None] = {}
    for module in model.modules():
        sizes = getattr(module, "out_features", None), getattr(module, "in_features", None)
        weight = getattr(module, "weight", None)
        if not (isinstance(sizes[0], int) and isinstance(sizes[1], int) and isinstance(weight, Tensor)):
            continue
        is_plain = weight.dtype == dtype and weight.shape == sizes
        found.setdefault((sizes[0], sizes[1]), weight.detach() if is_plain else None)
    return found


def products(weights: Weights, rows: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
    """Products of so many rows with weights of these sizes. One weight at a time is made."""
    for (N, K), weight in sorted(weights.items(), key=lambda item: item[0]):
        if weight is None and N * K * dtype.itemsize > MOST_BYTES:
            continue
        made = torch.empty(N, K, dtype=dtype, device=device) if weight is None else weight
        for count in rows if N < HEAD_SIZE else HEAD_ROWS:
            F.linear(torch.empty(count, K, dtype=dtype, device=device), made)
        del made


def attention(
    num_heads: int, num_kv_heads: int, head_dim: int, tokens: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Causal attention, of one query too, as torch chooses it."""
    for length in (tokens, 1):
        q = torch.zeros(1, num_heads, length, head_dim, dtype=dtype, device=device)
        k = torch.zeros(1, num_kv_heads, length, head_dim, dtype=dtype, device=device)
        F.scaled_dot_product_attention(q, k, k, is_causal=length > 1, enable_gqa=num_kv_heads != num_heads)


def layers(width: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
    """What plain layers of decoders do between products: norms, rotations, activations, sums."""
    ids = torch.arange(8, device=device) + 0
    x = F.embedding(ids, torch.zeros(16, width, dtype=dtype, device=device))[None]
    wide = x.float()
    x = x * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(dtype)
    x = x + F.silu(x) * x
    half = max(1, head_dim // 2)
    angles = torch.ones(1, half, 1, device=device) @ ids[None, None, :].float()
    both = torch.cat((angles.transpose(1, 2), angles.transpose(1, 2)), dim=-1)
    cos, sin = (both.cos() * 1.0).to(dtype), (both.sin() * 1.0).to(dtype)
    heads = torch.zeros(1, 2, 8, 2 * half, dtype=dtype, device=device)
    heads = heads * cos + torch.cat((-heads[..., half:], heads[..., :half]), dim=-1) * sin
    torch.cat([heads, heads], dim=-2)
    heads.transpose(1, 2).contiguous()


def proofs(dtype: torch.dtype, device: torch.device) -> None:
    """What proofs do with what they compare."""
    x = torch.zeros(2, 8, dtype=dtype, device=device)
    torch.equal(x, x)
    wide = x.double()
    apart = (wide - x).abs()
    bound = apart.amax(1) * 2.0
    _ = torch.cat([bound - bound, bound]) <= 0
    torch.stack((apart.max(), x.abs().max().double(), torch.zeros_like(apart.max())))
    places = torch.full((2,), 1, dtype=torch.int32, device=device).clamp(0, 7)
    _ = places + 1, places.long(), torch.cat((places, places))
    table = torch.stack((x, x), dim=1)
    table.index_select(0, places - places)
    found = torch.stack((x.float(), x.float()), 1)
    _ = found.isnan().any(), (found - found).abs().max(), x[places.long()]
    found[:1] /= found[1:]
    x.add_(x)


def choices(device: torch.device) -> None:
    """What choosing a token does, and the books of it."""
    logits = F.pad(torch.zeros(1, 64, device=device), (0, 0, 0, 1))
    chosen = logits.argmax(dim=-1)
    bad = logits.amax(dim=-1).isnan()
    history = torch.zeros(2, 8, dtype=torch.int64, device=device)
    slots = torch.arange(2, device=device)
    history[slots, slots] = chosen
    history[slots, slots] = 0
    history.scatter_(1, slots[:, None], chosen[:, None])
    counts = torch.zeros(2, dtype=torch.int32, device=device)
    counts[slots] = 1
    counts.add_(1).clamp_(0, 7)
    flags = torch.ones(2, dtype=torch.bool, device=device)
    flags[slots] = False
    flags.copy_((flags & ~bad) | (chosen >= counts))
    chosen.copy_(flags)
    _ = chosen.to(torch.int32), chosen.clone(), torch.stack([chosen, chosen]), torch.cat([chosen, chosen])
    mask = history.eq(0)
    _ = mask.all(), mask.any(), history.cumsum(-1) - 1, history.aminmax(), history.masked_fill(mask, 1), history < 1
    torch.empty(64, pin_memory=device.type == "cuda").copy_(logits[0], non_blocking=True)


def compilers() -> None:
    """Triton's name for its cache, which is a hash of all of its files, its tools on the device, NVRTC, our kernels."""
    with suppress(Exception):
        from triton.runtime import cache, driver

        _ = driver.active.utils
        cache.triton_key()
    from onegpu.kernels.nvrtc import why_not_nvrtc

    if why_not_nvrtc() is None:
        from cuda.bindings import driver as _driver  # noqa: F401
    for name in LAUNCHERS:
        with suppress(ImportError):
            importlib.import_module(f"onegpu.kernels.{name}")
