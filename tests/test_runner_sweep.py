"""Sweeps: every combination once, on workers that may die, on other machines, each on a GPU of its own."""

import json
import os
import signal
import subprocess
import sys
import time
import types

import pytest
from small_notebooks import PARAMETERS, PROGRAM, executed, folder_of_notebooks, run, write_notebook  # noqa: F401 - a fixture

import lab6_utils as lab
from lab6.runner import sweep


def test_a_sweep_runs_every_combination_once(folder, capsys):
    cell = "with open('ran', 'a') as log:\n    log.write(f'{seed} {schedule} {epochs}\\n')\nassert seed < 2, 'too many'"
    write_notebook(folder / "01_a.ipynb", cell, parameters=PARAMETERS + "schedule = None\nepochs = None\n")
    ran = lambda: (folder / "ran").read_text().splitlines()
    asked = ["-p", "epochs=3", "--sweep", "schedule=linear,cosine", "seed=0,2,1"]
    assert run(folder, "--workers", "2", *asked) == 1
    assert sorted(ran()) == [f"{seed} {schedule} 3" for seed in (0, 1, 2) for schedule in ("cosine", "linear")]
    out, error = capsys.readouterr()
    failures = sorted(error.rpartition("2 of 6 failed: ")[2].strip().split("; "))
    assert failures == ["01_a,schedule=cosine,seed=2", "01_a,schedule=linear,seed=2"] and "too many" in error
    assert "4 of 6: 01_a,schedule=" in out
    entries = json.loads(executed(folder, "sweep/status.json").read_text())
    assert entries["01_a,schedule=cosine,seed=1"]["state"] == "ok"
    done = executed(folder, "sweep/01_a,schedule=cosine,seed=1.ipynb")
    done.unlink()
    assert run(folder, *asked[:-1], "seed=0,1") == 0
    assert ran()[6:] == ["1 cosine 3"], "the others had been done"
    assert done.is_file() and "done before, at commit" in capsys.readouterr().out
    assert run(folder, "-p", "epochs=4", "--sweep", "schedule=linear", "seed=0") == 0 and ran()[7:] == ["0 linear 4"]


def test_what_a_worker_did_when_it_died_is_done_again(folder):
    """Two workers; the one that runs seed 0 is killed in the middle of it, and each result is recorded once."""
    cells = [
        "import os, pathlib, sys, time\nimport lab6_utils as lab",
        "with open('starts', 'a') as log:\n    log.write(f'{seed} {os.getppid()}\\n')\n"
        "while seed == 0 and not pathlib.Path('go').exists():\n    time.sleep(0.1)",
        "settings = lab.make_settings(profile, seed=seed)\n"
        "lab.save_result(settings, {'system': f'seed {seed}', 'accuracy': 1.0}, 'trainings')",
    ]
    write_notebook(folder / "01_a.ipynb", *cells)
    starts = lambda: [line.split() for line in (folder / "starts").read_text().splitlines()]
    asked = ["--profile", "tiny", "--sweep", "seed=0,1,2", "--workers", "2"]
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(folder), *asked], cwd=lab.ROOT)
    try:
        for _ in range(600):
            time.sleep(0.2)
            if executed(folder, "sweep/01_a,seed=2.ipynb").exists():
                break
        (worker,) = [int(pid) for seed, pid in starts() if seed == "0"]
        os.kill(worker, signal.SIGKILL)
        for _ in range(600):
            time.sleep(0.2)
            if len(starts()) == 4:
                break
        (folder / "go").touch()
        assert process.wait(timeout=120) == 0
    finally:
        process.kill()
    assert sorted(seed for seed, _ in starts()) == ["0", "0", "1", "2"], "only what the dead worker did is done again"
    results = json.loads((folder.parent / "LAB6_RUNS" / "tiny" / "figures" / "results.json").read_text())["trainings"]
    assert sorted(row["system"] for row in results) == ["seed 0", "seed 1", "seed 2"]
    entries = json.loads(executed(folder, "sweep/status.json").read_text())
    assert {name: entry["state"] for name, entry in entries.items()} == {f"01_a,seed={i}": "ok" for i in range(3)}


