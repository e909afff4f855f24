"""`import onegpu` is quick, starts nothing, and gives exactly the names it says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import onegpu

SOURCE = Path(__file__).parents[1] / "src"
HEAVY = (
    "torch",
    "transformers",
    "accelerate",
    "safetensors",
    "triton",
    "numba",
    "numpy",
    "fastapi",
    "uvicorn",
    "typer",
)


def fresh(code: str) -> str:
    path = os.pathsep.join(filter(None, (str(SOURCE), os.environ.get("PYTHONPATH"))))
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": path},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_import_loads_nothing_heavy() -> None:
    code = f"import sys, onegpu; print([name for name in {HEAVY!r} if name in sys.modules])"
    assert fresh(code) == "[]"


def test_import_is_quick() -> None:
    code = "import time; t = time.process_time(); import onegpu; print(time.process_time() - t)"
    assert float(fresh(code)) < 0.5, "it takes 0.01 s of processor time"


def test_a_wish_and_its_config_need_no_torch() -> None:
    code = "import sys, onegpu; onegpu.QuantConfig('nf4'); print('torch' in sys.modules)"
    assert fresh(code) == "False"


def test_all_is_what_can_be_imported() -> None:
    assert len(set(onegpu.__all__)) == len(onegpu.__all__)
    for name in onegpu.__all__:
        assert getattr(onegpu, name) is not None, name
    assert set(dir(onegpu)) >= set(onegpu.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'AutoModelForCausalLm'"):
        _ = onegpu.AutoModelForCausalLm


def test_importing_patches_nothing() -> None:
    code = (
        "import transformers as t\n"
        "names = ('from_pretrained', 'save_pretrained', 'generate', 'forward')\n"
        "look = lambda: [getattr(t.PreTrainedModel, name, None) for name in names]"
        " + [t.AutoModelForCausalLM.from_pretrained.__func__, hasattr(t.PreTrainedModel, 'to_bettertransformer')]\n"
        "before = look()\n"
        "import onegpu\nonegpu.AutoModelForCausalLM\n"
        "print(before == look())"
    )
    assert fresh(code) == "True"
