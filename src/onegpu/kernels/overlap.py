# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""A kernel that begins before the one in front of it has ended (programmatic dependent launch, PTX `griddepcontrol`).

Its programs come to processors as those of the kernel in front leave, once all of that one's have begun and let it.
What that kernel writes is there after `gdc_wait`. Before it a kernel may read what is older than all that still run,
and ask L2 for anything: L2 sees what others still write.
"""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl

from onegpu.kernels.launch import capability

__all__ = ["OVERLAP_CAPABILITY", "ask_for", "overlaps"]

OVERLAP_CAPABILITY: Final = (9, 0)


def overlaps(device: torch.device, wanted: bool) -> bool:
    """Whether a kernel on `device` may begin before the one in front of it has ended."""
    if not wanted or device.type != "cuda" or torch.version.hip is not None:
        return False
    return capability(device) >= OVERLAP_CAPABILITY


@triton.jit
def ask_for(pointers):
    """Have L2 fetch the lines that the pointers lie in."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
        "=r,l",
        (pointers.to(tl.int64),),
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