def test_a_sweep_on_the_workers_of_a_scheduler(folder, capsys, tmp_path):
    from distributed import LocalCluster

    write_notebook(folder / "01_a.ipynb", "import os\nopen(f'ran {seed}', 'w').write(os.environ.get('LAB6_RUNS', ''))")
    assert run(folder, "--sweep", "seed=0", "--scheduler", "tcp://127.0.0.1:9") == 2
    assert "no dask scheduler with workers answers there" in capsys.readouterr().err
    with LocalCluster(n_workers=0, dashboard_address="127.0.0.1:0") as cluster:

        def sweep_with(*options):
            """On a worker that knows neither this project's folder nor its variables."""
            other = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "LAB6_RUNS")}
            command = [sys.executable, "-m", "distributed.cli.dask_worker", cluster.scheduler_address, "--no-dashboard"]
            worker = subprocess.Popen([*command, *options], cwd=tmp_path, env=other, stderr=subprocess.DEVNULL)
            try:
                return run(folder, "--sweep", "seed=0,1", "--scheduler", cluster.scheduler_address)
            finally:
                assert worker.poll() is None, "the worker is its owner's to stop"
                worker.terminate()
                worker.wait()
                while cluster.scheduler.workers:
                    time.sleep(0.1)

        assert sweep_with("--nthreads", "2") == 2 and "--nthreads 1" in capsys.readouterr().err
        assert sweep_with("--nthreads", "1") == 0
    assert [(folder / f"ran {i}").read_text() for i in (0, 1)] == [str(folder.parent / "LAB6_RUNS")] * 2


# ── Which GPU, how many cores ────────────────────────────────────────────────────────────────────────


def test_workers_are_numbered_on_their_machine():
    """As dask's scheduler_info has them: by address, with numbers or words for names."""
    names = {"tcp://10.0.0.1:5": 0, "tcp://10.0.0.1:7": 1, "tcp://10.0.0.2:5": "b-1", "tcp://10.0.0.2:7": "b-0"}
    workers = {address: {"name": name, "host": address[6:14]} for address, name in names.items()}
    alike = dict.fromkeys(workers, None)
    assert sweep.places_on_machines(workers, alike) == {0: 0, 1: 1, "b-0": 0, "b-1": 1}
    pinned = alike | {address: f"{i},{1 - i}" for i, address in enumerate(workers) if address < "tcp://10.0.0.2"}
    assert {place for name, place in sweep.places_on_machines(workers, pinned).items() if isinstance(name, int)} == {0}
    assert sweep.places_on_machines({}, {}) == {}


@pytest.mark.parametrize(
    "count, named, ids",
    [(2, None, ["0", "1"]), (2, "3,5", ["3", "5"]), (1, "7", ["7"]), (0, "-1", []), (0, "", []), (0, None, [])],
)
def test_gpus_are_those_that_the_process_sees(monkeypatch, count, named, ids):
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert sweep.visible_gpus() == ids


@pytest.mark.parametrize("worker, gpu", [("a", "4"), ("b", "6"), ("c", "4")])
def test_a_worker_takes_a_gpu_of_its_machine(monkeypatch, tmp_path, worker, gpu):
    seen = []
    monkeypatch.setattr("distributed.get_worker", lambda: types.SimpleNamespace(name=worker))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("lab6.runner.sweep.execute", lambda *_: seen.append(os.environ["CUDA_VISIBLE_DEVICES"]))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    _, failure = sweep.run_job(None, tmp_path / "01_a.ipynb", {}, None, {}, {"a": 0, "b": 1, "c": 2})
    assert seen == [gpu] and failure is None
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "4,6", "the next notebook on this worker finds it as it was"


@pytest.mark.parametrize("room", [sweep, lab.load_renderer()])
def test_cores_that_a_process_may_not_use_do_not_count(monkeypatch, room):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 3, 5}, raising=False)
    assert room.count_cores() == 3
