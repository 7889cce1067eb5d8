"""The command line: what it refuses before anything runs, how it is interrupted, what it asks of the runner."""

import os
import shlex
import signal
import subprocess
import sys
import time

import pytest
from small_notebooks import PARAMETERS, PROGRAM, executed, folder_of_notebooks, run, status, write_notebook  # noqa: F401 - a fixture

import lab6_utils
import run_notebooks
from lab6.storage import ROOT


@pytest.mark.parametrize(
    "request_",
    [
        ["-p", "sed=1"],
        ["-p", "seed=x"],
        ["--only", "07"],
        ["--profile", "huge"],
        ["-p", "sampler=best"],
        ["-p", "split=train"],
        ["-p", "seed=-3"],
        ["-p", "weights=nowhere"],
        ["-p", "evaluator=data/nowhere.pth"],
        ["-p", "preset=few-step", "-p", "teacher=nowhere"],
        ["--sweep", "seed=0,x"],
        ["--sweep", "sampler=ddim,best"],
        ["--sweep", "seed"],
        ["--workers", "2"],
        ["--sweep", "seed=0", "--workers", "0"],
        ["--sweep", "seed=0", "--workers", "1", "--scheduler", "tcp://127.0.0.1:9"],
        ["--train", "--only", "01"],
        ["--settings", "nowhere.json"],
        ["--train", "--settings", "nowhere.json", "-p", "seed=1"],
    ],
)
def test_refused_before_anything_runs(folder, capsys, request_):
    more = 'sampler = ""\nsplit = "both"\npreset = "tokens"\nweights = "auto"\nteacher = None\nevaluator = "auto"\n'
    write_notebook(folder / "01_a.ipynb", "open('ran', 'w')", parameters=PARAMETERS + more)
    assert run(folder, *request_) == 2
    assert capsys.readouterr().err.count("\n") <= 2
    assert not (folder / "ran").exists() and not executed(folder).exists()


def test_what_needs_no_torch_is_checked_without():
    """Importing it takes seconds. Afterwards lab6_utils is there, which diffusers wants to load a pipeline."""
    code = """
import run_notebooks as r, sys
for asked in (["-p", "sed=1"], ["--only", "9"], ["--workers", "2"]):
    assert r.main(asked) == 2
assert "torch" not in sys.modules
r.plan(r.parse(["--train"]), r.NOTEBOOKS)
assert "lab6_utils" in sys.modules"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_missing_data_is_one_line_before_anything_runs(folder, capsys, tmp_path, monkeypatch):
    write_notebook(folder / "01_a.ipynb", "open('ran', 'w')")
    monkeypatch.setenv("LAB6_DATA", str(tmp_path / "elsewhere"))
    assert run(folder) == 2
    error = capsys.readouterr().err
    assert error.startswith("No i-CLEVR data: ") and error.count("\n") == 1
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interruption(folder, number):
    cell = "import os, time\nprint('progress', os.getpid(), flush=True)\ntime.sleep(60)"
    write_notebook(folder / "01_a.ipynb", cell)
    command = [sys.executable, "-c", PROGRAM, str(folder), "--profile", "tiny", "--no-report"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    kernel = next(int(line.split()[1]) for line in process.stdout if "progress" in line)
    process.send_signal(number)
    assert process.wait(timeout=60) == 130
    process.stdout.close()
    assert status(folder)["01_a"]["state"] == "failed"
    assert not executed(folder, "01_a.ipynb").exists()
    for _ in range(100):
        try:
            os.kill(kernel, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail("the kernel outlived the run")


def test_make_experiments_asks_for_what_can_be(folder, monkeypatch):
    """Each command of the target passes the checks that come before anything runs."""
    listed = subprocess.run(["make", "-n", "experiments"], cwd=ROOT, capture_output=True, text=True)
    lines = [line for line in listed.stdout.replace("\\\n", "").splitlines() if "run_notebooks.py" in line]
    asked = []
    for runner in ("run_all", "run_sweep"):
        monkeypatch.setattr(run_notebooks, runner, lambda jobs, *rest: asked.extend(jobs.values()))
    monkeypatch.setattr(run_notebooks, "make_report", lambda *arguments: None)
    for line in lines:
        assert run_notebooks.main(shlex.split(line.partition("run_notebooks.py")[2])) == 0, line
    chosen = [{name: value for name, value in given.items() if name != "profile"} for _, given in asked]
    assert [c for c in chosen if not c] == [{}], "last, the comparisons"
    assert {c["seed"] for c in chosen if c.get("preset") == "tokens"} == {0, 1}
    assert {c["num_train_timesteps"] for c in chosen if c.get("schedule") == "linear"} == {100, 300, 500, 1000}
    assert {c["preset"] for c in chosen if c} == set(lab6_utils.PRESETS)


def test_beside_the_others_06_is_given_no_preset(folder, monkeypatch):
    """It would train that preset again; by itself, it does."""
    for name in ("01_a", "06_experiments"):
        write_notebook(folder / f"{name}.ipynb", parameters='profile = "auto"\nseed = 0\npreset = None\n')
    given = {}
    monkeypatch.setattr(run_notebooks, "run_all", lambda jobs, *rest: given.update(jobs))
    chosen = ("-p", "preset=latent", "-p", "seed=3")
    assert run(folder, *chosen) == 0
    assert given["01_a"][1] == {"profile": "tiny", "seed": 3, "preset": "latent"}
    assert given["06_experiments"][1] == {"profile": "tiny", "seed": 3}
    assert run(folder, "--only", "06", *chosen) == 0 and given["06_experiments"][1]["preset"] == "latent"
