"""Why `scaled_dot_product_attention` takes the kernel it takes, and why not a faster one.

torch has four ways to compute it and picks the first that can; a refusal is silent, or a warning in its own words. Here
each way has rules, told as a sentence and a cure. On a GPU torch's verdict stands and the rules explain it; where they
have no explanation, torch's own words are given.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.backends import cuda as switches

from onegpu.attention.sdpa_rules import BACKENDS, RULES, Call, Reason
from onegpu.errors import ArgumentError

__all__ = ["BACKENDS", "SdpaExplanation", "SdpaVerdict", "explain_sdpa"]

# The numbers of torch's SDPBackend.
NUMBERS = {0: "math", 1: "flash", 2: "efficient", 3: "cudnn"}

ASK: dict[str, Callable[[Any, bool], bool]] = {
    "flash": switches.can_use_flash_attention,
    "cudnn": switches.can_use_cudnn_attention,
    "efficient": switches.can_use_efficient_attention,
}


@dataclass(frozen=True, slots=True)
class SdpaVerdict:
    """One way to compute: whether it can run, else every reason as a sentence, each with its cure."""

    backend: str
    runs: bool
    reasons: list[Reason]


@dataclass(frozen=True, slots=True)
class SdpaExplanation:
    """All ways, in the order of `BACKENDS`, and the one that torch takes (None where none can run)."""

    chosen: str | None
    backends: list[SdpaVerdict]

    def verdict(self, backend: str) -> SdpaVerdict:
        """One of `BACKENDS`; KeyError for another name."""
        return {verdict.backend: verdict for verdict in self.backends}[backend]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"torch takes {self.chosen}" if self.chosen else "torch can run none of them"]
        for verdict in self.backends:
            if verdict.runs:
                lines.append(f"  {verdict.backend:<9}  can run")
            for place, (reason, cure) in enumerate(verdict.reasons):
                lines.append(f"  {verdict.backend if place == 0 else '':<9}  {reason}")
                lines += [f"  {'':<9}  -> {cure}"] if cure else []
        return "\n".join(lines)


def explain_sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    enable_gqa: bool = False,
) -> SdpaExplanation:
    """Say for each backend of `torch.nn.functional.scaled_dot_product_attention` whether it can run this call.

    Args:
        q: [B, H, L, E]; k: [B, H_kv, S, E]; v: [B, H_kv, S, E_v]; nothing is computed.
        attn_mask, dropout_p, is_causal, enable_gqa: as they go to torch.

    Raises:
        ArgumentError: not three tensors, or a mask that is none.
    """
    if not all(isinstance(tensor, Tensor) for tensor in (q, k, v)) or not isinstance(attn_mask, Tensor | None):
        raise ArgumentError("explain_sdpa takes the tensors q, k, v and a mask that is a tensor or None")
    is_nvidia = q.is_cuda and torch.version.hip is None
    capability = torch.cuda.get_device_capability(q.device) if is_nvidia else None
    call = Call(q, k, v, attn_mask, dropout_p, is_causal, enable_gqa, capability)
    verdicts = [judge(backend, call) for backend in BACKENDS]
    return SdpaExplanation(chosen_by_torch(call, verdicts), verdicts)


def judge(backend: str, call: Call) -> SdpaVerdict:
    """Our rules, and on a GPU torch's word over them."""
    reasons = list(dict.fromkeys(reason for rule in RULES[backend] for reason in rule(call)))
    if call.on_gpu and backend in ASK and all(tensor.dim() == 4 for tensor in (call.q, call.k, call.v)):
        if can_run(backend, call):
            return SdpaVerdict(backend, True, [])
        return SdpaVerdict(backend, False, reasons or [(torchs_words(backend, call), "")])
    return SdpaVerdict(backend, not reasons, reasons)


def params_of(call: Call) -> Any:
    """The call as torch's questions take it."""
    return switches.SDPAParams(call.q, call.k, call.v, call.mask, call.dropout_p, call.is_causal, call.enable_gqa)


def can_run(backend: str, call: Call) -> bool:
    """Torch's own verdict, without its words: some versions write them to stderr past Python."""
    return bool(ASK[backend](params_of(call), False))


def torchs_words(backend: str, call: Call) -> str:
    """What torch says to a refusal."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ASK[backend](params_of(call), True)
    said = [str(warning.message).partition(" (Triggered internally")[0].strip() for warning in caught]
    return "; ".join(dict.fromkeys(said)) or "torch refuses it without a reason"


def chosen_by_torch(call: Call, verdicts: list[SdpaVerdict]) -> str | None:
    """What torch would take; told by the verdicts where it can't be asked."""
    try:
        number = torch._fused_sdp_choice(
            call.q,
            call.k,
            call.v,
            attn_mask=call.mask,
            dropout_p=call.dropout_p,
            is_causal=call.is_causal,
            enable_gqa=call.enable_gqa,
        )
    except RuntimeError:
        number = -1
    chosen = NUMBERS.get(int(number))
    runs = {verdict.backend for verdict in verdicts if verdict.runs}
    if chosen is None or (chosen == "math" and "math" not in runs):
        return None
    return chosen
