"""Pictures of label sets by a pipeline, over seeds and processes. Notebook 04."""

from __future__ import annotations

import time
import typing

import torch

from lab6.diffusion import SAMPLERS, make_sampler, make_scheduler
from lab6.guidance import guidance_kind, steps_with_guidance
from lab6.labels import encode_labels
from lab6.machine import autocast, format_seconds, headless, make_generator, progress

if typing.TYPE_CHECKING:
    from lab6.pipeline import ICLEVRPipeline
    from lab6.settings import Settings


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
