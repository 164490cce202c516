"""The notebooks: they run from top to bottom, show what their text says, and hold no outputs in the repository."""

import os
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from tests.helpers import ROOT

NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_holds_no_outputs(path: Path) -> None:
    """Outputs make every diff long, and carry the paths and the versions of whoever ran it last."""
    notebook = read(path)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None
            assert "execution" not in cell.metadata


@pytest.mark.process
def test_the_first_minute_shows_what_it_says(tmp_path: Path) -> None:
    """All cells but the one that installs, in a kernel of their own, on the checkpoint inside the package."""
    (path,) = NOTEBOOKS
    notebook = read(path)
    (install,) = (cell for cell in notebook.cells if "skip-execution" in cell.metadata.get("tags", ()))
    assert install.source == '%pip install -q "qwen2-fp16-fix[report]"'
    client = NotebookClient(
        notebook, timeout=120, skip_cells_with_tag="skip-execution", resources={"metadata": {"path": tmp_path}}
    )
    client.execute(env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"})
    shown = {cell.id: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}
    assert "!!!!!!!!" in printed(shown["stock"])
    assert "Go up, and say unto them" in printed(shown["fixed"])
    assert "!!" not in printed(shown["fixed"])
    assert shown["scan"][-1].data["image/png"]
    for name in ("doctor", "scan-table", "certify"):
        assert "monospace" in shown[name][-1].data["text/html"], name  # else the columns of a table do not line up


def printed(outputs: list[Any]) -> str:
    return "".join(output.text for output in outputs if output.get("name") == "stdout")
