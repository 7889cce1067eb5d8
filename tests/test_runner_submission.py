"""What the course wants handed in, as far as it needs no run of the notebooks (see test_notebooks.py for the whole)."""

import os
import subprocess

import pytest
import torch

import lab6_utils as lab
from lab6.runner import submission
from lab6.runner.parameters import Refused
from lab6.storage import ROOT


@pytest.mark.parametrize("student", [("", ""), ("1", ""), ("1", "a/b")])
def test_a_submission_says_who_hands_in(tmp_path, monkeypatch, student):
    for name, value in zip(("LAB6_STUDENT_ID", "LAB6_STUDENT_NAME"), student, strict=True):
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Refused, match=r"make submission STUDENT_ID=\.\.\. NAME=\.\.\."):
        submission.make_submission(lab.make_settings("tiny"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("git", ["knows nothing of it", "is not installed"])
def test_without_git_the_source_is_whole(monkeypatch, git):
    def run(*arguments, **options):
        if git == "is not installed":
            raise FileNotFoundError("git")
        return subprocess.CompletedProcess(arguments, 128, stdout="")

    monkeypatch.setattr("lab6.runner.submission.subprocess.run", run)
    source, new = submission.source_files()
    assert new == []
    files = {file.relative_to(ROOT).as_posix() for file in source}
    modules = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("lab6/**/*.py")}
    assert modules and modules <= files
    assert {"Makefile", "LICENSE", "lab6_utils.py", "benchmarks/speed.py", "benchmarks/results.json", "data/README.md",
            "data/render_scenes.py", "data/unseen_sets.json", "notebooks/01_data_exploration.ipynb",
            "notebooks/templates/report/index.html.j2", "tests/conftest.py"} <= files  # fmt: skip
    assert not [file for file in files if file.startswith(("data/weights", "data/runs", "figures", ".venv", ".git/"))]
    json_files = {file for file in files if file.endswith(".json")}
    assert json_files == {"benchmarks/results.json", "data/held_out_scenes.json", "data/unseen_sets.json"}
    assert {os.path.splitext(file)[1] for file in files}.isdisjoint({".zip", ".pth", ".pyc", ".safetensors", ".png"})


def test_new_files_are_taken_and_named_but_nothing_hidden_or_ignored(tmp_path, monkeypatch):
    monkeypatch.setattr("lab6.runner.submission.ROOT", tmp_path)
    git = lambda *command: subprocess.run(["git", "-C", tmp_path, *command], check=True, capture_output=True)
    git("init")
    (tmp_path / ".gitignore").write_text("data/runs\n*.pth\n")
    for name in ("old.py", "new.py", ".env", "DL_LAB6_1_a.zip", "model.pth", "data/runs/x.py", "data/train.json",
                 ".ssh/id.py", "data/file/x.json", "figures/a.py", "notebooks/07_own.ipynb", "notes.json"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    git("add", "old.py", ".gitignore")
    source, new = submission.source_files()
    assert new == ["new.py", "notebooks/07_own.ipynb", "notes.json"]
    assert {file.relative_to(tmp_path).as_posix() for file in source} == {".gitignore", "old.py", *new}


def test_images_that_are_not_there_are_refused(runs):
    settings = lab.make_settings("tiny")
    with pytest.raises(Refused, match=r"no images in .*: run notebook 04 first"):
        submission.sampled_images(settings)
    for split, count in (("test", 2), ("new_test", 1)):
        lab.save_images(torch.zeros(count, 3, 64, 64), settings.figures / "samples" / split)
    found = submission.sampled_images(settings)
    assert list(found) == ["images/test/0.png", "images/test/1.png", "images/new_test/0.png"]
    assert all(file.is_file() for file in found.values())
