"""What training sees: images, latents or a teacher's trajectories, all with the same method `batch`.

To train on something new, write a class like `ImageExamples`, with an example for each image of the dataset: its
length, `labels` (N, 24) on the device, `autoencoder` (or None), `prepare(denoiser)`, and `batch(rows, t, noise,
scheduler)`, which returns x_0, eps, t and scale. Open it in `open_examples`, by a setting of its own (options.py).
Stands on distillation, autoencoder, dataset, settings and machine.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path

import torch
from diffusers import DDPMScheduler
from torch import nn

from lab6.autoencoder import LatentDataset, load_autoencoder
from lab6.dataset import ICLEVRDataset
from lab6.distillation import open_trajectories
from lab6.machine import make_generator
from lab6.settings import Settings


class ImageExamples:
    """Training images as they are; each time with new noise."""

    autoencoder = None

    def __init__(self, dataset: ICLEVRDataset, device: str):
        self.dataset, self.labels = dataset, dataset.labels.to(device)

    def __len__(self):
        return len(self.dataset)

    def prepare(self, denoiser: nn.Module):
        """Nothing: the network begins at random."""

    def batch(self, rows: torch.Tensor, t: torch.Tensor, noise, scheduler: DDPMScheduler) -> dict:
        """The images of `rows` and the noise to add to them (see `training_batch`)."""
        x_0 = self.dataset.images_at(rows)
        return dict(x_0=x_0, eps=noise("noise", x_0.shape[1:]), t=t, scale=torch.ones(len(t), device=t.device))


def open_examples(settings: Settings, dataset: ICLEVRDataset, folder: Path):
    """What the network of `settings` is trained on, on its device: images, latents by the autoencoder in `folder`, or
    trajectories of the teacher, which are sampled first where they are not on disk yet.

    Raises:
        FileNotFoundError: no autoencoder in `folder`, or no such teacher.
    """
    if settings.teacher:
        return open_trajectories(settings, dataset.labels)
    autoencoder = load_autoencoder(settings, folder)
    return ImageExamples(dataset, settings.device) if autoencoder is None else LatentDataset(dataset, autoencoder)


def batch_blocks(size: int) -> int:
    """The number of blocks of a global batch. Each block has random noise of its own, so that a process whose share is
    a number of whole blocks makes only the noise of these."""
    return math.gcd(size, 16)


def training_batch(settings: Settings, examples, scheduler: DDPMScheduler, step: int, part=(0, 1)) -> dict:
    """Everything random of training step `step`, from (seed, step) alone, so that resuming changes nothing.

    Args:
        examples: from `open_examples`.
        part: (rank, number of processes): which slice of the global batch to return.

    Returns:
        dict: x_0, eps, x_t, target (B, 3, 64, 64); t (B,); labels (B, 24); null (B,) bool; scale (B,): s, or 1.
    """
    size, device, T = min(settings.batch_size, len(examples)), settings.device, settings.num_train_timesteps
    epoch, position = divmod(step, len(examples) // size)
    rank, count = part
    mine = slice(rank * size // count, (rank + 1) * size // count)
    rows = _epoch_order(settings.seed, epoch, len(examples), device)[position * size : (position + 1) * size][mine]
    g = make_generator(settings.seed, "batch", step, device=device)
    # One random offset spreads the times evenly over the batch: less noise in the loss (Kingma et al. 2021, app. I).
    spread = (torch.arange(size, device=device) + torch.rand((), generator=g, device=device)) / size
    t = (spread * T).long().clamp(max=T - 1)[torch.randperm(size, generator=g, device=device)][mine]
    null = (torch.rand(size, generator=g, device=device) < settings.label_dropout)[mine]

    blocks = batch_blocks(size)
    whole = blocks % count > 0  # the shares cut blocks: make all, and take the share
    own_blocks = range(blocks) if whole else range(rank * blocks // count, (rank + 1) * blocks // count)

    def noise(name, shape):
        generators = [make_generator(settings.seed, name, step, block, device=device) for block in own_blocks]
        parts = [torch.randn((size // blocks, *shape), generator=g, device=device) for g in generators]
        return torch.cat(parts)[mine] if whole else torch.cat(parts)

    batch = examples.batch(rows, t, noise, scheduler)
    x_0, eps, t = batch["x_0"], batch["eps"], batch["t"]
    if settings.flip:
        mirrored = (torch.rand(size, generator=g, device=device) < 0.5)[mine]
        x_0 = torch.where(mirrored[:, None, None, None], x_0.flip(3), x_0)
    target = {
        "epsilon": lambda: eps,
        "v_prediction": lambda: scheduler.get_velocity(x_0, eps, t),
        "sample": lambda: x_0,
    }[settings.prediction]()
    return batch | dict(x_0=x_0, x_t=scheduler.add_noise(x_0, eps, t), target=target, labels=examples.labels[rows],
                        null=null)  # fmt: skip


@functools.lru_cache(maxsize=2)  # the steps of an epoch share one order
def _epoch_order(seed, epoch, count, device):
    return torch.randperm(count, generator=make_generator(seed, "order", epoch, device=device), device=device)
