"""The training loop: loss, EMA, checkpoints that resume exactly. Notebook 03."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import time
import typing
from pathlib import Path

import torch

from lab6.autoencoder import LatentDataset, load_autoencoder
from lab6.denoiser import make_denoiser
from lab6.diffusion import make_scheduler, snr
from lab6.distillation import Trajectories, draw_trajectories, load_teacher
from lab6.machine import autocast, format_seconds, make_generator, progress
from lab6.pipeline import ICLEVRPipeline
from lab6.runs import read_checkpoint
from lab6.storage import exclusive, save_with_history, write_json, write_whole

if typing.TYPE_CHECKING:
    from lab6.dataset import ICLEVRDataset
    from lab6.settings import Settings


@dataclasses.dataclass(frozen=True)
class Epoch:
    """What `train` yields after each epoch; printed, it is one line."""

    epoch: int
    epochs: int
    step: int
    images_seen: int
    loss: float  # mean squared error of the prediction, weighted as `loss_weights` says, over the epoch
    learning_rate: float
    images_per_s: float
    seconds_left: float
    pipeline: ICLEVRPipeline | None = dataclasses.field(default=None, repr=False, compare=False)  # EMA weights

    def __str__(self):
        return (
            f"epoch {self.epoch}/{self.epochs}  loss {self.loss:.4f}  {self.images_per_s:.0f} images/s  "
            f"{format_seconds(self.seconds_left)} left"
        )


def learning_rate(settings: Settings, step: int, total_steps: int) -> float:
    """Linear warm-up, then constant, then linear to zero over the last `decay_fraction` of training.

    While it is constant it does not depend on how long training will be, so a run can be prolonged.
    """
    up = min(1.0, (step + 1) / max(1, settings.warmup_steps))
    down = min(1.0, (total_steps - step) / max(1.0, settings.decay_fraction * total_steps))
    return settings.learning_rate * up * (down if settings.decay_fraction else 1.0)


def loss_weights(settings: Settings, alpha_bar: torch.Tensor) -> torch.Tensor:
    """How much the squared error of the prediction counts at each t, (T,): ones, or min-SNR (Hang et al. 2023).

    min-SNR weighs the error of x_0 by min(SNR, gamma); that of eps is SNR times it, that of v SNR + 1 times.
    """
    if settings.loss_weighting == "none":
        return torch.ones_like(alpha_bar)
    ratio = snr(alpha_bar)
    by = {"epsilon": ratio, "v_prediction": ratio + 1, "sample": torch.ones_like(ratio)}[settings.prediction]
    return ratio.clamp(max=settings.min_snr_gamma) / by


def training_batch(settings: Settings, dataset, scheduler, step: int, part=(0, 1)):
    """Everything random of training step `step`, from (seed, step) alone, so that resuming changes nothing.

    Args:
        dataset: ICLEVRDataset, LatentDataset or, for a student, Trajectories.
        part: (rank, number of processes): which slice of the global batch to return.

    Returns:
        dict: x_0, eps, x_t, target (B, 3, 64, 64); t (B,); labels (B, 24); null (B,) bool; scale (B,): s, or 1.
    """
    size, device = min(settings.batch_size, len(dataset)), settings.device
    epoch, position = divmod(step, len(dataset) // size)
    order = torch.randperm(len(dataset), generator=make_generator(settings.seed, 0, epoch))
    rows = order[position * size : (position + 1) * size]
    g = make_generator(settings.seed, 1, step, device=device)
    taught = isinstance(dataset, Trajectories)
    x_0 = dataset.draw(rows, g) if not taught else None
    # One random offset spreads the times evenly over the batch: less noise in the loss (Kingma et al. 2021, app. I).
    spread = (torch.arange(size, device=device) + torch.rand((), generator=g, device=device)) / size
    t = (spread * settings.num_train_timesteps).long().clamp(max=settings.num_train_timesteps - 1)
    t = t[torch.randperm(size, generator=g, device=device)]
    if taught:
        x_0, eps, t, scale = dataset.step_from(rows, t, scheduler)
    else:
        eps, scale = torch.randn(x_0.shape, generator=g, device=device), torch.ones(size, device=device)
    null = torch.rand(size, generator=g, device=device) < settings.label_dropout
    mirrored = torch.rand(size, generator=g, device=device) < 0.5 * settings.flip
    x_0 = torch.where(mirrored[:, None, None, None], x_0.flip(3), x_0)
    target = {
        "epsilon": lambda: eps,
        "v_prediction": lambda: scheduler.get_velocity(x_0, eps, t),
        "sample": lambda: x_0,
    }[settings.prediction]()
    batch = dict(x_0=x_0, eps=eps, x_t=scheduler.add_noise(x_0, eps, t), target=target, t=t,
                 labels=dataset.labels[rows].to(device), null=null, scale=scale)  # fmt: skip
    rank, count = part
    return {k: v.chunk(count)[rank] for k, v in batch.items()}


def train(settings: Settings, dataset: ICLEVRDataset, folder: Path, resume: bool = True):
    """Train `settings`' denoiser on `dataset`; a generator that yields an `Epoch` after each epoch.

    Each epoch is checkpointed in `folder` (checkpoint.pt, history.json, TensorBoard's events), and a later call
    with the same folder goes on where it stopped, bit for bit on one CPU. `epochs` may be changed in between.
    `folder`/pipeline holds the pipeline with the EMA weights: at the end those of the last epoch, or, with
    keep="best", those of the epoch with the least loss so far; keep="every" also leaves `folder`/epochs/NNNN.

    Raises:
        ValueError: `folder` holds a run of other settings, or the dataset is empty.
        FileNotFoundError: space="latents" and no autoencoder in `folder`.
    """
    from accelerate import Accelerator

    if len(dataset) == 0:
        raise ValueError(f"no images to train on: the split {dataset.split!r} of this data is empty")
    accelerator = Accelerator(cpu=settings.device == "cpu")
    with contextlib.ExitStack() as stack:
        if accelerator.is_main_process:  # a second training of the same run waits, and then goes on with it
            stack.enter_context(exclusive(Path(folder) / "lock"))
        accelerator.wait_for_everyone()
        yield from _train(settings, dataset, Path(folder), resume, accelerator)


def _train(settings, dataset, folder, resume, accelerator):
    from accelerate.utils import gather_object
    from diffusers.training_utils import EMAModel
    from torch.utils.tensorboard import SummaryWriter

    part = (accelerator.process_index, accelerator.num_processes)
    autoencoder = load_autoencoder(settings, folder)
    if autoencoder is not None:
        dataset = LatentDataset(dataset, autoencoder)
    scheduler, denoiser = make_scheduler(settings), make_denoiser(settings)
    if settings.teacher:  # what the student has besides, the input for s, begins without effect
        teacher = load_teacher(settings)
        denoiser.load_state_dict(teacher.denoiser.state_dict(), strict=False)
    optimizer = torch.optim.AdamW(denoiser.parameters(), settings.learning_rate, weight_decay=settings.weight_decay,
                                  fused=settings.device != "mps")  # fmt: skip
    ema = EMAModel(denoiser.parameters(), settings.ema_decay, use_ema_warmup=True, power=0.75, foreach=True)
    denoiser.condition.slots = max(3, int(dataset.labels.sum(1).max()))
    state = read_checkpoint(settings, folder) if resume else None
    history = []
    if state:
        denoiser.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        ema.load_state_dict(state["ema"])
        history = state["history"]
    ema.to(settings.device)
    weights = loss_weights(settings, scheduler.alphas_cumprod).to(settings.device)
    network, optimizer = accelerator.prepare(denoiser, optimizer)
    network.train()

    size = min(settings.batch_size, len(dataset))
    steps = len(dataset) // size
    done, total = len(history), steps * settings.epochs
    if size % part[1]:
        raise ValueError(
            f"batch_size={size} cannot be split evenly over {part[1]} processes: use a multiple of {part[1]}"
        )
    if len(set(gather_object([done]))) > 1:
        raise ValueError(f"the processes find different checkpoints in {folder}: it must be a folder that they share")
    if history and history[-1]["step"] != done * steps:
        raise ValueError(f"{folder} was trained on another number of images; use the same data, or name another run")
    if settings.teacher and done < settings.epochs:
        drawn = draw_trajectories(settings, dataset.labels, teacher, part)
        accelerator.wait_for_everyone()
        dataset = Trajectories(settings, dataset.labels, drawn)

    def loss_of(network, step):
        batch = training_batch(settings, dataset, scheduler, step, part)
        with autocast(settings), torch.random.fork_rng(devices=[]):
            torch.manual_seed(make_generator(settings.seed, 2, step).initial_seed())  # of dropout
            null = batch["null"] if settings.label_dropout else None
            prediction = network(batch["x_t"], batch["t"], batch["labels"], null, batch["scale"])
        errors = (prediction.float() - batch["target"]).pow(2).mean((1, 2, 3))
        return (weights[batch["t"]] * errors).mean()

    if settings.torch_compile and done < settings.epochs:
        network = _compiled(network, lambda network: loss_of(network, done * steps))
    writer = SummaryWriter(folder / "tensorboard", purge_step=done * steps + 1) if accelerator.is_main_process else None
    start = time.perf_counter()
    for epoch in range(done, settings.epochs):
        losses = torch.zeros((), device=settings.device)
        epoch_start = time.perf_counter()
        for step in progress(range(epoch * steps, (epoch + 1) * steps), f"epoch {epoch + 1}/{settings.epochs}"):
            loss = loss_of(network, step)
            accelerator.backward(loss)
            if settings.gradient_clip:
                accelerator.clip_grad_norm_(network.parameters(), settings.gradient_clip)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(settings, step, total)
            optimizer.step()
            optimizer.zero_grad()
            ema.step(denoiser.parameters())
            losses += loss.detach()  # no .item(): it would wait for the device at every step
        loss = accelerator.reduce(losses, "mean").item() / steps  # here the host waits for the device, once an epoch
        now = time.perf_counter()
        record = dict(
            epoch=epoch + 1, epochs=settings.epochs, step=(epoch + 1) * steps,
            images_seen=(epoch + 1) * steps * size,
            loss=loss,
            learning_rate=learning_rate(settings, step, total),
            images_per_s=steps * size / (now - epoch_start),
            seconds_left=(now - start) / (epoch + 1 - done) * (settings.epochs - epoch - 1),
        )  # fmt: skip
        history = [*history, record]
        pipeline = ICLEVRPipeline(_ema_copy(denoiser, ema), make_scheduler(settings), autoencoder)
        if accelerator.is_main_process:
            for name in ("loss", "learning_rate", "images_per_s"):
                writer.add_scalar(name, record[name], record["step"])
            writer.flush()
            # Before the checkpoint: stopped in between, the epoch is done again.
            best = record["loss"] == min(past["loss"] for past in history)
            last = epoch + 1 == settings.epochs
            # At the end there is one, also where the best was passed before `keep` asked for it.
            if (best if settings.keep == "best" else last) or (last and not (folder / "pipeline").is_dir()):
                save_with_history(pipeline, folder / "pipeline", history)
            if settings.keep == "every" and (epoch + 1) % settings.keep_every == 0:
                save_with_history(pipeline, folder / "epochs" / f"{epoch + 1:04d}", history)
            state = dict(settings=dataclasses.asdict(settings), model=denoiser.state_dict(), ema=ema.state_dict(),
                         optimizer=optimizer.state_dict(), history=history)  # fmt: skip
            write_whole(folder / "checkpoint.pt", lambda p, s=state: torch.save(s, p))
            write_json(folder / "history.json", history)
        yield Epoch(**record, pipeline=pipeline)


def _compiled(network, loss_of):
    """The network by torch.compile, once a first backward pass has shown that it learns as the network itself does.

    On a CPU torch 2.13 compiles the network of `tokens` wrongly: no gradient passes an upsampling, while the loss still
    falls, for what comes after it learns.

    Raises:
        RuntimeError: it does not.
    """
    compiled, gradients = torch.compile(network), []
    print("progress: compiling the network, which takes a minute or more", flush=True)
    for each in (network, compiled):
        loss_of(each).backward()
        gradients.append([p.grad for p in network.parameters()])
        network.zero_grad()  # lets go of them: they stay as they are
    pairs = [(own, other) for own, other in zip(*gradients, strict=True) if own is not None and own.any()]
    wrong = sum(1 for own, other in pairs if other is None or not (own - other).norm() <= 0.5 * own.norm())  # or NaN
    if wrong > len(pairs) / 10:  # rounding and dropout make some difference, too
        raise RuntimeError(
            f"torch_compile=True: what torch {torch.__version__} compiles here would learn badly, {wrong} of "
            f"{len(pairs)} gradients are not the network's own. Train with torch_compile=False"
        )
    return compiled


def _ema_copy(denoiser, ema):
    """A frozen copy of `denoiser` with the averaged weights (its buffers are copied as they are)."""
    averaged = copy.deepcopy(denoiser)
    averaged.condition.slots = 0
    ema.copy_to(averaged.parameters())
    return averaged.eval().requires_grad_(False)
