"""How labels steer the sampling: a class for each guidance, found by name in GUIDANCES. Notebook 04.

To add one, write a class with `predict` and, if it needs more than one pass, `evaluations` and `needs_null`, and enter
it: settings, pipeline, samplers and results then know it. Notebooks 04 and 06 list the ways that they compare.
Everything that a guidance may use comes in a `Step`. Stands on diffusion, labels and options.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable

import torch
from torch.nn import functional as F

from lab6.diffusion import to_x_0
from lab6.labels import OBJECTS

if typing.TYPE_CHECKING:
    from diffusers import SchedulerMixin

    from lab6.options import Sampling

#: Distilled networks are trained with guidance scales from 0 to this; other networks have no such limit.
MAX_GUIDANCE_SCALE = 4.0


@dataclasses.dataclass
class Step:
    """What a guidance is told of one step of sampling.

    Attributes:
        denoiser: the network, a `Denoiser`; scheduler: the sampler.
        time, alpha_bar: (), on the CPU, where the host reads them without waiting for a GPU.
        x_t: (B, C, H, W) as the network expects it; labels: (B, 24); scale: s.
        places: (B, 24, 2) where the objects are to stand, or None.
        objects: the number of objects in the largest label set.
        decode: x_t or x_0 -> images; classifier: an `Evaluator` or None; classifier_input: "x_0" or "x_t".
        gradient: a place for what `predict` finds and `adjust` needs.
    """

    denoiser: torch.nn.Module
    scheduler: SchedulerMixin
    time: torch.Tensor
    alpha_bar: torch.Tensor
    x_t: torch.Tensor
    labels: torch.Tensor
    scale: float
    objects: int
    decode: Callable
    places: torch.Tensor | None = None
    classifier: object = None
    classifier_input: str = "x_0"
    gradient: torch.Tensor | None = None

    @property
    def prediction_type(self) -> str:
        """epsilon, v_prediction or sample."""
        return self.scheduler.config.prediction_type

    def predict(self, labels: torch.Tensor, null: torch.Tensor | None, scale: float = 1.0, x_t=None, told=None):
        """What the network predicts at x_t (or another), in float32, from (k B, 24) labels: for the whole batch k times
        in one pass. null: (k B,) bool or None; scale: s, for a distilled network; told: (k B,) bool, whose places it is
        told, default all."""
        x_t = self.x_t if x_t is None else x_t
        k = len(labels) // len(x_t)
        t = torch.full((len(labels),), self.time.item(), dtype=self.time.dtype, device=x_t.device)
        given = {}
        if self.places is not None:
            given["places"] = self.places.repeat(k, 1, 1)
            if told is not None:
                given["places"] = given["places"].masked_fill(~told[:, None, None], torch.nan)
        return self.denoiser(x_t.repeat(k, 1, 1, 1) if k > 1 else x_t, t, labels, null, scale, **given).float()

    def null(self, value: bool) -> torch.Tensor | None:
        """(B,) bool: ignore the labels of every image, or of none; None where the network knows no null condition."""
        if not value and self.denoiser.condition.null is None:
            return None
        return torch.full((len(self.labels),), value, device=self.labels.device)


class Guidance:
    """No guidance: the labelled prediction as it is. The base class of all others.

    Attributes:
        off_scale: the scale s at which it does nothing; None: there is none.
        needs_null: it uses the prediction without labels.
        needs_classifier: it uses a classifier, so it costs a backward pass, which `evaluations` does not count.
        samplers: the samplers it works with; empty: all.
        distilled: it works with a distilled network.
    """

    off_scale: float | None = None
    needs_null = False
    needs_classifier = False
    samplers: tuple[str, ...] = ()
    distilled = True

    def fits(self, has_null: bool, distilled: bool) -> bool:
        """Does it work with a network that has a null condition or not, and is distilled or not?"""
        return (self.distilled or not distilled) and (has_null or not self.needs_null)

    def evaluations(self, objects: int, scale: float, distilled: bool) -> int:
        """Evaluations of the network per image and step, for label sets of up to `objects` objects."""
        return 1

    def predict(self, step: Step) -> torch.Tensor:
        """The guided prediction, of the shape of x_t."""
        return step.predict(step.labels, step.null(False))

    def adjust(self, x_next: torch.Tensor, step: Step) -> torch.Tensor:
        """The state after the sampler's step, moved where the guidance does that."""
        return x_next


class ClassifierFree(Guidance):
    """eps_uncond + s (eps_cond - eps_uncond) (Ho & Salimans 2022); s = 1 is off, s = 0 ignores the labels.

    The same formula serves for v and x_0, which are affine in eps. Both predictions come from one pass of twice the
    batch; a distilled network has learnt the result, and takes s as an input.
    """

    off_scale = 1.0
    needs_null = True

    def fits(self, has_null, distilled):
        return has_null or distilled

    def evaluations(self, objects, scale, distilled):
        return 1 if distilled or scale in (0, 1) else 2

    def predict(self, step):
        if step.denoiser.config.student_steps:
            return step.predict(step.labels, None, step.scale)
        if step.scale in (0, 1):
            return step.predict(step.labels, step.null(step.scale == 0))
        null = torch.cat([step.null(True), step.null(False)])
        uncond, cond = step.predict(step.labels.repeat(2, 1), null).chunk(2)
        return uncond + step.scale * (cond - uncond)


