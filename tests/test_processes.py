"""Training and drawing in several processes: the same numbers as one process, and every file written once."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import make_data

import lab6_utils as lab
from lab6 import evaluators

# run_notebooks.py in single precision, which logs who writes what.
PROGRAM = """
import functools, os, sys
import lab6_utils as lab, run_notebooks
lab.make_settings = functools.partial(lab.make_settings, precision="fp32")
from lab6 import storage, runs, training
write = storage.write_whole
def logged(path, do):
    write(path, do)
    with open(os.environ["LAB6_RUNS"] + "/written", "a") as log:
        log.write(f"{os.environ.get('RANK')} {path.name}\\n")
for room in (storage, runs, training):
    room.write_whole = logged
sys.exit(run_notebooks.main(sys.argv[1:]))
"""


@pytest.fixture
def train(tmp_path):
    """Run `run_notebooks.py --train` in so many processes, into a folder."""
    (tmp_path / "program.py").write_text(PROGRAM)
    data = make_data(tmp_path / "data", scenes=range(12))

    def start(processes, folder, *arguments):
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = [sys.executable, *(torchrun if processes > 1 else []), str(tmp_path / "program.py"), "--train"]
        folder.mkdir(exist_ok=True)
        environment = os.environ | dict(LAB6_DATA=str(data), LAB6_RUNS=str(folder), PYTHONPATH=str(lab.ROOT))
        environment |= dict(OMP_NUM_THREADS="1")
        command += ["--profile", "tiny", *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)

    return start


def losses(folder):
    return [record["loss"] for record in json.loads((folder / "tiny" / "tokens" / "history.json").read_text())]


def test_two_processes_train_as_one_does(train, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    done = train(2, two)
    assert done.returncode == 0, done.stderr
    assert ", 2 processes, " in done.stdout and done.stdout.count("epoch 1/2") == 1, "one of them speaks"
    written = [line.split() for line in (two / "written").read_text().splitlines()]
    assert [rank for rank, name in written if name == "checkpoint.pt"] == ["0", "0"], "once an epoch"
    done = train(1, one)
    assert done.returncode == 0 and ", 1 processes, " in done.stdout, done.stderr
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    weights = [torch.load(f / "tiny" / "tokens" / "checkpoint.pt", weights_only=True)["model"] for f in (one, two)]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-3, atol=1e-3)

    before = losses(two)
    done = train(1, two, "-p", "epochs=3", "-p", "resume=yes")
    assert done.returncode == 0 and "epoch 3/3" in done.stdout and "epoch 2/3" not in done.stdout, done.stderr
    assert losses(two)[:2] == before and len(losses(two)) == 3
    done = train(2, two, "-p", "epochs=4", "-p", "resume=yes", "-p", "schedule=sigmoid")
    assert done.returncode and "belongs to other settings" in done.stderr, "a run of other settings is left alone"
    assert len(losses(two)) == 3


def test_a_notebook_trains_in_processes(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LAB6_DATA", str(make_data(tmp_path / "data", scenes=range(4))))
    settings = lab.make_settings("tiny", channels=(8, 16, 24), flip=True)
    lab.train_in_processes(settings, 2)
    assert "epoch 2/2" in capsys.readouterr().out
    dataset = lab.training_set(settings, lab.find_data())
    assert len(lab.load_history(lab.run_folder(settings))) == 2
    assert list(lab.train(settings, dataset, lab.run_folder(settings))) == [], "it is trained"
    with pytest.raises(RuntimeError, match="training in 3 processes failed"):
        lab.train_in_processes(settings, 3)
    assert "batch_size=8 cannot be split evenly over 3 processes" in capsys.readouterr().out


def test_a_second_training_of_a_run_waits_for_the_first(train, tmp_path):
    """Two at a time in one folder, as a sweep may ask for: the second finds the run whole."""
    with ThreadPoolExecutor() as pool:
        both = list(pool.map(lambda _: train(1, tmp_path / "run", "-p", "resume=yes"), range(2)))
    assert [done.returncode for done in both] == [0, 0], [done.stderr for done in both]
    written = [line.split()[1] for line in (tmp_path / "run" / "written").read_text().splitlines()]
    assert written.count("checkpoint.pt") == 2, "each epoch was trained once"


@pytest.mark.parametrize("guidance", ["classifier-free", "classifier-2"])
def test_seeds_are_shared_among_processes(guidance, monkeypatch):
    settings = lab.make_settings("tiny", device="cpu", precision="fp32", seeds=3, guidance=guidance, seed=5)
    pipe = lab.ICLEVRPipeline(lab.make_denoiser(settings), lab.make_scheduler(settings))
    pipe.scheduler = lab.make_sampler("ddpm", pipe.scheduler)
    pipe.classifier = lab.Evaluator(evaluators.make_evaluator_network("judge"), "judge")
    sets = [["red cube"], ["blue sphere", "gray cube"]]
    expected = lab.sample_seeds(pipe, sets, settings)
    monkeypatch.setattr("lab6.sampling._sample_each", lambda *arguments: pytest.fail("drawn in this process"))
    found = lab.sample_seeds(pipe, sets, settings, processes=2)
    assert found.shape == (3, 2, 3, 64, 64)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
