"""One frozen record of all settings, made from a profile, a preset and overrides.

Joins the groups of options, checks choices from registries and rules across groups. Stands on guidance, conditioning,
diffusion, machine, layouts, optimizers, presets, options and storage.
"""

from __future__ import annotations

import dataclasses
import difflib
import typing
from pathlib import Path

from lab6.conditioning import CONDITIONINGS
from lab6.diffusion import NOT_WITH_ZERO_SNR, SAMPLERS, SCHEDULES
from lab6.guidance import GUIDANCES, MAX_GUIDANCE_SCALE, guidance_kind
from lab6.layouts import PLACES
from lab6.machine import computes_bf16, find_device, has_cuda
from lab6.optimizers import OPTIMIZERS
from lab6.options import Data, Run, Sampling, Scoring, System, Training, option_types
from lab6.presets import PRESETS, PROFILES, fill
from lab6.storage import ROOT, folder_named_by, runs_folder

#: Options whose values come from a registry: what is entered there can be chosen at once.
REGISTRIES = {
    "profile": PROFILES, "preset": PRESETS, "conditioning": CONDITIONINGS, "schedule": SCHEDULES, "sampler": SAMPLERS,
    "guidance": GUIDANCES, "optimizer": OPTIMIZERS, "places": PLACES,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Settings(Scoring, Sampling, Training, Data, System, Run):  # dataclasses puts the fields of the last base first
    """Every setting. Make one with `make_settings`; it is saved in each checkpoint.

    `preset` names one of PRESETS, which fills the fields of the network, the diffusion and the optimiser; any field may
    be overridden. options.py says what each field means.
    """

    def check(self):
        """The rules across groups; those of one group are checked before."""
        for name, registry in REGISTRIES.items():
            if getattr(self, name) not in registry:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose from {', '.join(registry)}")
        self._check_training()
        self._check_diffusion()
        if self.teacher:
            self._check_distillation()
        self._check_guidance()

    def _check_training(self):
        if self.torch_compile and self.device != "cuda":
            raise ValueError(
                f"torch_compile=True with device={self.device!r}: it is for a GPU (on a CPU, torch 2.13 compiles "
                "networks that lose most of their gradients); use torch_compile=False"
            )
        if self.start and self.teacher:
            raise ValueError(f"start={self.start!r} with teacher={self.teacher!r}: a distilled network begins as its "
                             "teacher; use start=''")  # fmt: skip
        if self.places == "separated" and not self.takes_places:
            raise ValueError(f"places='separated' with conditioning={self.conditioning!r}: this network is not told "
                             "where objects stand; use conditioning='layout', or places='natural'")  # fmt: skip
        if self.flip and self.space == "latents":
            raise ValueError("flip=True with space='latents': a mirrored latent is not that of the mirrored image")
        crossing = [name for name in ("attention", "up_attention") if "cross" in getattr(self, name)]
        if crossing and not CONDITIONINGS[self.conditioning].gives_tokens:
            able = " or ".join(repr(name) for name, module in CONDITIONINGS.items() if module.gives_tokens)
            raise ValueError(
                f"{crossing[0]}={getattr(self, crossing[0])} with conditioning={self.conditioning!r}: cross-attention "
                f"needs conditioning={able}; use that, or 'none' or 'self' in place of 'cross'"
            )

    def _check_diffusion(self):
        if self.steps > self.num_train_timesteps:
            raise ValueError(f"steps={self.steps} exceeds num_train_timesteps={self.num_train_timesteps}")
        if self.zero_snr and self.loss_weighting == "min-snr":
            raise ValueError(
                "zero_snr=True with loss_weighting='min-snr': the last step, with which sampling begins, would have "
                "weight 0 and never be learnt"
            )
        if self.zero_snr and self.sampler in NOT_WITH_ZERO_SNR:
            raise ValueError(
                f"sampler={self.sampler!r} with zero_snr=True: it would start at infinite noise; use another sampler"
            )

    def _check_guidance(self):
        way = GUIDANCES[self.guidance]
        if guidance_kind(self) != "none" and not way.fits(self.label_dropout > 0, bool(self.teacher)):
            raise ValueError(
                f"label_dropout=0 with guidance={self.guidance!r}: it needs a network that has also learnt to sample "
                "without labels; use label_dropout=0.1, or another guidance"
            )
        if way.samplers and self.sampler not in way.samplers:
            raise ValueError(
                f"guidance={self.guidance!r} with sampler={self.sampler!r}: it works only with sampler="
                f"{' or '.join(map(repr, way.samplers))}; use that, or another guidance"
            )

    def _check_distillation(self):
        if not GUIDANCES[self.guidance].distilled:
            known = [name for name, way in GUIDANCES.items() if way.distilled]
            raise ValueError(f"guidance={self.guidance!r} for a distilled network: choose from {', '.join(known)}")
        needs = dict(space="pixels", label_dropout=0, flip=False, loss_weighting="none", sampler="ddim",
                     steps=self.student_steps)  # fmt: skip
        wrong = [f"{n}={value!r} (not {getattr(self, n)!r})" for n, value in needs.items() if getattr(self, n) != value]
        if not CONDITIONINGS[self.conditioning].gives_tokens:
            wrong.append(f"a conditioning that gives tokens (not {self.conditioning!r})")
        if not wrong and self.prediction == "epsilon":
            wrong = ["prediction='v_prediction' or 'sample', since at the last t eps says nothing about x_0"]
        if wrong:
            raise ValueError(f"teacher={self.teacher!r}: distillation needs {', '.join(wrong)}")
        if guidance_kind(self) == "classifier-free" and self.guidance_scale > MAX_GUIDANCE_SCALE:
            raise ValueError(f"guidance_scale={self.guidance_scale:g} for a distilled network: it has learnt scales up "
                             f"to {MAX_GUIDANCE_SCALE:g}")  # fmt: skip
        if self.num_train_timesteps % self.student_steps or self.teacher_steps % self.student_steps:
            raise ValueError(
                f"student_steps={self.student_steps}: must divide num_train_timesteps={self.num_train_timesteps} and "
                f"teacher_steps={self.teacher_steps}"
            )

    @property
    def takes_places(self) -> bool:
        """Is its network told where the objects stand? (A pipeline knows it of its own network.)"""
        return CONDITIONINGS[self.conditioning].blob_channels > 0

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


def make_settings(profile: str = "auto", **overrides) -> Settings:
    """Settings of a profile and a preset, with overrides.

    An override wins over the profile, the profile over the preset, the preset over the defaults. The short profiles
    train small networks, or train them briefly (see presets.py).

    Args:
        profile: one of PROFILES, or "auto": full with a CUDA GPU, else quick.
        overrides: fields of Settings, plain values; lists become tuples, whole numbers become floats, and None leaves
            the choice to the profile and the preset.

    Raises:
        ValueError: an unknown name or an impossible value, in one line.
    """
    if profile == "auto":
        profile = "full" if has_cuda() else "quick"
    if profile not in list(PROFILES):  # a list: what was given may not be hashable
        raise ValueError(f"profile={profile!r}: choose from auto, {', '.join(PROFILES)}")
    overrides = {name: value for name, value in overrides.items() if value is not None}
    preset = overrides.setdefault("preset", "layout")
    if preset not in list(PRESETS):
        raise ValueError(f"preset={preset!r}: choose from {', '.join(PRESETS)}")
    if overrides.get("device", "auto") == "auto":
        overrides["device"] = find_device()
    values = fill(profile, preset, overrides) | overrides | {"profile": profile}
    return settings_from(values | _derive(values, overrides))


def _derive(values, overrides):
    """What follows from other values, where it was not given itself."""
    derived = {}
    if values.get("precision", "auto") == "auto":
        derived["precision"] = "bf16" if computes_bf16(values["device"]) else "fp32"
    if values.get("steps") == 0:
        derived["steps"] = values.get("num_train_timesteps", Settings.num_train_timesteps)
    if values.get("student_steps") and "steps" not in overrides:
        derived["steps"] = values["student_steps"]
    if values.get("label_dropout") == 0 and "guidance" not in overrides and not values.get("teacher"):
        derived["guidance"] = "none"  # the default one needs a network that has learnt to do without labels
    return derived


def settings_from(values: dict) -> Settings:
    """Settings of {name: value}, also as json holds what dataclasses.asdict gave: without tuples, 1 for 1.0.

    Raises:
        ValueError: an unknown name or an impossible value, in one line.
    """
    if not isinstance(values, dict):
        raise ValueError("settings must be {name: value}")
    for name in values:
        if name not in _TYPES:
            close = difflib.get_close_matches(name, _TYPES, n=1)
            raise ValueError(f"unknown setting {name!r}" + (f": did you mean {close[0]!r}?" if close else ""))

    def exact(value, wanted):
        return float(value) if wanted is float and type(value) is int else value

    def convert(name, value):
        item = (*typing.get_args(_TYPES[name]), _TYPES[name])[0]  # of a tuple: the type of its items
        return tuple(exact(v, item) for v in value) if isinstance(value, list | tuple) else exact(value, item)

    return Settings(**{name: convert(name, value) for name, value in values.items()})


_TYPES = option_types(Settings)
