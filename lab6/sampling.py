"""Images of label sets by a pipeline, over seeds and processes. Notebook 04.

Stands on pipeline, settings, guidance, diffusion, machine and labels.
"""

from __future__ import annotations

import contextlib
import signal

import torch

from lab6.diffusion import NOT_WITH_ZERO_SNR, SAMPLERS, make_sampler, make_scheduler, set_times
from lab6.guidance import GUIDANCES, guidance_kind, steps_with_guidance
from lab6.labels import encode_labels, encode_places
from lab6.machine import autocast, make_generator, progress, without_accelerate_choices
from lab6.pipeline import ICLEVRPipeline
from lab6.settings import Settings

#: Images that pass through the network together: a CPU gains nothing by more than the first; a GPU takes the second, or
#: as many as its memory allows.
AT_A_TIME, AT_A_TIME_ON_A_GPU = 64, 512


def sample(pipe: ICLEVRPipeline, label_sets, settings: Settings, seed: int = 0, **overrides) -> torch.Tensor:
    """Images of `label_sets`: (B, 3, 64, 64) in [-1, 1]; the same seed gives image i the same noise.

    Args:
        overrides: arguments of the pipeline, in place of `settings`' steps, guidance and places.
    """
    return _sample_seeds(pipe, label_sets, settings, [seed], overrides)[0]


def sample_seeds(pipe: ICLEVRPipeline, label_sets, settings: Settings, processes: int = 0, **overrides) -> torch.Tensor:
    """`sample` for the seeds settings.seed, + 1, ...: (S, N, 3, 64, 64) with S = settings.seeds.

    processes: share the seeds among this many processes; 0: one for each GPU, as long as each has at least 200,000
        evaluations of the network to do, since a process takes its time to start.
    """
    if not processes and settings.device == "cuda":
        steps = overrides.get("num_inference_steps", settings.steps)
        processes = min(torch.cuda.device_count(), settings.seeds * len(label_sets) * steps // 200_000)
    count = min(settings.seeds, max(1, processes))
    seeds = [settings.seed + i for i in range(settings.seeds)]
    if count == 1:
        return _sample_seeds(pipe, label_sets, settings, seeds, overrides)
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=count, max_restarts=0, rdzv_backend="c10d",
                          rdzv_endpoint="localhost:0")  # fmt: skip
    device = pipe.device
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)  # without the numbers of an earlier call
    try:
        with _same_signal_handlers():
            parts = elastic_launch(config, _sample_part)(_move(pipe, "cpu"), label_sets, settings, seeds, overrides)
    finally:
        _move(pipe, device)
    return torch.cat([torch.from_numpy(parts[rank]) for rank in sorted(parts)])


@contextlib.contextmanager
def _same_signal_handlers():
    """elastic_launch leaves its own behind, after which a notebook's kernel is no longer interrupted."""
    names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT")  # Windows lacks the last two
    before = {getattr(signal, name): signal.getsignal(getattr(signal, name)) for name in names if hasattr(signal, name)}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:  # of a handler that was not set by Python nothing is known
                with contextlib.suppress(ValueError):  # outside the main thread nothing was changed
                    signal.signal(number, handler)


def _sample_part(pipe, label_sets, settings, seeds, overrides):
    """This process's share of the seeds, as an array, which outlives the process."""
    from accelerate import PartialState

    with without_accelerate_choices():
        state = PartialState(cpu=settings.device == "cpu")
    with state.split_between_processes(seeds) as mine:
        return _sample_seeds(_move(pipe, state.device), label_sets, settings, mine, overrides).numpy()


def _move(pipe, device):
    """The pipeline and its classifier, which diffusers does not know of, on `device`."""
    if pipe.classifier is not None:
        pipe.classifier.network.to(device)
        pipe.classifier.device = str(device)
    return pipe.to(device)


