"""How our evaluators are trained, and which one is used. Notebook 05.

Stands on evaluators, dataset, files, settings, machine, labels and storage.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from lab6.dataset import ICLEVRDataset, crowded_scenes, data_facts
from lab6.evaluators import Evaluator, last_layer, make_evaluator_network
from lab6.files import DataFiles, scene_of
from lab6.labels import to_float
from lab6.machine import autocast, check_finite, format_seconds, make_generator, progress, time_left
from lab6.settings import Settings
from lab6.storage import WEIGHTS, exclusive, name_of, write_json, write_whole


def prepare_evaluator(settings: Settings, files: DataFiles, choice: str = "auto") -> Evaluator:
    """The evaluator to use: the one at the path `choice`; with "auto" the course's if it lies with the data, else ours
    (the profiles full and tiny train it first, unless they have done so)."""
    if choice != "auto":
        return Evaluator.load(choice, settings.device)
    if file := files.evaluator:
        return Evaluator.load(file, settings.device)
    return _load_or_train(settings, files, "evaluator", "resnet18")


def prepare_judge(settings: Settings, files: DataFiles) -> Evaluator:
    """The judge, by which nothing is guided, chosen or stopped: trained or loaded as in `prepare_evaluator`."""
    return _load_or_train(settings, files, "judge", "judge")


def _load_or_train(settings, files, folder, name):
    if settings.profile not in ("full", "tiny"):
        return Evaluator.load(WEIGHTS / folder, settings.device)
    dataset = ICLEVRDataset(files, "train", settings.max_images)
    names = ("seed", "evaluator_epochs", "evaluator_scenes", "max_images")
    made_of = {name: getattr(settings, name) for name in names} | {"data": data_facts(dataset)["fingerprint"]}
    folder = settings.runs / settings.profile / name_of(folder, made_of)
    with exclusive(folder / "lock"):
        if not (folder / "model.safetensors").is_file():
            held_out = ICLEVRDataset(files, "held-out")
            crowded = crowded_scenes(settings.evaluator_scenes, seed=1) if settings.evaluator_scenes else None
            for record in train_evaluator(settings, dataset, folder, held_out, name, crowded):
                accuracy = "none here" if record["accuracy"] is None else f"{record['accuracy']:.4f}"
                print(f"epoch {record['epoch']}/{record['epochs']}  {name} loss {record['loss']:.4f}, "
                      f"held-out accuracy {accuracy}  {format_seconds(record['seconds_left'])} left")  # fmt: skip
    return Evaluator.load(folder, settings.device)


def train_evaluator(settings: Settings, dataset: ICLEVRDataset, folder: Path, held_out: ICLEVRDataset | None = None,
                    name: str = "resnet18", crowded: ICLEVRDataset | None = None):  # fmt: skip
    """Train our evaluator and save it in `folder`; yields a record per epoch.

    The course's evaluator was trained at 64x64 upsampled from 32x32, and generated images are a little soft, so half of
    each batch goes through 32x32. Flips, shifts, zoom, brightness and noise are varied too; hue is not, since colour is
    what the labels say. AdamW, one cycle of the learning rate (Smith & Topin 2018).

    The judge scores what the evaluator was used to make, to choose or to stop. So it is another network, its images are
    varied in other ways (see `_augment_for_judge`), and it leaves out every fifth scene, while the evaluator sees all.

    Args:
        settings: `evaluator_epochs`, `seed`, `device`, `precision` are used.
        dataset: real images; held_out: scored after each epoch, for information only, never for selection.
        name: "resnet18" or "judge".
        crowded: more images to train on, such as `crowded_scenes`, with more objects than the data shows.

    Yields:
        dict: epoch, epochs, loss, images_per_s, seconds_left, and accuracy (course's, held out) or None.
    """
    device, epochs, start, history = settings.device, settings.evaluator_epochs, time.perf_counter(), []
    pixels, labels, rows = _training_rows(dataset, crowded, name, device)
    size = min(64, len(rows))
    steps = len(rows) // size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed + (name == "judge"))
        network = make_evaluator_network(name)
    network = network.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps * epochs, pct_start=0.2)
    for epoch in range(epochs):
        order = torch.randperm(len(rows), generator=make_generator(settings.seed, f"{name} order", epoch))
        batches = rows[order.to(device)][: steps * size].split(size)
        loss = _one_epoch(settings, network, name, optimizer, schedule, pixels, labels, batches, epoch)
        check_finite(f"the loss of {name} in epoch {epoch + 1}", torch.tensor(loss))
        accuracy = None
        if held_out is not None and len(held_out):
            accuracy = Evaluator(network, name, device=device).eval(to_float(held_out.pixels), held_out.labels)
            network.requires_grad_(True)
        seen = (epoch + 1) * steps * size
        record = dict(epoch=epoch + 1, epochs=epochs, images_seen=seen, loss=loss, accuracy=accuracy,
                      images_per_s=seen / (time.perf_counter() - start),
                      seconds_left=time_left(start, epoch + 1, epochs))  # fmt: skip
        history.append(record)
        yield record
    save_weights(network, Path(folder) / "model.safetensors", name)
    write_json(Path(folder) / "history.json", history)


def _training_rows(dataset, crowded, name, device):
    """All pixels, their labels, and the rows that this evaluator is trained on, on the device."""
    parts = [part for part in (dataset, crowded) if part is not None]
    pixels, labels = (torch.cat([getattr(part, what) for part in parts]).to(device) for what in ("pixels", "labels"))
    files = [file for part in parts for file in part.names]
    rows = [i for i, file in enumerate(files) if name != "judge" or int(scene_of(file)) % 5]
    return pixels, labels, torch.tensor(rows).to(device)


def _one_epoch(settings, network, name, optimizer, schedule, pixels, labels, batches, epoch):
    """Train for one epoch; returns the mean loss."""
    vary, total = _augment_for_judge if name == "judge" else _augment, torch.zeros((), device=settings.device)
    network.train()
    last_layer(network)[1] = nn.Identity()  # the loss is computed more exactly from logits
    for step, rows in enumerate(progress(batches, f"{name}, epoch {epoch + 1}")):
        g = make_generator(settings.seed, f"{name} variation", epoch, step, device=settings.device)
        images = vary(to_float(pixels[rows]), g).contiguous(memory_format=torch.channels_last)
        with autocast(settings):
            logits = network(images)
        loss = F.binary_cross_entropy_with_logits(logits.float(), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        total += loss.detach()
    last_layer(network)[1] = nn.Sigmoid()
    return total.item() / len(batches)


def _uniform(images, generator):
    """A function (low, high) -> (B, 1, 1, 1) random numbers, one for each image."""
    new = lambda: torch.empty(len(images), 1, 1, 1, device=images.device)
    return lambda low, high: new().uniform_(low, high, generator=generator)


def _augment(images, generator):
    """Vary position, size, sharpness, brightness and noise of (B, 3, 64, 64); each image its own way."""
    uniform = _uniform(images, generator)
    grid = torch.zeros(len(images), 2, 3, device=images.device)
    zoom = uniform(0.93, 1.07).view(-1)
    grid[:, 0, 0] = zoom * torch.where(uniform(0, 1).view(-1) < 0.5, -1.0, 1.0)  # mirrored or not
    grid[:, 1, 1] = zoom
    grid[:, 0, 2] = uniform(-0.12, 0.12).view(-1)
    grid[:, 1, 2] = uniform(-0.12, 0.12).view(-1)
    grid = F.affine_grid(grid, images.shape, align_corners=False)
    images = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    soft = F.interpolate(F.interpolate(images, size=32, mode="bilinear", antialias=True), size=64, mode="bilinear")
    images = torch.where(uniform(0, 1) < 0.5, soft, images)
    noise = torch.randn(images.shape, generator=generator, device=images.device)
    return images * uniform(0.85, 1.15) + uniform(-0.1, 0.1) + noise * uniform(0, 0.06)


def _augment_for_judge(images, generator):
    """Vary place, light, sharpness and a hidden patch of (B, 3, 64, 64); each image its own way.

    Light is a power of the brightness and a slope across the image, softness a blur with three pixels, and the place a
    shift by whole pixels; `_augment` has none of these.
    """
    device, count, uniform = images.device, len(images), _uniform(images, generator)
    images = torch.where(uniform(0, 1) < 0.5, images.flip(3), images)
    moved = F.pad(images, (4, 4, 4, 4), mode="replicate")
    shift = lambda: torch.randint(0, 9, (count, 1), generator=generator, device=device)
    y, x = (shift() + torch.arange(64, device=device) for _ in range(2))
    images = moved[torch.arange(count, device=device)[:, None, None], :, y[:, :, None], x[:, None, :]]
    images = images.permute(0, 3, 1, 2)
    soft = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    images = images + uniform(0, 1) * (soft - images)
    slope = uniform(-0.1, 0.1) * torch.linspace(-1, 1, 64, device=device)
    images = 2 * ((images + 1) / 2).clamp(1e-3, 1) ** uniform(0.8, 1.25) - 1 + slope
    place, rows = uniform(0, 64), torch.arange(64, device=device).view(1, 1, 64, 1)
    hidden = ((rows - place).abs() < 4) & ((rows.transpose(2, 3) - uniform(0, 64)).abs() < 4)
    return torch.where(hidden, uniform(-0.3, 0.3), images)


def save_weights(network: nn.Module, file: Path, name: str = "resnet18"):
    """Write an evaluator's state dict as safetensors: matrices in bf16, vectors (biases, norms) in float32."""
    from safetensors.torch import save_file

    half = {k: v.to(torch.bfloat16) if v.ndim > 1 else v for k, v in network.state_dict().items()}
    half = {k: v.detach().cpu().contiguous() for k, v in half.items()}
    write_whole(file, lambda temporary: save_file(half, temporary, {"reader": name}))
