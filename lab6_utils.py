"""Shared code of the i-CLEVR diffusion workbook, in the order of its notebooks.

     1  Settings              one frozen record of every choice, from a profile, a preset and overrides
     2  Labels and data       the 24 objects, the course's files, the training images
     3  Forward process       noise schedules, q(x_t | x_0), signal-to-noise ratio        (notebook 02)
     4  Denoisers             U-Nets of diffusers that are told which objects to draw     (notebook 03)
     5  Training              loss, EMA, checkpoints that resume exactly                  (notebook 03)
     6  Sampling              ICLEVRPipeline, guidance, schedulers                        (notebook 04)
     7  Evaluation            the ResNet-18 evaluator, the course's protocol, intervals   (notebook 05)
     8  Figures               what every notebook draws
     9  Widgets               the sliders of notebook 04
    10  Provenance            every figure and number says what made it

Conventions. Images are (B, 3, 64, 64) float32 in [-1, 1]; labels are (B, 24) multi-hot float32 in the order
of OBJECTS; timesteps run from 0 (almost clean) to T - 1 (almost noise). The letters are those of Ho et al.
2020: x_0, x_t, eps, and alpha_bar for the cumulative product of (1 - beta). Guidance is
eps_uncond + s * (eps_cond - eps_uncond): s = 1 is off, s = 0 ignores the labels. All randomness is derived
from (seed, step), so the same settings give the same result, resumed or not. Importing this module does
nothing but define names.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import difflib
import functools
import hashlib
import inspect
import io
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import textwrap
import time
import typing
import uuid
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    HeunDiscreteScheduler,
    ModelMixin,
    SchedulerMixin,
    UNet2DConditionModel,
    UNet2DModel,
    UniPCMultistepScheduler,
)
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.unets.unet_2d_blocks import AttnDownBlock2D, AttnUpBlock2D
from diffusers.utils import BaseOutput
from diffusers.utils import logging as diffusers_logging
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import nn
from tqdm.auto import tqdm

if typing.TYPE_CHECKING:
    from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent
WEIGHTS = ROOT / "data" / "weights"

# ════════════════════════════════════════════════════════════════════════════════════════════════════
# 1  Settings
# ════════════════════════════════════════════════════════════════════════════════════════════════════

#: Each profile says how much is computed; the same notebooks run in all of them.
PROFILES = {
    # the tests: seconds a notebook, every line exercised
    "tiny": dict(batch_size=8, epochs=2, max_images=48, steps=4, seeds=2, ddpm_images=1, evaluator_epochs=1,
                 evaluation_sets=4, rendered_scenes=24, evaluator_scenes=0),
    # the default without a GPU: shipped weights, a short training shown, few seeds
    "quick": dict(epochs=6, max_images=1024, seeds=5, ddpm_images=2),
    # shipped weights, all seeds, a short training shown; writes figures/
    "shipped": dict(epochs=16, max_images=1024, seeds=16),
    # trains everything; wants a GPU
    "full": dict(seeds=16, ddpm_images=32, rendered_scenes=6003),
}  # fmt: skip

# A network that shows something after a minute on a CPU: it sees few, large patches, and predicts x_0, since with
# so few channels and steps it does not learn to carry the noise through, as eps and v ask.
_MINUTE = dict(patch=4, channels=(48, 64, 96), attention=("none", "cross", "none"), prediction="sample", batch_size=16,
               learning_rate=2e-3, warmup_steps=20, ema_decay=0.99)  # fmt: skip
#: What the profiles train in place of the preset `tokens`.
SMALL_TOKENS = {
    "tiny": dict(channels=(8, 16, 16), token_dim=16, norm_groups=8, warmup_steps=2),
    "quick": _MINUTE,
    "shipped": _MINUTE,
    "full": {},
}


def _shrink(preset, profile):
    """What a profile changes of a preset: in quick and shipped the reports' networks train a little as they are."""
    if preset == "tokens":
        return SMALL_TOKENS[profile]
    if preset == "few-step":  # begins with the weights of its teacher, which ships, and so is of its size
        fewer = dict(max_images=16 if profile == "tiny" else 128, epochs=2, warmup_steps=2)
        return {} if profile == "full" else fewer
    if profile == "tiny":
        channels = tuple(max(8, c // 128 * 8) for c in PRESETS[preset]["channels"])
        return dict(channels=channels, layers_per_block=1, norm_groups=8, head_dim=8, warmup_steps=0,
                    autoencoder_channels=(8, 8, 8), autoencoder_epochs=1)  # fmt: skip
    return {} if profile == "full" else dict(epochs=4, max_images=128, autoencoder_epochs=4, steps=20)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Every choice of a run. Make one with `make_settings`; it is saved in each checkpoint.

    What the system is: `preset` names one of PRESETS, which fills the fields of the model, the diffusion and
    the optimiser; any field may be overridden. Lengths of `channels` and `attention` agree: one entry for
    each resolution, the highest first.
    """

    profile: str = "quick"
    preset: str = "tokens"
    run: str = ""  # name of the training run; "": the preset's name
    seed: int = 0
    device: str = "auto"  # cuda, mps or cpu, chosen in that order
    precision: str = "auto"  # bf16 where the hardware computes in it, else fp32

    # latent diffusion: an autoencoder in front of the denoiser
    space: str = "pixels"  # pixels or latents: what is noised and denoised
    autoencoder_channels: tuple[int, ...] = (32, 64, 64)  # by resolution: 64x64, 32x32, and 16x16, that of the latents
    latent_channels: int = 4
    autoencoder_epochs: int = 20

    # model
    patch: int = 2  # the U-Net sees patch x patch pixels as channels (pixel unshuffle), at 64 / patch
    channels: tuple[int, ...] = (48, 96, 144)
    layers_per_block: int = 1
    attention: tuple[str, ...] = ("none", "none", "cross")  # none, self or cross, by resolution
    up_attention: tuple[str, ...] = ()  # on the way up, where it differs; also the highest resolution first
    head_dim: int = 32
    norm_groups: int = 16
    scale_shift: bool = True  # adaptive group norm: the embedding scales and shifts, else it is added
    conditioning: str = "tokens"  # tokens, multi-hot (these need cross-attention), mlp or linear
    token_dim: int = 128  # width of an object's token

    # diffusion
    num_train_timesteps: int = 1000  # T
    schedule: str = "cosine"
    schedule_reference: int = 32  # shifted-cosine only: the resolution at which the cosine would be right
    zero_snr: bool = False  # rescale the schedule so that the last step is pure noise
    prediction: str = "v_prediction"  # epsilon, v_prediction or sample (= x_0)

    # training
    loss_weighting: str = "none"  # none or min-snr, over the times t
    min_snr_gamma: float = 5.0
    batch_size: int = 32
    epochs: int = 100
    learning_rate: float = 8e-4
    weight_decay: float = 0.01
    warmup_steps: int = 500
    decay_fraction: float = 0.3  # the last part of training, in which the learning rate falls to zero
    gradient_clip: float = 1.0  # of the norm of all gradients; 0: none
    label_dropout: float = 0.1  # share of labels replaced by the null condition; 0: no guidance, but for a student
    ema_decay: float = 0.999
    flip: bool = False  # mirror half of the images
    teacher: str = ""  # distillation: whose pictures are learnt, a preset that ships or a pipeline's folder
    student_steps: int = 0  # in which a student does what its teacher takes teacher_steps for; 0: no student
    teacher_steps: int = 12
    keep: str = "last"  # whose weights the pipeline has: of the last epoch or the best; every: and one each keep_every
    keep_every: int = 10
    max_images: int = 0  # train on the first so many images; 0: all
    torch_compile: bool = False  # torch.compile the network for training: for a GPU, some minutes after the start
    leave_out: str = "none"  # unseen: train on no picture that shows a set of `unseen_sets`; random: on as few others
    rendered_scenes: int = 300  # how many to render where there are no course files

    # sampling and evaluation
    sampler: str = "ddpm"  # its fresh noise lets later steps mend what earlier ones got wrong
    steps: int = 20  # make_settings takes 0 for all T
    guidance: str = "classifier-free"  # none, classifier-free, composition, classifier-1 or classifier-2
    guidance_scale: float = 4.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)  # where in t / T guidance acts; 0 is the clean end
    classifier_input: str = "x_0"  # what the classifier is shown: the x_0 that the network predicts, or x_t
    ddpm_images: int = 4  # how many images notebook 04 draws with all T ancestral steps
    seeds: int = 16
    evaluation_sets: int = 0  # evaluate on the first so many label sets; 0: all
    evaluator_epochs: int = 12
    evaluator_scenes: int = 1200  # rendered scenes of up to five objects that the evaluators learn from too; 0: none

    def __post_init__(self):
        for field in dataclasses.fields(self):
            _check_type(field.name, getattr(self, field.name), _TYPES[field.name])
        for name, allowed in _allowed().items():
            values = getattr(self, name)
            for value in values if isinstance(values, tuple) else (values,):
                if value not in allowed:
                    raise ValueError(f"{name}={value!r}: choose from {', '.join(map(str, allowed))}")
        zero_says_something = ("seed", "warmup_steps", "max_images", "evaluation_sets", "evaluator_scenes",
                               "student_steps")  # fmt: skip
        for name, type_ in _TYPES.items():
            may_be_zero = type_ is float or name in zero_says_something
            if type_ in (int, float) and getattr(self, name) < (0 if may_be_zero else 1):
                raise ValueError(f"{name}={getattr(self, name)}: must be at least {0 if may_be_zero else 1}"
                                 + ", or 0 for all T" * (name == "steps"))  # fmt: skip
        for name in ("ema_decay", "decay_fraction"):
            if getattr(self, name) > 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at most 1")
        for name in ("attention", "up_attention"):
            by_resolution = getattr(self, name)
            if by_resolution and len(by_resolution) != len(self.channels):
                raise ValueError(
                    f"channels={self.channels} and {name}={by_resolution}: give both one entry a resolution"
                )
        for name in ("channels", "autoencoder_channels") if self.space == "latents" else ("channels",):
            if any(c % self.norm_groups for c in getattr(self, name)):
                raise ValueError(
                    f"{name}={getattr(self, name)}: each must be divisible by norm_groups={self.norm_groups}"
                )
        if (lowest := self.image_size / self.patch / 2 ** (len(self.channels) - 1)) < 1:
            raise ValueError(
                f"channels={self.channels} with patch={self.patch}: the last of so many resolutions would be {lowest:g}"
            )
        if self.flip and self.space == "latents":
            raise ValueError("flip=True with space='latents': a mirrored latent is not that of the mirrored picture")
        crossing = [name for name in ("attention", "up_attention") if "cross" in getattr(self, name)]
        if crossing and not CONDITIONINGS[self.conditioning].gives_tokens:
            raise ValueError(
                f"{crossing[0]}={getattr(self, crossing[0])} with conditioning={self.conditioning!r}: cross-attention "
                "needs conditioning='tokens' or 'multi-hot'"
            )
        if len(self.guidance_interval) != 2 or not 0 <= self.guidance_interval[0] <= self.guidance_interval[1] <= 1:
            raise ValueError(f"guidance_interval={self.guidance_interval}: give its lower and upper end, from 0 to 1")
        if not 0 <= self.label_dropout < 1:
            raise ValueError(f"label_dropout={self.label_dropout}: must be in [0, 1)")
        if bool(self.teacher) != bool(self.student_steps):
            raise ValueError(f"teacher={self.teacher!r}, student_steps={self.student_steps}: a student needs both")
        if self.teacher:
            self._check_student()
        free = () if self.teacher else ("classifier-free",)
        if self.label_dropout == 0 and guidance_kind(self) in (*free, "composition"):
            raise ValueError(
                f"label_dropout=0 with guidance={self.guidance!r}: it needs a network that has also learnt to draw "
                "without labels; use label_dropout=0.1, or another guidance"
            )
        if self.steps > self.num_train_timesteps:
            raise ValueError(f"steps={self.steps} exceeds num_train_timesteps={self.num_train_timesteps}")
        if self.zero_snr and self.prediction == "epsilon":
            raise ValueError(
                "zero_snr=True with prediction='epsilon': at the last step x_t holds no signal, so eps says "
                "nothing about x_0; use prediction='v_prediction' or 'sample'"
            )
        if self.zero_snr and self.loss_weighting == "min-snr":
            raise ValueError(
                "zero_snr=True with loss_weighting='min-snr': the last step, with which sampling begins, would have "
                "weight 0 and never be learnt"
            )
        if self.zero_snr and self.sampler == "heun":
            raise ValueError(
                "sampler='heun' with zero_snr=True: its noise levels would be infinite; use another sampler"
            )
        if self.guidance == "classifier-1" and self.sampler != "ddpm":
            raise ValueError(
                f"guidance='classifier-1' with sampler={self.sampler!r}: algorithm 1 moves the mean of ancestral "
                "sampling; use sampler='ddpm', or guidance='classifier-2'"
            )

    def _check_student(self):
        if self.guidance not in ("none", "classifier-free", "classifier-2"):
            raise ValueError(f"guidance={self.guidance!r}: a student knows none, classifier-free and classifier-2")
        learns = dict(space="pixels", conditioning="tokens", label_dropout=0, flip=False, loss_weighting="none",
                      sampler="ddim", steps=self.student_steps)  # fmt: skip
        wrong = [f"{name}={value!r}" for name, value in learns.items() if getattr(self, name) != value]
        if wrong or self.prediction == "epsilon":
            wrong = wrong or ["prediction='v_prediction' or 'sample', since at the last t eps says nothing of x_0"]
            raise ValueError(f"teacher={self.teacher!r}: a student needs {', '.join(wrong)}")
        if self.num_train_timesteps % self.student_steps or self.teacher_steps % self.student_steps:
            raise ValueError(
                f"student_steps={self.student_steps}: must divide num_train_timesteps={self.num_train_timesteps} and "
                f"teacher_steps={self.teacher_steps}"
            )

    @property
    def image_size(self) -> int:
        """Height and width of what is noised: 64, or that of the latents."""
        return 64 if self.space == "pixels" else 64 // 2 ** (len(self.autoencoder_channels) - 1)

    @property
    def runs(self) -> Path:
        """Folder for what a run leaves behind (checkpoints, caches): data/runs, or $LAB6_RUNS."""
        return _runs_folder()

    @property
    def figures(self) -> Path:
        """Folder for figures and results.json: figures/ (or $LAB6_FIGURES), and its folder quick/ for the quick
        profile and whenever there are fewer than 16 seeds."""
        if self.profile == "tiny":
            return self.runs / "tiny" / "figures"
        base = _folder_named_by("LAB6_FIGURES") or ROOT / "figures"
        return base / "quick" if self.profile == "quick" or self.seeds < 16 else base


def _allowed():
    """Fields with a fixed choice of values; what the later sections define can be chosen here at once."""
    return {
        "profile": PROFILES, "preset": PRESETS, "space": ("pixels", "latents"),
        "device": ("cuda", "mps", "cpu"), "precision": ("bf16", "fp32"),
        "patch": (1, 2, 4), "attention": ("none", "self", "cross"), "conditioning": CONDITIONINGS,
        "up_attention": ("none", "self", "cross"), "loss_weighting": ("none", "min-snr"),
        "keep": ("last", "best", "every"), "leave_out": ("none", "unseen", "random"), "guidance": GUIDANCES,
        "classifier_input": ("x_0", "x_t"),
        "prediction": ("epsilon", "v_prediction", "sample"), "schedule": SCHEDULES, "sampler": SAMPLERS,
    }  # fmt: skip


_TYPES = typing.get_type_hints(Settings)


def _check_type(name, value, expected):
    """Raise ValueError unless `value` has the annotated type (bool is not an int here)."""
    if typing.get_origin(expected) is tuple:
        item = typing.get_args(expected)[0]
        fits = isinstance(value, tuple) and all(type(v) is item for v in value)
        fits = fits and (len(value) > 0 or name == "up_attention")
    else:
        fits = type(value) is expected
    if not fits:
        wanted = str(expected) if typing.get_origin(expected) else expected.__name__
        raise ValueError(f"{name}={value!r}: expected {wanted}, got {type(value).__name__}")


def make_settings(profile: str = "auto", **overrides) -> Settings:
    """Settings of a profile and a preset, with overrides.

    What is given here wins over the profile, the profile over the preset, the preset over the defaults.
    The short profiles train small networks, or little (`_shrink`).

    Args:
        profile: one of PROFILES, or "auto": full with a CUDA GPU, else quick.
        overrides: fields of Settings, plain values; lists become tuples, whole numbers become floats, and None leaves
            the choice to the profile and the preset.

    Raises:
        ValueError: an unknown name or a value that cannot be, in one line.
    """
    if profile == "auto":
        profile = "full" if torch.cuda.is_available() else "quick"
    if profile not in list(PROFILES):  # a list: what was given may not be hashable
        raise ValueError(f"profile={profile!r}: choose from auto, {', '.join(PROFILES)}")
    overrides = {name: value for name, value in overrides.items() if value is not None}
    preset = overrides.get("preset", "tokens")
    if preset not in list(PRESETS):
        raise ValueError(f"preset={preset!r}: choose from {', '.join(PRESETS)}")
    for name in overrides:
        if name not in _TYPES:
            close = difflib.get_close_matches(name, _TYPES, n=1)
            raise ValueError(f"unknown setting {name!r}" + (f": did you mean {close[0]!r}?" if close else ""))
    fills = PROFILES[profile] | _shrink(preset, profile)
    values = {"device": "auto", "precision": "auto"} | PRESETS[preset] | fills | overrides
    values |= {"profile": profile, "preset": preset}
    if values["device"] == "auto":
        values["device"] = (
            "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        )
    if values["precision"] == "auto":
        values["precision"] = "bf16" if _computes_bf16(values["device"]) else "fp32"
    if values.get("steps") == 0:
        values["steps"] = values.get("num_train_timesteps", Settings.num_train_timesteps)
    if values.get("student_steps") and "steps" not in overrides:
        values["steps"] = values["student_steps"]
    if values.get("label_dropout") == 0 and "guidance" not in overrides and not values.get("teacher"):
        values["guidance"] = "none"  # the default one needs a network that has learnt to do without labels
    for name, value in values.items():
        wanted = (*typing.get_args(_TYPES[name]), _TYPES[name])[0]  # of a tuple: the type of its items
        exact = lambda v, wanted=wanted: float(v) if wanted is float and type(v) is int else v
        values[name] = tuple(map(exact, value)) if isinstance(value, list | tuple) else exact(value)
    return Settings(**values)


def _folder_named_by(variable):
    """The folder that an environment variable names, absolute, or None."""
    named = os.environ.get(variable)
    return Path(named).expanduser().resolve() if named else None


def _from_project(path):
    """A path that somebody gave, from the project's folder on."""
    return ROOT / Path(path).expanduser()


def _runs_folder():
    return _folder_named_by("LAB6_RUNS") or ROOT / "data" / "runs"


def _computes_bf16(device):
    """True where bf16 arithmetic is in hardware; emulated, it is slower than fp32."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device == "cpu" and getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()


def autocast(settings: Settings):
    """Context in which networks compute in `settings.precision`; weights and results stay float32."""
    return torch.autocast(settings.device, torch.bfloat16, enabled=settings.precision == "bf16")


def make_generator(seed: int, *stream: int, device: str = "cpu") -> torch.Generator:
    """A random generator for one purpose: the same (seed, *stream) always gives the same numbers.

    The numbers are hashed together, so that neighbouring seeds and steps share nothing.
    """
    digest = hashlib.sha256(repr((seed, *stream)).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "little"))


def headless() -> bool:
    """True when run_notebooks.py runs the notebook: progress is then printed lines, not bars."""
    return os.environ.get("LAB6_HEADLESS") == "1"


def progress(iterable, description: str, total: int | None = None):
    """A progress bar in JupyterLab and terminals; nothing headlessly, where callers print lines."""
    return tqdm(iterable, description, total, leave=False, disable=headless())


def _write_atomically(path: Path, write):
    """Call `write(temporary path)`, then rename: `path` is either the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{uuid.uuid4().hex[:12]}.{path.name}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _alone(file: Path):
    """Hold a lock file, so that of several processes one at a time does what follows; who waits says so.

    The same process may take it again, since an interrupted cell of a notebook can leave it held.
    """
    from filelock import FileLock, Timeout

    file.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(file, is_singleton=True)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"progress: waiting for another process, which works in {file.parent}", flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


# ════════════════════════════════════════════════════════════════════════════════════════════════════
# 2  Labels and data
# ════════════════════════════════════════════════════════════════════════════════════════════════════

SHAPES = ("cube", "sphere", "cylinder")
COLOURS = ("gray", "red", "blue", "green", "brown", "purple", "cyan", "yellow")
#: The 24 objects in the course's order: index = 8 * shape + colour.
OBJECTS = tuple(f"{colour} {shape}" for shape in SHAPES for colour in COLOURS)
#: The label set whose denoising the course asks to see.
MANUAL_SET = ("red sphere", "cyan cylinder", "cyan cube")


def encode_labels(label_sets) -> torch.Tensor:
    """Multi-hot vectors of label sets.

    Args:
        label_sets: one label set (["red sphere", "cyan cube"]) or a list of them.

    Returns:
        (B, 24) float32 of zeros and ones; B = 1 for one set.

    Raises:
        ValueError: an unknown, repeated or missing label.
    """
    if isinstance(label_sets, str):
        raise ValueError(f"{label_sets!r}: give a list of labels, such as [{label_sets!r}]")
    label_sets = list(label_sets)
    if not label_sets:
        raise ValueError("no labels: name at least one object")
    if isinstance(label_sets[0], str):
        label_sets = [label_sets]
    labels = torch.zeros(len(label_sets), len(OBJECTS))
    for row, names in enumerate(label_sets):
        if len(names) == 0:
            raise ValueError(f"label set {row} is empty: name at least one object")
        for name in names:
            if name not in OBJECTS:
                close = difflib.get_close_matches(str(name), OBJECTS, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"an object is one of {', '.join(OBJECTS)}"
                raise ValueError(f"unknown label {name!r} in label set {row}: {hint}")
            if labels[row, OBJECTS.index(name)]:
                raise ValueError(f"label {name!r} is twice in label set {row}")
            labels[row, OBJECTS.index(name)] = 1
    return labels


def decode_labels(labels: torch.Tensor) -> list[list[str]]:
    """Names of the objects in (B, 24) multi-hot vectors (or one (24,) vector), in the order of OBJECTS."""
    return [[OBJECTS[i] for i in row.nonzero().flatten().tolist()] for row in torch.atleast_2d(labels) > 0.5]


@dataclasses.dataclass(frozen=True)
class DataFiles:
    """Where the data is, and what its json files say. Made by `find_data`.

    images: the folder iclevr/ or the file iclevr.zip.
    train: {image file name: label set}; test, new_test: lists of label sets.
    source: what to print beside every figure, "course files" or "rendered scenes".
    """

    root: Path
    images: Path
    train: dict[str, list[str]]
    test: list[list[str]]
    new_test: list[list[str]]
    source: str = "course files"

    @property
    def held_out(self) -> frozenset[str]:
        """Scenes kept out of training: those of `held_out_scenes`; of rendered ones the last, in proportion."""
        if self.source == "course files":
            return held_out_scenes()
        scenes = sorted({scene_of(name) for name in self.train})
        return frozenset(scenes[len(scenes) * 5500 // 6003 :])


def choose_splits(split: str) -> list[str]:
    """The course's lists of label sets that `split` names: "test", "new_test" or "both"."""
    splits = {"test": ["test"], "new_test": ["new_test"], "both": ["test", "new_test"]}
    if split not in splits:
        raise ValueError(f"split={split!r}: choose from {', '.join(splits)}")
    return splits[split]


def find_data(rendered_scenes: int = 300) -> DataFiles:
    """The data, from the first of: the folder that LAB6_DATA names, data/, scenes rendered here.

    A folder qualifies with iclevr/ or iclevr.zip, train.json, test.json, new_test.json, and objects.json or
    object.json. Where LAB6_DATA is not set and data/ has none of them, so many scenes are rendered into
    data/runs/rendered-N, once (see data/render_scenes.py).

    Raises:
        FileNotFoundError: names the folder that was looked in and what is missing there.
        ValueError: a json file that is not what the course ships, by name.
        RuntimeError: scenes are to be rendered, and Mitsuba does not work.
    """
    chosen = _folder_named_by("LAB6_DATA")
    root = chosen or ROOT / "data"
    names = ("iclevr", "iclevr.zip", "objects.json", "object.json", "train.json", "test.json", "new_test.json")
    if not chosen and not any((root / name).exists() for name in names):
        root = _render(rendered_scenes)
    return read_data(root)


def read_data(root: Path) -> DataFiles:
    """What a folder of the course's layout holds, rendered scenes too; raises what `find_data` does."""
    images = root / "iclevr" if (root / "iclevr").is_dir() else root / "iclevr.zip"
    objects = root / "objects.json" if (root / "objects.json").is_file() else root / "object.json"
    missing = [] if images.exists() else ["iclevr/ or iclevr.zip"]
    missing += [] if objects.is_file() else ["objects.json or object.json"]
    missing += [f"{n}.json" for n in ("train", "test", "new_test") if not (root / f"{n}.json").is_file()]
    if missing:
        raise FileNotFoundError(
            f"No i-CLEVR data: {', '.join(missing)} not found in {root} (the folder that LAB6_DATA names, else data/). "
            "Put the course's files iclevr/ (or iclevr.zip), train.json, test.json, new_test.json and objects.json (or "
            "object.json) there, or set LAB6_DATA to the folder that has them; without any, and LAB6_DATA not set, "
            "scenes are rendered."
        )
    if _read_json(objects) != {name: i for i, name in enumerate(OBJECTS)}:
        raise ValueError(f"{objects}: not the 24 objects of i-CLEVR with the indices 0 to 23")
    train = _read_json(root / "train.json")
    if not isinstance(train, dict) or not train:
        raise ValueError(f"{root / 'train.json'}: expected {{image name: [labels]}}")
    for name in train:
        if Path(name).name != name or "\\" in name or name.count("_") < 2:
            raise ValueError(
                f"{root / 'train.json'}: {name!r} is not a plain file name such as CLEVR_train_001032_0.png"
            )
    sets = {"train": list(train.values())}
    for split in ("test", "new_test"):
        sets[split] = _read_json(root / f"{split}.json")
    for split, label_sets in sets.items():
        try:
            if not label_sets or any(isinstance(label_set, str) for label_set in label_sets):
                raise ValueError("expected a list of labels for each of one or more pictures")
            encode_labels(label_sets)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{root / f'{split}.json'}: {error}") from None
    source = "rendered scenes" if (root / "render.json").is_file() else "course files"
    return DataFiles(root, images, train, sets["test"], sets["new_test"], source)


def load_renderer():
    """The module data/render_scenes.py, which needs Mitsuba only when it renders."""
    folder = str(ROOT / "data")
    if folder not in sys.path:  # there to stay: the renderer's processes look for the module again
        sys.path.append(folder)
    import render_scenes

    return render_scenes


def _render(scenes, objects=3, seed=0):
    """The folder data/runs/rendered-N... with so many rendered scenes, made when it is not whole."""
    folder = _runs_folder() / f"rendered-{scenes}{'' if (objects, seed) == (3, 0) else f'-{objects}-{seed}'}"
    with _alone(folder.with_name(f"{folder.name}.lock")):
        if not (folder / "train.json").is_file():  # which the renderer writes last
            start = time.perf_counter()
            rendering = load_renderer().render_scenes(folder, scenes, objects, seed=seed)
            for done in progress(rendering, "rendering scenes", scenes):
                if headless() and (done % max(1, scenes // 6) == 0):
                    left = (time.perf_counter() - start) / done * (scenes - done)
                    print(f"progress: {done} of {scenes} scenes rendered, {format_seconds(left)} left", flush=True)
    return folder


def crowded_scenes(scenes: int, seed: int) -> ICLEVRDataset:
    """Pictures of one to five objects, which the course's data lacks: five a scene, rendered once into data/runs/.

    seed: 1 is what evaluators learn from, 2 what tests them, 0 what stands in for the course's scenes.
    """
    return ICLEVRDataset(read_data(_render(scenes, 5, seed)), "all")


def _read_json(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not readable as json ({error})") from None


def scene_of(name: str) -> str:
    """Scene number of an image: CLEVR_train_005500_2.png is the third picture of scene "005500"."""
    return name.removesuffix(".png").split("_")[-2]


def held_out_scenes() -> frozenset[str]:
    """The 503 of the course's scenes (005500 to 006002) on which nothing that ships is ever trained."""
    return frozenset(json.loads((ROOT / "data" / "held_out_scenes.json").read_text())["scenes"])


def unseen_sets() -> dict[str, list[list[str]]]:
    """200 label sets by kind, which training with leave_out="unseen" never sees: none of them in the course's test
    files, none in a picture that shows more. "pairs": two objects; "triples of such a pair": such a pair and a third
    object; "triples": three objects of which each two do occur together."""
    return json.loads((ROOT / "data" / "unseen_sets.json").read_text())["sets"]


class ICLEVRDataset(torch.utils.data.Dataset):
    """Images with their labels; item i is (image (3, 64, 64) float32 in [-1, 1], labels (24,) multi-hot).

    All images of train.json are decoded and resized once (antialiased bilinear, 4:3 squeezed to a square)
    into a uint8 file under data/runs/cache/, which is used again while the files' sizes and dates stay.

    Args:
        files: from `find_data`.
        split: "train", "held-out" (`files.held_out`) or "all". By scene, never by image, since the pictures of a
            scene share most of their pixels.
        limit: keep the first so many images; 0 keeps all.
        runs: where the cache goes; default data/runs or $LAB6_RUNS.
        without: file names to leave out.

    Attributes:
        names: file names; pixels: (N, 3, 64, 64) uint8, memory-mapped; labels: (N, 24).
    """

    def __init__(self, files: DataFiles, split: str = "train", limit: int = 0, runs: Path | None = None, without=()):
        if split not in ("train", "held-out", "all"):
            raise ValueError(f"split={split!r}: choose from train, held-out, all")
        names = sorted(files.train)
        held_out = files.held_out
        keep = [i for i, n in enumerate(names) if split == "all" or (scene_of(n) in held_out) == (split == "held-out")]
        keep = [i for i in keep if names[i] not in without][: limit or None]
        pixels = _load_cache(files, names, (runs or _runs_folder()) / "cache")
        self.split, self.source = split, files.source
        self.names = [names[i] for i in keep]
        # One contiguous run of scenes stays a view of the file; anything else is gathered once.
        contiguous = bool(keep) and keep == list(range(keep[0], keep[-1] + 1))
        self.pixels = pixels[keep[0] : keep[-1] + 1] if contiguous else pixels[keep]
        self.labels = encode_labels([files.train[n] for n in self.names]) if keep else torch.zeros(0, len(OBJECTS))

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        return to_float(self.pixels[index]), self.labels[index]

    def draw(self, rows: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """x_0 for training: the images of `rows`, (B, 3, 64, 64) in [-1, 1], on the generator's device, to which all
        images go when it is first asked for (0.2 GB)."""
        there = getattr(self, "_there", self.pixels)
        if there.device.type != generator.device.type:  # a generator's device has no number
            self._there = there = self.pixels.to(generator.device)
        return to_float(there[rows.to(generator.device)])


def training_set(settings: Settings, files: DataFiles) -> ICLEVRDataset:
    """The images that a denoiser is trained on: the first `max_images` of those that `leave_out` leaves."""
    out = ()
    if settings.leave_out != "none":
        whole = ICLEVRDataset(files, "train")
        sets = encode_labels([names for kind in unseen_sets().values() for names in kind])
        shows = (whole.labels @ sets.T == sets.sum(1)).any(1)
        if settings.leave_out == "random":
            shows = shows[torch.randperm(len(shows), generator=make_generator(0))]
        out = {name for name, left_out in zip(whole.names, shows, strict=True) if left_out}
    return ICLEVRDataset(files, "train", settings.max_images, without=out)


def to_float(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 0 to 255 -> float32 in [-1, 1], as ToTensor and Normalize(0.5, 0.5) do."""
    return pixels.float() / 127.5 - 1


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """[-1, 1] -> uint8 0 to 255, rounded; values outside are clipped."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def _load_cache(files, names, folder):
    """(N, 3, 64, 64) uint8 tensor on a memory-mapped file, made when it is missing or out of date."""
    sources, stamp = _image_sources(files, names)
    root = hashlib.sha256(str(files.images).encode()).hexdigest()[:8]
    path = Path(folder) / f"iclevr64-{root}-{stamp}.npy"
    if not path.exists():
        _write_atomically(path, lambda temporary: _decode_all(files, names, sources, temporary))
        for old in set(path.parent.glob(f"iclevr64-{root}-*.npy")) - {path}:
            with contextlib.suppress(OSError):  # on Windows, while another notebook reads it
                old.unlink()
    return torch.from_numpy(np.load(path, mmap_mode="c"))


def _image_sources(files, names):
    """Where each image's bytes are, and a hash of all sizes and dates. Errors name what is missing."""
    if files.images.is_dir():
        entries = {e.name: e for e in os.scandir(files.images)}
        stats = {n: entries[n].stat() for n in names if n in entries}
        sources, facts = entries, [(n, s.st_size, s.st_mtime_ns) for n, s in stats.items()]
    else:
        try:
            with zipfile.ZipFile(files.images) as archive:
                members = archive.infolist()
        except zipfile.BadZipFile as error:
            raise ValueError(f"{files.images}: not a readable zip file ({error}); download it again") from None
        for member in members:
            parts = member.filename.replace("\\", "/").split("/")
            if ".." in parts or parts[0] == "" or ":" in parts[0]:
                raise ValueError(f"{files.images}: {member.filename!r} points outside the zip; refused")
        sources = {Path(m.filename).name: m for m in members if "__MACOSX" not in m.filename}
        facts = [(n, sources[n].file_size, sources[n].CRC) for n in names if n in sources]
    missing = [n for n in names if n not in sources]
    if missing:
        raise FileNotFoundError(
            f"{files.images}: {len(missing)} of the {len(names)} images that train.json lists are missing, "
            f"the first is {missing[0]}; unpack the course's iclevr.zip again"
        )
    return sources, hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def _decode_all(files, names, sources, path):
    """Decode, resize and write all images as one .npy; Pillow and zlib leave the GIL, so threads do."""
    from torchvision.transforms.v2 import Resize

    resize = Resize((64, 64))
    with open(path, "wb") as out:  # not open_memmap: the file name must not gain a suffix
        header = {"descr": "|u1", "fortran_order": False, "shape": (len(names), 3, 64, 64)}
        np.lib.format.write_array_header_1_0(out, header)
        archive = zipfile.ZipFile(files.images) if files.images.is_file() else None

        def decode(name):
            try:
                data = archive.read(sources[name]) if archive else Path(sources[name].path).read_bytes()
                image = Image.open(io.BytesIO(data)).convert("RGB")
            except Exception as error:  # Pillow and zlib have many; all of them mean a damaged file
                raise ValueError(f"{files.images}: {name} is not a readable image ({error})") from None
            image = image if image.size == (64, 64) else resize(image)
            return np.asarray(image).transpose(2, 0, 1).tobytes()

        with ThreadPoolExecutor() as pool:
            for data in progress(pool.map(decode, names), "decoding images", len(names)):
                out.write(data)
        if archive:
            archive.close()


# ════════════════════════════════════════════════════════════════════════════════════════════════════
# 3  Forward process:  q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I)     (Ho et al. 2020, eq. 4)
# ════════════════════════════════════════════════════════════════════════════════════════════════════


def _linear(T, reference):
    """beta from 1e-4 to 0.02 (Ho et al. 2020), whatever T: with few steps noise remains short."""
    return torch.cumprod(1 - torch.linspace(1e-4, 0.02, T, dtype=torch.float64), 0)


def _linear_rescaled(T, reference):
    """The same betas times 1000 / T: any T ends at (almost) the noise that T = 1000 has with "linear"."""
    return torch.cumprod(1 - (torch.linspace(1e-4, 0.02, T, dtype=torch.float64) * 1000 / T).clamp(max=0.999), 0)


def _cosine(T, reference):
    """alpha_bar_t = f(t) / f(0), f(t) = cos^2((t / T + s) / (1 + s) * pi / 2), s = 0.008 (Nichol & Dhariwal 2021)."""
    time = torch.arange(T + 1, dtype=torch.float64) / T
    f = torch.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
    beta = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    return torch.cumprod(1 - beta, 0)


def _sigmoid(T, reference):
    """beta follows a sigmoid from 1e-4 to 0.02 (the "sigmoid" of diffusers, after GeoDiff)."""
    beta = torch.sigmoid(torch.linspace(-6, 6, T, dtype=torch.float64)) * (0.02 - 1e-4) + 1e-4
    return torch.cumprod(1 - beta, 0)


def _shifted_cosine(T, reference):
    """The cosine with log-SNR moved by 2 log(reference / 64) (Hoogeboom et al. 2023): below 64, noisier."""
    alpha_bar = _cosine(T, reference)
    return torch.sigmoid(torch.logit(alpha_bar) + 2 * math.log(reference / 64))


#: Add a schedule here and every notebook knows it: name -> function of (T, reference) giving alpha_bar (T,).
SCHEDULES = {
    "linear": _linear, "linear-rescaled": _linear_rescaled, "cosine": _cosine, "sigmoid": _sigmoid,
    "shifted-cosine": _shifted_cosine,
}  # fmt: skip


def alphas_bar(schedule: str, T: int = 1000, reference: int = 32, zero_snr: bool = False) -> torch.Tensor:
    """alpha_bar_t for t = 0 ... T-1: (T,) float64, falling from almost 1 towards 0.

    Args:
        schedule: a key of SCHEDULES.
        reference: resolution, for "shifted-cosine".
        zero_snr: shift and scale sqrt(alpha_bar) so that the last is exactly 0 (Lin et al. 2024, algorithm 1).
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule={schedule!r}: choose from {', '.join(SCHEDULES)}")
    alpha_bar = SCHEDULES[schedule](T, reference)
    if alpha_bar.shape != (T,) or not ((alpha_bar > 0) & (alpha_bar < 1)).all() or (alpha_bar.diff() > 0).any():
        raise ValueError(f"schedule={schedule!r}: it must return {T} values of alpha_bar, the share of the picture's "
                         "variance that is left, between 0 and 1 and falling (not beta)")  # fmt: skip
    if zero_snr:
        root = alpha_bar.sqrt()
        alpha_bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return alpha_bar


def snr(alpha_bar: torch.Tensor) -> torch.Tensor:
    """Signal-to-noise ratio alpha_bar / (1 - alpha_bar) of x_t, of the same shape."""
    return alpha_bar / (1 - alpha_bar)


def q_sample(x_0: torch.Tensor, t: torch.Tensor, eps: torch.Tensor, alpha_bar: torch.Tensor) -> torch.Tensor:
    """x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps (Ho et al. 2020, eq. 4).

    Args:
        x_0, eps: (B, 3, H, W); t: (B,) integers in 0 ... T-1; alpha_bar: (T,).
    """
    a = alpha_bar[t].to(x_0).view(-1, 1, 1, 1)
    return a.sqrt() * x_0 + (1 - a).sqrt() * eps


def to_x_0(output: torch.Tensor, x_t: torch.Tensor, alpha_bar_t: torch.Tensor, prediction: str) -> torch.Tensor:
    """The picture that a prediction (epsilon, v_prediction or sample) implies at x_t; alpha_bar_t broadcasts."""
    a, b = alpha_bar_t.sqrt(), (1 - alpha_bar_t).sqrt()
    if prediction == "epsilon":
        return (x_t - b * output) / a
    return a * x_t - b * output if prediction == "v_prediction" else output


def make_scheduler(settings: Settings) -> DDPMScheduler:
    """The diffusers scheduler that training and ancestral sampling use, for `settings`' schedule.

    All schedules go in as trained_betas; DDPM and DDIM clip pixels of x_0 to [-1, 1] on the way; sampling times are
    spaced "trailing", so that few-step sampling starts at the noisiest step (Lin et al. 2024).
    """
    reference = settings.schedule_reference * 64 // settings.image_size  # alphas_bar compares it with 64
    alpha_bar = alphas_bar(settings.schedule, settings.num_train_timesteps, reference)
    beta = 1 - alpha_bar / torch.cat([torch.ones(1, dtype=alpha_bar.dtype), alpha_bar[:-1]])
    return DDPMScheduler(
        num_train_timesteps=settings.num_train_timesteps,
        trained_betas=beta.clamp(max=0.999).tolist(),
        prediction_type=settings.prediction,
        rescale_betas_zero_snr=settings.zero_snr,
        timestep_spacing="trailing",
        clip_sample=settings.space == "pixels" and not settings.student_steps,  # x_0 of a long step is no picture
    )


#: Samplers by name: any other diffusers scheduler can be put into `pipe.scheduler` as well.
SAMPLERS = {
    "ddpm": (DDPMScheduler, {}),
    "ddim": (DDIMScheduler, {}),
    "dpm-solver++": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "unipc": (UniPCMultistepScheduler, {"solver_order": 2}),
    # Asks the network twice a step. Its noise levels are even in log sigma: even in t, the first step, from the
    # cosine's sigma = 20,000 to some 10, would be too long for a second order.
    "heun": (HeunDiscreteScheduler, {"use_exponential_sigmas": True}),
}


def make_sampler(name: str, scheduler: DDPMScheduler):
    """The sampler `name` of SAMPLERS for the noise schedule of `scheduler`."""
    if name not in SAMPLERS:
        raise ValueError(f"sampler={name!r}: choose from {', '.join(SAMPLERS)}")
    if name == "heun" and scheduler.config.get("rescale_betas_zero_snr"):
        raise ValueError("sampler='heun' with zero_snr=True: it would start at infinite noise; use another sampler")
    scheduler_class, options = SAMPLERS[name]
    # Only what describes the noise: diffusers hands on every option, so another sampler's would come along.
    shared = ("num_train_timesteps", "trained_betas", "prediction_type", "rescale_betas_zero_snr", "timestep_spacing",
              "clip_sample")  # fmt: skip
    noise = {key: scheduler.config[key] for key in shared if key in scheduler.config}
    return scheduler_class.from_config(noise, **options)


# ════════════════════════════════════════════════════════════════════════════════════════════════════
# 4  Denoisers
# ════════════════════════════════════════════════════════════════════════════════════════════════════

# What all reports share: pixels in, eps out, ancestral sampling, the plain U-Nets of diffusers, Adam. They drop no
# labels, so there is no classifier-free guidance. The average of the weights, gradient clipping and even spread of t
# are this workbook's (assumed).
_REPORT = dict(patch=1, head_dim=8, norm_groups=32, scale_shift=False, layers_per_block=2, schedule="linear",
               prediction="epsilon", weight_decay=0.0, warmup_steps=0, decay_fraction=0.0, label_dropout=0.0,
               guidance="none", guidance_scale=1.0, steps=0)  # fmt: skip
#: What each system fixes in Settings; a field it leaves out keeps its default.
PRESETS = {
    # Ours: one token per object into cross-attention, their pooled embedding into the time embedding.
    "tokens": dict(),
    # A student of tokens: the scale is an input, and four DDIM steps do what twelve guided ones of its teacher do.
    "few-step": dict(teacher="tokens", student_steps=4, label_dropout=0.0, epochs=10, learning_rate=4e-4,
                     warmup_steps=50, decay_fraction=1.0, sampler="ddim", guidance_scale=5.0),
    # Ours in the latents of an autoencoder (4 x 16 x 16), which is trained first.
    "latent": dict(space="latents", patch=1, channels=(96, 144, 192), attention=("none", "cross", "cross")),
    # Report A. Assumed: widths, two layers a block, attention in the middle block, linear schedule, Dropout(0.1). It
    # goes on from its best epoch; here every run goes on from its last.
    "mlp-fusion": _REPORT | dict(
        channels=(64, 128, 256, 256, 512), attention=("none", "none", "self", "self", "none"),
        up_attention=("none", "self", "self", "none", "none"),  # the 3rd and 4th block on the way up
        conditioning="mlp", batch_size=64, epochs=200, learning_rate=1e-4, keep="best",
    ),
    # Report B. Assumed: AdamW, its rate, batch and epochs, and that its learning rate falls to zero.
    "linear-attn": _REPORT | dict(
        channels=(32, 64, 96, 128), attention=("none", "self", "self", "self"), conditioning="linear",
        batch_size=32, epochs=100, learning_rate=1e-4, weight_decay=0.01, decay_fraction=1.0,
    ),
    # Report C. The blocks that it names attend to themselves; only the middle block attends to the labels.
    # Assumed: its heads, 32 channels each.
    "cross-attention": _REPORT | dict(
        channels=(64, 128, 256), attention=("none", "none", "self"), conditioning="multi-hot",
        head_dim=32, batch_size=64, epochs=50, learning_rate=2e-4, keep="every", keep_every=1,
    ),
    # Report D: a UNet2DModel that adds Linear(24, 512) of the labels to the time embedding.
    "linear-512": _REPORT | dict(
        channels=(128, 128, 256, 256), attention=("none", "none", "none", "self"), conditioning="linear",
        batch_size=32, epochs=300, learning_rate=1e-4,
    ),
    # Its larger model. Assumed: widths.
    "linear-512-six": _REPORT | dict(
        channels=(128, 128, 256, 256, 512, 512), attention=("none", "none", "none", "none", "self", "self"),
        conditioning="linear", batch_size=32, epochs=300, learning_rate=1e-4,
    ),
}  # fmt: skip


class LinearCondition(nn.Module):
    """Multi-hot labels through one linear layer, to be added to the time embedding.

    forward(labels (B, 24), null (B,) bool) -> (pooled (B, width), None). Where null, a learned vector stands
    in: the null condition is not a label vector, and all zeros ("no object") would be one.
    """

    pools, gives_tokens = True, False

    def __init__(self, width: int, token_dim: int, null_condition: bool):
        super().__init__()
        self.linear = nn.Linear(len(OBJECTS), width)
        self.null = nn.Parameter(torch.zeros(width)) if null_condition else None

    def forward(self, labels, null):
        pooled = self.linear(labels)
        return (pooled if self.null is None else torch.where(null[:, None], self.null, pooled)), None


class MLPCondition(LinearCondition):
    """`LinearCondition` with three layers, GELU and dropout between them (report A)."""

    def __init__(self, width: int, token_dim: int, null_condition: bool):
        super().__init__(width, token_dim, null_condition)
        between = lambda: (nn.GELU(), nn.Dropout(0.1), nn.Linear(width, width))
        self.linear = nn.Sequential(self.linear, *between(), *between())


class MultiHotCondition(nn.Module):
    """The multi-hot vector itself as the only token for cross-attention (report C); nothing is pooled.

    forward(labels (B, 24), null (B,) bool) -> (None, (B, 1, 24)). Where null, a learned vector stands in.
    """

    pools, gives_tokens = False, True

    def __init__(self, width: int, token_dim: int, null_condition: bool):
        super().__init__()
        self.null = nn.Parameter(torch.zeros(len(OBJECTS))) if null_condition else None

    def forward(self, labels, null):
        token = labels if self.null is None else torch.where(null[:, None], self.null.to(labels), labels)
        return None, token[:, None]


class TokenCondition(nn.Module):
    """One token per object for cross-attention, and a pooled vector to be added to the time embedding.

    An object's token is made of its colour's and its shape's embedding, so what is learned of "red" in a red
    cube serves for a red sphere. There are as many slots as the fullest set needs, at least three; empty ones
    hold a learned token, and under the null condition all hold another (a row of masked tokens would leave
    nothing to attend to).

    forward(labels (B, 24), null (B,) bool) -> (pooled (B, width), tokens (B, slots, token_dim)).
    """

    pools, gives_tokens = True, True

    def __init__(self, width: int, token_dim: int, null_condition: bool):
        super().__init__()
        self.colour = nn.Parameter(torch.randn(1, len(COLOURS), token_dim))
        self.shape = nn.Parameter(torch.randn(len(SHAPES), 1, token_dim))
        self.mix = nn.Sequential(nn.Linear(token_dim, token_dim), nn.SiLU(), nn.Linear(token_dim, token_dim))
        self.empty = nn.Parameter(torch.randn(token_dim))
        self.pool = nn.Sequential(nn.Linear(len(OBJECTS), width), nn.SiLU(), nn.Linear(width, width))
        self.null = nn.Parameter(torch.randn(token_dim)) if null_condition else None
        self.null_pooled = nn.Parameter(torch.zeros(width)) if null_condition else None
        self.slots = 0  # how many, where that is known: to count them the host would wait for a GPU at every step

    def forward(self, labels, null):
        table = self.mix((self.shape + self.colour).flatten(0, 1))  # (24, token_dim), in the order of OBJECTS
        slots = self.slots or max(3, int(labels.sum(1).max()))
        present, index = labels.sort(dim=1, descending=True, stable=True)
        tokens = torch.where(present[:, :slots, None] > 0, table[index[:, :slots]], self.empty.to(table))
        pooled = self.pool(labels)
        if self.null is not None:
            tokens = torch.where(null[:, None, None], self.null.to(table), tokens)
            pooled = torch.where(null[:, None], self.null_pooled.to(pooled), pooled)
        return pooled, tokens


#: Ways of telling the network the labels: name -> module (width of the time embedding, token_dim, null_condition). It
#: says whether it pools into the time embedding and whether it gives tokens for cross-attention.
CONDITIONINGS = {
    "tokens": TokenCondition, "multi-hot": MultiHotCondition, "mlp": MLPCondition, "linear": LinearCondition,
}  # fmt: skip


GUIDANCE_EMBEDDING = 64  # width of what a student is told of s


class Denoiser(ModelMixin, ConfigMixin):
    """A U-Net of diffusers and its label conditioning: (x_t, t, labels) -> eps, v or x_0.

    The arguments are the fields of Settings with the same names; `null_condition` gives it a learned "no
    labels" input, which classifier-free guidance needs; of latents, `image_channels` and `image_size` are theirs (the
    docstrings say (B, 3, 64, 64)). Save and load it through `ICLEVRPipeline`.
    """

    @register_to_config
    def __init__(
        self,
        patch: int = 2,
        channels: tuple[int, ...] = (48, 96, 144),
        layers_per_block: int = 1,
        attention: tuple[str, ...] = ("none", "none", "cross"),
        up_attention: tuple[str, ...] = (),
        head_dim: int = 32,
        norm_groups: int = 16,
        scale_shift: bool = True,
        conditioning: str = "tokens",
        token_dim: int = 128,
        null_condition: bool = True,
        student_steps: int = 0,
        image_channels: int = 3,
        image_size: int = 64,
    ):
        super().__init__()
        self.condition = CONDITIONINGS[conditioning](4 * channels[0], token_dim, null_condition)
        prefix = {"none": "", "self": "Attn", "cross": "CrossAttn"}
        shared = dict(
            sample_size=image_size // patch,
            in_channels=image_channels * patch**2,
            out_channels=image_channels * patch**2,
            block_out_channels=tuple(channels),
            layers_per_block=layers_per_block,
            down_block_types=tuple(f"{prefix[a]}DownBlock2D" for a in attention),
            up_block_types=tuple(f"{prefix[a]}UpBlock2D" for a in reversed(up_attention or attention)),
            norm_num_groups=norm_groups,
            resnet_time_scale_shift="scale_shift" if scale_shift else "default",
            class_embed_type="identity" if self.condition.pools else None,
        )
        if self.condition.gives_tokens:
            # In UNet2DConditionModel this argument is the number of heads, despite its name; but blocks that attend to
            # themselves take it for the heads' width, and so are set right after.
            heads = tuple(max(1, c // head_dim) for c in channels)
            width = len(OBJECTS) if conditioning == "multi-hot" else token_dim
            scale = dict(time_cond_proj_dim=GUIDANCE_EMBEDDING) if student_steps else {}
            self.unet = UNet2DConditionModel(cross_attention_dim=width, attention_head_dim=heads, **shared, **scale)
            if student_steps:
                nn.init.zeros_(self.unet.time_embedding.cond_proj.weight)  # a student begins as its teacher
            for block in (*self.unet.down_blocks, *self.unet.up_blocks):
                for layer in block.attentions if isinstance(block, AttnDownBlock2D | AttnUpBlock2D) else ():
                    layer.heads = max(1, layer.inner_dim // head_dim)
                    layer.scale = (layer.inner_dim / layer.heads) ** -0.5
        else:
            self.unet = UNet2DModel(attention_head_dim=head_dim, **shared)

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, labels: torch.Tensor, null: torch.Tensor | None = None,
                guidance_scale: torch.Tensor | float = 1.0):  # fmt: skip
        """Predict what `prediction` names.

        Args:
            x_t: (B, 3, 64, 64); t: (B,) or () integers; labels: (B, 24) multi-hot.
            null: (B,) bool, True where the labels are to be ignored; default nowhere.
            guidance_scale: s of classifier-free guidance, (B,) or one for all; only students take it as an input.

        Returns:
            (B, 3, 64, 64)
        """
        if null is None:
            null = torch.zeros(len(labels), dtype=torch.bool, device=labels.device)
        elif self.condition.null is None and null.any():
            raise ValueError(
                "this model has no null condition (it was trained with label_dropout=0), so it has no guidance by "
                "itself and no composition: use guidance_scale=1, or train with label_dropout=0.1"
            )
        pooled, tokens = self.condition(labels.to(self.dtype), null)
        x = F.pixel_unshuffle(x_t.to(self.dtype), self.config.patch).contiguous(memory_format=torch.channels_last)
        extra = {} if tokens is None else {"encoder_hidden_states": tokens}
        if tokens is not None and tokens.shape[1] > 3:  # slots for a fuller set of the batch: hidden from the others
            slots = torch.arange(tokens.shape[1], device=labels.device)
            extra["encoder_attention_mask"] = slots < labels.sum(1, keepdim=True).clamp(min=3)
        if self.config.student_steps:
            scale = torch.as_tensor(guidance_scale, device=x.device).expand(len(x))
            extra["timestep_cond"] = get_timestep_embedding(100 * scale, GUIDANCE_EMBEDDING).to(x.dtype)
        return F.pixel_shuffle(self.unet(x, t, class_labels=pooled, **extra).sample, self.config.patch)


#: What `Denoiser` takes from Settings as it is.
_OF_NETWORK = ("patch", "channels", "layers_per_block", "attention", "up_attention", "head_dim", "norm_groups",
               "scale_shift", "conditioning", "token_dim")  # fmt: skip


def _arguments_of_denoiser(settings):
    return {name: getattr(settings, name) for name in _OF_NETWORK} | dict(
        null_condition=settings.label_dropout > 0,
        student_steps=settings.student_steps,
        image_channels=3 if settings.space == "pixels" else settings.latent_channels,
        image_size=settings.image_size,
    )


def make_denoiser(settings: Settings, device: str | None = None) -> Denoiser:
    """The network of `settings`, initialised from its seed, on their device or another ("meta": shapes only)."""
    with torch.random.fork_rng(devices=[]), torch.device("meta" if device == "meta" else "cpu"):
        torch.manual_seed(settings.seed)
        denoiser = Denoiser(**_arguments_of_denoiser(settings))
    return denoiser.to(device or settings.device, memory_format=torch.channels_last)


def count_flops(settings: Settings) -> int:
    """Floating-point operations of the network of `settings` in one pass forward over one picture, as torch's
    FlopCounterMode counts them: matrix products, convolutions and attention. A step of training takes three times as
    many for each picture."""
    return _count_flops(**_arguments_of_denoiser(settings))


@functools.cache  # experiments by the dozen have the same network
def _count_flops(**arguments):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    with torch.random.fork_rng(devices=[]):
        denoiser = Denoiser(**arguments)
    channels, size = arguments["image_channels"], arguments["image_size"]
    whole = sdpa_kernel(SDPBackend.MATH)  # the counter does not know the CPU's fused attention
    with FlopCounterMode(display=False) as counter, torch.no_grad(), whole:
        denoiser(torch.zeros(1, channels, size, size), torch.tensor(0), encode_labels(MANUAL_SET))
    return counter.get_total_flops()


def describe_denoiser(denoiser: Denoiser) -> list[dict]:
    """What a denoiser is made of, in the order of computation, measured by passing one image through it.

    Returns:
        One dict a part: part, kind, output (channels, height, width), attention (none, self, cross), parameters.
    """
    unet, rows, hooks = denoiser.unet, [], []
    downs = [(f"down {i}", block) for i, block in enumerate(unet.down_blocks)]
    ups = [(f"up {i}", block) for i, block in enumerate(unet.up_blocks)]
    parts = [("input", unet.conv_in), *downs, ("middle", unet.mid_block), *ups, ("output", unet.conv_out)]

    def record(name, module, output):
        tensor = output[0] if isinstance(output, tuple) else output
        attentions = [type(a).__name__ for a in getattr(module, "attentions", None) or [] if a is not None]
        kind = "none" if not attentions else "self + cross" if "Transformer" in attentions[0] else "self"
        rows.append(dict(part=name, kind=type(module).__name__, output=tuple(tensor.shape[1:]), attention=kind,
                         parameters=count_parameters(module)))  # fmt: skip

    for name, module in parts:
        hooks.append(module.register_forward_hook(lambda m, _, out, name=name: record(name, m, out)))
    with torch.no_grad():
        size = denoiser.config.image_size
        x = torch.zeros(1, denoiser.config.image_channels, size, size, device=denoiser.device)
        denoiser(x, torch.tensor(0, device=denoiser.device), encode_labels(MANUAL_SET).to(denoiser.device))
    for hook in hooks:
        hook.remove()
    pooled = (4 * denoiser.config.channels[0],)
    time = unet.time_embedding
    return [
        dict(part="labels", kind=type(denoiser.condition).__name__, output=pooled, attention="none",
             parameters=count_parameters(denoiser.condition)),
        dict(part="time", kind=type(time).__name__, output=pooled, attention="none", parameters=count_parameters(time)),
        *rows,
    ]  # fmt: skip


@torch.no_grad()
def label_effect(denoiser: Denoiser, x_0, labels, t: int, alpha_bar, settings: Settings) -> float:
    """How much the prediction at time t changes when each picture gets the labels of the next one.

    Args:
        x_0: (B, 3, 64, 64) real pictures; labels: (B, 24); alpha_bar: (T,).

    Returns:
        Root mean squared change over the root mean square of the prediction.
    """
    times = torch.full((len(x_0),), int(t))
    x_t = q_sample(x_0, times, torch.randn(x_0.shape, generator=make_generator(settings.seed)), alpha_bar)
    x_t, times, labels = (v.to(denoiser.device) for v in (x_t, times, labels))
    with autocast(settings):
        right, wrong = (denoiser(x_t, times, y).float() for y in (labels, labels.roll(1, 0)))
    return ((right - wrong).pow(2).mean() / right.pow(2).mean()).sqrt().item()


def make_autoencoder(settings: Settings) -> AutoencoderKL:
    """The autoencoder of latent diffusion (Rombach et al. 2022), initialised from the seed."""
    channels = settings.autoencoder_channels
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        autoencoder = AutoencoderKL(
            block_out_channels=channels,
            down_block_types=("DownEncoderBlock2D",) * len(channels),
            up_block_types=("UpDecoderBlock2D",) * len(channels),
            latent_channels=settings.latent_channels,
            norm_num_groups=settings.norm_groups,
            sample_size=64,
        )
    return autoencoder.to(settings.device, memory_format=torch.channels_last)


def encode(autoencoder: AutoencoderKL, images: torch.Tensor):
    """Mean and standard deviation of the latents of (B, 3, 64, 64), each (B, latent_channels, 16, 16), scaled so that
    over the training images each channel has mean 0 and variance 1 (once the autoencoder knows their statistics)."""
    posterior = autoencoder.encode(images.to(autoencoder.device)).latent_dist
    mean, scale = _latent_statistics(autoencoder)
    return (posterior.mean - mean) / scale, posterior.std / scale


def decode(autoencoder: AutoencoderKL | None, latents: torch.Tensor) -> torch.Tensor:
    """Pictures of latents, scaled as by `encode`; without an autoencoder what is given, which then is a picture."""
    if autoencoder is None:
        return latents
    mean, scale = _latent_statistics(autoencoder)
    return autoencoder.decode(latents.to(autoencoder.dtype) * scale + mean).sample.float()


def _latent_statistics(autoencoder):
    as_tensor = lambda values, default: torch.tensor(values or [default], device=autoencoder.device).view(1, -1, 1, 1)
    return as_tensor(autoencoder.config.latents_mean, 0.0), as_tensor(autoencoder.config.latents_std, 1.0)


class LatentDataset:
    """Training images as latents, encoded once; `draw` gives a fresh sample of their distribution each time."""

    def __init__(self, dataset: ICLEVRDataset, autoencoder: AutoencoderKL):
        self.split, self.labels = dataset.split, dataset.labels
        with torch.no_grad():
            parts = [encode(autoencoder, to_float(pixels)) for pixels in progress(dataset.pixels.split(64), "encoding")]
        self.mean, self.std = (torch.cat(v).cpu() for v in zip(*parts, strict=True))

    def __len__(self):
        return len(self.labels)

    def draw(self, rows: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """x_0 for training: latents of `rows`, on the generator's device."""
        mean, std = (v[rows].to(generator.device) for v in (self.mean, self.std))
        return mean + std * torch.randn(mean.shape, generator=generator, device=generator.device)


def count_parameters(module: nn.Module) -> int:
    """Number of trainable numbers in a module."""
    return sum(p.numel() for p in module.parameters())


# ════════════════════════════════════════════════════════════════════════════════════════════════════
# 5  Training
# ════════════════════════════════════════════════════════════════════════════════════════════════════


@dataclasses.dataclass(frozen=True)
class Epoch:
    """What `train` yields after each epoch; printed, it is one line."""

    epoch: int
    epochs: int
    step: int
    images_seen: int
    loss: float  # mean squared error of the prediction, weighted as `loss_weights` says, over the epoch
    learning_rate: float
    images_per_s: float
    seconds_left: float
    pipeline: ICLEVRPipeline | None = dataclasses.field(default=None, repr=False, compare=False)  # EMA weights

    def __str__(self):
        return (
            f"epoch {self.epoch}/{self.epochs}  loss {self.loss:.4f}  {self.images_per_s:.0f} images/s  "
            f"{format_seconds(self.seconds_left)} left"
        )


@dataclasses.dataclass(frozen=True)
class AutoencoderEpoch:
    """What `train_autoencoder` yields after each epoch; printed, it is one line."""

    epoch: int
    epochs: int
    loss: float
    error: float  # mean absolute, of pictures in [-1, 1]
    seconds_left: float

    def __str__(self):
        left = format_seconds(self.seconds_left)
        return f"epoch {self.epoch}/{self.epochs}  autoencoder, error {self.error:.4f}  {left} left"


def format_seconds(seconds: float) -> str:
    """75 -> "1 min 15 s"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


def learning_rate(settings: Settings, step: int, total_steps: int) -> float:
    """Linear warm-up, then constant, then linear to zero over the last `decay_fraction` of training.

    While it is constant it does not depend on how long training will be, so a run can be prolonged.
    """
    up = min(1.0, (step + 1) / max(1, settings.warmup_steps))
    down = min(1.0, (total_steps - step) / max(1.0, settings.decay_fraction * total_steps))
    return settings.learning_rate * up * (down if settings.decay_fraction else 1.0)


def loss_weights(settings: Settings, alpha_bar: torch.Tensor) -> torch.Tensor:
    """How much the squared error of the prediction counts at each t, (T,): ones, or min-SNR (Hang et al. 2023).

    min-SNR weighs the error of x_0 by min(SNR, gamma); that of eps is SNR times it, that of v SNR + 1 times.
    """
    if settings.loss_weighting == "none":
        return torch.ones_like(alpha_bar)
    ratio = snr(alpha_bar)
    by = {"epsilon": ratio, "v_prediction": ratio + 1, "sample": torch.ones_like(ratio)}[settings.prediction]
    return ratio.clamp(max=settings.min_snr_gamma) / by


def training_batch(settings: Settings, dataset, scheduler, step: int, part=(0, 1)):
    """Everything random of training step `step`, from (seed, step) alone, so that resuming changes nothing.

    Args:
        dataset: ICLEVRDataset, LatentDataset or, for a student, Trajectories.
        part: (rank, number of processes): which slice of the global batch to return.

    Returns:
        dict: x_0, eps, x_t, target (B, 3, 64, 64); t (B,); labels (B, 24); null (B,) bool; scale (B,): s, or 1.
    """
    size, device = min(settings.batch_size, len(dataset)), settings.device
    epoch, position = divmod(step, len(dataset) // size)
    order = torch.randperm(len(dataset), generator=make_generator(settings.seed, 0, epoch))
    rows = order[position * size : (position + 1) * size]
    g = make_generator(settings.seed, 1, step, device=device)
    taught = isinstance(dataset, Trajectories)
    x_0 = dataset.draw(rows, g) if not taught else None
    # One random offset spreads the times evenly over the batch: less noise in the loss (Kingma et al. 2021, app. I).
    spread = (torch.arange(size, device=device) + torch.rand((), generator=g, device=device)) / size
    t = (spread * settings.num_train_timesteps).long().clamp(max=settings.num_train_timesteps - 1)
    t = t[torch.randperm(size, generator=g, device=device)]
    if taught:
        x_0, eps, t, scale = dataset.step_from(rows, t, scheduler)
    else:
        eps, scale = torch.randn(x_0.shape, generator=g, device=device), torch.ones(size, device=device)
    null = torch.rand(size, generator=g, device=device) < settings.label_dropout
    mirrored = torch.rand(size, generator=g, device=device) < 0.5 * settings.flip
    x_0 = torch.where(mirrored[:, None, None, None], x_0.flip(3), x_0)
    target = {
        "epsilon": lambda: eps,
        "v_prediction": lambda: scheduler.get_velocity(x_0, eps, t),
        "sample": lambda: x_0,
    }[settings.prediction]()
    batch = dict(x_0=x_0, eps=eps, x_t=scheduler.add_noise(x_0, eps, t), target=target, t=t,
                 labels=dataset.labels[rows].to(device), null=null, scale=scale)  # fmt: skip
    rank, count = part
    return {k: v.chunk(count)[rank] for k, v in batch.items()}


#: Students are trained with guidance scales from 0 to this; whoever takes no scale as an input has no such limit.
MAX_GUIDANCE_SCALE = 6.0
#: So many trajectories are drawn at a time, with one s.
_AT_A_TIME = 64


def draw_trajectories(settings: Settings, labels: torch.Tensor, teacher: ICLEVRPipeline, part=(0, 1)) -> Path:
    """Let a teacher draw what a student learns from (see `Trajectories`), some at a time; who was stopped goes on.

    Args:
        labels: (N, 24), of the training images.
        part: (rank, number of processes): who draws which.

    Returns:
        The folder in data/runs/cache that holds them: another for another teacher, labels, steps or seed.
    """
    from safetensors.torch import save_file

    how = (teacher.weights_sha256, settings.student_steps, settings.teacher_steps, settings.seed, MAX_GUIDANCE_SCALE)
    name = hashlib.sha256(repr(how).encode() + labels.numpy().tobytes()).hexdigest()[:16]
    folder = settings.runs / "cache" / f"trajectories-{name}"
    parts = [(folder / f"{i:04d}.safetensors", i, of) for i, of in enumerate(labels.split(_AT_A_TIME))]
    missing = [each for each in parts[part[0] :: part[1]] if not each[0].exists()]
    start = time.perf_counter()
    for done, (file, number, of) in enumerate(progress(missing, "the teacher draws"), 1):
        generators = [make_generator(settings.seed, 4, number, i) for i in range(len(of))]
        scale = MAX_GUIDANCE_SCALE * torch.rand(1, generator=make_generator(settings.seed, 5, number))
        with autocast(settings):
            states = teacher(of, settings.teacher_steps, scale.item(), generator=generators, output_type="pt",
                             return_process=True).process  # fmt: skip
        states = states[:: settings.teacher_steps // settings.student_steps].transpose(0, 1)
        kept = {"states": states.half().contiguous(), "scale": scale}
        _write_atomically(file, lambda temporary, kept=kept: save_file(kept, temporary))
        if headless() and (done % 16 == 0 or done == len(missing)):
            left = (time.perf_counter() - start) / done * (len(missing) - done)
            print(f"progress: the teacher drew {done}/{len(missing)} parts, {format_seconds(left)} left", flush=True)
    return folder


class Trajectories:
    """What a student is trained on: for the labels of each training image the states x_t through which its teacher
    went from noise to a picture, guided by some s, and without chance.

    Attributes:
        labels: (N, 24).
        states: (N, student_steps + 1, 3, 64, 64) float16, where each of the student's steps begins and ends.
        scales: (N,), the s of each.
    """

    def __init__(self, settings: Settings, labels: torch.Tensor, folder: Path):
        from safetensors.torch import load_file

        self.labels, shape = labels, (len(labels), settings.student_steps + 1, 3, 64, 64)
        self.states = torch.empty(shape, dtype=torch.float16, device=settings.device)
        self.scales = torch.empty(len(labels), device=settings.device)
        for i, rows in enumerate(torch.arange(len(labels)).split(_AT_A_TIME)):
            kept = load_file(folder / f"{i:04d}.safetensors")
            self.states[rows[0] : rows[-1] + 1], self.scales[rows[0] : rows[-1] + 1] = kept["states"], kept["scale"]

    def __len__(self):
        return len(self.labels)

    def step_from(self, rows: torch.Tensor, t: torch.Tensor, scheduler: DDPMScheduler):
        """The student's steps in which the times `t` lie: from what x_0 and eps one step of DDIM leads from a step's
        beginning to its end. Returns x_0, eps (B, 3, 64, 64), the times of the beginnings and the scales (B,)."""
        steps = self.states.shape[1] - 1
        stride = scheduler.config.num_train_timesteps // steps
        t = t // stride * stride + stride - 1
        alpha_bar = F.pad(scheduler.alphas_cumprod.to(t.device), (0, 1), value=1.0)  # [-1] is where time ends
        level = lambda t: (x.sqrt()[:, None, None, None] for x in (alpha_bar[t], 1 - alpha_bar[t]))
        (a, b), (a_end, b_end) = level(t), level(t - stride)
        rows, number = rows.to(t.device), steps - 1 - t // stride
        x_t, x_end = (self.states[rows, i].float() for i in (number, number + 1))
        x_0 = (x_end - b_end / b * x_t) / (a_end - b_end / b * a)
        return x_0, (x_t - a * x_0) / b, t, self.scales[rows]


def _find_teacher(settings):
    folder = WEIGHTS / settings.teacher
    folder = folder if folder.is_dir() else _from_project(settings.teacher)
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(f"teacher={settings.teacher!r}: no pipeline in {folder}; give a preset that ships "
                                "(data/weights) or a pipeline's folder")  # fmt: skip
    return folder


def load_teacher(settings: Settings) -> ICLEVRPipeline:
    """The pipeline that `settings.teacher` names (a preset that ships, or a folder), with a deterministic sampler that
    needs few steps.

    Raises:
        FileNotFoundError: there is none.
        ValueError: its network, or its noise, is not what the student begins with.
    """
    teacher = load_pipeline(settings, str(_find_teacher(settings)))
    here = {name: getattr(settings, name) for name in _OF_NETWORK}
    here |= {name: make_scheduler(settings).config[name] for name in ("trained_betas", "prediction_type")}
    there = dict(teacher.denoiser.config) | dict(teacher.scheduler.config)
    differ = [name for name in here if json.dumps(here[name]) != json.dumps(there[name])]
    if differ or teacher.denoiser.config.student_steps or "classifier-free" not in teacher.guidances:
        why = f"another network than this run's: {', '.join(differ)}" if differ else "it knows no guidance by itself"
        raise ValueError(f"teacher={settings.teacher!r}: {why}. A student begins with its teacher's weights")
    teacher.scheduler = make_sampler("dpm-solver++", teacher.scheduler)
    return teacher


def train_autoencoder(settings: Settings, dataset: ICLEVRDataset, folder: Path):
    """Train the autoencoder of latent diffusion in `folder`/autoencoder; yields an `AutoencoderEpoch` after each.

    Its loss is the mean absolute error of the pictures, and 1e-6 times the KL divergence of their latents from N(0, I),
    which keeps them near each other (the idea of Rombach et al. 2022). A finished one is left alone, a stopped one
    goes on; for diffusion of pixels there is nothing to do.
    """
    if settings.space == "latents":
        with _alone(Path(folder) / "lock"):
            yield from _train_autoencoder(settings, dataset, Path(folder) / "autoencoder")


def _train_autoencoder(settings, dataset, folder):
    if (folder / "config.json").is_file():
        return
    device, autoencoder = settings.device, make_autoencoder(settings)
    optimizer = torch.optim.AdamW(autoencoder.parameters(), lr=1e-3, weight_decay=0.0, fused=device != "mps")
    size = min(settings.batch_size, len(dataset))
    steps = len(dataset) // size
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps * settings.autoencoder_epochs)
    parts = dict(model=autoencoder, optimizer=optimizer, schedule=schedule)
    resumed = folder.with_suffix(".pt")
    state = torch.load(resumed, map_location=device, weights_only=True) if resumed.exists() else {"history": []}
    for name, part in parts.items():
        if name in state:
            part.load_state_dict(state[name])
    history, start = state["history"], time.perf_counter()
    for epoch in range(len(history), settings.autoencoder_epochs):
        totals = torch.zeros(2, device=device)
        order = torch.randperm(len(dataset), generator=make_generator(settings.seed, 3, epoch))
        for step in progress(range(steps), f"autoencoder, epoch {epoch + 1}"):
            g = make_generator(settings.seed, 4, epoch, step, device=device)
            images = dataset.draw(order[step * size : (step + 1) * size], g)
            with autocast(settings):
                posterior = autoencoder.encode(images).latent_dist
                noise = torch.randn(posterior.mean.shape, generator=g, device=device)
                error = (autoencoder.decode(posterior.mean + posterior.std * noise).sample - images).abs().mean()
            loss = error + 1e-6 * posterior.kl().mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(autoencoder.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            totals += torch.stack([loss.detach(), error.detach()])
        loss, error = (totals / steps).tolist()
        spent = (time.perf_counter() - start) / (epoch + 1 - len(state["history"]))
        left = settings.autoencoder_epochs - epoch - 1
        record = AutoencoderEpoch(epoch + 1, settings.autoencoder_epochs, loss, error, seconds_left=spent * left)
        history = [*history, dataclasses.asdict(record)]
        saved = {name: part.state_dict() for name, part in parts.items()} | {"history": history}
        _write_atomically(resumed, lambda temporary, saved=saved: torch.save(saved, temporary))
        yield record
    latents = LatentDataset(dataset, autoencoder.eval().requires_grad_(False))
    mean, spread = latents.mean.mean((0, 2, 3)), latents.mean.var((0, 2, 3)) + latents.std.square().mean((0, 2, 3))
    autoencoder.register_to_config(latents_mean=mean.tolist(), latents_std=spread.sqrt().tolist())
    _save_pretrained(autoencoder, folder, history)
    resumed.unlink()


def load_autoencoder(settings: Settings, folder: Path) -> AutoencoderKL | None:
    """The autoencoder that `train_autoencoder` left in `folder`; None for diffusion of pixels."""
    if settings.space == "pixels":
        return None
    if not (Path(folder) / "autoencoder" / "config.json").is_file():
        raise FileNotFoundError(
            f"no autoencoder in {folder}: train it first, with train_autoencoder (notebook 03 does)"
        )
    autoencoder = AutoencoderKL.from_pretrained(Path(folder) / "autoencoder", local_files_only=True)
    there = tuple(autoencoder.config.block_out_channels), autoencoder.config.latent_channels
    if there != (settings.autoencoder_channels, settings.latent_channels):
        raise ValueError(f"{folder} holds an autoencoder of other settings (autoencoder_channels={there[0]}, "
                         f"latent_channels={there[1]}): name another run (run='...')")  # fmt: skip
    return autoencoder.to(settings.device, memory_format=torch.channels_last).eval().requires_grad_(False)


def train(settings: Settings, dataset: ICLEVRDataset, folder: Path, resume: bool = True):
    """Train `settings`' denoiser on `dataset`; a generator that yields an `Epoch` after each epoch.

    Each epoch is checkpointed in `folder` (checkpoint.pt, history.json, TensorBoard's events), and a later call
    with the same folder goes on where it stopped, bit for bit on one CPU. `epochs` may be changed in between.
    `folder`/pipeline holds the pipeline with the EMA weights: at the end those of the last epoch, or, with
    keep="best", those of the epoch with the least loss so far; keep="every" also leaves `folder`/epochs/NNNN.

    Raises:
        ValueError: `folder` holds a run of other settings, or the dataset is empty.
        FileNotFoundError: space="latents" and no autoencoder in `folder`.
    """
    from accelerate import Accelerator

    if len(dataset) == 0:
        raise ValueError(f"no images to train on: the split {dataset.split!r} of this data is empty")
    accelerator = Accelerator(cpu=settings.device == "cpu")
    with contextlib.ExitStack() as stack:
        if accelerator.is_main_process:  # a second training of the same run waits, and then goes on with it
            stack.enter_context(_alone(Path(folder) / "lock"))
        accelerator.wait_for_everyone()
        yield from _train(settings, dataset, Path(folder), resume, accelerator)


def _train(settings, dataset, folder, resume, accelerator):
    from accelerate.utils import gather_object
    from diffusers.training_utils import EMAModel
    from torch.utils.tensorboard import SummaryWriter

    part = (accelerator.process_index, accelerator.num_processes)
    autoencoder = load_autoencoder(settings, folder)
    if autoencoder is not None:
        dataset = LatentDataset(dataset, autoencoder)
    scheduler, denoiser = make_scheduler(settings), make_denoiser(settings)
    if settings.teacher:  # what the student has besides, the input for s, begins without effect
        teacher = load_teacher(settings)
        denoiser.load_state_dict(teacher.denoiser.state_dict(), strict=False)
    optimizer = torch.optim.AdamW(denoiser.parameters(), settings.learning_rate, weight_decay=settings.weight_decay,
                                  fused=settings.device != "mps")  # fmt: skip
    ema = EMAModel(denoiser.parameters(), settings.ema_decay, use_ema_warmup=True, power=0.75, foreach=True)
    denoiser.condition.slots = max(3, int(dataset.labels.sum(1).max()))
    state = _read_checkpoint(settings, folder) if resume else None
    history = []
    if state:
        denoiser.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        ema.load_state_dict(state["ema"])
        history = state["history"]
    ema.to(settings.device)
    weights = loss_weights(settings, scheduler.alphas_cumprod).to(settings.device)
    network, optimizer = accelerator.prepare(denoiser, optimizer)
    network.train()

    size = min(settings.batch_size, len(dataset))
    steps = len(dataset) // size
    done, total = len(history), steps * settings.epochs
    if size % part[1]:
        raise ValueError(
            f"batch_size={size} cannot be split evenly over {part[1]} processes: use a multiple of {part[1]}"
        )
    if len(set(gather_object([done]))) > 1:
        raise ValueError(f"the processes find different checkpoints in {folder}: it must be a folder that they share")
    if history and history[-1]["step"] != done * steps:
        raise ValueError(f"{folder} was trained on another number of images; use the same data, or name another run")
    if settings.teacher and done < settings.epochs:
        drawn = draw_trajectories(settings, dataset.labels, teacher, part)
        accelerator.wait_for_everyone()
        dataset = Trajectories(settings, dataset.labels, drawn)

    def loss_of(network, step):
        batch = training_batch(settings, dataset, scheduler, step, part)
        with autocast(settings), torch.random.fork_rng(devices=[]):
            torch.manual_seed(make_generator(settings.seed, 2, step).initial_seed())  # of dropout
            null = batch["null"] if settings.label_dropout else None
            prediction = network(batch["x_t"], batch["t"], batch["labels"], null, batch["scale"])
        errors = (prediction.float() - batch["target"]).pow(2).mean((1, 2, 3))
        return (weights[batch["t"]] * errors).mean()

    if settings.torch_compile and done < settings.epochs:
        network = _compiled(network, lambda network: loss_of(network, done * steps))
    writer = SummaryWriter(folder / "tensorboard", purge_step=done * steps + 1) if accelerator.is_main_process else None
    start = time.perf_counter()
    for epoch in range(done, settings.epochs):
        losses = torch.zeros((), device=settings.device)
        epoch_start = time.perf_counter()
        for step in progress(range(epoch * steps, (epoch + 1) * steps), f"epoch {epoch + 1}/{settings.epochs}"):
            loss = loss_of(network, step)
            accelerator.backward(loss)
            if settings.gradient_clip:
                accelerator.clip_grad_norm_(network.parameters(), settings.gradient_clip)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(settings, step, total)
            optimizer.step()
            optimizer.zero_grad()
            ema.step(denoiser.parameters())
            losses += loss.detach()  # no .item(): it would wait for the device at every step
        loss = accelerator.reduce(losses, "mean").item() / steps  # here the host waits for the device, once an epoch
        now = time.perf_counter()
        record = dict(
            epoch=epoch + 1, epochs=settings.epochs, step=(epoch + 1) * steps,
            images_seen=(epoch + 1) * steps * size,
            loss=loss,
            learning_rate=learning_rate(settings, step, total),
            images_per_s=steps * size / (now - epoch_start),
            seconds_left=(now - start) / (epoch + 1 - done) * (settings.epochs - epoch - 1),
        )  # fmt: skip
        history = [*history, record]
        pipeline = ICLEVRPipeline(_ema_copy(denoiser, ema), make_scheduler(settings), autoencoder)
        if accelerator.is_main_process:
            for name in ("loss", "learning_rate", "images_per_s"):
                writer.add_scalar(name, record[name], record["step"])
            writer.flush()
            # Before the checkpoint: stopped in between, the epoch is done again.
            best = record["loss"] == min(past["loss"] for past in history)
            last = epoch + 1 == settings.epochs
            # At the end there is one, also where the best was passed before `keep` asked for it.
            if (best if settings.keep == "best" else last) or (last and not (folder / "pipeline").is_dir()):
                _save_pretrained(pipeline, folder / "pipeline", history)
            if settings.keep == "every" and (epoch + 1) % settings.keep_every == 0:
                _save_pretrained(pipeline, folder / "epochs" / f"{epoch + 1:04d}", history)
            state = dict(settings=dataclasses.asdict(settings), model=denoiser.state_dict(), ema=ema.state_dict(),
                         optimizer=optimizer.state_dict(), history=history)  # fmt: skip
            _write_atomically(folder / "checkpoint.pt", lambda p, s=state: torch.save(s, p))
            write_json(folder / "history.json", history)
        yield Epoch(**record, pipeline=pipeline)


def _compiled(network, loss_of):
    """The network by torch.compile, once a first backward pass has shown that it learns as the network itself does.

    On a CPU torch 2.13 compiles the network of `tokens` wrongly: no gradient passes an upsampling, while the loss still
    falls, for what comes after it learns.

    Raises:
        RuntimeError: it does not.
    """
    compiled, gradients = torch.compile(network), []
    print("progress: compiling the network, which takes a minute or more", flush=True)
    for each in (network, compiled):
        loss_of(each).backward()
        gradients.append([p.grad for p in network.parameters()])
        network.zero_grad()  # lets go of them: they stay as they are
    pairs = [(own, other) for own, other in zip(*gradients, strict=True) if own is not None and own.any()]
    wrong = sum(1 for own, other in pairs if other is None or not (own - other).norm() <= 0.5 * own.norm())  # or NaN
    if wrong > len(pairs) / 10:  # rounding and dropout make some difference, too
        raise RuntimeError(
            f"torch_compile=True: what torch {torch.__version__} compiles here would learn badly, {wrong} of "
            f"{len(pairs)} gradients are not the network's own. Train with torch_compile=False"
        )
    return compiled


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


def _save_pretrained(model, folder, history):
    """Save a pipeline or a model and the history up to it as `folder`, whole, in place of an earlier one."""
    partial = folder.with_name(f"{folder.name}.partial")
    model.save_pretrained(partial)
    write_json(partial / "history.json", history)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


#: Settings that may change when a run is resumed. `epochs` moves the decay of the learning rate, no step before it.
_RESUMABLE = {"profile", "run", "device", "precision", "torch_compile", "epochs", "keep", "keep_every", "sampler",
              "steps", "guidance", "guidance_scale", "guidance_interval", "classifier_input", "ddpm_images", "seeds",
              "evaluation_sets", "evaluator_epochs", "evaluator_scenes"}  # fmt: skip


def _first_line(error):
    return f"{type(error).__name__}: {error}".splitlines()[0]  # an error may have no message at all


def _read_checkpoint(settings, folder):
    """The state in `folder`, or None where there is none; ValueError for a run of other settings."""
    file = folder / "checkpoint.pt"
    if not file.exists():
        return None
    try:
        state = torch.load(file, map_location=settings.device, weights_only=True)
        defaults = {field.name: field.default for field in dataclasses.fields(Settings)}
        saved = defaults | dict(state["settings"])  # what a setting says that is younger than the checkpoint
    except Exception as error:
        raise ValueError(
            f"{file}: not a checkpoint of this workbook ({_first_line(error)}); delete it to start afresh"
        ) from None
    now = dataclasses.asdict(settings)
    differ = [
        f"{n} ({saved.get(n)!r} there, {now[n]!r} now)" for n in now if n not in _RESUMABLE and saved.get(n) != now[n]
    ]
    if differ:
        raise ValueError(
            f"{file} belongs to other settings: {', '.join(differ)}. Name another run "
            f"(run='...'), or delete {folder} to start afresh."
        )
    return state


def _ema_copy(denoiser, ema):
    """A frozen copy of `denoiser` with the averaged weights (its buffers are copied as they are)."""
    averaged = copy.deepcopy(denoiser)
    averaged.condition.slots = 0
    ema.copy_to(averaged.parameters())
    return averaged.eval().requires_grad_(False)


def load_history(folder: Path) -> list[dict]:
    """The per-epoch records of a run, oldest first; empty where none was trained."""
    file = Path(folder) / "history.json"
    return json.loads(file.read_text()) if file.exists() else []


# ════════════════════════════════════════════════════════════════════════════════════════════════════
# 6  Sampling
# ════════════════════════════════════════════════════════════════════════════════════════════════════


@dataclasses.dataclass
class ICLEVROutput(BaseOutput):
    """What the pipeline returns: images, a list of PIL images or (B, 3, 64, 64) in [-1, 1]. With return_process
    also process, x_t before each step and at the end, and guesses, the x_0 that the network would have put in
    its place: both (steps + 1, B, 3, 64, 64) on the CPU."""

    images: list | torch.Tensor
    process: torch.Tensor | None = None
    guesses: torch.Tensor | None = None


#: How labels may steer the sampling; see `ICLEVRPipeline`.
BY_CLASSIFIER = ("classifier-1", "classifier-2")
GUIDANCES = ("none", "classifier-free", "composition", *BY_CLASSIFIER)


class ICLEVRPipeline(DiffusionPipeline):
    """Labels in, pictures out: `pipe(["red sphere", "cyan cube"], guidance_scale=2.0).images[0]`.

    Components: denoiser (`Denoiser`), scheduler (any of diffusers' that fits; see `make_sampler`) and, for diffusion
    of latents, autoencoder. Saved and loaded in diffusers' manner, by save_pretrained and from_pretrained. Whoever
    guides by a classifier sets the attribute `classifier`, an `Evaluator`, which is not saved.
    """

    _optional_components: typing.ClassVar = ["autoencoder"]

    def __init__(self, denoiser: Denoiser, scheduler: SchedulerMixin, autoencoder: AutoencoderKL | None = None):
        super().__init__()
        self.register_modules(denoiser=denoiser, scheduler=scheduler, autoencoder=autoencoder)
        self.classifier = None

    @torch.no_grad()
    def __call__(
        self,
        labels,
        num_inference_steps: int = 20,
        guidance_scale: float = 1.0,
        guidance: str = "classifier-free",
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        classifier_input: str = "x_0",
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        return_process: bool = False,
        callback_on_step_end=None,
    ):
        """Draw one picture for each label set.

        Args:
            labels: a label set, a list of them, or (B, 24) multi-hot.
            num_inference_steps: steps of the scheduler. A step is one pass of the network over the batch (two with
                the sampler heun), or over the batch twice (with and without labels, in one pass) when guidance is on;
                a student needs no second one.
            guidance_scale: s, how strong the guidance is.
            guidance: one of GUIDANCES.
                "none": the labelled prediction as it is.
                "classifier-free": eps_uncond + s (eps_cond - eps_uncond) (Ho & Salimans 2022); 1 is off and costs no
                second half, 0 ignores the labels. The same formula serves for v and x_0, which are affine in eps.
                "composition": eps_uncond + s sum_i (eps_i - eps_uncond), where eps_i is told of object i alone (Liu et
                al. 2022); a pass for each object and one without labels.
                "classifier-1", "classifier-2": algorithms 1 and 2 of Dhariwal & Nichol 2021: s times the gradient of
                log p(labels | x_t) moves the mean of an ancestral step, or eps; 0 is off.
            guidance_interval: the steps at which guidance acts, by the lowest and highest t / T (Kynkäänniemi et al.
                2024); the others cost one pass, as without guidance.
            classifier_input: what the classifier is shown, "x_0" (as predicted at x_t, with the gradient through the
                network, in the same pass) or "x_t", which it was not trained on.
            generator: one, or one for each picture, which makes a picture independent of its batch.
            output_type: "pil" or "pt" ((B, 3, 64, 64) float32 in [-1, 1], on the CPU).
            return_process: also return the states on the way (see `ICLEVROutput`).
            callback_on_step_end: called as f(pipe, step, t, {"x_t": x_t}).
        """
        for name, value, allowed in (("output_type", output_type, ("pil", "pt")), ("guidance", guidance, GUIDANCES),
                                     ("classifier_input", classifier_input, ("x_0", "x_t"))):  # fmt: skip
            if value not in allowed:
                raise ValueError(f"{name}={value!r}: choose from {', '.join(allowed)}")
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps={num_inference_steps}: must be at least 1")
        if guidance in BY_CLASSIFIER and self.classifier is None:
            raise ValueError(f"guidance={guidance!r} needs a classifier: set pipe.classifier to an Evaluator")
        if guidance == "classifier-1" and not isinstance(self.scheduler, DDPMScheduler):
            raise ValueError("guidance='classifier-1' moves the mean of ancestral sampling: use sampler='ddpm'")
        labels = labels if isinstance(labels, torch.Tensor) else encode_labels(labels)
        labels = labels.to(self.device)
        if isinstance(generator, list) and len(generator) != len(labels):
            raise ValueError(f"{len(generator)} generators for {len(labels)} label sets: give one for each")
        self.scheduler.set_timesteps(num_inference_steps, device=self.device)
        channels, size = self.denoiser.config.image_channels, self.denoiser.config.image_size
        x_t = randn_tensor((len(labels), channels, size, size), generator=generator, device=self.device)
        x_t = x_t * self.scheduler.init_noise_sigma
        acts = steps_with_guidance(self.scheduler, guidance_interval)
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        extra = {"generator": generator} if takes_generator else {}
        process, guesses, wanted = [], [], guidance
        for i, t in enumerate(self.progress_bar(self.scheduler.timesteps)):
            guidance = wanted if acts[i] else "none"
            seen = self.scheduler.scale_model_input(x_t, t)  # x_t as the network knows it
            if guidance in BY_CLASSIFIER:
                prediction, gradient = self._classify(seen, t, labels, classifier_input)
                if guidance == "classifier-2":
                    prediction = prediction - guidance_scale * self._eps_to_prediction(gradient, t)
            else:
                prediction, gradient = self._guided(seen, t, labels, guidance, guidance_scale).float(), None
            stepped = self.scheduler.step(prediction, t, x_t, **extra)
            if return_process:
                guess = to_x_0(prediction, seen, self._alpha_bar(t), self.scheduler.config.prediction_type)
                process.append(decode(self.autoencoder, seen).cpu())
                guesses.append(decode(self.autoencoder, guess).cpu())
            x_t = stepped.prev_sample
            if guidance == "classifier-1":
                x_t = x_t + guidance_scale * self._variance(t) * gradient
            if callback_on_step_end is not None:
                callback_on_step_end(self, i, t, {"x_t": x_t})
        images = decode(self.autoencoder, x_t).clamp(-1, 1).float().cpu()
        states = [torch.stack([*s, images]) for s in (process, guesses)] if return_process else [None, None]
        output = ICLEVROutput(to_pil(images) if output_type == "pil" else images, *states)
        return output if return_dict else output.to_tuple()

    @property
    def guidances(self) -> tuple[str, ...]:
        """Those of GUIDANCES that its network can do: a student does without a null condition, and cannot compose."""
        can = {"composition": self.denoiser.condition.null is not None}
        can["classifier-free"] = can["composition"] or self.denoiser.config.student_steps > 0
        return tuple(kind for kind in GUIDANCES if can.get(kind, True))

    @property
    def scales(self) -> list[float]:
        """Scales of classifier-free guidance to look at, up to the highest that its network can be trusted with."""
        if "classifier-free" not in self.guidances:
            return [1.0]
        return [0.0, 1.0, 2.0, 4.0, MAX_GUIDANCE_SCALE if self.denoiser.config.student_steps else 8.0]

    def _guided(self, x_t, t, labels, guidance, scale):
        """The network's prediction, guided by itself."""
        if self.denoiser.config.student_steps and guidance != "composition":
            return self.denoiser(x_t, t, labels, None, scale if guidance == "classifier-free" else 1.0)
        null = torch.zeros(len(labels), dtype=torch.bool, device=labels.device)
        if guidance == "composition":
            slots = int(labels.sum(1).max())
            present, index = (v[:, :slots] for v in labels.sort(dim=1, descending=True, stable=True))
            single = F.one_hot(index.T, len(OBJECTS)).to(labels)  # (slots, B, 24)
            every = torch.cat([labels, single.flatten(0, 1)])
            outputs = self.denoiser(x_t.repeat(slots + 1, 1, 1, 1), t, every, torch.cat([~null, null.repeat(slots)]))
            uncond, *parts = outputs.float().chunk(slots + 1)
            there = present.T.view(slots, -1, 1, 1, 1)
            return uncond + scale * (there * (torch.stack(parts) - uncond)).sum(0)
        if guidance != "classifier-free" or scale == 1:
            return self.denoiser(x_t, t, labels, null)
        if scale == 0:
            return self.denoiser(x_t, t, labels, ~null)
        both = self.denoiser(x_t.repeat(2, 1, 1, 1), t, labels.repeat(2, 1), torch.cat([~null, null]))
        uncond, cond = both.float().chunk(2)
        return uncond + scale * (cond - uncond)

    @torch.enable_grad()
    def _classify(self, x_t, t, labels, shown):
        """The network's prediction at x_t and the gradient there of log p(labels | x_t); zero where x_t is noise."""
        x_t = x_t.detach().requires_grad_()
        prediction = self.denoiser(x_t, t, labels).float()
        alpha_bar_t = self._alpha_bar(t)
        x_0 = to_x_0(prediction, x_t, alpha_bar_t, self.scheduler.config.prediction_type)
        pictures = decode(self.autoencoder, x_0).clamp(-1, 1) if shown == "x_0" else decode(self.autoencoder, x_t)
        log_p = self.classifier.log_probability(pictures, labels)
        gradient = torch.autograd.grad(log_p.sum(), x_t)[0]
        return prediction.detach(), gradient * (alpha_bar_t > 1e-4)

    def _alpha_bar(self, t):
        return self.scheduler.alphas_cumprod.to(t.device)[t.round().long()]

    def _eps_to_prediction(self, gradient, t):
        """What a change of eps by sqrt(1 - alpha_bar_t) `gradient` is in what the network predicts."""
        alpha_bar_t = self._alpha_bar(t)
        a, b = alpha_bar_t.sqrt().clamp(min=1e-6), (1 - alpha_bar_t).sqrt()
        factor = {"epsilon": b, "v_prediction": b / a, "sample": -(b**2) / a}
        return factor[self.scheduler.config.prediction_type] * gradient

    def _variance(self, t):
        """Of an ancestral step (Ho et al. 2020, eq. 7)."""
        now, before = self._alpha_bar(t), self.scheduler.previous_timestep(t)
        before = self._alpha_bar(before) if before >= 0 else torch.ones_like(now)
        return (1 - before) / (1 - now) * (1 - now / before)


def steps_with_guidance(scheduler: SchedulerMixin, interval: tuple[float, float]) -> list[bool]:
    """Of each pass of a sampler whose steps are set: does its t / T lie in the interval?"""
    low, high = (end * scheduler.config.num_train_timesteps for end in interval)
    return [low <= t <= high for t in scheduler.timesteps.tolist()]


def to_pil(images: torch.Tensor) -> list[Image.Image]:
    """(B, 3, H, W) in [-1, 1] -> list of PIL images."""
    return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in to_uint8(images)]


def load_pipeline(settings: Settings, weights: str = "auto") -> ICLEVRPipeline:
    """A trained pipeline with `settings`' sampler, on its device.

    Args:
        weights: "shipped" (data/weights/), "trained" (what notebook 03 trained in this profile), a folder, or
            "auto": trained in the profiles full and tiny, when a run is named, or when none ships; else shipped.

    Raises:
        FileNotFoundError: there is none, and which notebook makes it.
    """
    folder = _find_pipeline(settings, weights)
    diffusers_logging.disable_progress_bar()  # of loading two files
    pipe = ICLEVRPipeline.from_pretrained(folder, local_files_only=True).to(settings.device)
    pipe.set_progress_bar_config(disable=headless())
    pipe.denoiser.to(memory_format=torch.channels_last)
    pipe.scheduler = make_sampler(settings.sampler, pipe.scheduler)
    pipe.weights_sha256 = sha256_of(folder / "denoiser" / "diffusion_pytorch_model.safetensors")
    history = load_history(folder)
    pipe.images_seen = history[-1]["images_seen"] if history else None
    return pipe


def _find_pipeline(settings, weights):
    shipped = WEIGHTS / settings.preset
    if weights == "auto":
        own = settings.run or settings.profile in ("full", "tiny") or not shipped.is_dir()
        weights = "trained" if own else "shipped"
    named = {"shipped": shipped, "trained": run_folder(settings) / "pipeline"}
    folder = named.get(weights) or _from_project(weights)
    if not (folder / "model_index.json").is_file():
        if weights not in named:
            raise FileNotFoundError(
                f"weights={weights!r}: no pipeline in {folder}; choose auto, shipped, trained or a pipeline's folder"
            )
        raise FileNotFoundError(
            f"No trained pipeline in {folder}: run notebook 03_model_and_training with profile={settings.profile!r} "
            f"and preset={settings.preset!r} first" + (", or choose weights='shipped'" if shipped.is_dir() else "")
        )
    return folder


def check_files(settings: Settings, weights: str = "auto", evaluator: str = "auto"):
    """Raise FileNotFoundError where a pipeline, teacher or evaluator that is named, and not made by the run, is not
    there. Arguments as for `load_pipeline` and `prepare_evaluator`."""
    made_here = _from_project(weights).resolve().is_relative_to(run_folder(settings))  # by notebook 03, perhaps
    if weights not in ("auto", "trained") and not made_here:
        _find_pipeline(settings, weights)
    if settings.teacher:
        _find_teacher(settings)
    if evaluator != "auto":
        Evaluator.file_of(evaluator)


def run_folder(settings: Settings) -> Path:
    """Where notebook 03 keeps a training run: data/runs/PROFILE/RUN."""
    return settings.runs / settings.profile / (settings.run or settings.preset)


def sample(pipe: ICLEVRPipeline, label_sets, settings: Settings, seed: int = 0, **overrides) -> torch.Tensor:
    """Pictures of `label_sets`: (B, 3, 64, 64) in [-1, 1]; the same seed gives picture i the same noise.

    Args:
        overrides: arguments of the pipeline, in place of `settings`' steps and guidance.
    """
    labels = label_sets if isinstance(label_sets, torch.Tensor) else encode_labels(label_sets)
    generators = [make_generator(seed, i) for i in range(len(labels))]
    options = {name: getattr(settings, name) for name in
               ("guidance", "guidance_scale", "guidance_interval", "classifier_input")}  # fmt: skip
    options |= dict(num_inference_steps=settings.steps) | overrides
    pipe.set_progress_bar_config(disable=True)
    images = []
    for i in range(0, len(labels), 64):
        with autocast(settings):
            images.append(
                pipe(labels[i : i + 64], generator=generators[i : i + 64], output_type="pt", **options).images
            )
    return torch.cat(images)


def sample_seeds(pipe: ICLEVRPipeline, label_sets, settings: Settings, processes: int = 0, **overrides) -> torch.Tensor:
    """`sample` for the seeds settings.seed, + 1, ...: (S, N, 3, 64, 64) with S = settings.seeds.

    processes: share the seeds among so many; 0: one for each GPU that would have at least 2,000 pictures to draw, since
        a process takes its time to start.
    """
    if not processes and settings.device == "cuda":
        processes = min(torch.cuda.device_count(), settings.seeds * len(label_sets) // 2000)
    count = min(settings.seeds, max(1, processes))
    if count == 1:
        return _sample_each(pipe, label_sets, settings, range(settings.seeds), overrides)
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=count, max_restarts=0, rdzv_backend="c10d",
                          rdzv_endpoint="localhost:0")  # fmt: skip
    device = pipe.device
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)  # without the last drawing's numbers
    try:
        parts = elastic_launch(config, _sample_part)(_move(pipe, "cpu"), label_sets, settings, overrides)
    finally:
        _move(pipe, device)
    return torch.cat([torch.from_numpy(parts[rank]) for rank in sorted(parts)])


def _sample_part(pipe, label_sets, settings, overrides):
    """This process's share of the seeds, as an array, which outlives the process."""
    from accelerate import PartialState

    state = PartialState(cpu=settings.device == "cpu")
    with state.split_between_processes(list(range(settings.seeds))) as mine:
        return _sample_each(_move(pipe, state.device), label_sets, settings, mine, overrides).numpy()


def _move(pipe, device):
    """The pipeline and its classifier, which diffusers does not know of, on `device`."""
    if pipe.classifier is not None:
        pipe.classifier.network.to(device)
        pipe.classifier.device = str(device)
    return pipe.to(device)


def _sample_each(pipe, label_sets, settings, seeds, overrides):
    images, start = [], time.perf_counter()
    for i, seed in enumerate(progress(seeds, "seeds"), 1):
        images.append(sample(pipe, label_sets, settings, settings.seed + seed, **overrides))
        if headless() and time.perf_counter() - start > 10:
            left = format_seconds((time.perf_counter() - start) / i * (len(seeds) - i))
            print(f"progress: seed {i} of {len(seeds)}, {len(label_sets)} pictures, {left} left", flush=True)
    return torch.stack(images)


def sample_process(pipe: ICLEVRPipeline, label_set, settings: Settings, seed: int = 0):
    """One picture on its way: (x_t, guesses of x_0), each (steps + 1, 3, 64, 64), noise first, picture last."""
    with autocast(settings):
        output = pipe(label_set, settings.steps, settings.guidance_scale, settings.guidance, settings.guidance_interval,
                      settings.classifier_input, make_generator(seed, 0), return_process=True)  # fmt: skip
    return output.process[:, 0], output.guesses[:, 0]


def guidance_kind(settings: Settings) -> str:
    """`settings.guidance`, or "none" where its scale turns it off."""
    off = {"classifier-free": 1, "classifier-1": 0, "classifier-2": 0}
    return "none" if off.get(settings.guidance) == settings.guidance_scale else settings.guidance


def guidance_of(settings: Settings) -> dict:
    """How `settings` guide, as results.json keeps it: kind and scale, and what else is not as usual."""
    told = {"kind": guidance_kind(settings), "scale": settings.guidance_scale}
    if told["kind"] in BY_CLASSIFIER:
        told["shown"] = settings.classifier_input
    if told["kind"] != "none" and settings.guidance_interval != (0.0, 1.0):
        told["interval"] = list(settings.guidance_interval)
    return told


def describe_guidance(kind: str, scale: float | None, shown: str | None = None, interval=None) -> str:
    """What `guidance_of` gives in words: "none", "s = 3" (classifier-free), "composition, s = 3",
    "classifier-2 by x_0, s = 4" or "s = 3 at t/T from 0.2 to 0.8"."""
    if kind == "none" or scale is None:
        return "none"
    where = f" at t/T from {interval[0]:g} to {interval[1]:g}" if interval else ""
    said = "" if kind == "classifier-free" else f"{kind}{f' by {shown}' if shown else ''}, "
    return f"{said}s = {scale:g}{where}"


def samplers_for(pipe: ICLEVRPipeline, settings: Settings) -> list[str]:
    """The samplers that go with a pipeline's noise schedule and `settings.guidance`; a student knows DDIM alone."""
    if pipe.denoiser.config.student_steps:
        return ["ddim"]
    names = ["ddpm"] if settings.guidance == "classifier-1" else list(SAMPLERS)
    return [name for name in names if name != "heun" or not pipe.scheduler.config.get("rescale_betas_zero_snr")]


def count_evaluations(settings: Settings, labels: torch.Tensor, student: bool = False) -> int:
    """How often the network, a student's or not, is asked for each picture of a batch with `labels` (B, 24); a pass
    backward, for the gradient of a classifier, is not counted."""
    scheduler = make_sampler(settings.sampler, make_scheduler(settings))
    scheduler.set_timesteps(settings.steps)
    acts, kind = steps_with_guidance(scheduler, settings.guidance_interval), guidance_kind(settings)
    more = {"composition": int(labels.sum(1).max()), "classifier-free": int(settings.guidance_scale != 0)}
    return len(acts) + sum(acts) * (0 if student else more.get(kind, 0))


def save_pictures(images: torch.Tensor, folder: Path):
    """Write each image as folder/000.png, 001.png, ... in order, in place of those that were there."""
    for i, picture in enumerate(to_pil(images)):
        _write_atomically(Path(folder) / f"{i:03d}.png", lambda temporary, p=picture: p.save(temporary, "png"))
    for old in sorted(Path(folder).glob("[0-9][0-9][0-9].png"))[len(images) :]:
        old.unlink()


# ════════════════════════════════════════════════════════════════════════════════════════════════════
# 7  Evaluation
# ════════════════════════════════════════════════════════════════════════════════════════════════════


def _make_reader(name):
    """The network of an evaluator, with 24 sigmoid outputs: the course's ResNet-18 or, for the "judge", a DenseNet."""
    from torchvision import models

    head = lambda width: nn.Sequential(nn.Linear(width, len(OBJECTS)), nn.Sigmoid())
    if name == "judge":
        network = models.DenseNet(growth_rate=24, block_config=(6, 12, 18), num_init_features=48)
        network.classifier = head(network.classifier.in_features)
    else:
        network = models.resnet18()
        network.fc = head(network.fc.in_features)
    return network


def _head(network):
    """The last layer of a reader, a Sequential(Linear, Sigmoid)."""
    return list(network.children())[-1]


class Evaluator:
    """Reads which objects are in a picture, and scores pictures by the course's protocol.

    Attributes:
        name: "course" (its checkpoint.pth), "resnet18" (ours, the same network and protocol) or "judge".
        sha256: hash of the weights file, first 16 digits.
    """

    def __init__(self, network: nn.Module, name: str, sha256: str = "", device: str = "cpu"):
        self.network = network.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
        self.name, self.sha256, self.device = name, sha256, device

    @staticmethod
    def file_of(path: Path | str) -> Path:
        """The file at `path` (from the project's folder on) or in that folder; raises FileNotFoundError."""
        path = _from_project(path)
        file = path / "model.safetensors" if path.is_dir() else path
        if not file.is_file():
            raise FileNotFoundError(
                f"No evaluator at {file}: name a checkpoint.pth or a folder of train_evaluator's, or choose 'auto'"
            )
        return file

    @classmethod
    def load(cls, path: Path | str, device: str = "cpu") -> Evaluator:
        """Read the course's checkpoint.pth, or a folder that `train_evaluator` wrote.

        The course's file is a pickle: it is read with weights_only=True, which runs no code from it.

        Raises:
            FileNotFoundError, ValueError: naming the file and what is wrong with it.
        """
        from safetensors import safe_open

        file, name = cls.file_of(path), "course"
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, "pt") as opened:
                    name = (opened.metadata() or {}).get("reader", "resnet18")
                    state = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - it is no dict
            else:
                state = torch.load(file, map_location="cpu", weights_only=True)["model"]
            network = _make_reader("resnet18" if name == "course" else name)
            network.load_state_dict(state)
        except Exception as error:
            raise ValueError(
                f"{file}: not an evaluator (a ResNet-18 with Sequential(Linear(512, 24), Sigmoid()), its state "
                f"dict under 'model'; {type(error).__name__}). Get the file again, or remove it: without the course's "
                "checkpoint.pth ours is used."
            ) from None
        return cls(network, name, sha256_of(file), device)

    @classmethod
    def find(cls, files: DataFiles | None = None, device: str = "cpu") -> Evaluator:
        """The course's checkpoint.pth where it lies beside the data, else the evaluator that ships."""
        if files is not None and (files.root / "checkpoint.pth").is_file():
            return cls.load(files.root / "checkpoint.pth", device)
        return cls.load(WEIGHTS / "evaluator", device)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, 64, 64) in [-1, 1] -> (B, 24) probabilities on the CPU, in batches of 256."""
        with torch.no_grad():
            return torch.cat([self.network(x.to(self.device)).float().cpu() for x in images.split(256)])

    def log_probability(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """(B,) log p(labels | image), with gradients: of the objects asked for log sigma, of the others log(1 - sigma).

        Computed from the network's outputs before the sigmoid, which a sure answer would round to 0 or 1.
        """
        logits = self._at_last_layer(images.float())[1]
        return -F.binary_cross_entropy_with_logits(logits, labels.to(logits), reduction="none").sum(1)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, 64, 64) in [-1, 1] -> (B, width) what the last layer is given, on the CPU, in batches of 256."""
        with torch.no_grad():
            return torch.cat([self._at_last_layer(x.to(self.device))[0].float().cpu() for x in images.split(256)])

    def _at_last_layer(self, images):
        kept = []
        hook = _head(self.network)[0].register_forward_hook(
            lambda module, inputs, output: kept.extend([*inputs, output])
        )
        try:
            self.network(images)
        finally:
            hook.remove()
        return kept

    def eval(self, images: torch.Tensor, labels: torch.Tensor) -> float:
        """The course's accuracy: of all labels of the batch, the share found (see `count_hits`)."""
        return float(count_hits(self(images), labels).sum() / labels.sum())


def count_hits(probabilities: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The course's protocol: an image with k labels scores its k highest outputs against them.

    Args:
        probabilities: (B, 24); labels: (B, 24) multi-hot.

    Returns:
        (B,) number of labels found, 0 to k. The course's accuracy is their sum over the sum of k.
    """
    labels = labels.cpu()
    return (_read(probabilities, labels) & labels.bool()).sum(-1)


def _read(probabilities, labels):
    """(..., B, 24) True for the k highest outputs of an image, where k labels of (B, 24) are asked for."""
    rank = probabilities.argsort(-1, descending=True).argsort(-1)
    return rank < labels.sum(1)[:, None]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What an evaluator read in pictures of the same label sets, drawn with several seeds.

    Attributes:
        probabilities: (S, N, 24), seed by label set; labels: (N, 24) multi-hot.
        evaluator, sha256: the evaluator's name and the hash of its weights.
        groups: (N,) integers; images of one group (a scene) are resampled together. None: each on its own.
    """

    probabilities: torch.Tensor
    labels: torch.Tensor
    evaluator: str
    sha256: str = ""
    groups: np.ndarray | None = None

    @property
    def hits(self) -> torch.Tensor:
        """(S, N) labels found by the course's protocol."""
        return count_hits(self.probabilities, self.labels)

    @property
    def accuracy_by_seed(self) -> torch.Tensor:
        """(S,) the course's accuracy of each seed."""
        return self.hits.sum(1) / self.labels.sum()

    def found(self) -> torch.Tensor:
        """(S, N, 24) True where an object asked for is among the image's k highest outputs."""
        return _read(self.probabilities, self.labels) & self.labels.bool()

    def errors(self) -> dict:
        """What is read in place of objects asked for: {kind: {"share", "ci95_sets"}}, of all labels asked for.

        An image's k highest outputs that were not asked for are its errors. "swapped": the colour and the shape were
        both asked for, of different objects, so that an attribute was bound to the wrong one; "colour": of the two,
        only the shape was asked for; "shape": only the colour; "both": neither.
        """
        asked = self.labels.bool().view(-1, len(SHAPES), len(COLOURS))
        colour, shape = (asked.any(dim, keepdim=True).expand_as(asked).flatten(1) for dim in (1, 2))
        wrong = _read(self.probabilities, self.labels) & ~self.labels.bool()
        kinds = {"swapped": colour & shape, "colour": shape & ~colour, "shape": colour & ~shape,
                 "both": ~colour & ~shape}  # fmt: skip
        totals, result = self.labels.sum(1).numpy(), {}
        for name, kind in kinds.items():
            counts = (wrong & kind).sum(-1).numpy()
            share = round(float(counts.sum() / totals.sum() / len(counts)), 4)
            result[name] = {"share": share, "ci95_sets": bootstrap_intervals(counts, totals)[1]}
        return result

    def confusions(self) -> torch.Tensor:
        """(24, 26) how often an object asked for (row) was not found, by the object read in its place (column).

        The last two columns: "none", no output above 0.5 was left for it; "outranked", it was read too (above 0.5), but
        more objects were than were asked for. Where several of an image's objects are missed, they are paired with what
        was read so that pairs share as many colours and shapes as they can.
        """
        none, outranked = len(OBJECTS), len(OBJECTS) + 1
        counts = torch.zeros(len(OBJECTS), len(OBJECTS) + 2, dtype=torch.long)
        read, asked = _read(self.probabilities, self.labels), self.labels.bool().expand_as(self.probabilities)
        shared = lambda a, b: (
            b < none and (a % len(COLOURS) == b % len(COLOURS)) + (a // len(COLOURS) == b // len(COLOURS))
        )
        for image in (read & ~asked).any(-1).nonzero().tolist():
            sure = self.probabilities[*image] > 0.5
            missed = asked[*image] & ~read[*image]
            counts[missed & sure, outranked] += 1
            missed = (missed & ~sure).nonzero().flatten().tolist()
            taken = (read[*image] & ~asked[*image] & sure).nonzero().flatten().tolist()
            taken += [none] * (len(missed) - len(taken))
            ways = [list(zip(missed, order, strict=True)) for order in itertools.permutations(taken, len(missed))]
            for pair in max(ways, key=lambda way: sum(shared(*pair) for pair in way)):
                counts[pair] += 1
        return counts

    def metrics(self) -> dict:
        """All measures, with 95% bootstrap intervals of the accuracy; the keys are those of results.json.

        accuracy: the course's, labels found over labels asked for. accuracy_per_image: the mean over images of
        the share found. accuracy_24: share of the 24 classes on the right side of 0.5 (a picture of nothing has
        `accuracy_24_of_nothing`). exact_match: share of images whose outputs above 0.5 are just the labels.
        f1: micro-averaged at 0.5. ci95_seeds: seeds resampled, label sets fixed; ci95_sets: seeds and label sets
        resampled; None where there is too little to resample (see `bootstrap_intervals`).
        """
        wanted = self.labels.bool().expand_as(self.probabilities)
        given = self.probabilities > 0.5
        true_positives = (wanted & given).sum()
        hits, totals = self.hits.numpy(), self.labels.sum(1).numpy()
        if self.groups is not None:
            member = np.eye(self.groups.max() + 1)[self.groups]  # (N, groups)
            hits, totals = hits @ member, totals @ member
        seeds, sets = bootstrap_intervals(hits, totals)
        return {
            "accuracy": round(self.accuracy_by_seed.mean().item(), 4),
            "ci95_seeds": seeds,
            "ci95_sets": sets,
            "accuracy_per_image": round((self.hits / self.labels.sum(1)).mean().item(), 4),
            "accuracy_24": round((wanted == given).float().mean().item(), 4),
            "accuracy_24_of_nothing": round(1 - self.labels.mean().item(), 4),
            "exact_match": round((wanted == given).all(-1).float().mean().item(), 4),
            "f1": round((2 * true_positives / (wanted.sum() + given.sum())).item(), 4),
        }


def evaluate(evaluator: Evaluator, images: torch.Tensor, labels, groups=None) -> Evaluation:
    """Let `evaluator` read pictures.

    Args:
        images: (S, N, 3, 64, 64) in [-1, 1]: S seeds of N label sets ((N, 3, 64, 64) counts as one seed).
        labels: N label sets, or (N, 24).
        groups: N names; images with the same name (of a scene) are resampled together.
    """
    groups = None if groups is None else np.unique(groups, return_inverse=True)[1]
    labels = labels if isinstance(labels, torch.Tensor) else encode_labels(labels)
    images = images if images.ndim == 5 else images[None]
    if images.shape[1] != len(labels):
        raise ValueError(f"{images.shape[1]} images a seed for {len(labels)} label sets: these must agree")
    probabilities = evaluator(images.flatten(0, 1)).unflatten(0, images.shape[:2])
    return Evaluation(probabilities, labels, evaluator.name, evaluator.sha256, groups)


def bootstrap_intervals(hits: np.ndarray, totals: np.ndarray, resamples: int = 10_000):
    """95% percentile intervals of sum(hits) / sum(totals) (Efron 1979).

    Args:
        hits: (S, N) labels found; totals: (N,) labels asked for.

    Returns:
        ([low, high] over seeds, or None with fewer than 5 or all alike, whose spread says too little; [low, high]
        over seeds and label sets, or None with one set).
    """
    rng = np.random.default_rng(0)
    count, sets = hits.shape
    seed_weights = rng.multinomial(count, np.full(count, 1 / count), resamples) / count
    set_weights = rng.multinomial(sets, np.full(sets, 1 / sets), resamples)
    means = seed_weights @ hits  # (resamples, N)
    over_seeds = means.sum(1) / totals.sum()
    over_sets = (means * set_weights).sum(1) / (set_weights @ totals)
    interval = lambda values: [round(float(v), 4) for v in np.percentile(values, [2.5, 97.5])]
    enough = count >= 5 and np.ptp(hits.sum(1)) > 0
    return (interval(over_seeds) if enough else None), (interval(over_sets) if sets > 1 else None)


def paired_test(one, other, totals, resamples: int = 10_000) -> dict:
    """Is `one` more accurate than `other` on the same label sets? The mean over seeds is compared, set by set.

    Args:
        one, other: (S, N) labels found (`Evaluation.hits`), the same N label sets in the same order; S may differ.
        totals: (N,) labels asked for.

    Returns:
        difference of the accuracies; ci95_sets: label sets resampled (percentile bootstrap); p: how often a difference
        as large turns up when at each label set it is a coin that says whose result is whose (two-sided permutation
        test, Fisher 1935).
    """
    one, other, totals = (np.asarray(x, dtype=float) for x in (one, other, totals))
    if not one.shape[-1] == other.shape[-1] == len(totals):
        raise ValueError(f"{one.shape[-1]} and {other.shape[-1]} results for {len(totals)} label sets: not in pairs")
    rng, gain = np.random.default_rng(0), one.mean(0) - other.mean(0)
    weights = rng.multinomial(len(gain), np.full(len(gain), 1 / len(gain)), resamples)
    shuffled = np.abs(rng.choice([-1, 1], (resamples, len(gain))) @ gain)
    extreme = (shuffled >= abs(gain.sum()) - 1e-9).sum()
    return {
        "difference": round(float(gain.sum() / totals.sum()), 4),
        "ci95_sets": [round(float(v), 4) for v in np.percentile(weights @ gain / (weights @ totals), [2.5, 97.5])],
        "p": round(float((1 + extreme) / (1 + resamples)), 4),
    }


def frechet_distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Distance of two Gaussians fitted to features, |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) (Heusel et al. 2017).

    Args:
        one, other: (N, D) and (M, D) features of pictures. The estimate falls with more pictures: compare equal
            numbers only.
    """
    (mean_1, cov_1), (mean_2, cov_2) = ((x.double().mean(0), x.double().T.cov()) for x in (one, other))
    values, vectors = torch.linalg.eigh(cov_1)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    shared = torch.linalg.eigvalsh(root @ cov_2 @ root).clamp(min=0).sqrt().sum()
    return float((mean_1 - mean_2).square().sum() + cov_1.trace() + cov_2.trace() - 2 * shared)


def nearest(queries: torch.Tensor, references: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each row of (Q, D) the nearest row of (R, D): (distances, root mean square over D; indices), each (Q,)."""
    found = [torch.cdist(q.float(), references.float()).min(1) for q in queries.split(256)]
    distances, indices = (torch.cat(each) for each in zip(*found, strict=True))
    return distances / queries.shape[1] ** 0.5, indices


def frechet_by_halves(drawn: torch.Tensor, real: torch.Tensor, scenes, other: torch.Tensor, other_scenes) -> dict:
    """Is what was drawn as like real pictures as other real ones are? Five times the scenes are halved at random.

    Args:
        drawn, real: (N, D) features of pictures with the same labels; scenes: (N,) names of the real ones' scenes.
        other, other_scenes: (M, D) features of real pictures of other scenes, of at least half as many scenes.

    Returns:
        {"drawn": with one half's labels, against the real pictures of the other half; "floor": `other`, of as many
        scenes, against these}, each [mean, lowest, highest] of five.
    """
    each, every_other = np.unique(scenes), np.unique(other_scenes)
    half = len(each) // 2
    if not 1 < half <= len(every_other):
        raise ValueError(f"{len(each)} scenes and {len(every_other)} others: too few to halve")
    found = {"drawn": [], "floor": []}
    for i in range(5):
        rng = np.random.default_rng(i)
        first = torch.from_numpy(np.isin(scenes, rng.permutation(each)[:half]))
        extra = torch.from_numpy(np.isin(other_scenes, rng.permutation(every_other)[:half]))
        found["drawn"].append(frechet_distance(drawn[first], real[~first]))
        found["floor"].append(frechet_distance(other[extra], real[~first]))
    return {who: [round(float(v), 4) for v in (np.mean(f), min(f), max(f))] for who, f in found.items()}


def mean_by_group(values, groups) -> list[float]:
    """[mean, low, high] of (N,) values, 95% percentile bootstrap over groups: those of one group (a scene) together."""
    number = np.unique(groups, return_inverse=True)[1]
    sums, counts = np.bincount(number, np.asarray(values, dtype=float)), np.bincount(number)
    return [round(float(sums.sum() / counts.sum()), 4), *bootstrap_intervals(sums[None], counts)[1]]


#: Colours that can be told from all others and from the ground by their hue; yellow only without brown.
HUES = ("red", "blue", "green", "purple", "cyan", "yellow")


def object_places(images: torch.Tensor, colour: str) -> torch.Tensor:
    """(N, 2) x and y, in pixels, of the centre of what has this colour's hue (see HUES) in (N, 3, 64, 64); nan where
    fewer than 5 pixels have."""
    grayless = lambda rgb, dim: rgb - rgb.mean(dim, keepdim=True)
    wanted = F.normalize(grayless(torch.tensor(load_renderer().COLOURS[colour]) / 255, 0), dim=0)
    found = grayless((images + 1) / 2, 1)
    alike = torch.einsum("nchw,c->nhw", F.normalize(found, dim=1), wanted)
    has = ((alike > 0.9) & (found.norm(dim=1) > 0.12)).float()
    at, count = torch.arange(images.shape[-1], dtype=torch.float32), has.sum((1, 2))
    places = torch.stack([has.sum(1) @ at, has.sum(2) @ at], 1) / count[:, None]
    return places.where(count[:, None] >= 5, math.nan)


def spread_of_places(places: torch.Tensor) -> float:
    """Root mean square distance, in pixels, of (N, 2) places from their mean; those that are nan left out."""
    places = places[~places.isnan().any(1)]
    return places.var(0).sum().sqrt().item()


def prepare_evaluator(settings: Settings, files: DataFiles, choice: str = "auto") -> Evaluator:
    """The evaluator to use: the course's if it lies with the data, else ours (in the profiles full and tiny
    trained here, unless it has been); or the one at the path `choice`."""
    if choice != "auto":
        return Evaluator.load(choice, settings.device)
    if (files.root / "checkpoint.pth").is_file():
        return Evaluator.find(files, settings.device)
    return _load_or_train(settings, files, "evaluator", "resnet18")


def prepare_judge(settings: Settings, files: DataFiles) -> Evaluator:
    """The judge, which nothing is guided, chosen or stopped by: trained here or shipped, as in `prepare_evaluator`."""
    return _load_or_train(settings, files, "judge", "judge")


def _load_or_train(settings, files, folder, reader):
    if settings.profile not in ("full", "tiny"):
        return Evaluator.load(WEIGHTS / folder, settings.device)
    made_of = ("seed", "evaluator_epochs", "evaluator_scenes", "max_images")
    folder = settings.runs / settings.profile / name_of(folder, {name: getattr(settings, name) for name in made_of})
    with _alone(folder / "lock"):
        if not (folder / "model.safetensors").is_file():
            dataset, held_out = ICLEVRDataset(files, "train", settings.max_images), ICLEVRDataset(files, "held-out")
            crowded = crowded_scenes(settings.evaluator_scenes, seed=1) if settings.evaluator_scenes else None
            for record in train_evaluator(settings, dataset, folder, held_out, reader, crowded):
                accuracy = "none here" if record["accuracy"] is None else f"{record['accuracy']:.4f}"
                print(f"epoch {record['epoch']}/{record['epochs']}  {reader} loss {record['loss']:.4f}, "
                      f"held-out accuracy {accuracy}  {format_seconds(record['seconds_left'])} left")  # fmt: skip
    return Evaluator.load(folder, settings.device)


#: The course's grades: accuracy from which -> share of the points.
GRADES = {0.8: "100%", 0.7: "90%", 0.6: "80%", 0.5: "70%", 0.4: "60%"}


def grade(accuracy: float) -> str:
    """What the course gives for an accuracy, as a share of the points ("0%" below 0.4)."""
    return next((points for limit, points in GRADES.items() if accuracy >= limit), "0%")


def print_course_result(evaluation: Evaluation, split: str, seed: int = 0):
    """Print one seed's accuracy, as the course wants the evaluator's output shown."""
    found, asked = int(evaluation.hits[seed].sum()), int(evaluation.labels.sum())
    accuracy = found / asked
    print(f"{split}: accuracy {accuracy:.4f} ({found} of {asked} labels), grade {grade(accuracy)}")


def train_evaluator(settings: Settings, dataset: ICLEVRDataset, folder: Path, held_out: ICLEVRDataset | None = None,
                    reader: str = "resnet18", crowded: ICLEVRDataset | None = None):  # fmt: skip
    """Train our evaluator and save it in `folder`; yields a record per epoch.

    The course's evaluator was trained at 64x64 upsampled from 32x32, and generated pictures are a little soft:
    half of each batch goes through 32x32. Flips, shifts, zoom, brightness and noise are varied too; hue is not,
    since colour is what the labels say. AdamW, one cycle of the learning rate (Smith & Topin 2018).

    The judge is there to read what the evaluator was used to make, to choose or to stop. So it is another network,
    varied in other ways (see `_augment_for_judge`), and leaves out every fifth scene, where the evaluator sees all.

    Args:
        settings: `evaluator_epochs`, `seed`, `device`, `precision` are used.
        dataset: real images; held_out: scored after each epoch, for the eye only, never for selection.
        reader: "resnet18" or "judge".
        crowded: more pictures to train on, such as `crowded_scenes`, of more objects than the data shows.

    Yields:
        dict: epoch, epochs, loss, images_per_s, seconds_left, and accuracy (course's, held out) or None.
    """
    device, epochs, judge = settings.device, settings.evaluator_epochs, reader == "judge"
    parts = [part for part in (dataset, crowded) if part is not None]
    pixels, labels = (torch.cat([getattr(part, name) for part in parts]) for name in ("pixels", "labels"))
    names = [name for part in parts for name in part.names]
    rows = [i for i, name in enumerate(names) if not judge or int(scene_of(name)) % 5]
    rows, batch = torch.tensor(rows), min(64, len(rows))
    vary = _augment_for_judge if judge else _augment
    steps = len(rows) // batch
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed + judge)
        network = _make_reader(reader)
    network = network.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps * epochs, pct_start=0.2)
    start, history = time.perf_counter(), []
    for epoch in range(epochs):
        network.train()
        _head(network)[1] = nn.Identity()  # the loss is surer on logits
        order = rows[torch.randperm(len(rows), generator=make_generator(settings.seed + judge, epoch))]
        total = torch.zeros((), device=device)
        for step in progress(range(steps), f"{reader}, epoch {epoch + 1}"):
            index = order[step * batch : (step + 1) * batch]
            images = to_float(pixels[index]).to(device)
            images = vary(images, make_generator(settings.seed + judge, epoch, step))
            with autocast(settings):
                logits = network(images.contiguous(memory_format=torch.channels_last))
            loss = F.binary_cross_entropy_with_logits(logits.float(), labels[index].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.detach()
        _head(network)[1] = nn.Sigmoid()
        spent = time.perf_counter() - start
        accuracy = None
        if held_out is not None and len(held_out):
            accuracy = Evaluator(network, reader, device=device).eval(to_float(held_out.pixels), held_out.labels)
            network.requires_grad_(True)
        record = dict(epoch=epoch + 1, epochs=epochs, images_seen=(epoch + 1) * steps * batch,
                      loss=total.item() / steps, accuracy=accuracy, images_per_s=(epoch + 1) * steps * batch / spent,
                      seconds_left=spent / (epoch + 1) * (epochs - epoch - 1))  # fmt: skip
        history.append(record)
        yield record
    _save_weights(network, Path(folder) / "model.safetensors", reader)
    write_json(Path(folder) / "history.json", history)


def _augment(images, generator):
    """Vary position, size, sharpness, brightness and noise of (B, 3, 64, 64); each image its own way."""
    device, count = images.device, len(images)
    draw = lambda low, high: torch.empty(count, 1, 1, 1).uniform_(low, high, generator=generator).to(device)
    grid = torch.zeros(count, 2, 3, device=device)
    zoom = draw(0.93, 1.07).view(-1)
    grid[:, 0, 0] = zoom * torch.where(draw(0, 1).view(-1) < 0.5, -1.0, 1.0)  # mirrored or not
    grid[:, 1, 1] = zoom
    grid[:, :, 2] = draw(-0.12, 0.12).view(-1, 1) * torch.tensor([1.0, 0.0], device=device)
    grid[:, 1, 2] = draw(-0.12, 0.12).view(-1)
    grid = F.affine_grid(grid, images.shape, align_corners=False)
    images = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    soft = F.interpolate(F.interpolate(images, size=32, mode="bilinear", antialias=True), size=64, mode="bilinear")
    images = torch.where(draw(0, 1) < 0.5, soft, images)
    noise = torch.randn(images.shape, generator=generator).to(device)
    return images * draw(0.85, 1.15) + draw(-0.1, 0.1) + noise * draw(0, 0.06)


def _augment_for_judge(images, generator):
    """Vary place, light, sharpness and a hidden patch of (B, 3, 64, 64); each image its own way.

    Light is a power of the brightness and a slope across the picture, softness a blur with three pixels, and the place
    a shift by whole pixels; `_augment` has none of these.
    """
    device, count = images.device, len(images)
    draw = lambda low, high: torch.empty(count, 1, 1, 1).uniform_(low, high, generator=generator).to(device)
    images = torch.where(draw(0, 1) < 0.5, images.flip(3), images)
    moved = F.pad(images, (4, 4, 4, 4), mode="replicate")
    y, x = (torch.randint(0, 9, (count, 1), generator=generator) + torch.arange(64) for _ in range(2))
    images = moved[torch.arange(count)[:, None, None], :, y[:, :, None], x[:, None, :]].permute(0, 3, 1, 2)
    soft = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    images = images + draw(0, 1) * (soft - images)
    slope = draw(-0.1, 0.1) * torch.linspace(-1, 1, 64, device=device)
    images = 2 * ((images + 1) / 2).clamp(1e-3, 1) ** draw(0.8, 1.25) - 1 + slope
    place, rows = draw(0, 64), torch.arange(64, device=device).view(1, 1, 64, 1)
    hidden = ((rows - place).abs() < 4) & ((rows.transpose(2, 3) - draw(0, 64)).abs() < 4)
    return torch.where(hidden, draw(-0.3, 0.3), images)


def _save_weights(network, file, reader="resnet18"):
    """Write a state dict as safetensors: matrices in bf16, vectors (biases, norms) in float32."""
    from safetensors.torch import save_file

    half = {k: v.to(torch.bfloat16) if v.ndim > 1 else v for k, v in network.state_dict().items()}
    half = {k: v.detach().cpu().contiguous() for k, v in half.items()}
    _write_atomically(file, lambda temporary: save_file(half, temporary, {"reader": reader}))


# ════════════════════════════════════════════════════════════════════════════════════════════════════
# 8  Figures: each plot_ function returns a matplotlib Figure, to be shown and kept by `save_figure`
# ════════════════════════════════════════════════════════════════════════════════════════════════════


def new_figure(width: float = 8, height: float = 4, rows: int = 1, columns: int = 1, **options):
    """(Figure, axes) in the workbook's style; size in inches, 8 being the width of a page.

    options: of `Figure.subplots`, such as sharey, squeeze, width_ratios.
    """
    from matplotlib.figure import Figure

    fig = Figure(figsize=(width, height), layout="constrained", dpi=150)
    axes = fig.subplots(rows, columns, **options)
    for ax in np.ravel(axes):
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=8)
        ax.xaxis.label.set_size(8)
        ax.yaxis.label.set_size(8)
    return fig, axes


def draw_image(ax, image: torch.Tensor, title: str = "", size: float = 7):
    """Put an image ((3, H, W) in [-1, 1] or uint8) on an axis, without ticks."""
    pixels = image if image.dtype == torch.uint8 else to_uint8(image)
    ax.imshow(pixels.permute(1, 2, 0).numpy(), interpolation="nearest")
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_visible(False)
    ax.set_title(title, fontsize=size, pad=2, linespacing=1.05)


def plot_images(images, titles=None, columns: int = 8, width: float = 8) -> Figure:
    """Images in rows of `columns`, each under its title; images: (B, 3, H, W) in [-1, 1] or uint8.

    Titles may be label sets: they are written one object a line.
    """
    rows = math.ceil(len(images) / columns)
    texts = ["" if titles is None else t if isinstance(t, str) else "\n".join(t) for t in titles or [""] * len(images)]
    lines = max(t.count("\n") + bool(t) for t in texts)
    cell = width / columns
    fig, axes = new_figure(width, rows * (cell + 0.115 * lines), rows, columns, squeeze=False)
    for ax in axes.flat[len(images) :]:
        ax.set_visible(False)
    for ax, image, text in zip(axes.flat, images, texts, strict=False):
        draw_image(ax, image, text, size=min(7, 6.2 * cell))
    return fig


# ════════════════════════════════════════════════════════════════════════════════════════════════════
# 9  Widgets
# ════════════════════════════════════════════════════════════════════════════════════════════════════


def guidance_explorer(pipe: ICLEVRPipeline, settings: Settings):
    """Sliders and label pickers around one picture that is drawn anew at each change (JupyterLab only)."""
    import ipywidgets as widgets

    nothing = "–"
    pickers = [
        widgets.Dropdown(options=(nothing, *OBJECTS), value=value, layout=widgets.Layout(width="150px"))
        for value in MANUAL_SET
    ]
    student = pipe.denoiser.config.student_steps > 0  # fast enough to follow the slider, and has learnt its steps alone
    scale = widgets.FloatSlider(
        settings.guidance_scale,
        min=0.0,
        max=MAX_GUIDANCE_SCALE if student else 8.0,
        step=0.5,
        description="guidance s",
        continuous_update=student,
    )
    steps = widgets.IntSlider(
        settings.steps, min=1, max=50, description="steps", continuous_update=False, disabled=student
    )
    seed = widgets.IntSlider(settings.seed, min=0, max=99, description="seed", continuous_update=False)
    picture = widgets.Image(format="png", width=320, height=320)
    message = widgets.HTML()

    def draw(_=None):
        try:
            start = time.perf_counter()
            labels = encode_labels([picker.value for picker in pickers if picker.value != nothing])
            options = dict(num_inference_steps=steps.value, guidance_scale=scale.value)
            image = sample(pipe, labels, settings, seed.value, **options)
        except ValueError as error:  # a label twice, none, or a network that knows no guidance
            message.value = f"<b>{error}</b>"
            return
        buffer = io.BytesIO()
        to_pil(image)[0].resize((320, 320), Image.Resampling.BICUBIC).save(buffer, "png")
        picture.value = buffer.getvalue()
        message.value = f"{', '.join(decode_labels(labels)[0])} · {time.perf_counter() - start:.1f} s"

    for control in (*pickers, scale, steps, seed):
        control.observe(draw, "value")
    draw()
    return widgets.HBox([picture, widgets.VBox([*pickers, scale, steps, seed, message])])


# ════════════════════════════════════════════════════════════════════════════════════════════════════
# 10  Provenance
# ════════════════════════════════════════════════════════════════════════════════════════════════════


def sha256_of(file: Path) -> str:
    """First 16 hexadecimal digits of a file's SHA-256."""
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]


def write_json(path: Path, value):
    """Write json, whole or not at all."""
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    _write_atomically(Path(path), lambda temporary: temporary.write_text(text, encoding="utf-8"))


@functools.cache
def commit() -> str:
    """The commit of this checkout, with a + where files have changed since; "unknown" outside git."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno", "--", "*.py", "*.ipynb", "data"],
                                 capture_output=True, text=True, check=True)  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def device_name(settings: Settings) -> str:
    """The device as results name it: the GPU's name, or the number of CPU threads."""
    if settings.device == "cuda":
        return torch.cuda.get_device_name()
    return f"{settings.device}, {torch.get_num_threads()} threads"


def show_figure(fig: Figure):
    """Show a figure in the notebook without keeping it in a file."""
    from IPython.display import Image as Picture
    from IPython.display import display

    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", bbox_inches="tight")
    display(Picture(buffer.getvalue(), width=round(fig.get_figwidth() * 100)))


def save_figure(fig: Figure, name: str, settings: Settings, caption: str, **provenance):
    """Keep a figure as settings.figures/NAME.png, with NAME.json beside it, and show it in the notebook.

    What made the figure stands in its footer, in the PNG's metadata and in the json: commit, profile, seed and
    device, and whatever `provenance` adds (data, weights, sampler, ...; plain values).
    """
    from IPython.display import Markdown, display

    facts = {"figure": name, "caption": caption, "commit": commit(), "profile": settings.profile,
             "seed": settings.seed, "device": device_name(settings), **provenance}  # fmt: skip
    footer = " · ".join(f"{k} {v}" for k, v in facts.items() if k not in ("figure", "caption"))
    fig.text(
        0,
        0,
        "\n".join(textwrap.wrap(footer, int(fig.get_figwidth() * 24))) + "\n",
        fontsize=4.5,
        color="0.55",
        va="top",
    )
    path = settings.figures / f"{name}.png"
    metadata = {"Title": name, "Description": json.dumps(facts, ensure_ascii=False), "Software": "lab6_utils"}
    _write_atomically(
        path, lambda temporary: fig.savefig(temporary, format="png", bbox_inches="tight", metadata=metadata)
    )
    write_json(path.with_suffix(".json"), facts)
    show_figure(fig)
    display(Markdown(f"**Figure** `{name}`. {caption}"))


def result_record(settings: Settings, pipe: ICLEVRPipeline | None, split: str, score: Evaluation, files: DataFiles,
                  seconds_per_64: float | None = None) -> dict:  # fmt: skip
    """A measurement in the form of results.json; `pipe` None means the data's own images in place of drawn ones."""
    drawn = pipe is not None
    return {
        "system": settings.preset if drawn else "real images" if files.source == "course files" else files.source,
        "weights_sha256": pipe.weights_sha256 if drawn else None,
        "data": files.source,
        "images_seen": pipe.images_seen if drawn else None,
        "split": split,
        "evaluator": score.evaluator,
        "evaluator_sha256": score.sha256,
        "sampler": settings.sampler if drawn else None,
        "steps": settings.steps if drawn else None,
        "evaluations": count_evaluations(settings, score.labels, bool(pipe.denoiser.config.student_steps))
        if drawn
        else None,
        "guidance": guidance_of(settings) if drawn else {"kind": "none", "scale": None},
        "seeds": len(score.probabilities) if drawn else None,
        **score.metrics(),
        "seconds_per_64": seconds_per_64 and round(seconds_per_64, 2),
    }


def results_table(rows: list[dict]) -> str:
    """A Markdown table of result records: accuracy with both intervals, and what it was measured with."""
    several = len({r["system"] for r in rows if r["sampler"]}) > 1
    lines = ["| split | accuracy | 95% over seeds | 95% over seeds and sets | sampler | guidance | seeds | evaluator |"]
    lines += ["|" + "---|" * 8]
    for r in rows:
        spans = ["–" if r[k] is None else "{:.3f} to {:.3f}".format(*r[k]) for k in ("ci95_seeds", "ci95_sets")]
        how = f"{r['sampler']}, {r['steps']} steps" if r["sampler"] else "–"
        how = f"{r['system']}: {how}" if several and r["sampler"] else how
        guidance = describe_guidance(**r["guidance"]) if r["sampler"] else "–"
        cells = [r["split"], f"**{r['accuracy']:.4f}**", *spans, how, guidance, r["seeds"] or "–", r["evaluator"]]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def name_of(preset: str, choices: dict) -> str:
    """A name for a training run, from what was chosen: fit for a folder, the same for the same choices."""
    parts = [preset, *(f"{name}={value}" for name, value in sorted(choices.items()))]
    return re.sub(r"[^\w=.-]+", "_", ",".join(parts)).strip("_")


def load_results(settings: Settings, kind: str = "results") -> list[dict]:
    """The measurements of settings.figures/results.json, and, but for the profile tiny, those that it does not have
    of the folder above quick/ and of figures/, which ships. Its own come last.

    kind: "results" of the workbook's model, or "experiments" and "trainings" (loss curves) of notebook 06.
    """
    folders = [settings.figures]
    if settings.profile != "tiny":
        folders += [settings.figures.parent] * (settings.figures.name == "quick") + [ROOT / "figures"]
    files = [folder / "results.json" for folder in reversed(folders)]
    last = {}
    for row in (row for file in files if file.exists() for row in _read_json(file).get(kind, [])):
        key = json.dumps([row.get(name) for name in _same_measurement(kind)])
        last.pop(key, None)  # so that it goes to the end
        last[key] = row
    return list(last.values())


def _same_measurement(kind):
    """By which keys two rows of results.json are the same measurement."""
    what = "weights_sha256" if kind == "results" else "experiment"
    return (what, "system", "data", "split", "evaluator_sha256", "sampler", "steps", "guidance", "seeds")


#: What the reports say of their systems: accuracy on test.json and new_test.json, and what they counted.
REPORTED = {
    "mlp-fusion": ("0.6289", "0.6146 (classifier-guided)", "24 classes right (nothing: 0.906, 0.891)"),
    "linear-attn": ("0.9219", "0.9531", "top k, by picture"),
    "cross-attention": ("0.8333", "0.9048", "top k, by label"),
    "linear-512": ("0.9010 (T = 500: 0.9740, 100: 0.8021)", "0.9271 (0.8906, 0.7865)", "top k, by picture"),
    "linear-512-six": ("–", "–", "loss only"),
}


def results_of_presets(settings: Settings, kind: str) -> list[dict]:
    """Rows of results.json (see `load_results`) of presets as they are: nothing was chosen, no profile shrank them,
    and what was scored was drawn as the preset says, by a network that a full training made."""

    whole_profile = "tiny" if settings.profile == "tiny" else "full"

    def as_it_is(row):
        chosen = row.get("experiment", {"profile": whole_profile})
        if row["system"] not in PRESETS or set(chosen) - {"profile", "seed", "epochs", "max_images"}:
            return False
        here, whole = (make_settings(p, preset=row["system"], device="cpu") for p in (chosen["profile"], whole_profile))
        if kind == "trainings":
            return here.channels == whole.channels
        alike = (row["sampler"], row["steps"], row["guidance"]) == (here.sampler, here.steps, guidance_of(here))
        return alike and chosen["profile"] == whole_profile

    return list(filter(as_it_is, load_results(settings, kind)))


def systems_table(settings: Settings) -> str:
    """A Markdown table of the presets: what its report says of each beside what was measured here, by the course's
    protocol, of the one that has seen most images; "not trained" where nothing was measured."""
    scored = results_of_presets(settings, "results") + results_of_presets(settings, "experiments")
    trained = scored + results_of_presets(settings, "trainings")
    lines = ["| system | parameters | its report: test | new_test | counted | here: test | new_test | drawn by "]
    lines = [lines[0] + "| images seen |", "|" + "---|" * 9]
    for name in PRESETS:
        cells = []
        for split in ("test", "new_test"):
            rows = [r for r in scored if (r["system"], r["split"]) == (name, split) and r["evaluator"] != "judge"]
            best = max(rows, key=lambda r: (r["data"] == "course files", r["images_seen"]), default=None)
            if best is None:
                cells.append("not trained")
                continue
            data = "" if best["data"] == "course files" else f", {best['data']}"
            cells.append(f"{with_interval(best['accuracy'], best['ci95_sets'])}, {best['evaluator']}{data}")
        seen = max((r["images_seen"] for r in trained if r["system"] == name), default=0)
        own = make_settings("full", preset=name, device="cpu")
        size = count_parameters(make_denoiser(own, "meta"))
        drawn = f"{own.sampler}, {own.steps} steps, guidance {describe_guidance(**guidance_of(own))}"
        cells = [name, f"{size / 1e6:.1f} M", *REPORTED.get(name, "–––"), *cells, drawn, f"{seen:,}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def settings_of(row: dict) -> Settings:
    """Every setting of an experiment in results.json, also what it left to its preset."""
    return make_settings(**{"preset": row["system"], "device": "cpu"} | row["experiment"])


def is_known(row: dict) -> bool:
    """Whether this version knows the settings of an experiment; if not, say so."""
    try:
        settings_of(row)
    except ValueError as error:
        print(f"not compared: an experiment of {row['system']} in results.json ({error})")
        return False
    return True


def compare_experiments(rows: list[dict], *choice: str) -> dict[tuple, list[dict]]:
    """The group of experiments that differ in the settings `choice` alone (and in the seed); of several groups the one
    that was trained on most images, then the largest.

    Returns:
        {values of `choice`: the rows with these}, sorted; empty without rows.
    """
    groups = {}
    for row in rows:
        settings = settings_of(row)
        rest = dataclasses.asdict(settings) | dict.fromkeys([*choice, "seed", "seeds", "run"])
        alike = str([rest, row["evaluator_sha256"], row["data"]])
        values = tuple(getattr(settings, name) for name in choice)
        groups.setdefault(alike, {}).setdefault(values, []).append(row)
    trained = lambda group: min(row["images_seen"] for rows in group.values() for row in rows)
    best = max(groups.values(), key=lambda group: (len(group) > 1, trained(group), len(group)), default={})
    return dict(sorted(best.items(), key=lambda item: [str(v) if isinstance(v, tuple) else v for v in item[0]]))


def _say(values):
    words = (("no", "yes")[v] if isinstance(v, bool) else str(v) for v in values)
    return ", ".join(words).replace("'", "")


def with_interval(share: float, interval) -> str:
    """ "0.612 (0.55 to 0.67)"; without an interval the share alone."""
    return f"{share:.3f}" + (" ({:.2f} to {:.2f})".format(*interval) if interval else "")


def comparison_table(group: dict[tuple, list[dict]]) -> str:
    """A Markdown table of what `compare_experiments` found: each training's accuracy, with its 95% interval."""
    lines = ["| choice | parameters | test.json, by training | new_test.json, by training |", "|" + "---|" * 4]
    for values, rows in group.items():
        cells = [", ".join(with_interval(r["accuracy"], r["ci95_sets"]) for r in rows if r["split"] == split)
                 for split in ("test", "new_test")]  # fmt: skip
        lines.append(f"| {_say(values)} | {rows[0]['parameters'] / 1e6:.2f} M | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw_accuracy(ax, row: dict, y: float, lower: bool):
    """A dot and the bar of its 95% interval in the line y of a plot: the upper one red, the lower one blue."""
    place, colour = (y + 0.13, "tab:blue") if lower else (y - 0.13, "tab:red")
    ax.plot(row["ci95_sets"] or [row["accuracy"]] * 2, [place] * 2, color=colour, alpha=0.3, linewidth=2)
    ax.plot(row["accuracy"], place, "o", color=colour, markersize=4)


def plot_comparisons(found: dict[tuple, dict]) -> Figure:
    """Dots for trainings, bars for their 95% intervals; {choice: what `compare_experiments` found for it}."""
    sizes = [len(group) + 0.6 for group in found.values()]
    fig, axes = new_figure(8, 0.7 + 0.28 * sum(sizes), rows=len(found), squeeze=False, sharex=True, height_ratios=sizes)
    for ax, (choice, group) in zip(axes[:, 0], found.items(), strict=True):
        for y, rows in enumerate(group.values()):
            for r in rows:
                draw_accuracy(ax, r, y, lower=r["split"] == "new_test")
        ax.set_yticks(range(len(group)), map(_say, group), fontsize=7)
        ax.set_title(", ".join(choice).replace("_", " "), fontsize=8)
        ax.set_ylim(len(group) - 0.5, -0.5)
    axes[-1, 0].set_xlabel("accuracy (upper, red: test.json; lower, blue: new_test.json)", fontsize=8)
    return fig


def plot_confusions(counts: torch.Tensor, asked: int) -> Figure:
    """(24, 26) `Evaluation.confusions`, and their sums by kind; `asked`: how many labels were asked for in all."""
    fig, (ax, bars) = new_figure(8, 4.6, 1, 2, width_ratios=(3, 1))
    ax.imshow(counts, cmap="Oranges", vmin=0)
    for y, x in counts.nonzero().tolist():
        ax.text(x, y, int(counts[y, x]), ha="center", va="center", fontsize=5)
    ax.set_xticks(range(26), [*OBJECTS, "none", "outranked"], rotation=90, fontsize=6)
    ax.set_yticks(range(24), OBJECTS, fontsize=6)
    ax.set(xlabel="what was read in its place", ylabel="asked for and not found")
    shape, colour = torch.arange(24) // len(COLOURS), torch.arange(24) % len(COLOURS)
    same_shape, same_colour = (x[:, None] == x for x in (shape, colour))
    others = counts[:, :24]
    kinds = {"another\ncolour": others[same_shape], "another\nshape": others[same_colour],
             "another\nobject": others[~same_shape & ~same_colour], "none": counts[:, 24],
             "outranked": counts[:, 25]}  # fmt: skip
    bars.barh(list(kinds), [int(n.sum()) for n in kinds.values()], 0.6, color="tab:orange")
    bars.invert_yaxis()
    bars.set_xlabel(f"of {asked} labels asked for", fontsize=8)
    bars.tick_params(labelsize=7)
    return fig


def plot_errors(errors: dict[str, list[dict]]) -> Figure:
    """Of each label, the mean of `Evaluation.errors` over a list, as shares of all errors."""
    kinds = {"swapped": ("swapped", "tab:red"), "colour": ("wrong colour", "tab:orange"),
             "shape": ("wrong shape", "tab:olive"), "both": ("both wrong", "tab:gray")}  # fmt: skip
    fig, ax = new_figure(8, 0.8 + 0.3 * len(errors))
    for y, each in enumerate(errors.values()):
        shares = np.array([sum(e[kind]["share"] for e in each) for kind in kinds])
        shares = shares / max(shares.sum(), 1e-9)
        for (name, colour), share, left in zip(kinds.values(), shares, shares.cumsum() - shares, strict=True):
            ax.barh(y, share, left=left, color=colour, label=name if y == 0 else None)
    ax.set_yticks(range(len(errors)), errors, fontsize=7)
    ax.set_ylim(len(errors) - 0.5, -0.5)
    ax.set_xlabel("share of the errors", fontsize=8)
    fig.legend(fontsize=7, frameon=False, ncols=4, loc="outside upper center")
    return fig


def save_result(settings: Settings, record: dict, kind: str = "results"):
    """Add a measurement to settings.figures/results.json; the same measurement made again takes its place.

    kind: as in `load_results`. In "experiments" and "trainings" the same choices (key `experiment`) are the same
    measurement, whatever weights they gave.
    """
    from filelock import FileLock

    path = settings.figures / "results.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    record = record | {"device": device_name(settings), "commit": commit()}
    same = _same_measurement(kind)
    with FileLock(path.with_suffix(".lock")):  # runs side by side write to one file
        content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"schema": 1, "results": []}
        rows = [r for r in content.get(kind, []) if any(r.get(name) != record.get(name) for name in same)]
        write_json(path, content | {kind: [*rows, record]})
