"""Latent diffusion: an autoencoder in front of the denoiser (Rombach et al. 2022).

Stands on dataset, settings, machine, labels and storage.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler
from torch import nn

from lab6.dataset import ICLEVRDataset, data_facts
from lab6.labels import to_float
from lab6.machine import autocast, check_finite, format_seconds, make_generator, progress, time_left
from lab6.settings import Settings
from lab6.storage import exclusive, read_json, replace_folder, write_json, write_whole


def make_autoencoder(settings: Settings) -> AutoencoderKL:
    """The autoencoder of latent diffusion, initialised from the seed."""
    channels = settings.autoencoder_channels
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        autoencoder = AutoencoderKL(
            block_out_channels=channels,
            down_block_types=("DownEncoderBlock2D",) * len(channels),
            up_block_types=("UpDecoderBlock2D",) * len(channels),
            latent_channels=settings.latent_channels,
            norm_num_groups=settings.norm_groups,
            sample_size=64,
        )
    return autoencoder.to(settings.device, memory_format=torch.channels_last)


def encode_images(autoencoder: AutoencoderKL, images: torch.Tensor):
    """Mean and standard deviation of the latents of (B, 3, 64, 64), each (B, latent_channels, 16, 16), scaled so that
    over the training images each channel has mean 0 and variance 1 (once the autoencoder knows their statistics)."""
    posterior = autoencoder.encode(images.to(autoencoder.device)).latent_dist
    mean, scale = _latent_statistics(autoencoder)
    return (posterior.mean - mean) / scale, posterior.std / scale


def decode_latents(autoencoder: AutoencoderKL | None, latents: torch.Tensor) -> torch.Tensor:
    """Images of latents, scaled as by `encode_images`; without an autoencoder the input, which then is an image."""
    if autoencoder is None:
        return latents
    mean, scale = _latent_statistics(autoencoder)
    return autoencoder.decode(latents.to(autoencoder.dtype) * scale + mean).sample.float()


def _latent_statistics(autoencoder):
    as_tensor = lambda values, default: torch.tensor(values or [default]).view(1, -1, 1, 1).to(autoencoder.device)
    return as_tensor(autoencoder.config.latents_mean, 0.0), as_tensor(autoencoder.config.latents_std, 1.0)


class LatentDataset:
    """Training images as the latents' distributions, encoded once; `batch` samples from them anew each time."""

    places = layouts = None

    def __init__(self, dataset: ICLEVRDataset, autoencoder: AutoencoderKL):
        self.autoencoder, device = autoencoder, autoencoder.device
        self.labels = dataset.labels.to(device)
        with torch.no_grad():
            batches = progress(dataset.pixels.split(64), "encoding")
            parts = [encode_images(autoencoder, to_float(pixels)) for pixels in batches]
        self.mean, self.std = (torch.cat(v) for v in zip(*parts, strict=True))

    def __len__(self):
        return len(self.labels)

    def prepare(self, denoiser: nn.Module):
        """Nothing: the network begins at random."""

    def batch(self, rows: torch.Tensor, t: torch.Tensor, noise, scheduler: DDPMScheduler) -> dict:
        """Latents of `rows` and the noise to add to them (see `training_batch`)."""
        x_0 = self.mean[rows] + self.std[rows] * noise("latents", self.mean.shape[1:])
        return dict(x_0=x_0, eps=noise("noise", self.mean.shape[1:]), t=t, scale=torch.ones(len(t), device=t.device))


@dataclasses.dataclass(frozen=True)
class AutoencoderEpoch:
    """What `train_autoencoder` yields after each epoch; printed, it is one line."""

    epoch: int
    epochs: int
    loss: float
    error: float  # mean absolute, of images in [-1, 1]
    seconds_left: float

    def __str__(self):
        left = format_seconds(self.seconds_left)
        return f"epoch {self.epoch}/{self.epochs}  autoencoder, error {self.error:.4f}  {left} left"


def train_autoencoder(settings: Settings, dataset: ICLEVRDataset, folder: Path, resume: bool = True):
    """Train the autoencoder of latent diffusion in `folder`/autoencoder; yields an `AutoencoderEpoch` after each epoch.

    Its loss is the mean absolute error of the images, plus 1e-6 times the KL divergence of their latents from N(0, I),
    which keeps them near each other (the idea of Rombach et al. 2022). A finished one of the same settings and data is
    left alone; with `resume`, a stopped one continues. For diffusion of pixels there is nothing to do.

    Raises:
        ValueError: with `resume`, the folder holds one of other settings or of other data.
    """
    if settings.space == "latents":
        with exclusive(Path(folder) / "lock"):
            yield from _train_autoencoder(settings, dataset, Path(folder) / "autoencoder", resume)


