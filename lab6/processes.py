"""Training on several GPUs: one process each."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import typing

import torch

from lab6.distillation import find_teacher
from lab6.evaluators import Evaluator
from lab6.runs import find_pipeline, run_folder
from lab6.settings import make_settings
from lab6.storage import ROOT, from_project

if typing.TYPE_CHECKING:
    from lab6.dataset import ICLEVRDataset
    from lab6.settings import Settings


def count_processes(settings: Settings, dataset: ICLEVRDataset) -> int:
    """How many processes `train` can use here: one a GPU, as far as they divide a batch; at least 1."""
    gpus = torch.cuda.device_count() if settings.device == "cuda" else 1
    return max(n for n in range(1, max(1, gpus) + 1) if min(settings.batch_size, len(dataset)) % n == 0)


def goes_on(settings: Settings, resume: str) -> bool:
    """What notebook 03's `resume` (yes, no or auto) means: auto goes on in the full profile only."""
    return resume == "yes" or (resume == "auto" and settings.profile == "full")


def train_in_processes(settings: Settings, processes: int, resume: bool = False):
    """What notebook 03 trains with these settings, in so many processes: run_notebooks.py --train under torchrun.

    Prints their lines, and returns when all is trained: `train` with resume=True then finds a whole run.

    Raises:
        RuntimeError: they failed; the reason is in what they printed.
    """
    whole = dataclasses.asdict(make_settings(settings.profile, preset=settings.preset))
    chosen = {name: value for name, value in dataclasses.asdict(settings).items() if value != whole[name]}
    chosen |= dict(preset=settings.preset, resume="yes" if resume else "no")
    values = [f"{name}={list(value) if isinstance(value, tuple) else value}" for name, value in chosen.items()]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += [ROOT / "run_notebooks.py", "--train", "--profile", settings.profile]
    command += [part for value in values for part in ("-p", value)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            for line in process.stdout:
                print(line, end="", flush=True)
        except BaseException:  # interrupted: torchrun ends its processes
            process.terminate()
            process.wait()
            raise
    if process.returncode:
        raise RuntimeError(f"training in {processes} processes failed (exit status {process.returncode}): see above")


def check_files(settings: Settings, weights: str = "auto", evaluator: str = "auto"):
    """Raise FileNotFoundError where a pipeline, teacher or evaluator that is named, and not made by the run, is not
    there. Arguments as for `load_pipeline` and `prepare_evaluator`."""
    made_here = from_project(weights).resolve().is_relative_to(run_folder(settings))  # by notebook 03, perhaps
    if weights not in ("auto", "trained") and not made_here:
        find_pipeline(settings, weights)
    if settings.teacher:
        find_teacher(settings)
    if evaluator != "auto":
        Evaluator.file_of(evaluator)
