"""run_notebooks.py on small notebooks in a temporary folder: what it refuses, how it stops, what it leaves behind."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time

import nbformat
import pytest
from conftest import make_data

import lab6_utils
import run_notebooks
from run_notebooks import Refused, check_parameters, choose_notebooks, parse_value

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


@pytest.fixture
def folder(tmp_path, monkeypatch):
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


def test_choice_of_notebooks(folder):
    for name in ("01_a", "02_b", "05_e", "06_f"):
        write_notebook(folder / f"{name}.ipynb")
    assert [p.stem for p in choose_notebooks(folder)] == ["01_a", "02_b", "05_e", "06_f"]
    assert [p.stem for p in choose_notebooks(folder, "06,1")] == ["01_a", "06_f"]
    for only in ("03", "a", "1-2"):
        with pytest.raises(Refused, match="--only"):
            choose_notebooks(folder, only)


def test_values_take_the_type_of_the_default():
    assert parse_value("3", 1) == 3 and parse_value("3", "test") == "3"
    assert parse_value("3", 1.0) == 3.0 and type(parse_value("3", 1.0)) is float
    assert parse_value("false", True) is False and parse_value("True", False) is True
    assert parse_value("gray cube, red cube", ["blue cube"]) == ["gray cube", "red cube"]
    assert parse_value('["gray cube", "red cube"]', ["blue cube"]) == ["gray cube", "red cube"]
    assert parse_value("1,2", [0.5]) == [1.0, 2.0]
    assert parse_value("3", None) == 3 and parse_value("linear-attn", None) == "linear-attn"
    assert parse_value("[8, 16]", None) == parse_value("8,16", None) == [8, 16] and parse_value("true", None) is True
    assert parse_value("sample", None) == "sample", "None stands for the preset's choice, of whatever type"
    wrong = (("x", 1), ("1.5", 1), ("true", 1), ("x", 1.0), ("true", 1.0), ("1", True), ("yes", True), ("1,x", [1]))
    for text, default in wrong:
        with pytest.raises((ValueError, SyntaxError)):
            parse_value(text, default)


def test_parameters_go_to_the_notebooks_that_have_them(folder):
    write_notebook(folder / "01_a.ipynb", parameters=PARAMETERS + 'split = "test"  # or new_test\n')
    write_notebook(folder / "02_b.ipynb", parameters=PARAMETERS + "scale = 2.0\nlabels = [\n    'gray cube',\n]\n")
    first, second = paths = choose_notebooks(folder)
    given = check_parameters(paths, ["scale=3", "seed=7", "split=a=b"])
    assert given == {first: {"seed": 7, "split": "a=b"}, second: {"scale": 3.0, "seed": 7}}
    with pytest.raises(Refused, match=r"(?s)did you mean scale\?.*01_a has .*02_b has"):
        check_parameters(paths, ["scal=3"])
    more = "num_timesteps = 3\nguidance_scale = 2.0\nsteps = 1\n"
    write_notebook(folder / "03_c.ipynb", parameters=PARAMETERS + more)
    for name, meant in (("guidance", "guidance_scale"), ("step", "steps")):
        with pytest.raises(Refused, match=rf"did you mean {meant}\?"):
            check_parameters(choose_notebooks(folder, "03"), [f"{name}=3"])
    with pytest.raises(Refused, match=r"02_b wants float, such as its default 2\.0"):
        check_parameters(paths, ["scale=big"])
    with pytest.raises(Refused, match="use --profile"):
        check_parameters(paths, ["profile=quick"])
    with pytest.raises(Refused, match="write name=value"):
        check_parameters(paths, ["seed"])


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
    ],
)
def test_refused_before_anything_runs(folder, capsys, request_):
    more = 'sampler = ""\nsplit = "both"\npreset = "tokens"\nweights = "auto"\nteacher = None\nevaluator = "auto"\n'
    write_notebook(folder / "01_a.ipynb", "open('ran', 'w')", parameters=PARAMETERS + more)
    assert run(folder, *request_) == 2
    assert capsys.readouterr().err.count("\n") <= 2
    assert not (folder / "ran").exists() and not executed(folder).exists()


def test_missing_data_is_one_line_before_anything_runs(folder, capsys, tmp_path, monkeypatch):
    write_notebook(folder / "01_a.ipynb", "open('ran', 'w')")
    monkeypatch.setenv("LAB6_DATA", str(tmp_path / "elsewhere"))
    assert run(folder) == 2
    error = capsys.readouterr().err
    assert error.startswith("No i-CLEVR data: ") and error.count("\n") == 1
    assert not (folder / "ran").exists()


def test_success(folder, capsys):
    importable = "import importlib.util, os\nassert importlib.util.find_spec('lab6_utils')"
    headless = "assert os.environ['LAB6_HEADLESS'] == '1'\nopen(f'{profile} {seed}', 'w')"
    write_notebook(folder / "01_a.ipynb", importable, headless, "print('Epoch 1/2\\nquiet\\nprogress 50%')")
    write_notebook(folder / "02_b.ipynb", "1")
    assert run(folder, "-p", "seed=7") == 0
    assert (folder / "tiny 7").exists(), "ran in the notebooks' folder, with its parameters"
    assert sorted(p.name for p in executed(folder).iterdir()) == ["01_a.ipynb", "02_b.ipynb", "status.json"]
    entry = status(folder)["01_a"]
    assert entry["state"] == "ok" and entry["seconds"] > 0 and entry["commit"]
    assert entry["parameters"] == {"profile": "tiny", "seed": 7}
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines if not line.startswith(" ")] == [
        ["01_a", "running"], ["01_a", "ok"], ["02_b", "running"], ["02_b", "ok"],
    ]  # fmt: skip
    assert [line for line in lines if line.startswith(" ")] == ["  Epoch 1/2", "  progress 50%"]


@pytest.mark.parametrize(
    "cell, arguments, words",
    [
        ("x = 1\nx / 0", [], ["ZeroDivisionError: division by zero"]),
        ("import os\nos._exit(1)", [], ["DeadKernelError"]),
        ("import time\ntime.sleep(60)", ["--timeout", "1"], ["CellTimeoutError"]),
        ("import sys\nsys.exit(0)", [], ["ended the kernel"]),
    ],
)
def test_failure_stops_the_run_and_keeps_the_last_good_notebook(folder, capsys, cell, arguments, words):
    first_line = cell.splitlines()[0]
    write_notebook(folder / "01_a.ipynb", "'fine'", cell, "'not reached'")
    write_notebook(folder / "02_b.ipynb", "open('ran', 'w')")
    executed(folder).mkdir(parents=True)
    executed(folder, "01_a.ipynb").write_text("the last good one")
    assert run(folder, *arguments) == 1
    message = capsys.readouterr().err
    for word in [f"cell 4 of 5: {first_line}", *words]:
        assert word in message
    assert executed(folder, "01_a.ipynb").read_text() == "the last good one"
    assert executed(folder, "01_a.partial.ipynb").exists()
    assert status(folder)["01_a"]["state"] == "failed" and "02_b" not in status(folder)
    assert not (folder / "ran").exists()


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
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(folder), *asked], cwd=run_notebooks.ROOT)
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


def test_a_sweep_on_the_workers_of_a_scheduler(folder, capsys, monkeypatch):
    from distributed import LocalCluster

    write_notebook(folder / "01_a.ipynb", "import os\nopen(f'ran {seed}', 'w').write(os.environ.get('LAB6_RUNS', ''))")
    assert run(folder, "--sweep", "seed=0", "--scheduler", "tcp://127.0.0.1:9") == 2
    assert "no dask scheduler with workers answers there" in capsys.readouterr().err
    options = dict(n_workers=1, dashboard_address="127.0.0.1:0")
    with LocalCluster(threads_per_worker=2, **options) as cluster:
        assert run(folder, "--sweep", "seed=0", "--scheduler", cluster.scheduler_address) == 2
        assert "--nthreads 1" in capsys.readouterr().err
    with monkeypatch.context() as elsewhere:  # workers that were started with other variables
        elsewhere.delenv("LAB6_RUNS")
        cluster = LocalCluster(threads_per_worker=1, **options)
    with cluster:
        assert run(folder, "--sweep", "seed=0,1", "--scheduler", cluster.scheduler_address) == 0
        assert len(cluster.scheduler_info["workers"]) == 1, "the cluster is its owner's to close"
    assert [(folder / f"ran {i}").read_text() for i in (0, 1)] == [str(folder.parent / "LAB6_RUNS")] * 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interruption(folder, number):
    cell = "import os, time\nprint('progress', os.getpid(), flush=True)\ntime.sleep(60)"
    write_notebook(folder / "01_a.ipynb", cell)
    command = [sys.executable, "-c", PROGRAM, str(folder), "--profile", "tiny", "--no-report"]
    process = subprocess.Popen(command, cwd=run_notebooks.ROOT, stdout=subprocess.PIPE, text=True)
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
    listed = subprocess.run(["make", "-n", "experiments"], cwd=run_notebooks.ROOT, capture_output=True, text=True)
    lines = [line for line in listed.stdout.replace("\\\n", "").splitlines() if "run_notebooks.py" in line]
    asked = []
    for runner in ("run_all", "run_sweep"):
        monkeypatch.setattr(run_notebooks, runner, lambda jobs, *rest: asked.extend(jobs.values()))
    monkeypatch.setattr(run_notebooks, "report", lambda *arguments: None)
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