def _train_autoencoder(settings, dataset, folder, resume):
    made_of = _made_of(settings, dataset)
    resumed = folder.with_suffix(".pt")
    state = {"history": []}
    if (folder / "config.json").is_file():
        there = read_json(folder / "made_of.json", default={})
        if resume or there == made_of:
            return _check_made_of(there, made_of, folder)
    if resume and resumed.exists():
        state = torch.load(resumed, map_location=settings.device, weights_only=True)
        _check_made_of(state.get("made_of", {}), made_of, resumed)
    autoencoder, size = make_autoencoder(settings), min(settings.batch_size, len(dataset))
    parts = _parts(settings, autoencoder, len(dataset) // size * settings.autoencoder_epochs)
    for name, part in parts.items():
        if name in state:
            part.load_state_dict(state[name])
    history, start = state["history"], time.perf_counter()
    done, total = len(history), settings.autoencoder_epochs
    for epoch in range(done, total):
        loss, error = _one_epoch(settings, dataset, epoch, size, **parts)
        check_finite(f"the autoencoder's loss in epoch {epoch + 1}", torch.tensor([loss, error]))
        left = time_left(start, epoch + 1 - done, total - done)
        record = AutoencoderEpoch(epoch + 1, total, loss, error, seconds_left=left)
        history = [*history, dataclasses.asdict(record)]
        saved = {name: part.state_dict() for name, part in parts.items()} | dict(history=history, made_of=made_of)
        write_whole(resumed, lambda temporary, saved=saved: torch.save(saved, temporary))
        yield record
    _save(autoencoder.eval().requires_grad_(False), dataset, folder, history, made_of)
    resumed.unlink()


def _made_of(settings, dataset):
    """What decides how a trained autoencoder turns out, as json holds it."""
    names = ("seed", "batch_size", "norm_groups", "autoencoder_channels", "latent_channels", "autoencoder_epochs")
    values = {name: getattr(settings, name) for name in names} | data_facts(dataset)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _check_made_of(there, here, where):
    differ = [f"{name} ({there[name]!r} there, {here[name]!r} now)" for name in there if there[name] != here.get(name)]
    if differ:
        raise ValueError(
            f"{where} holds an autoencoder of other settings or data: {', '.join(differ)}. Name another run "
            f"(run='...'), or delete {where.parent} to start afresh."
        )


def _parts(settings, autoencoder, steps):
    """What a training of the autoencoder keeps: {name: object with a state dict}."""
    optimizer = torch.optim.AdamW(autoencoder.parameters(), lr=1e-3, weight_decay=0.0, fused=settings.device != "mps")
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    return dict(model=autoencoder, optimizer=optimizer, schedule=schedule)


def _one_epoch(settings, dataset, epoch, size, model, optimizer, schedule):
    """Train for one epoch; returns the mean loss and the mean absolute error."""
    device, steps = settings.device, len(dataset) // size
    totals = torch.zeros(2, device=device)
    order = torch.randperm(len(dataset), generator=make_generator(settings.seed, "autoencoder order", epoch)).to(device)
    for step in progress(range(steps), f"autoencoder, epoch {epoch + 1}"):
        g = make_generator(settings.seed, "autoencoder noise", epoch, step, device=device)
        images = dataset.images_at(order[step * size : (step + 1) * size])
        with autocast(settings):
            posterior = model.encode(images).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=g, device=device)
            error = (model.decode(posterior.mean + posterior.std * noise).sample - images).abs().mean()
        loss = error + 1e-6 * posterior.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        totals += torch.stack([loss.detach(), error.detach()])
    return (totals / steps).tolist()


def _save(autoencoder, dataset, folder, history, made_of):
    """Save a finished autoencoder, which from then on knows the statistics of its latents."""
    latents = LatentDataset(dataset, autoencoder)
    mean, spread = latents.mean.mean((0, 2, 3)), latents.mean.var((0, 2, 3)) + latents.std.square().mean((0, 2, 3))
    autoencoder.register_to_config(latents_mean=mean.tolist(), latents_std=spread.sqrt().tolist())

    def write(temporary):
        autoencoder.save_pretrained(temporary)
        write_json(temporary / "history.json", history)
        write_json(temporary / "made_of.json", made_of)

    replace_folder(folder, write)


def load_autoencoder(settings: Settings, folder: Path) -> AutoencoderKL | None:
    """The autoencoder that `train_autoencoder` left in `folder`; None for diffusion of pixels."""
    if settings.space == "pixels":
        return None
    if not (Path(folder) / "autoencoder" / "config.json").is_file():
        raise FileNotFoundError(
            f"no autoencoder in {folder}: train it first, with train_autoencoder (notebook 03 does)"
        )
    autoencoder = AutoencoderKL.from_pretrained(Path(folder) / "autoencoder", local_files_only=True)
    there = tuple(autoencoder.config.block_out_channels), autoencoder.config.latent_channels
    if there != (settings.autoencoder_channels, settings.latent_channels):
        raise ValueError(f"{folder} holds an autoencoder of other settings (autoencoder_channels={there[0]}, "
                         f"latent_channels={there[1]}): name another run (run='...')")  # fmt: skip
    return autoencoder.to(settings.device, memory_format=torch.channels_last).eval().requires_grad_(False)
