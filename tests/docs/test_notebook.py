"""The notebook runs from its first cell to its last, in a kernel of its own, on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from pages import ROOT

NOTEBOOK = ROOT / "docs/notebooks/first-steps.ipynb"

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")


def test_the_notebook_runs(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs for cell in cells), "it is kept without outputs"
    client = nbclient.NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(workplace)}}
    )
    client.execute()
    said = ["".join(output.get("text", "") for output in cell.outputs) for cell in cells]
    assert "nf4+double" in said[0]
    assert "14 × nf4" in said[1]
    assert said[3].count("loss") == 3
    assert "torch takes flash" in said[-1]


def test_a_cell_that_fails_is_seen(workplace: Path) -> None:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("import onegpu; onegpu.fit('no/model')")])
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="no model called"):
        nbclient.NotebookClient(notebook, timeout=60, kernel_name="python3").execute()
