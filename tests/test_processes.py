"""lab6/processes.py: training in several processes: the same numbers as in one, every file written once."""

import json
import os
import re
import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest
import torch
from conftest import make_data

import lab6_utils as lab
import run_notebooks
from lab6.runner.parameters import NOTEBOOKS

# run_notebooks.py in single precision, which logs who writes what.
PROGRAM = """
import functools, os, sys
import run_notebooks
from lab6 import processes, runs, settings, storage, training
settings.make_settings = functools.partial(settings.make_settings, precision="fp32")
write = storage.write_whole
def logged(path, do, *previous):
    write(path, do, *previous)
    with open(os.environ["LAB6_RUNS"] + "/written", "a") as log:
        log.write(f"{os.environ.get('RANK')} {path.name}\\n")
for room in (storage, runs, training):
    room.write_whole = logged
sys.exit(run_notebooks.main(sys.argv[1:]))
"""


@pytest.fixture
def train(tmp_path):
    """Run `run_notebooks.py --train` in so many processes, into a folder."""
    data = make_data(tmp_path / "data", scenes=range(12))

    def start(processes, folder, *arguments, program=PROGRAM, preset="tokens"):
        (tmp_path / "program.py").write_text(program)
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = [sys.executable, *(torchrun if processes > 1 else []), str(tmp_path / "program.py"), "--train"]
        folder.mkdir(exist_ok=True)
        environment = os.environ | dict(LAB6_DATA=str(data), LAB6_RUNS=str(folder), PYTHONPATH=str(lab.ROOT))
        environment |= dict(OMP_NUM_THREADS="1")
        command += ["--profile", "tiny", "-p", f"preset={preset}", *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)

    return start


def losses(folder, preset="tokens"):
    return [record["loss"] for record in json.loads((folder / "tiny" / preset / "history.json").read_text())]


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
        if not re.search(r"resnets.*conv\w*\.bias", name):  # before a norm: no gradient but rounding
            torch.testing.assert_close(weights[1][name], value, rtol=1e-3, atol=1e-5)

    before = losses(two)
    done = train(1, two, "-p", "epochs=3", "-p", "resume=yes")
    assert done.returncode == 0 and "epoch 3/3" in done.stdout and "epoch 2/3" not in done.stdout, done.stderr
    assert losses(two)[:2] == before and len(losses(two)) == 3
    done = train(2, two, "-p", "epochs=4", "-p", "resume=yes", "-p", "schedule=sigmoid")
    assert done.returncode and "belongs to other settings" in done.stderr, "a run of other settings is left alone"
    assert len(losses(two)) == 3


def test_two_processes_balance_the_loss_as_one_does(train, tmp_path):
    """The preset layout: places, shares of objects, and weights from the errors of all processes."""
    for count in (1, 2):
        done = train(count, tmp_path / str(count), preset="layout")
        assert done.returncode == 0, done.stderr
    one, two = (losses(tmp_path / str(count), "layout") for count in (1, 2))
    assert one == pytest.approx(two, rel=1e-2)
    errors = [torch.load(tmp_path / str(count) / "tiny" / "layout" / "checkpoint.pt", weights_only=True)["balance"]
              for count in (1, 2)]  # fmt: skip
    torch.testing.assert_close(*errors, rtol=1e-2, atol=1e-3)


def test_every_process_prints_its_error(train, tmp_path):
    """Also one that is not the first, such as one whose GPU has too little memory."""
    fails = """
def fails(*arguments):
    if os.environ["RANK"] == "1":
        raise RuntimeError("out of memory")
    return []
processes.train = fails
sys.exit"""
    done = train(2, tmp_path / "run", program=PROGRAM.replace("sys.exit", fails))
    assert done.returncode and "rank 1: out of memory" in done.stderr, done.stderr


@pytest.mark.parametrize(
    "choices", [dict(label_dropout=0), dict(preset="few-step", student_steps=2),
                dict(preset="linear-512", num_train_timesteps=500)],
)  # fmt: skip
def test_all_settings_reach_the_processes(runs, choices):
    """Also those that follow from others and are no parameters of notebook 03: guidance, steps."""
    settings = lab.make_settings("full", device="cpu", **choices)
    with mock.patch("lab6.processes.subprocess.Popen") as start:
        process = start.return_value.__enter__.return_value
        process.stdout, process.returncode = [], 0
        lab.train_in_processes(settings, 4, resume=True)
    command = [str(part) for part in start.call_args.args[0]]
    assert "--nproc-per-node=4" in command
    arguments = command[command.index(str(lab.ROOT / "run_notebooks.py")) + 1 :]
    arrived, given, _ = run_notebooks.plan(run_notebooks.parse(arguments), NOTEBOOKS)
    assert arrived == settings and given["resume"] == "yes"


@pytest.mark.parametrize(
    "gpus, batch, images, count",
    [(8, 256, 10_000, 4), (2, 256, 10_000, 2), (8, 1024, 10_000, 8), (8, 32, 10_000, 1), (0, 256, 10_000, 1),
     (3, 256, 10_000, 2), (8, 1000, 10_000, 8), (8, 1000, 500, 4), (8, 333, 10_000, 1)],
)  # fmt: skip
def test_how_many_processes_train(monkeypatch, gpus, batch, images, count):
    """Each has a GPU, 64 images of a batch or more, and whole blocks of it."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    settings = types.SimpleNamespace(device="cuda", batch_size=batch)
    assert lab.count_processes(settings, range(images)) == count
    assert lab.count_processes(types.SimpleNamespace(device="cpu", batch_size=batch), range(images)) == 1


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
