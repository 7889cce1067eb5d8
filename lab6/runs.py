"""What a training run leaves on disk: its folder, its checkpoint, its pipeline.

Stands on pipeline, denoiser, settings, diffusion, machine and storage.
"""

from __future__ import annotations

import contextlib
import dataclasses
import zipfile
from pathlib import Path

import torch
from diffusers.utils import logging as diffusers_logging
from safetensors.torch import load_file

from lab6.denoiser import Denoiser, count_parameters
from lab6.diffusion import make_sampler
from lab6.machine import check_finite, headless
from lab6.pipeline import ICLEVRPipeline
from lab6.settings import Settings
from lab6.storage import WEIGHTS, from_project, load_history, open_folder, sha256_of, write_json, write_whole


def run_folder(settings: Settings) -> Path:
    """Where notebook 03 keeps a training run: data/runs/PROFILE/RUN."""
    return settings.runs / settings.profile / (settings.run or settings.preset)


#: The newest checkpoint of a run, and the one before, which serves where the newest is damaged.
CHECKPOINTS = ("checkpoint.pt", "checkpoint.previous.pt")


def write_checkpoint(folder: Path, state: dict):
    """Keep the state of a training, and the one before."""
    newest, previous = (Path(folder) / name for name in CHECKPOINTS)
    write_whole(newest, lambda temporary: torch.save(state, temporary), previous)
    write_json(Path(folder) / "history.json", state["history"])


@contextlib.contextmanager
def open_tensorboard(folder, steps_done, main):
    """TensorBoard's writer of the main process, closed at the end; what a stopped run wrote after its checkpoint is
    overwritten."""
    if not main:
        yield None
        return
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(folder / "tensorboard", purge_step=steps_done + 1) as writer:
        yield writer


def read_checkpoint(settings: Settings, data: dict, folder: Path) -> dict | None:
    """The newest state in `folder`, or None where there is none. Where it is damaged, that before it, with a line.

    Args:
        data: `data_facts` of the images to train on. Checkpoints of earlier versions do not know their data.

    Raises:
        ValueError: all are damaged, or it belongs to other settings or other data.
    """
    files = [file for name in CHECKPOINTS if (file := Path(folder) / name).exists()]
    if not files:
        return None
    state, wrong = None, []
    for file in files:
        try:
            with zipfile.ZipFile(file) as archive:  # torch itself does not look at the checksums
                if damaged := archive.testzip():
                    raise ValueError(f"{damaged} in it is damaged")
            state = torch.load(file, map_location=settings.device, weights_only=True)
            defaults = {field.name: field.default for field in dataclasses.fields(Settings)}
            saved = defaults | dict(state["settings"])  # defaults for settings that are younger than the checkpoint
            break
        except Exception as error:
            wrong.append(f"{file}: not a checkpoint of this workbook ({_first_line(error)})")
    else:
        raise ValueError(f"{'; '.join(wrong)}; delete {'it' if len(files) == 1 else 'both'} to start afresh")
    for words in wrong:
        print(f"progress: {words}; going on from {file.name}, the one before", flush=True)
    names = [field.name for field in dataclasses.fields(Settings) if not field.metadata["resumable"]]
    now = {name: getattr(settings, name) for name in names}
    differ = [f"{n} ({saved.get(n)!r} there, {now[n]!r} now)" for n in names if saved.get(n) != now[n]]
    if differ:
        raise ValueError(
            f"{file} belongs to other settings: {', '.join(differ)}. Name another run "
            f"(run='...'), or delete {folder} to start afresh."
        )
    if state.get("data", data)["fingerprint"] != data["fingerprint"]:
        there = state["data"]
        raise ValueError(
            f"{file} was trained on other data: {there['images']:,} images of {there['source']} there, "
            f"{data['images']:,} images of {data['source']} now, of other content. Use the same data, name another run "
            f"(run='...'), or delete {folder} to start afresh."
        )
    return state


def _first_line(error):
    return f"{type(error).__name__}: {error}".splitlines()[0]  # an error may have no message at all


