"""Running notebooks with papermill, one after the other, and keeping in status.json how each stands.

Stands on parameters, files, machine and storage.
"""

from __future__ import annotations

import contextlib
import datetime
import io
import os
import re
import time

import papermill

from lab6.runner.parameters import Refused
from lab6.storage import ROOT, folder_named_by, read_json, update_json

#: What notebooks are told by environment variables, also those that run on other machines.
PASSED_ON = ("LAB6_DATA", "LAB6_RUNS", "LAB6_FIGURES", "LAB6_HEADLESS", "JUPYTER_PREFER_ENV_PATH", "PYTHONPATH",
             "PYDEVD_DISABLE_FILE_VALIDATION")  # fmt: skip


class Failed(Exception):
    """A notebook did not run to its end; the message says where and why."""


# ── What notebooks are told ────────────────────────────────────────────────────────────────────────────


def set_environment():
    """What the kernels inherit: this interpreter, lab6_utils importable, no progress bars, absolute paths."""
    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"  # else a kernel of the user's named "python3" comes first
    os.environ["LAB6_HEADLESS"] = "1"
    os.environ["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"  # no debugger warning from every kernel
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    for name in ("LAB6_DATA", "LAB6_RUNS", "LAB6_FIGURES"):
        if folder := folder_named_by(name):
            os.environ[name] = str(folder)


@contextlib.contextmanager
def environment(variables):
    """Set environment variables for a while."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def run_facts(settings):
    """Commit, device and data of a run, for status.json and the report. Raises Refused where there is no data."""
    from lab6.files import find_data
    from lab6.machine import commit, device_name

    try:
        data = find_data(settings.rendered_scenes).source
    except (OSError, ValueError, RuntimeError) as error:
        raise Refused(error) from None
    return {"commit": commit(), "device": device_name(settings), "data": data}


# ── One notebook ───────────────────────────────────────────────────────────────────────────────────────


class ProgressLines(io.TextIOBase):
    """The file that papermill writes a notebook's prints to: "epoch..." and "progress..." lines pass."""

    rest = ""

    def __init__(self, prefix="  "):
        self.prefix = prefix

    def write(self, text):
        *lines, self.rest = (self.rest + text).split("\n")
        for line in lines:
            if line.lower().startswith(("epoch", "progress")):
                print(f"{self.prefix}{line}", flush=True)


def execute(path, final, parameters, timeout=None, prefix="  "):
    """Run one notebook; `final` is replaced only when all of it ran. Raises Failed.

    prefix: of the lines on its progress.
    """
    partial = final.with_suffix(".partial.ipynb")
    try:
        executed = papermill.execute_notebook(
            path, partial, parameters, kernel_name="python3", cwd=path.parent, progress_bar=False,
            stdout_file=ProgressLines(prefix), execution_timeout=timeout, start_timeout=600, iopub_timeout=60,
            extra_arguments=["--log-level=50"],  # no advice on transports from every kernel
        )  # fmt: skip
    except Exception as error:
        reason = f"{explain(error)}\n  what ran is in {partial}"
        raise Failed(f"{where_it_stopped(partial)}\n    {reason}") from error
    code = [cell for cell in executed.cells if cell.cell_type == "code" and cell.source.strip()]
    if not all(cell.execution_count for cell in code):  # exit() in a cell is no error to papermill
        raise Failed(f"{where_it_stopped(partial)}\n    ended the kernel: the cells after it did not run")
    os.replace(partial, final)


def where_it_stopped(partial):
    """ "cell 7 of 31: its first line" for the last cell that began, numbered as in the stored notebook."""
    added = {"injected-parameters", "papermill-error-cell-tag"}  # by papermill
    cells = read_json(partial, default={}).get("cells", [])
    cells = [cell for cell in cells if not added & set(cell["metadata"].get("tags", []))]
    for number, cell in reversed(list(enumerate(cells, 1))):
        if cell["cell_type"] == "code" and cell["metadata"].get("papermill", {}).get("start_time"):
            first_line = "".join(cell["source"]).strip().partition("\n")[0]
            return f"cell {number} of {len(cells)}: {first_line}"
    return "before its first cell"


def explain(error):
    """An error's name and message, with the last lines of the traceback where a cell raised it."""
    if not hasattr(error, "traceback"):  # a time-out or a dead kernel
        return f"{type(error).__name__}: {error}".strip().splitlines()[0]
    lines = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(error.traceback)).splitlines()
    return "\n    ".join([*[line for line in lines if line.strip()][-8:-1], f"{error.ename}: {error.evalue}"])


# ── All of them ────────────────────────────────────────────────────────────────────────────────────────


def read_status(folder):
    """{name: how it stands} of the notebooks that ran into `folder`. Raises Refused where status.json is broken."""
    try:
        return read_json(folder / "status.json") if (folder / "status.json").exists() else {}
    except ValueError as error:
        raise Refused(f"{error}; delete it, and all counts as not done") from None


def record(folder, name, state, seconds, parameters, **facts):
    """Enter how a notebook stands in status.json of its folder, and print it."""
    date = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    entry = {"state": state, "seconds": round(seconds, 1), "date": date, **facts, "parameters": parameters}
    update_json(folder / "status.json", lambda status: status | {name: entry}, default={})
    print(f"{name:28}{state}" + ("" if state == "running" else f"  {seconds:.1f} s"), flush=True)


def run_all(jobs, folder, facts, timeout=None):
    """Run notebooks in order into `folder`, status.json beside them. Raises Failed at the first failure.

    jobs: {name of the executed notebook: (path, parameters)}.
    """
    folder.mkdir(parents=True, exist_ok=True)
    read_status(folder)
    for name, (path, parameters) in jobs.items():
        start = time.monotonic()
        record(folder, name, "running", 0, parameters, **facts)
        try:
            execute(path, folder / f"{name}.ipynb", parameters, timeout)
        except (Failed, KeyboardInterrupt) as error:
            reason = str(error) or "interrupted"
            record(folder, name, "failed", time.monotonic() - start, parameters, **facts, error=reason)
            raise
        record(folder, name, "ok", time.monotonic() - start, parameters, **facts)
