"""How our evaluators are trained, and which one is used. Notebook 05."""

from __future__ import annotations

import time
import typing
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from lab6.dataset import ICLEVRDataset, crowded_scenes
from lab6.evaluators import Evaluator, last_layer, make_evaluator_network
from lab6.files import scene_of
from lab6.labels import to_float
from lab6.machine import autocast, format_seconds, make_generator, progress
from lab6.storage import WEIGHTS, exclusive, name_of, write_json, write_whole

if typing.TYPE_CHECKING:
    from lab6.files import DataFiles
    from lab6.settings import Settings


def prepare_evaluator(settings: Settings, files: DataFiles, choice: str = "auto") -> Evaluator:
    """The evaluator to use: the course's if it lies with the data, else ours (in the profiles full and tiny
    trained here, unless it has been); or the one at the path `choice`."""
    if choice != "auto":
        return Evaluator.load(choice, settings.device)
    if (files.root / "checkpoint.pth").is_file():
        return Evaluator.find(files, settings.device)
    return _load_or_train(settings, files, "evaluator", "resnet18")


def prepare_judge(settings: Settings, files: DataFiles) -> Evaluator:
    """The judge, which nothing is guided, chosen or stopped by: trained here or shipped, as in `prepare_evaluator`."""
    return _load_or_train(settings, files, "judge", "judge")


def _load_or_train(settings, files, folder, reader):
    if settings.profile not in ("full", "tiny"):
        return Evaluator.load(WEIGHTS / folder, settings.device)
    made_of = ("seed", "evaluator_epochs", "evaluator_scenes", "max_images")
    folder = settings.runs / settings.profile / name_of(folder, {name: getattr(settings, name) for name in made_of})
    with exclusive(folder / "lock"):
        if not (folder / "model.safetensors").is_file():
            dataset, held_out = ICLEVRDataset(files, "train", settings.max_images), ICLEVRDataset(files, "held-out")
            crowded = crowded_scenes(settings.evaluator_scenes, seed=1) if settings.evaluator_scenes else None
            for record in train_evaluator(settings, dataset, folder, held_out, reader, crowded):
                accuracy = "none here" if record["accuracy"] is None else f"{record['accuracy']:.4f}"
                print(f"epoch {record['epoch']}/{record['epochs']}  {reader} loss {record['loss']:.4f}, "
                      f"held-out accuracy {accuracy}  {format_seconds(record['seconds_left'])} left")  # fmt: skip
    return Evaluator.load(folder, settings.device)


