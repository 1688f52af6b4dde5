"""The notebooks run as they are, in a fresh kernel and an empty folder, and are stored without what they gave."""

from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SHOWN: dict[str, dict[str, Any]] = {
    "finetune": {"image/png": 3, "text": ["as loaded", "CLIPModel ViT-Ti/32", "on cpu, in evaluation mode"]},
    "look": {"image/png": 2, "text/html": 3, "text": ["mean rank", "iframe srcdoc=", "as loaded"]},
    "search": {"text/html": 2, "text": ["shapes on a red background", "data:image/jpeg;base64,", "'score': "]},
    "export": {"text": ["exported: exported, loaded by transformers", "tensor([[", "logits differ by 0.0"]},
}
"""Of each notebook: how many outputs of a kind it has at least, and texts that stand in them."""


def code_cells(path: Path) -> list[Any]:
    notebook = nbformat.read(path, as_version=4)
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_there_are_four() -> None:
    assert {path.stem for path in NOTEBOOKS} == set(SHOWN)
    for readme in ("README.md", "README.zh-CN.md"):
        text = (ROOT / readme).read_text(encoding="utf-8")
        assert all(f"(notebooks/{path.name})" in text for path in NOTEBOOKS)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_they_are_stored_without_outputs_and_images(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.nbformat == 4
    assert all("attachments" not in cell for cell in notebook.cells)
    assert "base64" not in path.read_text(encoding="utf-8")
    for cell in code_cells(path):
        assert (cell.outputs, cell.execution_count) == ([], None)
    first = code_cells(path)[0].source
    assert 'if importlib.util.find_spec("cliptune") is None:\n    %pip install' in first


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the notebooks share one run, as they do in a person's folder."""
    return tmp_path_factory.mktemp("notebooks")


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_they_run(path: Path, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # the toolkit is there, so nothing is installed
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    notebook = nbformat.read(path, as_version=4)
    folder = tmp_path if path.stem == "search" else run_dir  # one that trains its model itself
    where = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=where).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    kinds = [kind for output in outputs for kind in output.get("data", {})]
    told = "\n".join(str(output.get("text", "")) + "\n".join(output.get("data", {}).values()) for output in outputs)
    wanted = dict(SHOWN[path.stem])
    for text in wanted.pop("text"):
        assert text in told
    for kind, number in wanted.items():
        assert kinds.count(kind) >= number, kind
    assert "pip install" not in told
