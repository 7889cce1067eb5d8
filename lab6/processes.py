"""Training in several processes, one per GPU: how many, started from a notebook, and what each of them does.

Stands on training, examples, runs, autoencoder, dataset, files, machine, settings and storage.
"""

from __future__ import annotations

import dataclasses
import datetime
import subprocess
import sys

import torch

from lab6.autoencoder import train_autoencoder
from lab6.dataset import ICLEVRDataset, training_set
from lab6.examples import batch_blocks
from lab6.files import find_data
from lab6.machine import without_accelerate_choices
from lab6.runs import run_folder
from lab6.settings import Settings
from lab6.storage import ROOT, write_json
from lab6.training import train


def should_resume(settings: Settings, resume: str) -> bool:
    """What notebook 03's `resume` (yes, no or auto) means: auto continues an earlier run in the full profile only."""
    return resume == "yes" or (resume == "auto" and settings.profile == "full")


def count_processes(settings: Settings, dataset: ICLEVRDataset) -> int:
    """How many processes should train here: one per GPU, but each with at least 64 images of a batch, and all with the
    same number of its blocks (see `batch_blocks`). At least 1."""
    batch = min(settings.batch_size, len(dataset))
    most = min(torch.cuda.device_count(), batch // 64) if settings.device == "cuda" else 1
    return max((n for n in range(1, most + 1) if batch_blocks(batch) % n == 0), default=1)


def train_in_processes(settings: Settings, processes: int, resume: bool = False):
    """Train in several processes what notebook 03 trains with these settings: run_notebooks.py --train under torchrun.

    The settings reach them by settings.json in the run's folder, where they stay. Prints what the processes print, and
    returns when all is trained: `train` with resume=True then finds the run complete.

    Raises:
        RuntimeError: they failed; the reason is in what they printed.
    """
    file = run_folder(settings) / "settings.json"
    write_json(file, dataclasses.asdict(settings))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += [ROOT / "run_notebooks.py", "--train", "--settings", file, "-p", f"resume={'yes' if resume else 'no'}"]
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


def train_here(settings: Settings, resume: bool = False):
    """Train as notebook 03 does, in as many processes as torchrun or accelerate started; prints a line per epoch.

    Raises:
        OSError, ValueError, RuntimeError: no data, a checkpoint of other settings, not enough memory.
    """
    from accelerate import PartialState

    # The others wait while the first renders scenes or trains the autoencoder: longer than the usual ten minutes.
    with without_accelerate_choices():
        state = PartialState(cpu=settings.device == "cpu", timeout=datetime.timedelta(hours=12))
    folder = run_folder(settings)
    with state.main_process_first():  # the others find the cache
        dataset = training_set(settings, find_data(settings.rendered_scenes))
    if state.is_main_process:
        print(f"progress: {len(dataset)} images, {state.num_processes} processes, {folder}", flush=True)
        for epoch in train_autoencoder(settings, dataset, folder, resume):
            print(epoch, flush=True)
    state.wait_for_everyone()
    for epoch in train(settings, dataset, folder, resume):
        if state.is_main_process:
            print(epoch, flush=True)
