"""What the course wants handed in: a zip of the report and the source, and the weights as a .pth.

Stands on report, parameters, runs and storage.
"""

from __future__ import annotations

import os
import re
import subprocess
import zipfile
from pathlib import Path

from lab6.runner.parameters import NOTEBOOKS, Refused
from lab6.runner.report import make_report
from lab6.storage import ROOT, write_whole

#: Where the source is and how its files end, for a copy of this project that is not a git repository.
FOLDERS = ("*", "benchmarks/**/*", "data/*", "lab6/**/*", "notebooks/**/*", "tests/**/*")
ENDINGS = {"", ".cff", ".css", ".ipynb", ".j2", ".md", ".py", ".toml", ".txt", ".yml"}
#: json files that are ours; the course's are not ours to hand on.
JSON = ("benchmarks/results.json", "data/held_out_scenes.json", "data/unseen_sets.json")


def make_submission(settings, weights="auto", notebooks=NOTEBOOKS):
    """Write DL_LAB6_ID_NAME.zip and DL_lab6_ID_NAME.pth into the current folder.

    The student's number and name are those of LAB6_STUDENT_ID and LAB6_STUDENT_NAME, the report is made of what ran
    last, and the weights are those of `load_pipeline`. Raises Refused where any of them is missing.
    """
    from lab6.runs import load_pipeline

    student = [os.environ.get(name, "").strip() for name in ("LAB6_STUDENT_ID", "LAB6_STUDENT_NAME")]
    if not all(student) or any(re.search(r'[\\/:*?"<>|\x00-\x1f]', part) for part in student):
        raise Refused('say who you are: make submission STUDENT_ID=... NAME=... (no / \\ : * ? " < > | in them)')
    try:
        pipe = load_pipeline(settings, weights)
    except (OSError, ValueError) as error:
        raise Refused(error) from None
    pdf = make_report(settings, notebooks)
    if pdf is None:
        raise Refused("a submission needs report.pdf")
    name = "_".join(student)
    archive, network = Path(f"DL_LAB6_{name}.zip").resolve(), Path(f"DL_lab6_{name}.pth").resolve()
    write_whole(archive, lambda temporary: write_zip(temporary, archive.stem, pdf))
    write_whole(network, lambda temporary: write_weights(temporary, pipe))
    print(f"submission  {archive}", f"submission  {network}", sep="\n")


def write_zip(file, folder, pdf):
    """A zip of one folder that holds report.pdf and source/."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(pdf, f"{folder}/report.pdf")
        for source in source_files():
            archive.write(source, f"{folder}/source/{source.relative_to(ROOT).as_posix()}")


def source_files():
    """The files of this project that git knows or, without git, those that look like source. No weights, no figures."""
    try:
        git = ["git", "-C", str(ROOT), "ls-files", "-z"]
        listed = subprocess.run(git, capture_output=True, text=True).stdout.split("\0")
    except OSError:  # no git on this computer
        listed = []
    files = [ROOT / file for file in listed if file]
    if not files:
        found = [file for pattern in FOLDERS for file in ROOT.glob(pattern) if file.suffix in ENDINGS]
        found = [file for file in found if not file.name.startswith(".") or file.name == ".gitignore"]
        files = [*found, *(ROOT / name for name in JSON)]
    left_out = {ROOT / "figures", ROOT / "data" / "weights", ROOT / ".ci"}
    return [file for file in files if file.is_file() and not left_out & set(file.parents)]


def write_weights(file, pipe):
    """{"model": state dict of the denoiser, "config": its arguments, "scheduler": those of the DDPMScheduler} and,
    where it samples latents, "autoencoder" and "autoencoder_config"; to be read with weights_only=True."""
    import torch

    config = {key: value for key, value in pipe.denoiser.config.items() if not key.startswith("_")}
    weights = dict(model=pipe.denoiser.state_dict(), config=config, scheduler=dict(pipe.scheduler.config))
    if pipe.autoencoder is not None:
        weights |= dict(autoencoder=pipe.autoencoder.state_dict(), autoencoder_config=dict(pipe.autoencoder.config))
    torch.save(weights, file)
