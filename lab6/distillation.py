"""Distillation: a teacher's trajectories, from which a network learns to sample in fewer steps."""

from __future__ import annotations

import hashlib
import json
import time
import typing

import torch
import torch.nn.functional as F

from lab6.denoiser import NETWORK_FIELDS
from lab6.diffusion import make_sampler, make_scheduler
from lab6.guidance import MAX_GUIDANCE_SCALE
from lab6.machine import autocast, format_seconds, headless, make_generator, progress
from lab6.runs import load_pipeline
from lab6.storage import WEIGHTS, from_project, write_whole

if typing.TYPE_CHECKING:
    from pathlib import Path

    from diffusers import DDPMScheduler

    from lab6.pipeline import ICLEVRPipeline
    from lab6.settings import Settings


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
        write_whole(file, lambda temporary, kept=kept: save_file(kept, temporary))
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


def find_teacher(settings):
    folder = WEIGHTS / settings.teacher
    folder = folder if folder.is_dir() else from_project(settings.teacher)
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
    teacher = load_pipeline(settings, str(find_teacher(settings)))
    here = {name: getattr(settings, name) for name in NETWORK_FIELDS}
    here |= {name: make_scheduler(settings).config[name] for name in ("trained_betas", "prediction_type")}
    there = dict(teacher.denoiser.config) | dict(teacher.scheduler.config)
    differ = [name for name in here if json.dumps(here[name]) != json.dumps(there[name])]
    if differ or teacher.denoiser.config.student_steps or "classifier-free" not in teacher.guidances:
        why = f"another network than this run's: {', '.join(differ)}" if differ else "it knows no guidance by itself"
        raise ValueError(f"teacher={settings.teacher!r}: {why}. A student begins with its teacher's weights")
    teacher.scheduler = make_sampler("dpm-solver++", teacher.scheduler)
    return teacher
