"""What the course wants handed in: a zip of the report, the source and the images, or the weights as a .pth.

Stands on report, parameters, runs and storage.
"""

from __future__ import annotations

import os
import re
import subprocess
import zipfile
from pathlib import Path

from lab6.runner.parameters import NOTEBOOKS, Refused, refusing
from lab6.runner.report import make_report
from lab6.storage import ROOT, write_whole

#: Where the source is and how its files end, for a copy of this project that is not a git repository.
FOLDERS = ("*", "benchmarks/**/*", "data/*", "lab6/**/*", "notebooks/**/*", "tests/**/*")
ENDINGS = {"", ".cff", ".css", ".ipynb", ".j2", ".md", ".py", ".toml", ".txt", ".yml"}
#: json files that are ours; the course's are not ours to hand on.
JSON = ("benchmarks/results.json", "data/held_out_scenes.json", "data/unseen_sets.json")


#: What the course wants in a year: images in the zip, or weights as a .pth beside it. The newest comes first.
LAYOUTS = {"2026": "images", "earlier": "weights"}


def make_submission(settings, weights="auto", notebooks=NOTEBOOKS, layout="2026"):
    """Write DL_LAB6_ID_NAME.zip and, in the layouts that want it, DL_lab6_ID_NAME.pth into the current folder.

    The student's number and name are those of LAB6_STUDENT_ID and LAB6_STUDENT_NAME, report and images are of what ran
    last, and the weights are those of `load_pipeline`. Raises Refused where any of them is missing.
    """
    from lab6.runs import load_pipeline

    student = [os.environ.get(name, "").strip() for name in ("LAB6_STUDENT_ID", "LAB6_STUDENT_NAME")]
    if not all(student) or any(re.search(r'[\\/:*?"<>|\x00-\x1f]', part) for part in student):
        raise Refused('say who you are: make submission STUDENT_ID=... NAME=... (no / \\ : * ? " < > | in them)')
    pipe = refusing(load_pipeline, settings, weights) if LAYOUTS[layout] == "weights" else None
    images = sampled_images(settings) if LAYOUTS[layout] == "images" else {}
    pdf = make_report(settings, notebooks)
    if pdf is None:
        raise Refused("a submission needs report.pdf")
    name = "_".join(student)
    archive, network = Path(f"DL_LAB6_{name}.zip").resolve(), Path(f"DL_lab6_{name}.pth").resolve()
    source, new = source_files()
    write_whole(archive, lambda temporary: write_zip(temporary, archive.stem, {"report.pdf": pdf} | images, source))
    print(f"submission  layout {layout}: report.pdf, {len(images)} images, {len(source)} files of source",
          *(f"submission  not yet under git, but taken: {file}" for file in new), f"submission  {archive}",
          sep="\n")  # fmt: skip
    if pipe:
        write_whole(network, lambda temporary: write_weights(temporary, pipe))
        print(f"submission  {network}")


def sampled_images(settings):
    """{"images/test/0.png": file, ...} of what notebook 04 sampled last. Raises Refused where there are none."""
    images, folder = {}, settings.figures / "samples"
    for split in ("test", "new_test"):  # notebook 04 writes all of a file, and removes older ones
        files = sorted((folder / split).glob("[0-9][0-9][0-9].png"))
        images |= {f"images/{split}/{number}.png": file for number, file in enumerate(files)}
    if not images:
        raise Refused(f"no images in {folder}: run notebook 04 first, or choose --layout earlier")
    return images


def write_zip(file, folder, others, source):
    """A zip of one folder that holds source/ and the other files, {name in the zip: file}."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, other in others.items():
            archive.write(other, f"{folder}/{name}")
        for each in source:
            archive.write(each, f"{folder}/source/{each.relative_to(ROOT).as_posix()}")


def source_files():
    """The files of this project that git knows and those that are new and not ignored, and, apart, the new ones.
    Without git: those that look like source. No weights, no figures, nothing hidden that git does not know."""
    known, new = _list_by_git("--cached"), _list_by_git("--others", "--exclude-standard")
    hidden = lambda file: any(part.startswith(".") for part in file.relative_to(ROOT).parts)
    new = [file for file in new if file.suffix in {*ENDINGS, ".json"} and not hidden(file)]
    if not known:
        found = [file for pattern in FOLDERS for file in ROOT.glob(pattern) if file.suffix in ENDINGS]
        found = [file for file in found if not file.name.startswith(".") or file.name == ".gitignore"]
        known, new = [*found, *(ROOT / name for name in JSON)], []
    left_out = {ROOT / "figures", ROOT / "data" / "weights", ROOT / ".ci"}
    of_ours = lambda files: [file for file in files if file.is_file() and not left_out & set(file.parents)]
    new = [file for file in of_ours(new) if ROOT / "data" not in file.parents]  # where the course's files lie
    return of_ours(known) + new, [file.relative_to(ROOT).as_posix() for file in new]


def _list_by_git(*which):
    try:
        git = ["git", "-C", str(ROOT), "ls-files", "-z", *which]
        listed = subprocess.run(git, capture_output=True, text=True).stdout.split("\0")
    except OSError:  # no git on this computer
        return []
    return [ROOT / file for file in listed if file]


def write_weights(file, pipe):
    """{"model": state dict of the denoiser, "config": its arguments, "scheduler": those of the DDPMScheduler} and,
    where it samples latents, "autoencoder" and "autoencoder_config"; to be read with weights_only=True."""
    import torch

    config = {key: value for key, value in pipe.denoiser.config.items() if not key.startswith("_")}
    weights = dict(model=pipe.denoiser.state_dict(), config=config, scheduler=dict(pipe.scheduler.config))
    if pipe.autoencoder is not None:
        weights |= dict(autoencoder=pipe.autoencoder.state_dict(), autoencoder_config=dict(pipe.autoencoder.config))
    torch.save(weights, file)
