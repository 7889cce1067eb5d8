"""Distillation: a teacher's trajectories, from which a network learns to sample in fewer steps.

Stands on runs, pipeline, settings, guidance, diffusion, machine, options and storage.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import nn

from lab6.diffusion import make_sampler, make_scheduler
from lab6.guidance import MAX_GUIDANCE_SCALE
from lab6.machine import autocast, make_generator, progress
from lab6.options import Network
from lab6.pipeline import ICLEVRPipeline
from lab6.runs import find_weights, load_pipeline
from lab6.settings import Settings
from lab6.storage import write_whole

#: This many trajectories are sampled at a time, with one guidance scale.
_AT_A_TIME = 64


def sample_trajectories(settings: Settings, labels: torch.Tensor, teacher: ICLEVRPipeline, part=(0, 1)) -> Path:
    """Let a teacher sample what a network is distilled from (see `Trajectories`), part by part, so that a run that was
    stopped continues. A teacher that is told places draws natural ones, in a share `place_dropout` of the parts none.

    Args:
        labels: (N, 24), of the training images.
        part: (rank, number of processes): which parts this process samples.

    Returns:
        The folder in data/runs/cache that holds them: another for another teacher, labels, steps or seed.
    """
    from safetensors.torch import save_file

    how = (teacher.weights_sha256, settings.student_steps, settings.teacher_steps, settings.seed, MAX_GUIDANCE_SCALE,
           settings.place_dropout, "named streams")  # fmt: skip
    name = hashlib.sha256(repr(how).encode() + labels.numpy().tobytes()).hexdigest()[:16]
    folder = settings.runs / "cache" / f"trajectories-{name}"
    parts = [(folder / f"{i:04d}.safetensors", i, of) for i, of in enumerate(labels.split(_AT_A_TIME))]
    missing = [each for each in parts[part[0] :: part[1]] if not each[0].exists()]
    for file, number, of in progress(missing, "the teacher samples", lines=True):
        generators = [make_generator(settings.seed, "trajectory", number, i) for i in range(len(of))]
        random = torch.rand(2, generator=make_generator(settings.seed, "scale", number))
        scale, told = MAX_GUIDANCE_SCALE * random[:1], random[1] >= settings.place_dropout
        with autocast(settings):
            sampled = teacher(of, settings.teacher_steps, scale.item(), generator=generators, output_type="pt",
                              places=None if told else "none", return_process=True)  # fmt: skip
        states = sampled.process[:: settings.teacher_steps // settings.student_steps].transpose(0, 1)
        kept = {"states": states.half().contiguous(), "scale": scale}
        if sampled.places is not None:
            kept["places"] = sampled.places
        write_whole(file, lambda temporary, kept=kept: save_file(kept, temporary))
    return folder


class Trajectories:
    """What a network is distilled from: for the labels of each training image the states x_t through which its teacher
    went from noise to an image, guided by some s, without fresh noise on the way.

    Attributes:
        labels: (N, 24).
        states: (N, student_steps + 1, 3, 64, 64) float16, where each step of the distilled network begins and ends.
        scales: (N,), the s of each.
        asked: (N, 24, 2), the places that the teacher was told, or None.
    """

    autoencoder = places = layouts = None  # its places are not varied, and the teacher's weights bring its layouts

    def __init__(self, settings: Settings, labels: torch.Tensor, folder: Path, teacher: nn.Module | None = None):
        from safetensors.torch import load_file

        self.teacher = teacher
        self.labels, shape = labels.to(settings.device), (len(labels), settings.student_steps + 1, 3, 64, 64)
        self.states = torch.empty(shape, dtype=torch.float16, device=settings.device)
        self.scales = torch.empty(len(labels), device=settings.device)
        self.asked = torch.empty(*labels.shape, 2, device=settings.device) if settings.takes_places else None
        for i, rows in enumerate(torch.arange(len(labels)).split(_AT_A_TIME)):
            kept, part = load_file(folder / f"{i:04d}.safetensors"), slice(rows[0], rows[-1] + 1)
            self.states[part], self.scales[part] = kept["states"], kept["scale"]
            if settings.takes_places:
                self.asked[part] = kept["places"]

    def __len__(self):
        return len(self.labels)

    def prepare(self, denoiser: nn.Module):
        """Give the network its teacher's weights. What it has besides, the input for s, begins without effect."""
        denoiser.load_state_dict(self.teacher.state_dict(), strict=False)

    def batch(self, rows: torch.Tensor, t: torch.Tensor, noise, scheduler: DDPMScheduler) -> dict:
        """The distilled network's steps in which the times `t` lie: the x_0 and eps with which one step of DDIM leads
        from the beginning of a step to its end.

        Returns:
            dict: x_0, eps (B, 3, 64, 64); t (B,), the times of the beginnings; scale (B,); places (B, 24, 2) or None.
        """
        steps = self.states.shape[1] - 1
        stride = scheduler.config.num_train_timesteps // steps
        t = t // stride * stride + stride - 1
        alpha_bar = F.pad(scheduler.alphas_cumprod.to(t.device), (0, 1), value=1.0)  # [-1] is where time ends
        level = lambda t: (x.sqrt()[:, None, None, None] for x in (alpha_bar[t], 1 - alpha_bar[t]))
        (a, b), (a_end, b_end) = level(t), level(t - stride)
        number = steps - 1 - t // stride
        x_t, x_end = (self.states[rows, i].float() for i in (number, number + 1))
        x_0 = (x_end - b_end / b * x_t) / (a_end - b_end / b * a)
        places = None if self.asked is None else self.asked[rows]
        return dict(x_0=x_0, eps=(x_t - a * x_0) / b, t=t, scale=self.scales[rows], places=places)


def open_trajectories(settings: Settings, labels: torch.Tensor) -> Trajectories:
    """The trajectories of `settings.teacher` for (N, 24) labels, sampled first where they are not on disk yet; the
    processes of a training share that work."""
    from accelerate import PartialState

    state, teacher = PartialState(cpu=settings.device == "cpu"), load_teacher(settings)
    folder = sample_trajectories(settings, labels, teacher, (state.process_index, state.num_processes))
    state.wait_for_everyone()
    return Trajectories(settings, labels, folder, teacher.denoiser)


def load_teacher(settings: Settings) -> ICLEVRPipeline:
    """The pipeline that `settings.teacher` names (a preset that ships, or a folder), with a deterministic sampler that
    needs few steps.

    Raises:
        FileNotFoundError: there is none.
        ValueError: its network, or its noise, is not what the distilled network begins with.
    """
    teacher = load_pipeline(settings, str(find_weights("teacher", settings.teacher)))
    own, there = make_scheduler(settings), dict(teacher.denoiser.config) | dict(teacher.scheduler.config)
    here = {field.name: getattr(settings, field.name) for field in dataclasses.fields(Network)}
    here |= {"prediction_type": own.config.prediction_type}
    differ = [name for name in here if json.dumps(here[name]) != json.dumps(there[name])]
    # Another computer's cosine may end in other digits.
    if own.betas.shape != teacher.scheduler.betas.shape or not torch.allclose(own.betas, teacher.scheduler.betas):
        differ.append("its noise schedule")
    if differ or teacher.denoiser.config.student_steps or "classifier-free" not in teacher.guidances:
        why = f"its network differs from this run's in {', '.join(differ)}" if differ else "it knows no guidance"
        raise ValueError(f"teacher={settings.teacher!r}: {why}. A distilled network begins with its teacher's weights")
    teacher.scheduler = make_sampler("dpm-solver++", teacher.scheduler)
    return teacher
