"""The house as a whole: imports go downward only, rooms are small, and the front door shows them all."""

import ast
import re
import shutil
import statistics
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT

import lab6_utils as lab

ROOMS = sorted(file for file in (ROOT / "lab6").rglob("*.py") if file.name != "__init__.py")


def lint(folder):
    """What import-linter says of the contracts in a folder's pyproject.toml."""
    command = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    arguments = [sys.executable, "-c", command, "--no-cache", "--no-logo"]
    return subprocess.run(arguments, cwd=folder, capture_output=True, text=True)


def test_imports_go_downward_only():
    checked = lint(ROOT)
    assert checked.returncode == 0 and "3 kept, 0 broken" in checked.stdout, checked.stdout + checked.stderr


@pytest.mark.parametrize(
    "room, line",
    [
        ("diffusion", "from lab6.settings import Settings"),
        ("pipeline", "import typing\nif typing.TYPE_CHECKING:\n    from lab6.training import Epoch"),
        ("storage", "import lab6_utils"),
        ("attic", "import math"),
    ],
)
def test_the_contract_bites(tmp_path, room, line):
    """An import that goes upward, a type hint too; the front door from inside; a room without a floor."""
    shutil.copytree(ROOT / "lab6", tmp_path / "lab6")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with open(tmp_path / "lab6" / f"{room}.py", "a") as file:
        file.write(f"\n{line}\n")
    assert lint(tmp_path).returncode == 1


def test_rooms_are_small_and_say_what_they_hold():
    lengths = []
    for file in [*ROOMS, ROOT / "lab6_utils.py", ROOT / "run_notebooks.py"]:
        text = file.read_text(encoding="utf-8")
        tree = ast.parse(text)
        assert text.count("\n") <= 300, f"{file.name} has {text.count(chr(10))} lines: is it one room?"
        assert ast.get_docstring(tree), file.name
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                lengths.append((node.end_lineno - node.lineno + 1, f"{file.name}: {node.name}"))
    longest = max(lengths)
    assert longest[0] <= 60, longest
    assert statistics.median(length for length, _ in lengths) < 10
    assert sum(length > 40 for length, _ in lengths) <= 5


def test_public_names_are_explained():
    for file in ROOMS:
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{file.name}: {node.name}"


def rooms_imported(file):
    """The rooms that a module imports, also inside functions, without the package of the runner in their names."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lab6."):
            names.add(node.module.split(".")[-1])
    return names - {file.stem}


@pytest.mark.parametrize("file", ROOMS, ids=lambda file: file.stem)
def test_a_room_says_what_it_stands_on(file):
    text = " ".join(ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))).split())
    said = re.search(r"Stands on ([^.]*)\.", text)[1].replace(" and ", ", ").split(", ")
    assert sorted(said) == sorted(rooms_imported(file) or {"no other room"})


def test_the_front_door_names_every_room():
    rooms = {file.stem for file in ROOMS if file.parent.name == "lab6"}
    listed = set(re.findall(r"\w+", lab.__doc__.partition("The rooms stand")[0]))
    assert rooms <= listed, f"not in the map: {rooms - listed}"
    text = Path(lab.__file__).read_text(encoding="utf-8")
    assert {node.module for node in ast.parse(text).body if isinstance(node, ast.ImportFrom)} >= {
        f"lab6.{room}" for room in rooms - {"options"}
    }
    assert all(hasattr(lab, name) for name in lab.__all__)


def test_the_contract_has_every_room():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    floors = [name.strip() for layer in contracts[0]["layers"] for name in layer.split("|")]
    assert sorted(floors) == sorted({file.stem for file in ROOMS if file.parent.name == "lab6"} | {"runner"})