def load_pipeline(settings: Settings, weights: str = "auto") -> ICLEVRPipeline:
    """A trained pipeline with `settings`' sampler, on its device.

    Args:
        weights: "shipped" (data/weights/), "trained" (what notebook 03 trained in this profile), a folder, or
            "auto": trained in the profiles full and tiny, when a run is named, or when none ships; else shipped.

    Raises:
        FileNotFoundError: there is none, and which notebook makes it.
    """
    diffusers_logging.disable_progress_bar()  # of loading two files
    with open_folder(find_pipeline(settings, weights)) as folder:
        pipe = ICLEVRPipeline.from_pretrained(folder, local_files_only=True)
        pipe.weights_sha256 = sha256_of(folder / "denoiser" / "diffusion_pytorch_model.safetensors")
        history = load_history(folder)
        check_finite(str(folder), *pipe.denoiser.parameters())
    pipe.images_seen = history[-1]["images_seen"] if history else None
    pipe.to(settings.device).set_progress_bar_config(disable=headless())
    pipe.denoiser.to(memory_format=torch.channels_last)
    pipe.scheduler = make_sampler(settings.sampler, pipe.scheduler)
    return pipe


def find_weights(option: str, name: str) -> Path:
    """The folder of the pipeline that an option (teacher, start) names: a preset that ships, or a folder.

    Raises:
        FileNotFoundError: there is none.
    """
    folder = WEIGHTS / name
    folder = folder if folder.is_dir() else from_project(name)
    with open_folder(folder):
        found = (folder / "model_index.json").is_file()
    if not found:
        raise FileNotFoundError(f"{option}={name!r}: no pipeline in {folder}; give a preset that ships (data/weights) "
                                "or a pipeline's folder")  # fmt: skip
    return folder


def begin_with(denoiser: Denoiser, folder: Path) -> int:
    """Give a network the weights of the pipeline in `folder`, as far as they fit. A layer with more inputs than there
    takes no notice of the additional ones at first; what the other network lacks keeps its own start.

    Returns:
        The number of images that these weights have seen, 0 where that is not known.

    Raises:
        ValueError: less than half of the network fits.
    """
    with open_folder(folder):
        given = load_file(folder / "denoiser" / "diffusion_pytorch_model.safetensors")
        history = load_history(folder)
    fitting = 0
    with torch.no_grad():
        for name, own in denoiser.named_parameters():
            other = given.get(name)
            if other is not None and _fits(own.shape, other.shape):
                own.zero_()
                own[tuple(map(slice, other.shape))] = other.to(own)
                fitting += own.numel()
    if fitting < count_parameters(denoiser) / 2:
        raise ValueError(f"start={str(folder)!r}: less than half of this network fits to those weights; use start='', "
                         "or weights of a network of the same channels")  # fmt: skip
    return history[-1]["images_seen"] if history else 0


def _fits(own, other):
    """Are these shapes of weights the same, but for a convolution that takes more channels than the other?"""
    without_inputs = lambda shape: shape[:1] + shape[2:]
    return own == other or (len(own) == 4 and without_inputs(own) == without_inputs(other) and own[1] > other[1])


def find_pipeline(settings: Settings, weights: str) -> Path:
    """The folder of the pipeline that `load_pipeline` would load; FileNotFoundError where there is none."""
    shipped = WEIGHTS / settings.preset
    if weights == "auto":
        own = settings.run or settings.profile in ("full", "tiny") or not shipped.is_dir()
        weights = "trained" if own else "shipped"
    named = {"shipped": shipped, "trained": run_folder(settings) / "pipeline"}
    with open_folder(named.get(weights) or from_project(weights)) as folder:
        if (folder / "model_index.json").is_file():
            return folder
    if weights not in named:
        raise FileNotFoundError(
            f"weights={weights!r}: no pipeline in {folder}; choose auto, shipped, trained or a pipeline's folder"
        )
    raise FileNotFoundError(
        f"No trained pipeline in {folder}: run notebook 03_model_and_training with profile={settings.profile!r} "
        f"and preset={settings.preset!r} first" + (", or choose weights='shipped'" if shipped.is_dir() else "")
    )
