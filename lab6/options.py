"""Every setting, in groups, each with its default, its limits and what it means.

`Settings` joins the groups. A function that needs only one group takes only that. Choices from a registry (schedules,
samplers, conditionings, guidances, optimisers, places) and rules across groups stand in settings.py. For `-p` and
notebooks, a new field also goes into the first code cell of a notebook and into its call of make_settings. Stands on no
other room.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import typing


def option(default, *choices, low=None, high=None, below=None, positive=False, resumable=False):
    """A field of a group.

    choices: the values that it, or each item of a tuple, may have; low, high: inclusive limits; below: an exclusive
    upper one; positive: more than 0; resumable: a run may continue with another value.
    """
    limits = dict(choices=choices, low=low, high=high, below=below, positive=positive, resumable=resumable)
    return dataclasses.field(default=default, metadata=limits)


def count(default, low=1, **limits):
    """A field that counts something: at least 1, or 0 where 0 means something."""
    return option(default, low=low, **limits)


@dataclasses.dataclass(frozen=True)
class Options:
    """What all groups share: checking types and limits when an instance is made, then the rules of each group."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            check_type(field.name, value, option_types(type(self))[field.name])
            for item in value if isinstance(value, tuple) else (value,):
                check_limits(field.name, item, **field.metadata)
        for group in reversed(type(self).__mro__):  # rules across groups come last
            if "check" in vars(group):
                group.check(self)


@dataclasses.dataclass(frozen=True)
class Run(Options):
    """Which training this is, and where it computes."""

    profile: str = option("quick", resumable=True)
    preset: str = option("tokens")
    run: str = option("", resumable=True)  # name of the training run; "": the preset's name
    seed: int = count(0, low=0, high=2**63 - 1)
    device: str = option("auto", "cuda", "mps", "cpu", resumable=True)  # chosen in that order
    # bf16 where the hardware computes in it; fp32 on a GPU has torch's default, TF32 for convolutions
    precision: str = option("auto", "bf16", "fp32", resumable=True)

    def check(self):
        if self.run and not re.fullmatch(r"\w[\w=.,+ -]*", self.run):
            raise ValueError(
                f"run={self.run!r}: a run's name is also its folder's name: letters, digits and any of _ = . , + -, "
                "beginning with a letter or a digit"
            )


@dataclasses.dataclass(frozen=True)
class Network(Options):
    """The U-Net and its conditioning. Tuples have one entry per resolution, the highest resolution first.

    Each field is also an argument of `Denoiser`, with the same name.
    """

    patch: int = option(2, 1, 2, 4)  # the U-Net sees patch x patch pixels as channels (pixel unshuffle), at 64 / patch
    channels: tuple[int, ...] = count((48, 96, 144))
    layers_per_block: int = count(1)
    attention: tuple[str, ...] = option(("none", "none", "cross"), "none", "self", "cross")
    up_attention: tuple[str, ...] = option((), "none", "self", "cross")  # on the way up, where it differs
    head_dim: int = count(32)
    norm_groups: int = count(16)
    scale_shift: bool = option(True)  # adaptive group norm: the embedding scales and shifts, else it is added
    conditioning: str = option("tokens")  # layout, tokens, multi-hot (these need cross-attention), mlp or linear
    token_dim: int = count(128)  # width of an object's token

    def check(self):
        for name in ("attention", "up_attention"):
            by_resolution = getattr(self, name)
            if by_resolution and len(by_resolution) != len(self.channels):
                raise ValueError(
                    f"channels={self.channels} and {name}={by_resolution}: give both one entry per resolution"
                )
        check_groups("channels", self.channels, self.norm_groups)


@dataclasses.dataclass(frozen=True)
class Latents(Options):
    """Latent diffusion: an autoencoder in front of the denoiser."""

    space: str = option("pixels", "pixels", "latents")  # what is noised and denoised
    autoencoder_channels: tuple[int, ...] = count((32, 64, 64))  # by resolution: 64x64, 32x32, and 16x16, the latents'
    latent_channels: int = count(4)
    autoencoder_epochs: int = count(20)

    @property
    def image_size(self) -> int:
        """Height and width of what is noised: 64, or that of the latents."""
        return 64 if self.space == "pixels" else 64 // 2 ** (len(self.autoencoder_channels) - 1)


