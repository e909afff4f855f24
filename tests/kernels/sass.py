"""The instructions of a compiled kernel, by Triton's disassembler."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from pathlib import Path


def instructions(cubin: Path) -> list[str]:
    """Their names in order, without operands: "HGMMA", "LDL"; with their kind where warpgroups wait or go on:
    "WARPGROUP.DEPBAR"."""
    triton = Path(importlib.util.find_spec("triton").origin).parent
    command = [str(triton / "backends" / "nvidia" / "bin" / "nvdisasm"), "-c", str(cubin)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?(WARPGROUP\.[A-Z]+|[A-Z0-9_]+)", text, re.MULTILINE)