def train_evaluator(settings: Settings, dataset: ICLEVRDataset, folder: Path, held_out: ICLEVRDataset | None = None,
                    reader: str = "resnet18", crowded: ICLEVRDataset | None = None):  # fmt: skip
    """Train our evaluator and save it in `folder`; yields a record per epoch.

    The course's evaluator was trained at 64x64 upsampled from 32x32, and generated pictures are a little soft:
    half of each batch goes through 32x32. Flips, shifts, zoom, brightness and noise are varied too; hue is not,
    since colour is what the labels say. AdamW, one cycle of the learning rate (Smith & Topin 2018).

    The judge is there to read what the evaluator was used to make, to choose or to stop. So it is another network,
    varied in other ways (see `_augment_for_judge`), and leaves out every fifth scene, where the evaluator sees all.

    Args:
        settings: `evaluator_epochs`, `seed`, `device`, `precision` are used.
        dataset: real images; held_out: scored after each epoch, for the eye only, never for selection.
        reader: "resnet18" or "judge".
        crowded: more pictures to train on, such as `crowded_scenes`, of more objects than the data shows.

    Yields:
        dict: epoch, epochs, loss, images_per_s, seconds_left, and accuracy (course's, held out) or None.
    """
    device, epochs, judge = settings.device, settings.evaluator_epochs, reader == "judge"
    parts = [part for part in (dataset, crowded) if part is not None]
    pixels, labels = (torch.cat([getattr(part, name) for part in parts]) for name in ("pixels", "labels"))
    names = [name for part in parts for name in part.names]
    rows = [i for i, name in enumerate(names) if not judge or int(scene_of(name)) % 5]
    rows, batch = torch.tensor(rows), min(64, len(rows))
    vary = _augment_for_judge if judge else _augment
    steps = len(rows) // batch
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed + judge)
        network = make_evaluator_network(reader)
    network = network.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps * epochs, pct_start=0.2)
    start, history = time.perf_counter(), []
    for epoch in range(epochs):
        network.train()
        last_layer(network)[1] = nn.Identity()  # the loss is surer on logits
        order = rows[torch.randperm(len(rows), generator=make_generator(settings.seed + judge, epoch))]
        total = torch.zeros((), device=device)
        for step in progress(range(steps), f"{reader}, epoch {epoch + 1}"):
            index = order[step * batch : (step + 1) * batch]
            images = to_float(pixels[index]).to(device)
            images = vary(images, make_generator(settings.seed + judge, epoch, step))
            with autocast(settings):
                logits = network(images.contiguous(memory_format=torch.channels_last))
            loss = F.binary_cross_entropy_with_logits(logits.float(), labels[index].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.detach()
        last_layer(network)[1] = nn.Sigmoid()
        spent = time.perf_counter() - start
        accuracy = None
        if held_out is not None and len(held_out):
            accuracy = Evaluator(network, reader, device=device).eval(to_float(held_out.pixels), held_out.labels)
            network.requires_grad_(True)
        record = dict(epoch=epoch + 1, epochs=epochs, images_seen=(epoch + 1) * steps * batch,
                      loss=total.item() / steps, accuracy=accuracy, images_per_s=(epoch + 1) * steps * batch / spent,
                      seconds_left=spent / (epoch + 1) * (epochs - epoch - 1))  # fmt: skip
        history.append(record)
        yield record
    save_weights(network, Path(folder) / "model.safetensors", reader)
    write_json(Path(folder) / "history.json", history)


def _augment(images, generator):
    """Vary position, size, sharpness, brightness and noise of (B, 3, 64, 64); each image its own way."""
    device, count = images.device, len(images)
    draw = lambda low, high: torch.empty(count, 1, 1, 1).uniform_(low, high, generator=generator).to(device)
    grid = torch.zeros(count, 2, 3, device=device)
    zoom = draw(0.93, 1.07).view(-1)
    grid[:, 0, 0] = zoom * torch.where(draw(0, 1).view(-1) < 0.5, -1.0, 1.0)  # mirrored or not
    grid[:, 1, 1] = zoom
    grid[:, :, 2] = draw(-0.12, 0.12).view(-1, 1) * torch.tensor([1.0, 0.0], device=device)
    grid[:, 1, 2] = draw(-0.12, 0.12).view(-1)
    grid = F.affine_grid(grid, images.shape, align_corners=False)
    images = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    soft = F.interpolate(F.interpolate(images, size=32, mode="bilinear", antialias=True), size=64, mode="bilinear")
    images = torch.where(draw(0, 1) < 0.5, soft, images)
    noise = torch.randn(images.shape, generator=generator).to(device)
    return images * draw(0.85, 1.15) + draw(-0.1, 0.1) + noise * draw(0, 0.06)


def _augment_for_judge(images, generator):
    """Vary place, light, sharpness and a hidden patch of (B, 3, 64, 64); each image its own way.

    Light is a power of the brightness and a slope across the picture, softness a blur with three pixels, and the place
    a shift by whole pixels; `_augment` has none of these.
    """
    device, count = images.device, len(images)
    draw = lambda low, high: torch.empty(count, 1, 1, 1).uniform_(low, high, generator=generator).to(device)
    images = torch.where(draw(0, 1) < 0.5, images.flip(3), images)
    moved = F.pad(images, (4, 4, 4, 4), mode="replicate")
    y, x = (torch.randint(0, 9, (count, 1), generator=generator) + torch.arange(64) for _ in range(2))
    images = moved[torch.arange(count)[:, None, None], :, y[:, :, None], x[:, None, :]].permute(0, 3, 1, 2)
    soft = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    images = images + draw(0, 1) * (soft - images)
    slope = draw(-0.1, 0.1) * torch.linspace(-1, 1, 64, device=device)
    images = 2 * ((images + 1) / 2).clamp(1e-3, 1) ** draw(0.8, 1.25) - 1 + slope
    place, rows = draw(0, 64), torch.arange(64, device=device).view(1, 1, 64, 1)
    hidden = ((rows - place).abs() < 4) & ((rows.transpose(2, 3) - draw(0, 64)).abs() < 4)
    return torch.where(hidden, draw(-0.3, 0.3), images)


def save_weights(network, file, reader="resnet18"):
    """Write a state dict as safetensors: matrices in bf16, vectors (biases, norms) in float32."""
    from safetensors.torch import save_file

    half = {k: v.to(torch.bfloat16) if v.ndim > 1 else v for k, v in network.state_dict().items()}
    half = {k: v.detach().cpu().contiguous() for k, v in half.items()}
    write_whole(file, lambda temporary: save_file(half, temporary, {"reader": reader}))
