"""The training loop: loss, EMA, checkpoints that resume exactly. Notebook 03.

Training knows its examples only by their method `batch` (see examples.py). Stands on examples, runs, pipeline,
denoiser, objective, optimizers, dataset, settings, diffusion, machine and storage.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import time
from pathlib import Path

import torch

from lab6.dataset import ICLEVRDataset, data_facts
from lab6.denoiser import make_denoiser
from lab6.diffusion import make_scheduler
from lab6.examples import open_examples, training_batch
from lab6.machine import (
    autocast,
    enough_memory,
    format_seconds,
    global_randomness,
    hold_signals,
    progress,
    time_left,
    without_accelerate_choices,
)
from lab6.objective import Balance, learning_rate, loss_weights, rate_factor
from lab6.optimizers import OPTIMIZERS
from lab6.pipeline import ICLEVRPipeline
from lab6.runs import begin_with, find_weights, open_tensorboard, read_checkpoint, write_checkpoint
from lab6.settings import Settings
from lab6.storage import exclusive, has_folder, save_with_history

#: What of an epoch's record goes into TensorBoard.
LOGGED = ("loss", "learning_rate", "images_per_s")


@dataclasses.dataclass(frozen=True)
class Epoch:
    """What `train` yields after each epoch; printed, it is one line."""

    epoch: int
    epochs: int
    step: int
    images_seen: int
    loss: float  # mean squared error of the prediction over the epoch, weighted by `loss_weights` or `Balance`
    learning_rate: float
    images_per_s: float
    seconds_left: float
    pipeline: ICLEVRPipeline | None = dataclasses.field(default=None, repr=False, compare=False)  # EMA weights

    def __str__(self):
        return (
            f"epoch {self.epoch}/{self.epochs}  loss {self.loss:.4f}  {self.images_per_s:.0f} images/s  "
            f"{format_seconds(self.seconds_left)} left"
        )


class TrainingState:
    """All that changes during a training: network, its average (EMA), optimiser, weights of the loss, history, and how
    far the epoch is that is going on.

    One list says what a checkpoint holds besides the history; it drives both saving and loading.
    """

    KEPT = ("model", "ema", "optimizer", "balance")

    def __init__(self, settings: Settings, examples, saved: dict | None):
        from diffusers.training_utils import EMAModel

        self.model = make_denoiser(settings)
        examples.prepare(self.model)
        if examples.layouts is not None:
            self.model.condition.remember(examples.layouts)
        self.images_before = 0  # that its weights had seen when the training began
        if settings.start and not saved:
            self.images_before = begin_with(self.model, find_weights("start", settings.start))
        self.optimizer = OPTIMIZERS[settings.optimizer](settings, self.model)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.ema = EMAModel(self.model.parameters(), settings.ema_decay, use_ema_warmup=True, power=0.75, foreach=True)
        self.balance = Balance(settings.num_train_timesteps, settings.device)
        # What of the epoch is done: its steps, the sum of their losses, and the seconds they took.
        self.part = {"steps": 0, "losses": 0.0, "seconds": 0.0}
        self.history = saved["history"] if saved else []
        for name in self.KEPT if saved else ():
            if name in saved:  # checkpoints of earlier versions have no balance
                getattr(self, name).load_state_dict(saved[name])
        if saved:
            self.part |= saved.get("part", {})
            self.images_before = saved.get("images_before", 0)
        self.ema.to(settings.device)

    def state_dict(self) -> dict:
        """What a checkpoint holds of it."""
        kept = {name: getattr(self, name).state_dict() for name in self.KEPT}
        return kept | {"history": self.history, "part": self.part, "images_before": self.images_before}

    def set_rates(self, factor: float):
        """Let each group of parameters learn at its own rate times this."""
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor

    def averaged(self):
        """A frozen copy of the network with the averaged weights (its buffers are copied as they are)."""
        averaged = copy.deepcopy(self.model)
        self.ema.copy_to(averaged.parameters())
        return averaged.eval().requires_grad_(False)


def train(settings: Settings, dataset: ICLEVRDataset, folder: Path, resume: bool = True):
    """Train `settings`' denoiser on `dataset`; a generator that yields an `Epoch` after each epoch.

    Each epoch is checkpointed in `folder` (checkpoint.pt, history.json, TensorBoard's events), in a single process long
    ones every `checkpoint_minutes`, too, and at the step at which Ctrl-C or SIGTERM stops it. A later call with the
    same folder continues there, bit for bit on one CPU. `epochs` may be changed in between.
    `folder`/pipeline holds the pipeline with the EMA weights: at the end those of the last epoch, or, with keep="best",
    those of the epoch with the least loss so far; keep="every" also leaves `folder`/epochs/NNNN.

    Raises:
        ValueError: `folder` holds a run of other settings or other data, or the dataset is empty.
        FileNotFoundError: space="latents" and no autoencoder in `folder`.
        RuntimeError: the loss is no longer finite, or a GPU's memory is too small.
    """
    from accelerate import Accelerator

    if len(dataset) == 0:
        raise ValueError(f"no images to train on: the split {dataset.split!r} of this data is empty")
    with without_accelerate_choices():  # autocast() chooses the precision
        accelerator = Accelerator(cpu=settings.device == "cpu", mixed_precision="no")
    with contextlib.ExitStack() as stack:
        if accelerator.is_main_process:  # a second training of the same run waits, and then continues it
            stack.enter_context(exclusive(Path(folder) / "lock"))
        accelerator.wait_for_everyone()
        yield from _train(settings, dataset, Path(folder), resume, accelerator)


def _train(settings, dataset, folder, resume, accelerator):
    data = data_facts(dataset)
    saved = read_checkpoint(settings, data, folder) if resume else None
    done, size = len(saved["history"]) if saved else 0, min(settings.batch_size, len(dataset))
    steps, part = len(dataset) // size, (accelerator.process_index, accelerator.num_processes)
    _check_processes((done, (saved or {}).get("part")), size, part[1], folder)
    if done and saved["history"][-1]["step"] != done * steps:  # a checkpoint that does not know its data
        raise ValueError(f"{folder} was trained on another number of images; use the same data, or name another run")
    if done >= settings.epochs:
        return
    examples, scheduler = open_examples(settings, dataset, folder), make_scheduler(settings)
    state, saved = TrainingState(settings, examples, saved), None  # so that the checkpoint does not stay in memory
    network, state.optimizer = accelerator.prepare(state.model, state.optimizer)
    if settings.torch_compile:
        print("progress: compiling the network, which takes a minute or more", flush=True)
        network = torch.compile(network)
    loss_at = _loss(settings, network, examples, scheduler, part, state.balance, accelerator.gather)
    keep = _keeper(settings, state, data, folder, accelerator.is_main_process)
    start = time.perf_counter()
    with open_tensorboard(folder, done * steps, accelerator.is_main_process) as writer:
        for epoch in range(done, settings.epochs):
            with state.model.expecting(int(dataset.labels.sum(1).max())), enough_memory(settings.batch_size):
                loss, seconds = _one_epoch(settings, state, network, loss_at, epoch, steps, accelerator, keep)
            left = time_left(start, epoch + 1 - done, settings.epochs - done)
            record = _record(settings, epoch, steps, size, loss, seconds, left, state.images_before)
            state.history = [*state.history, record]
            pipeline = ICLEVRPipeline(state.averaged(), make_scheduler(settings), examples.autoencoder)
            if accelerator.is_main_process:
                for name in LOGGED:
                    writer.add_scalar(name, record[name], record["step"])
                writer.flush()
                _keep_pipeline(settings, state, pipeline, folder)
            keep()
            yield Epoch(**record, pipeline=pipeline)


def _check_processes(done, size, processes, folder):
    from accelerate.utils import gather_object

    if size % processes:
        raise ValueError(
            f"batch_size={size} cannot be split evenly over {processes} processes: use a multiple of {processes}"
        )
    if len(set(map(str, gather_object([done])))) > 1:
        raise ValueError(f"the processes find different checkpoints in {folder}: it must be a folder that they share")


def _loss(settings, network, examples, scheduler, part, balance, gather):
    """The loss as a function of the training step."""
    fixed = loss_weights(settings, scheduler.alphas_cumprod).to(settings.device)

    def loss_at(step):
        batch = training_batch(settings, examples, scheduler, step, part)
        null, t = batch["null"] if settings.label_dropout else None, batch["t"]
        # Dropout layers have masks of their own in each process.
        with autocast(settings), global_randomness(settings.device, settings.seed, "dropout", step, part[0]):
            prediction = network(batch["x_t"], t, batch["labels"], null, batch["scale"], batch["places"])
        errors = (prediction.float() - batch["target"]).pow(2).mean((1, 2, 3))
        if settings.loss_weighting != "balanced":
            return (fixed[t] * errors).mean()
        weights = balance.weights(t)
        balance.learn(gather(t), gather(errors.detach()))
        return (weights * errors).mean()

    return loss_at


def _one_epoch(settings, state, network, loss_at, epoch, steps, accelerator, keep):
    """Train for one epoch, or the rest of one; returns the mean loss over all processes, and the seconds it took."""
    done, before, start = state.part["steps"], state.part["seconds"], time.perf_counter()
    losses = torch.full((), state.part["losses"], device=settings.device)
    network.train()
    kept, last = start, (epoch + 1) * steps - 1
    alone = accelerator.num_processes == 1  # several would each ask their own clock, and hear signals at other steps
    with hold_signals(alone) as asked:
        for step in progress(range(epoch * steps + done, last + 1), f"epoch {epoch + 1}/{settings.epochs}"):
            loss = loss_at(step)
            accelerator.backward(loss)
            if settings.gradient_clip:
                accelerator.clip_grad_norm_(network.parameters(), settings.gradient_clip)
            state.set_rates(rate_factor(settings, step, steps * settings.epochs))
            state.optimizer.step()
            state.optimizer.zero_grad()
            state.ema.step(state.model.parameters())
            losses += loss.detach()  # no .item(): the host would wait for the device at every step
            if settings.device == "cpu":
                _check_finite(settings, state, epoch, step, losses)
            due = (now := time.perf_counter()) - kept > 60 * settings.checkpoint_minutes
            if asked or (due and alone and step < last):  # at its end the epoch itself is kept
                kept = now
                _check_finite(settings, state, epoch, step, losses, *state.model.parameters())
                state.part = dict(steps=step + 1 - epoch * steps, losses=losses.item(), seconds=before + now - start)
                keep()
                if asked:
                    break
    if asked:  # and whoever handled the signal let the program go on
        raise KeyboardInterrupt
    _check_finite(settings, state, epoch, last, losses, *state.model.parameters())
    state.part = dict(steps=0, losses=0.0, seconds=0.0)
    loss = accelerator.reduce(losses, "mean").item() / steps  # here the host waits for the device, once an epoch
    return loss, before + time.perf_counter() - start


def _check_finite(settings, state, epoch, step, *tensors):
    """Raise RuntimeError where loss or weights are not finite, before anything of that is kept."""
    if torch.stack([tensor.isfinite().all() for tensor in tensors]).all():  # in one, for which the host waits once
        return
    done = len(state.history)
    kept = f"the checkpoint and pipeline of epoch {done} or later" if done else "what was kept before"
    raise RuntimeError(
        f"epoch {epoch + 1}, step {step + 1}: loss or weights are no longer finite numbers. Usual causes: a learning "
        f"rate that is too high (learning_rate={settings.learning_rate:g}, muon_learning_rate="
        f"{settings.muon_learning_rate:g}), no gradient_clip ({settings.gradient_clip:g}), or few digits (precision="
        f"{settings.precision!r}). Nothing of this is saved; {kept} stays. Lower the rate, and name another run "
        "(run='...') or go on from there."
    )


def _record(settings, epoch, steps, size, loss, seconds, left, before):
    """The record of an epoch, as history.json keeps it."""
    return dict(
        epoch=epoch + 1, epochs=settings.epochs, step=(epoch + 1) * steps,
        images_seen=before + (epoch + 1) * steps * size, loss=loss,
        learning_rate=learning_rate(settings, (epoch + 1) * steps - 1, steps * settings.epochs),
        images_per_s=steps * size / seconds, seconds_left=left,
    )  # fmt: skip


def _keep_pipeline(settings, state, pipeline, folder):
    """Save the pipeline that an epoch leaves, where it is time for one. The checkpoint follows: if the run is stopped
    in between, the epoch is done again."""
    epoch, losses = len(state.history), [past["loss"] for past in state.history]
    last = epoch == settings.epochs
    wanted = losses[-1] == min(losses) if settings.keep == "best" else last
    # At the end there is a pipeline, also where the best epoch was over before `keep` asked for it.
    if wanted or (last and not has_folder(folder / "pipeline")):
        save_with_history(pipeline, folder / "pipeline", state.history)
    if settings.keep == "every" and epoch % settings.keep_every == 0:
        save_with_history(pipeline, folder / "epochs" / f"{epoch:04d}", state.history)


def _keeper(settings, state, data, folder, main):
    """A function that saves the checkpoint, in the main process."""

    def keep():
        if main:
            saved = state.state_dict() | dict(settings=dataclasses.asdict(settings), data=data)
            write_checkpoint(folder, saved)

    return keep
