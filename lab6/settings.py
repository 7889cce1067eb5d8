"""One frozen record of every choice of a run, made from a profile, a preset and overrides."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from pathlib import Path

import torch

from lab6.conditioning import CONDITIONINGS
from lab6.diffusion import SAMPLERS, SCHEDULES
from lab6.guidance import GUIDANCES, guidance_kind
from lab6.machine import computes_bf16
from lab6.presets import PRESETS, PROFILES, shrink
from lab6.storage import ROOT, folder_named_by, runs_folder


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
        return runs_folder()

    @property
    def figures(self) -> Path:
        """Folder for figures and results.json: figures/ (or $LAB6_FIGURES), and its folder quick/ for the quick
        profile and whenever there are fewer than 16 seeds."""
        if self.profile == "tiny":
            return self.runs / "tiny" / "figures"
        base = folder_named_by("LAB6_FIGURES") or ROOT / "figures"
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
    The short profiles train small networks, or little (`shrink`).

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
    fills = PROFILES[profile] | shrink(preset, profile)
    values = {"device": "auto", "precision": "auto"} | PRESETS[preset] | fills | overrides
    values |= {"profile": profile, "preset": preset}
    if values["device"] == "auto":
        values["device"] = (
            "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        )
    if values["precision"] == "auto":
        values["precision"] = "bf16" if computes_bf16(values["device"]) else "fp32"
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
