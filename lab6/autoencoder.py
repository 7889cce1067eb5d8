"""Latent diffusion: an autoencoder in front of the denoiser (Rombach et al. 2022)."""

from __future__ import annotations

import dataclasses
import time
import typing
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import nn

from lab6.labels import to_float
from lab6.machine import autocast, format_seconds, make_generator, progress
from lab6.storage import exclusive, save_with_history, write_whole

if typing.TYPE_CHECKING:
    from lab6.dataset import ICLEVRDataset
    from lab6.settings import Settings


def make_autoencoder(settings: Settings) -> AutoencoderKL:
    """The autoencoder of latent diffusion (Rombach et al. 2022), initialised from the seed."""
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


def encode(autoencoder: AutoencoderKL, images: torch.Tensor):
    """Mean and standard deviation of the latents of (B, 3, 64, 64), each (B, latent_channels, 16, 16), scaled so that
    over the training images each channel has mean 0 and variance 1 (once the autoencoder knows their statistics)."""
    posterior = autoencoder.encode(images.to(autoencoder.device)).latent_dist
    mean, scale = _latent_statistics(autoencoder)
    return (posterior.mean - mean) / scale, posterior.std / scale


def decode(autoencoder: AutoencoderKL | None, latents: torch.Tensor) -> torch.Tensor:
    """Pictures of latents, scaled as by `encode`; without an autoencoder what is given, which then is a picture."""
    if autoencoder is None:
        return latents
    mean, scale = _latent_statistics(autoencoder)
    return autoencoder.decode(latents.to(autoencoder.dtype) * scale + mean).sample.float()


def _latent_statistics(autoencoder):
    as_tensor = lambda values, default: torch.tensor(values or [default], device=autoencoder.device).view(1, -1, 1, 1)
    return as_tensor(autoencoder.config.latents_mean, 0.0), as_tensor(autoencoder.config.latents_std, 1.0)


class LatentDataset:
    """Training images as latents, encoded once; `draw` gives a fresh sample of their distribution each time."""

    def __init__(self, dataset: ICLEVRDataset, autoencoder: AutoencoderKL):
        self.split, self.labels = dataset.split, dataset.labels
        with torch.no_grad():
            parts = [encode(autoencoder, to_float(pixels)) for pixels in progress(dataset.pixels.split(64), "encoding")]
        self.mean, self.std = (torch.cat(v).cpu() for v in zip(*parts, strict=True))

    def __len__(self):
        return len(self.labels)

    def draw(self, rows: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """x_0 for training: latents of `rows`, on the generator's device."""
        mean, std = (v[rows].to(generator.device) for v in (self.mean, self.std))
        return mean + std * torch.randn(mean.shape, generator=generator, device=generator.device)


@dataclasses.dataclass(frozen=True)
class AutoencoderEpoch:
    """What `train_autoencoder` yields after each epoch; printed, it is one line."""

    epoch: int
    epochs: int
    loss: float
    error: float  # mean absolute, of pictures in [-1, 1]
    seconds_left: float

    def __str__(self):
        left = format_seconds(self.seconds_left)
        return f"epoch {self.epoch}/{self.epochs}  autoencoder, error {self.error:.4f}  {left} left"


def train_autoencoder(settings: Settings, dataset: ICLEVRDataset, folder: Path):
    """Train the autoencoder of latent diffusion in `folder`/autoencoder; yields an `AutoencoderEpoch` after each.

    Its loss is the mean absolute error of the pictures, and 1e-6 times the KL divergence of their latents from N(0, I),
    which keeps them near each other (the idea of Rombach et al. 2022). A finished one is left alone, a stopped one
    goes on; for diffusion of pixels there is nothing to do.
    """
    if settings.space == "latents":
        with exclusive(Path(folder) / "lock"):
            yield from _train_autoencoder(settings, dataset, Path(folder) / "autoencoder")


def _train_autoencoder(settings, dataset, folder):
    if (folder / "config.json").is_file():
        return
    device, autoencoder = settings.device, make_autoencoder(settings)
    optimizer = torch.optim.AdamW(autoencoder.parameters(), lr=1e-3, weight_decay=0.0, fused=device != "mps")
    size = min(settings.batch_size, len(dataset))
    steps = len(dataset) // size
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps * settings.autoencoder_epochs)
    parts = dict(model=autoencoder, optimizer=optimizer, schedule=schedule)
    resumed = folder.with_suffix(".pt")
    state = torch.load(resumed, map_location=device, weights_only=True) if resumed.exists() else {"history": []}
    for name, part in parts.items():
        if name in state:
            part.load_state_dict(state[name])
    history, start = state["history"], time.perf_counter()
    for epoch in range(len(history), settings.autoencoder_epochs):
        totals = torch.zeros(2, device=device)
        order = torch.randperm(len(dataset), generator=make_generator(settings.seed, 3, epoch))
        for step in progress(range(steps), f"autoencoder, epoch {epoch + 1}"):
            g = make_generator(settings.seed, 4, epoch, step, device=device)
            images = dataset.draw(order[step * size : (step + 1) * size], g)
            with autocast(settings):
                posterior = autoencoder.encode(images).latent_dist
                noise = torch.randn(posterior.mean.shape, generator=g, device=device)
                error = (autoencoder.decode(posterior.mean + posterior.std * noise).sample - images).abs().mean()
            loss = error + 1e-6 * posterior.kl().mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(autoencoder.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            totals += torch.stack([loss.detach(), error.detach()])
        loss, error = (totals / steps).tolist()
        spent = (time.perf_counter() - start) / (epoch + 1 - len(state["history"]))
        left = settings.autoencoder_epochs - epoch - 1
        record = AutoencoderEpoch(epoch + 1, settings.autoencoder_epochs, loss, error, seconds_left=spent * left)
        history = [*history, dataclasses.asdict(record)]
        saved = {name: part.state_dict() for name, part in parts.items()} | {"history": history}
        write_whole(resumed, lambda temporary, saved=saved: torch.save(saved, temporary))
        yield record
    latents = LatentDataset(dataset, autoencoder.eval().requires_grad_(False))
    mean, spread = latents.mean.mean((0, 2, 3)), latents.mean.var((0, 2, 3)) + latents.std.square().mean((0, 2, 3))
    autoencoder.register_to_config(latents_mean=mean.tolist(), latents_std=spread.sqrt().tolist())
    save_with_history(autoencoder, folder, history)
    resumed.unlink()


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
