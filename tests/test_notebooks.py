"""The notebooks run from top to bottom; what is committed of them is whole, clean and small, and uses public names.

Whole, but shorter: MOBA_NOTEBOOK_STEPS makes the two that train take one step, MOBA_NOTEBOOK_LENGTHS leaves the
benchmark one length. What a cell shows must be of the kind that is committed (text, picture), not the same figures:
these come from a longer run.
"""

import ast
import importlib
import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
each = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def python(notebook) -> ast.Module:
    """The notebook's code without IPython's lines."""
    lines = [line for cell in code_cells(notebook) for line in cell.source.splitlines()]
    return ast.parse("\n".join(line for line in lines if not line.startswith(("%", "!"))))


def kinds(cell) -> set[str]:
    """What a cell shows: names of streams, types of data."""
    return {kind for output in cell.outputs for kind in (output.get("data") or [output.get("name", "error")])}


def text_of(notebook) -> str:
    """Everything that can be read in it, pictures left out."""
    texts = [cell.source for cell in notebook.cells]
    for output in (output for cell in code_cells(notebook) for output in cell.outputs):
        texts += [output.get("text", ""), output.get("data", {}).get("text/plain", "")]
    return "\n".join(texts)


def test_there_are_five():
    assert [path.stem[:2] for path in PATHS] == ["01", "02", "03", "04", "05"]


@each
@pytest.mark.timeout(600)
def test_runs_whole(path, tmp_path, monkeypatch):
    for folder in ("JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(folder, str(tmp_path))
    shorter = {"MOBA_NOTEBOOK_STEPS": "1", "MOBA_NOTEBOOK_LENGTHS": "2048"}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **shorter}
    committed, notebook = nbformat.read(path, 4), nbformat.read(path, 4)
    resources = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=550, kernel_name="python3", resources=resources).execute(env=environment)
    for before, after in zip(code_cells(committed), code_cells(notebook), strict=True):
        assert kinds(before) == kinds(after), after.source


@each
def test_outputs_are_committed(path):
    """Every cell has been run, in order and without an error; there is a picture but in the quickstart."""
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    shown = set().union(*map(kinds, cells))
    assert "stdout" in shown and "error" not in shown
    assert "image/png" in shown or path.stem == "01_quickstart"
    assert path.stat().st_size <= 1_000_000


@each
def test_nothing_of_the_machine_is_left(path):
    """No metadata but the kernel's name, no absolute path, no warning but the quickstart's."""
    notebook = nbformat.read(path, 4)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    assert notebook.metadata == {"kernelspec": kernel, "language_info": {"name": "python"}}
    assert all(cell.metadata == {} for cell in notebook.cells)
    found = re.search(r"(?<![\w.:/])(/[a-zA-Z][\w.-]*/[\w.-]+|[A-Z]:\\)", text_of(notebook))
    assert found is None, found[0]
    for output in (output for cell in code_cells(notebook) for output in cell.outputs):
        if output.get("name") == "stderr":
            assert path.stem == "01_quickstart" and "MoBA needs continued training" in output.text


@each
def test_public_names_alone(path):
    """Nothing private is touched, and every function or class taken from the package has a docstring."""
    for node in ast.walk(python(nbformat.read(path, 4))):
        if isinstance(node, ast.Attribute):
            assert not node.attr.startswith("_"), node.attr
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "moba_hf":
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert not any(part.startswith("_") for part in (*node.module.split("."), alias.name)), alias.name
                imported = getattr(module, alias.name, None) or importlib.import_module(f"{node.module}.{alias.name}")
                assert isinstance(imported, str) or imported.__doc__, alias.name


@each
def test_the_readme_names_it(path):
    assert f"notebooks/{path.name}" in (ROOT / "README.md").read_text(encoding="utf-8")