def _sample_seeds(pipe, label_sets, settings, seeds, overrides):
    """(seeds, label sets, 3, 64, 64). Each image has a generator of its own, so that only its last bits depend on its
    batch. A GPU takes all seeds together, in batches as large as its memory allows; on a CPU each seed has batches of
    its own, for the same bits as when it is sampled alone."""
    labels = label_sets if isinstance(label_sets, torch.Tensor) else encode_labels(label_sets)
    names = ("guidance", "guidance_scale", "guidance_interval", "classifier_input", "places")
    options = {name: getattr(settings, name) for name in names} | dict(num_inference_steps=settings.steps)
    options |= dict(places=places_of(pipe, settings)) | overrides
    places = options.pop("places")
    if places is not None and not isinstance(places, str):
        places = encode_places(label_sets, places)
    together = [seeds] if settings.device == "cuda" else [[seed] for seed in seeds]
    groups = [[(seed, i) for seed in group for i in range(len(labels))] for group in together]
    pipe.set_progress_bar_config(disable=True)

    def in_batches(batch_size):
        images, parts = [], [g[i : i + batch_size] for g in groups for i in range(0, len(g), batch_size)]
        for part in progress(parts, "sampling", lines=True) if len(parts) > 1 else parts:  # no bar for a slider's move
            generators, rows = [make_generator(seed, i) for seed, i in part], [i for _, i in part]
            given = places[rows] if isinstance(places, torch.Tensor) else places
            with autocast(settings):
                batch = pipe(labels[rows], places=given, generator=generators, output_type="pt", **options)
            images.append(batch.images)
        return torch.cat(images).unflatten(0, (len(seeds), len(labels)))

    size = AT_A_TIME_ON_A_GPU if settings.device == "cuda" else AT_A_TIME
    while True:  # where a GPU's memory runs out, with half as many images at a time
        try:
            return in_batches(size)
        except torch.OutOfMemoryError:
            if size == 1:
                raise
        torch.cuda.empty_cache()
        size //= 2


def sample_process(pipe: ICLEVRPipeline, label_set, settings: Settings, seed: int = 0):
    """One image on its way: (x_t, guesses of x_0), each (steps + 1, 3, 64, 64), noise first, image last."""
    with autocast(settings):
        output = pipe(label_set, settings.steps, settings.guidance_scale, settings.guidance, settings.guidance_interval,
                      settings.classifier_input, places_of(pipe, settings), [make_generator(seed, 0)],
                      return_process=True)  # fmt: skip
    return output.process[:, 0], output.guesses[:, 0]


def places_of(pipe: ICLEVRPipeline, settings: Settings) -> str:
    """How `pipe` is told where objects stand, as results and captions say it: `settings.places`, or "none" where its
    network is not told."""
    return settings.places if pipe.takes_places else "none"


def samplers_for(pipe: ICLEVRPipeline, settings: Settings) -> list[str]:
    """The samplers that go with a pipeline's noise schedule and `settings.guidance`; a distilled network knows only
    DDIM."""
    if pipe.denoiser.config.student_steps:
        return ["ddim"]
    names = GUIDANCES[settings.guidance].samplers or SAMPLERS
    zero_snr = pipe.scheduler.config.get("rescale_betas_zero_snr")
    return [name for name in names if not (zero_snr and name in NOT_WITH_ZERO_SNR)]


def count_evaluations(settings: Settings, labels: torch.Tensor, distilled: bool = False) -> int:
    """Evaluations of the network for each image of a batch with `labels` (B, 24); the backward passes of guidance by a
    classifier are not counted."""
    scheduler = make_sampler(settings.sampler, make_scheduler(settings))
    set_times(scheduler, settings.steps)
    acts, way = steps_with_guidance(scheduler, settings.guidance_interval), GUIDANCES[guidance_kind(settings)]
    guided = way.evaluations(int(labels.sum(1).max()), settings.guidance_scale, distilled)
    return len(acts) + sum(acts) * (guided - 1)
