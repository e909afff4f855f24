from __future__ import annotations

import subprocess
import sys
import types

from onegpu import formats


def test_all_is_what_can_be_imported() -> None:
    public = {
        name
        for name, value in vars(formats).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType) and name != "annotations"
    }
    assert public == set(formats.__all__)
    assert sorted(formats.__all__) == list(formats.__all__)


def test_importing_brings_in_torch_only() -> None:
    code = (
        "import sys, onegpu.formats; "
        "print(*[m for m in ('triton', 'transformers', 'numba', 'bitsandbytes', 'onegpu.kernels') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert run.stdout.split() == []
