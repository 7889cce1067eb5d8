"""How labels may steer the sampling."""

from __future__ import annotations

import typing

if typing.TYPE_CHECKING:
    from diffusers import SchedulerMixin

    from lab6.settings import Settings


#: Students are trained with guidance scales from 0 to this; whoever takes no scale as an input has no such limit.
MAX_GUIDANCE_SCALE = 6.0


#: How labels may steer the sampling; see `ICLEVRPipeline`.
BY_CLASSIFIER = ("classifier-1", "classifier-2")


GUIDANCES = ("none", "classifier-free", "composition", *BY_CLASSIFIER)


def steps_with_guidance(scheduler: SchedulerMixin, interval: tuple[float, float]) -> list[bool]:
    """Of each pass of a sampler whose steps are set: does its t / T lie in the interval?"""
    low, high = (end * scheduler.config.num_train_timesteps for end in interval)
    return [low <= t <= high for t in scheduler.timesteps.tolist()]


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
