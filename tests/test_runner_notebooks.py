"""Running notebooks one after the other: what is left of one that ran, of one that failed, and in status.json."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from small_notebooks import executed, folder_of_notebooks, run, status, write_notebook  # noqa: F401 - a fixture

from lab6.runner.notebooks import read_status, record


def test_success(folder, capsys):
    importable = "import importlib.util, os\nassert importlib.util.find_spec('lab6_utils')"
    headless = "assert os.environ['LAB6_HEADLESS'] == '1'\nopen(f'{profile} {seed}', 'w')"
    write_notebook(folder / "01_a.ipynb", importable, headless, "print('Epoch 1/2\\nquiet\\nprogress 50%')")
    write_notebook(folder / "02_b.ipynb", "1")
    assert run(folder, "-p", "seed=7") == 0
    assert (folder / "tiny 7").exists(), "ran in the notebooks' folder, with its parameters"
    left = sorted(p.name for p in executed(folder).iterdir())
    assert left == ["01_a.ipynb", "02_b.ipynb", "status.json", "status.lock"]
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


def test_status_loses_nothing_that_several_write_at_once(tmp_path):
    """As two runs in the same folder do, or two sweeps."""
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: record(tmp_path, f"notebook {i}", "ok", 1.0, {"seed": i}), range(200)))
    entries = read_status(tmp_path)
    assert {entry["parameters"]["seed"] for entry in entries.values()} == set(range(200))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["status.json", "status.lock"]


def test_a_broken_status_is_not_written_over(folder, capsys):
    write_notebook(folder / "01_a.ipynb", "open('ran', 'w')")
    executed(folder).mkdir(parents=True)
    executed(folder, "status.json").write_text('{"01_a": ')
    for more in ([], ["--sweep", "seed=0"]):
        executed(folder, "sweep").mkdir(exist_ok=True)
        executed(folder, "sweep/status.json").write_text('{"01_a": ')
        assert run(folder, *more) == 2 and "status.json: not readable" in capsys.readouterr().err
    assert not (folder / "ran").exists()