@dataclasses.dataclass(frozen=True)
class Diffusion(Options):
    """The forward process, and what the network predicts."""

    num_train_timesteps: int = count(1000)  # T
    schedule: str = option("cosine")
    schedule_reference: int = count(32)  # shifted-cosine only: the resolution at which the cosine would be right
    zero_snr: bool = option(False)  # rescale the schedule so that the last step is pure noise
    prediction: str = option("v_prediction", "epsilon", "v_prediction", "sample")  # sample: x_0

    def check(self):
        if self.zero_snr and self.prediction == "epsilon":
            raise ValueError(
                "zero_snr=True with prediction='epsilon': at the last step x_t holds no signal, so eps says "
                "nothing about x_0; use prediction='v_prediction' or 'sample'"
            )


@dataclasses.dataclass(frozen=True)
class Distillation(Options):
    """A network that learns to do in few steps what its teacher does in many."""

    teacher: str = option("")  # a preset that ships, or a pipeline's folder
    student_steps: int = count(0, low=0)  # steps of the distilled network; 0: no distillation
    teacher_steps: int = count(12)  # steps of its teacher for the same way

    def check(self):
        if bool(self.teacher) != bool(self.student_steps):
            raise ValueError(f"teacher={self.teacher!r}, student_steps={self.student_steps}: distillation needs both")


@dataclasses.dataclass(frozen=True)
class System(Distillation, Diffusion, Latents, Network):
    """What a network and its noise are made from, in whatever way it is trained and used."""

    def check(self):
        if (lowest := self.image_size / self.patch / 2 ** (len(self.channels) - 1)) < 1:
            raise ValueError(
                f"channels={self.channels} with patch={self.patch}: the lowest of these resolutions would be {lowest:g}"
            )
        if self.space == "latents":
            check_groups("autoencoder_channels", self.autoencoder_channels, self.norm_groups)


@dataclasses.dataclass(frozen=True)
class Data(Options):
    """Which images are trained on."""

    max_images: int = count(0, low=0)  # only the first ones; 0: all
    # unseen: no image that shows a set of `unseen_sets`; random: the same number of images fewer, chosen at random
    leave_out: str = option("none", "none", "unseen", "random")
    flip: bool = option(False)  # mirror half of the images
    # shares of the images with one, two, ... objects among what an epoch shows; (): as they are in the data
    object_shares: tuple[float, ...] = option((), low=0, high=1)
    rendered_scenes: int = count(300)  # how many to render where there are no course files

    def check(self):
        if self.object_shares and abs(sum(self.object_shares) - 1) > 1e-6:
            raise ValueError(f"object_shares={self.object_shares}: shares of images must add up to 1")


@dataclasses.dataclass(frozen=True)
class Training(Options):
    """The objective, the optimiser, and whose weights are kept."""

    loss_weighting: str = option("none", "none", "min-snr", "balanced")  # over the times t
    min_snr_gamma: float = option(5.0, positive=True)
    batch_size: int = count(32)
    epochs: int = count(100, resumable=True)  # it moves the decay of the learning rate, no step before that
    # whose weights the network begins with, as far as they fit: a preset that ships, or a pipeline's folder; "": none
    start: str = option("", resumable=True)
    optimizer: str = option("adamw")  # a key of OPTIMIZERS
    learning_rate: float = option(8e-4, low=0)
    muon_learning_rate: float = option(1.5e-3, low=0)  # of the matrices that Muon trains; the rest has learning_rate
    weight_decay: float = option(0.01, low=0)
    warmup_steps: int = count(500, low=0)
    decay_fraction: float = option(0.3, low=0, high=1)  # the last part of training; the rate falls to zero in it
    gradient_clip: float = option(1.0, low=0)  # of the norm of all gradients; 0: none
    # share of labels replaced by the null condition; 0: no classifier-free guidance, except for a distilled network
    label_dropout: float = option(0.1, low=0, below=1)
    place_dropout: float = option(0.12, low=0, high=1)  # share of images whose places, or some of them, are not told
    ema_decay: float = option(0.999, low=0, high=1)
    # the epoch whose weights the pipeline has, the last or the best; every: the last, and copies each keep_every epochs
    keep: str = option("last", "last", "best", "every", resumable=True)
    keep_every: int = count(10, resumable=True)
    checkpoint_minutes: float = option(1.0, positive=True, resumable=True)  # within an epoch
    torch_compile: bool = option(False, resumable=True)  # compile the network for training, on a GPU


