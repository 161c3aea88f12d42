"""The notebook runs from its first cell to its last."""

import json

import nbformat
import pytest
import tiny
from nbclient import NotebookClient

pytestmark = pytest.mark.nightly

PATH = tiny.ROOT / "docs/tutorial.ipynb"


def test_every_cell_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("TUTORIAL_SHORT", "1")
    monkeypatch.setenv("TUTORIAL_OUTPUT", str(tmp_path / "tutorial"))
    notebook = nbformat.read(PATH, as_version=4)
    client = NotebookClient(
        notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": PATH.parent}}
    )
    client.execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("teacher" in str(x.get("data", {}).get("text/markdown")) for x in shown)
    for name in ("detections/detections.md", "sharedkd/model_final.pth", "report.html"):
        assert (tmp_path / "tutorial" / name).stat().st_size > 0
    student = json.loads((tmp_path / "tutorial/sharedkd/run.json").read_text())
    assert student["iterations"] == 4
