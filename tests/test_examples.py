"""examples/: every notebook runs from top to bottom, and is stored with its outputs."""
import base64
import os
import re

import nbformat
import pytest
from nbclient import NotebookClient

from conftest import ROOT

EXAMPLES = ROOT / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
MAX_BYTES = 1_000_000  # of all notebooks


def code_cells(book):
    return [cell for cell in book.cells if cell.cell_type == "code"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(notebook, monkeypatch, tmp_path):
    """It needs no network, raises no error, gives as many pictures as are stored, and leaves no file behind."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    files = set(os.listdir(EXAMPLES))
    book = nbformat.read(notebook, as_version=4)
    stored = count_pictures(book)
    client = NotebookClient(book, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(EXAMPLES)}})
    client.execute()  # raises CellExecutionError with the cell and its traceback
    assert count_pictures(book) == stored > 0
    assert set(os.listdir(EXAMPLES)) == files


def count_pictures(book):
    """The number of stored PNG pictures. Each must be a PNG file."""
    outputs = [output for cell in code_cells(book) for output in cell.outputs if "image/png" in output.get("data", {})]
    for output in outputs:
        assert base64.b64decode(output.data["image/png"]).startswith(b"\x89PNG")
    return len(outputs)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_notebook(notebook):
    """The first cell tells what it needs and how long it takes. All code cells were executed once, in order."""
    book = nbformat.read(notebook, as_version=4)
    nbformat.validate(book)
    first = book.cells[0]
    assert first.cell_type == "markdown" and "**Needs**" in first.source and "**Takes**" in first.source
    cells = code_cells(book)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not any(output.output_type == "error" for cell in cells for output in cell.outputs)
    assert notebook.name in (EXAMPLES / "README.md").read_text()
    text = "\n".join(cell.source for cell in book.cells)
    for name in re.findall(r"\]\(([\w./-]+)\)", text):
        assert (EXAMPLES / name).exists(), name
    for name in re.findall(r"`[^`\n]*?(configs/[\w./-]+|perceiver/[\w./-]+)", text):
        assert (ROOT / name).exists(), name


def test_notebooks_are_small():
    assert len(NOTEBOOKS) == 5
    assert sum(path.stat().st_size for path in NOTEBOOKS) < MAX_BYTES