@dataclasses.dataclass(frozen=True)
class Sampling(Options):
    """How images are sampled."""

    sampler: str = option("ddpm", resumable=True)  # its fresh noise lets later steps mend errors of earlier ones
    steps: int = count(20, resumable=True)  # make_settings takes 0 for all T
    guidance: str = option("classifier-free", resumable=True)  # a key of GUIDANCES
    guidance_scale: float = option(4.0, low=0, resumable=True)
    guidance_interval: tuple[float, float] = option((0.0, 1.0), resumable=True)  # in t / T; 0 is clean
    # what the classifier sees: the x_0 that the network predicts, or x_t
    classifier_input: str = option("x_0", "x_0", "x_t", resumable=True)
    # where objects stand, for a network that is told: as in training scenes, so that none hides another, or not told
    places: str = option("natural", resumable=True)  # one of PLACES
    ddpm_images: int = count(4, resumable=True)  # how many images notebook 04 samples with all T ancestral steps

    def check(self):
        if len(self.guidance_interval) != 2 or not 0 <= self.guidance_interval[0] <= self.guidance_interval[1] <= 1:
            raise ValueError(f"guidance_interval={self.guidance_interval}: give its lower and upper end, from 0 to 1")


@dataclasses.dataclass(frozen=True)
class Scoring(Options):
    """How much is evaluated, and how our evaluators are trained."""

    seeds: int = count(16, resumable=True)
    evaluation_sets: int = count(0, low=0, resumable=True)  # only the first label sets; 0: all
    evaluator_epochs: int = count(12, resumable=True)
    # rendered scenes of up to five objects that the evaluators learn from too; 0: none
    evaluator_scenes: int = count(1200, low=0, resumable=True)


def option_names() -> set[str]:
    """The names of all options."""
    groups = (Run, System, Data, Training, Sampling, Scoring)
    return {field.name for group in groups for field in dataclasses.fields(group)}


@functools.cache
def option_types(group: type) -> dict[str, type]:
    """{name: type} of a group's options."""
    return typing.get_type_hints(group)


def check_type(name: str, value, expected):
    """Raise ValueError unless `value` has the annotated type (bool is not an int here)."""
    if typing.get_origin(expected) is tuple:
        item = typing.get_args(expected)[0]
        fits = isinstance(value, tuple) and all(type(v) is item for v in value)
        fits = fits and (len(value) > 0 or name in ("up_attention", "object_shares"))
    else:
        fits = type(value) is expected
    if not fits:
        wanted = str(expected) if typing.get_origin(expected) else expected.__name__
        found = "an empty one" if value == () else type(value).__name__
        found = f"one of {', '.join(type(v).__name__ for v in value)}" if value and type(value) is tuple else found
        raise ValueError(f"{name}={value!r}: expected {wanted}, got {found}")


def check_limits(name: str, value, choices, low, high, below, positive, resumable):
    """Raise ValueError where `value` is not one of the choices or lies outside the limits of `option`."""
    if choices and value not in choices:
        raise ValueError(f"{name}={value!r}: choose from {', '.join(map(str, choices))}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name}={value}: must be a finite number")
    if low is not None and value < low:
        raise ValueError(f"{name}={value}: must be at least {low}" + ", or 0 for all T" * (name == "steps"))
    if high is not None and value > high:
        raise ValueError(f"{name}={value}: must be at most {high}")
    if below is not None and value >= below:
        raise ValueError(f"{name}={value}: must be in [{low}, {below})")
    if positive and value <= 0:
        raise ValueError(f"{name}={value}: must be more than 0")


def check_groups(name: str, channels: tuple[int, ...], norm_groups: int):
    """Raise ValueError unless group norm can divide all channels."""
    if any(c % norm_groups for c in channels):
        raise ValueError(f"{name}={channels}: each must be divisible by norm_groups={norm_groups}")
