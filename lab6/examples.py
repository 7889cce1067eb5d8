"""What training sees: images, latents or a teacher's trajectories, all with the same method `batch`.

To train on something new, write a class like `ImageExamples`, with an example for each image of the dataset: its
length, `labels` (N, 24) on the device, `autoencoder`, `places` and `layouts` (or None; `open_examples` finds them),
`prepare(denoiser)`, and `batch(rows, t, noise, scheduler)`, which returns x_0, eps, t, scale and, where they are not
the images', places. Open it in `open_examples`, by a setting of its own (options.py). Stands on distillation,
autoencoder, places, dataset, settings and machine.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import nn

from lab6.autoencoder import LatentDataset, load_autoencoder
from lab6.dataset import ICLEVRDataset
from lab6.distillation import open_trajectories
from lab6.machine import make_generator
from lab6.places import find_places, places_by_object
from lab6.settings import Settings


class ImageExamples:
    """Training images as they are; each time with new noise."""

    autoencoder = places = layouts = None

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
    if autoencoder := load_autoencoder(settings, folder):
        examples = LatentDataset(dataset, autoencoder)
    else:
        examples = ImageExamples(dataset, settings.device)
    if settings.takes_places:
        examples.places, examples.layouts = _find_places(dataset, settings.device)
    return examples


def _find_places(dataset, device):
    """Where the objects of each image stand, by object, (N, 24, 2); and the places of the first three in the images
    that show most, in order."""
    found = find_places(dataset.files, dataset)
    first = F.pad(found, (0, 0, 0, 3), value=torch.nan)[:, :3]
    most = first.isfinite().sum((1, 2))
    return places_by_object(dataset.files, dataset, found).to(device), first[(most == most.max()) & (most > 0)]


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
        dict: x_0, eps, x_t, target (B, 3, 64, 64); t (B,); labels (B, 24); null (B,) bool; scale (B,): s, or 1;
            places (B, 24, 2), or None for a network that is not told them.
    """
    size, device, T = min(settings.batch_size, len(examples)), settings.device, settings.num_train_timesteps
    epoch, position = divmod(step, len(examples) // size)
    rank, count = part
    mine = slice(rank * size // count, (rank + 1) * size // count)
    order = _epoch_order(settings, examples, epoch)
    rows = order[position * size : (position + 1) * size][mine]
    g = make_generator(settings.seed, "batch", step, device=device)
    # One random offset spreads the times evenly over the batch: less noise in the loss (Kingma et al. 2021, app. I).
    spread = (torch.arange(size, device=device) + torch.rand((), generator=g, device=device)) / size
    t = (spread * T).long().clamp(max=T - 1)[torch.randperm(size, generator=g, device=device)][mine]
    null = (torch.rand(size, generator=g, device=device) < settings.label_dropout)[mine]
    places = None if examples.places is None else _vary_places(settings, examples.places, rows, g, mine, size)

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
        if places is not None:
            places[..., 0] = torch.where(mirrored[:, None], 64 - places[..., 0], places[..., 0])
    target = {
        "epsilon": lambda: eps,
        "v_prediction": lambda: scheduler.get_velocity(x_0, eps, t),
        "sample": lambda: x_0,
    }[settings.prediction]()
    return dict(places=places) | batch | dict(x_0=x_0, x_t=scheduler.add_noise(x_0, eps, t), target=target,
                                              labels=examples.labels[rows], null=null)  # fmt: skip


def _vary_places(settings, places, rows, generator, mine, size):
    """The places of `rows`, as a network is told them: half a pixel to and fro, since what is found is no more exact,
    and some left out: in a share `place_dropout` of the images all, or half of the objects' at random."""
    random = lambda *shape, make=torch.rand: make(size, *shape, generator=generator, device=places.device)[mine]
    jitter = 0.5 * random(places.shape[1], 2, make=torch.randn)
    left_out, every, some = random() < settings.place_dropout, random() < 0.5, random(places.shape[1]) < 0.5
    hidden = left_out[:, None] & (every[:, None] | some)
    return (places[rows] + jitter).masked_fill(hidden[..., None], torch.nan)


def _epoch_order(settings, examples, epoch):
    """The rows of the images in an epoch, as many as there are. The examples keep it, since the steps of an epoch share
    one order."""
    key = settings.seed, epoch, settings.object_shares
    if getattr(examples, "order", (None,))[0] != key:
        # With shares it is made on the CPU, where the host need not wait for a GPU's counts of objects.
        device = "cpu" if settings.object_shares else settings.device
        generator = make_generator(settings.seed, "order", epoch, device=device)
        order = _permute(examples.labels, settings.object_shares, generator)
        examples.order = key, order.to(settings.device)
    return examples.order[1]


def _permute(labels, shares, generator):
    """All rows of (N, 24) labels in random order; with `shares` that part of them which shows one, two, ... objects."""
    permuted = lambda rows: rows[torch.randperm(len(rows), generator=generator, device=rows.device)]
    rows = torch.arange(len(labels), device=generator.device)
    if not shares:
        return permuted(rows)
    count, chosen = labels.sum(1).to(rows.device), []
    for objects, share in enumerate(shares, 1):
        group = rows[count == objects]
        wanted = round(share * len(rows)) if len(group) else 0
        chosen += [permuted(group) for _ in range(wanted // max(1, len(group)))]
        chosen.append(permuted(group)[: wanted % max(1, len(group))])
    return permuted(torch.cat([*chosen, permuted(rows)])[: len(rows)])  # rounding, or no such images, leaves a few