class Composition(Guidance):
    """eps_uncond + s sum_i (eps_i - eps_uncond), where eps_i knows object i alone (Liu et al. 2022).

    One pass for each object and one without labels, in one batch.
    """

    needs_null = True
    distilled = False

    def evaluations(self, objects, scale, distilled):
        return 1 + objects

    def predict(self, step):
        count = step.objects
        present, index = (v[:, :count] for v in step.labels.sort(dim=1, descending=True, stable=True))
        single = F.one_hot(index.T, len(OBJECTS)).to(step.labels)  # (count, B, 24)
        labels = torch.cat([step.labels, single.flatten(0, 1)])
        null = torch.cat([step.null(True), step.null(False).repeat(count)])
        # Without labels it is told no places either: those of the other objects would be taken away from each part.
        uncond, *parts = step.predict(labels, null, told=~null).chunk(count + 1)
        there = present.T.view(count, -1, 1, 1, 1)
        return uncond + step.scale * (there * (torch.stack(parts) - uncond)).sum(0)


class ByClassifier(Guidance):
    """The gradient of log p(labels | x_t) by a classifier (Dhariwal & Nichol 2021); s = 0 is off."""

    off_scale = 0.0
    needs_classifier = True

    @torch.enable_grad()
    def ask(self, step: Step) -> torch.Tensor:
        """The plain prediction; leaves the gradient at x_t in `step`, zero where x_t is noise."""
        x_t = step.x_t.detach().requires_grad_()
        prediction = step.predict(step.labels, None, x_t=x_t)
        if step.classifier_input == "x_0":
            images = step.decode(to_x_0(prediction, x_t, step.alpha_bar, step.prediction_type)).clamp(-1, 1)
        else:
            images = step.decode(x_t)
        log_p = step.classifier.log_probability(images, step.labels)
        step.gradient = torch.autograd.grad(log_p.sum(), x_t)[0] * (step.alpha_bar > 1e-4)
        return prediction.detach()


class Classifier1(ByClassifier):
    """Algorithm 1: s times the gradient, times the variance of the step, moves the mean of an ancestral step."""

    samplers = ("ddpm",)
    distilled = False

    def predict(self, step):
        return self.ask(step)

    def adjust(self, x_next, step):
        return x_next + step.scale * _variance(step) * step.gradient


class Classifier2(ByClassifier):
    """Algorithm 2: s times the gradient moves eps, with any sampler."""

    def predict(self, step):
        prediction = self.ask(step)
        a, b = step.alpha_bar.sqrt().clamp(min=1e-6), (1 - step.alpha_bar).sqrt()
        # What a change of eps by b times the gradient is in what the network predicts.
        factor = {"epsilon": b, "v_prediction": b / a, "sample": -(b**2) / a}[step.prediction_type]
        return prediction - step.scale * (factor * step.gradient)


def _variance(step):
    """Of an ancestral step (Ho et al. 2020, eq. 7)."""
    now, before = step.alpha_bar, step.scheduler.previous_timestep(step.time)
    before = step.scheduler.alphas_cumprod[before] if before >= 0 else torch.ones_like(now)
    return (1 - before) / (1 - now) * (1 - now / before)


#: Add a guidance here and everything knows it: name -> an instance of its class.
GUIDANCES = {
    "none": Guidance(),
    "classifier-free": ClassifierFree(),
    "composition": Composition(),
    "classifier-1": Classifier1(),
    "classifier-2": Classifier2(),
}
#: Those that ask a classifier.
BY_CLASSIFIER = tuple(name for name, guidance in GUIDANCES.items() if guidance.needs_classifier)


def steps_with_guidance(scheduler: SchedulerMixin, interval: tuple[float, float]) -> list[bool]:
    """For each pass of a sampler whose steps are set: does its t / T lie in the interval?"""
    low, high = (end * scheduler.config.num_train_timesteps for end in interval)
    return [low <= t <= high for t in scheduler.timesteps.tolist()]


def guidance_kind(options: Sampling) -> str:
    """The name of the guidance, or "none" where its scale turns it off."""
    return "none" if GUIDANCES[options.guidance].off_scale == options.guidance_scale else options.guidance


def guidance_record(options: Sampling) -> dict:
    """The guidance as results.json keeps it: kind and scale, and what else differs from the usual."""
    kept = {"kind": guidance_kind(options), "scale": options.guidance_scale}
    if GUIDANCES[kept["kind"]].needs_classifier:
        kept["shown"] = options.classifier_input
    if kept["kind"] != "none" and options.guidance_interval != (0.0, 1.0):
        kept["interval"] = list(options.guidance_interval)
    return kept


def describe_guidance(kind: str, scale: float | None, shown: str | None = None, interval=None) -> str:
    """What `guidance_record` gives in words: "none", "s = 3" (classifier-free), "composition, s = 3",
    "classifier-2 by x_0, s = 4" or "s = 3 at t/T from 0.2 to 0.8"."""
    if kind == "none" or scale is None:
        return "none"
    where = f" at t/T from {interval[0]:g} to {interval[1]:g}" if interval else ""
    name = "" if kind == "classifier-free" else f"{kind}{f' by {shown}' if shown else ''}, "
    return f"{name}s = {scale:g}{where}"
