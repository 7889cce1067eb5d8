"""Small notebooks in a temporary folder, for the tests of the runner: written, run by run_notebooks.py, looked at."""

import json
import os

import nbformat
import pytest
from conftest import make_data

import run_notebooks

#: run_notebooks.py on a folder of notebooks, for a process of its own.
PROGRAM = "import pathlib, run_notebooks as r, sys; sys.exit(r.main(sys.argv[2:], pathlib.Path(sys.argv[1])))"
PARAMETERS = 'profile = "auto"\nseed = 0\n'


def write_notebook(path, *sources, parameters=PARAMETERS):
    """A notebook of a title, a parameters cell and the given code cells."""
    cells = [nbformat.v4.new_markdown_cell("# Title"), nbformat.v4.new_code_cell(parameters)]
    cells[1].metadata["tags"] = ["parameters"]
    cells += [nbformat.v4.new_code_cell(source) for source in sources]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)


@pytest.fixture(name="folder")
def folder_of_notebooks(tmp_path, monkeypatch):
    """An empty folder for notebooks; runs and figures stay in the same temporary place."""
    for name in ("LAB6_RUNS", "LAB6_FIGURES"):
        monkeypatch.setenv(name, str(tmp_path / name))
    for name in ("LAB6_HEADLESS", "JUPYTER_PREFER_ENV_PATH", "PYTHONPATH"):  # main() sets them: put back after
        monkeypatch.setenv(name, os.environ.get(name, ""))
    monkeypatch.setenv("LAB6_DATA", str(make_data(tmp_path / "data")))
    (tmp_path / "notebooks").mkdir()
    return tmp_path / "notebooks"


def run(folder, *arguments):
    return run_notebooks.main(["--profile", "tiny", "--no-report", *arguments], folder)


def executed(folder, name=""):
    return folder.parent / "LAB6_RUNS" / "notebooks" / "tiny" / name


def status(folder):
    return json.loads(executed(folder, "status.json").read_text())
