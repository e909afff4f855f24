"""The same questions for one model, from its config.json alone: its head dims, dtype, masks and windows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from onegpu.attention.sdpa import SdpaExplanation, explain_sdpa
from onegpu.attention.varlen import VarlenSpec
from onegpu.diagnosis.finding import Finding
from onegpu.diagnosis.operators import look_at_attention
from onegpu.memory.geometry import Geometry, read_geometry, text_part

__all__ = ["look_at_model"]

TOKENS = 16


def model_dtype(config: Mapping[str, Any], device: torch.device) -> torch.dtype:
    """The 16-bit dtype that the model computes in here."""
    text = text_part(config)
    said = next((part[key] for part in (config, text) for key in ("dtype", "torch_dtype") if part.get(key)), None)
    if said == "float16":
        return torch.float16
    old = device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0)
    return torch.float16 if old else torch.bfloat16


def look_at_model(config: Mapping[str, Any], device: torch.device) -> Iterator[Finding]:
    """Which attention each phase of this model gets on `device`, and whether its weights can be quantized as they are.

    Raises:
        ConfigError: the config does not say its layers, heads or hidden size.
    """
    geometry = read_geometry(config)
    dtype = model_dtype(config, device)
    shape = f"{geometry.layers} layers, {geometry.heads} heads of {geometry.head_dim}"
    yield Finding("model", "ok", f"{geometry.model_type}, {shape}, in {str(dtype).removeprefix('torch.')}")
    for phase, (queries, keys, mask, causal) in phases(geometry).items():
        yield told(phase, explain(geometry, device, dtype, queries, keys, mask, causal))
    if geometry.kind == "encoder":
        window = text_part(config).get("local_attention") or text_part(config).get("sliding_window")
        spec = VarlenSpec(device, dtype, geometry.head_dim, has_window=bool(window), lengths_on_host=True)
        yield from look_at_attention(spec)
    if geometry.head_dim % 8:
        text = f"a head dim of {geometry.head_dim} is no multiple of 8, which rules out several attention kernels"
        yield Finding("head dim", "note", text)


def phases(geometry: Geometry) -> dict[str, tuple[int, int, str | None, bool]]:
    """Queries, keys, mask ("padding", "window" or none) and is_causal of each phase, as Transformers asks for them."""
    if geometry.kind == "encoder":
        return {
            "texts of one length": (TOKENS, TOKENS, None, False),
            "texts with padding": (TOKENS, TOKENS, "padding", False),
        }
    found: dict[str, tuple[int, int, str | None, bool]] = {
        "prompt": (TOKENS, TOKENS, None, True),
        "prompts with padding": (TOKENS, TOKENS, "padding", False),
        "next token": (1, TOKENS, None, False),
    }
    if any(window is not None for window in geometry.windows):
        found["prompt beyond the window"] = (TOKENS, TOKENS, "window", False)
    return found


def explain(
    geometry: Geometry,
    device: torch.device,
    dtype: torch.dtype,
    queries: int,
    keys: int,
    mask: str | None,
    causal: bool,
) -> SdpaExplanation:
    """Ask for one layer of the model on a short input."""
    latent = geometry.vectors_per_token == 2 and geometry.values_per_token != 2 * geometry.head_dim
    kv_heads = geometry.heads if latent else max(geometry.vectors_per_token // 2, 1)
    q: Tensor = torch.empty(1, geometry.heads, queries, geometry.head_dim, device=device, dtype=dtype)
    k: Tensor = torch.empty(1, kv_heads, keys, geometry.head_dim, device=device, dtype=dtype)
    seen = None if mask is None else torch.ones(1, 1, queries, keys, device=device, dtype=torch.bool)
    return explain_sdpa(q, k, k, seen, is_causal=causal, enable_gqa=kv_heads != geometry.heads)


def told(phase: str, explanation: SdpaExplanation) -> Finding:
    """What is taken, and why not what is faster."""
    if explanation.chosen is None:
        reason, cure = explanation.verdict("math").reasons[0]
        return Finding(phase, "problem", f"no attention kernel can run: {reason}", cure)
    flash = explanation.verdict("flash")
    if explanation.chosen in ("flash", "cudnn") or flash.runs:
        return Finding(phase, "ok", f"torch takes {explanation.chosen}")
    reason, cure = flash.reasons[0]
    return Finding(
        phase,
        "note",
        f"torch takes {explanation.chosen}; {reason if reason.startswith('flash') else f'flash {reason}'}",
        cure,
    )
