"""Trains, samples and evaluates on a device that is not there (far_device.py); prints what the host waited for as json.

python tests/far_program.py training | sampling | evaluation | latents
"""

import contextlib
import functools
import json
import pathlib
import sys
import tempfile
import types

import accelerate
import torch

TESTS = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]
import far_device as far  # noqa: E402

import lab6_utils as lab  # noqa: E402
from lab6 import examples, machine, training  # noqa: E402

SETS = [["red cube"], ["blue sphere", "gray cube"], list(lab.MANUAL_SET)]


def make_generator(seed, *stream, device="cpu", original=machine.make_generator):
    near = original(seed, *stream)
    return near if torch.device(device).type == "cpu" else far.Generator().manual_seed(near.initial_seed())


def prepare():
    """Let lab6 make far generators, and save nothing, since far tensors have no storage."""
    rooms = [module for name, module in sys.modules.items() if name.startswith("lab6.")]
    for room in rooms:
        if hasattr(room, "make_generator"):
            room.make_generator = make_generator
    accelerate.Accelerator = functools.partial(accelerate.Accelerator, device_placement=False)
    for room in rooms:
        for name in ("save_with_history", "save_weights", "write_json", "write_whole", "replace_folder"):
            if hasattr(room, name):
                setattr(room, name, lambda *_: None)


def settings_on_far(**choices):
    settings = lab.make_settings("tiny", device="cpu", precision="fp32", **choices)
    object.__setattr__(settings, "device", "far")  # no device that can be chosen
    return settings


class Pictures(lab.ICLEVRDataset):
    """40 pictures of noise."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.pixels = torch.randint(0, 256, (40, 3, 64, 64), dtype=torch.uint8, generator=generator)
        self.labels = torch.eye(24)[torch.arange(40) % 24]
        self.names, self.split, self.source = [f"CLEVR_train_{i:06d}_0.png" for i in range(40)], "train", "noise"
        train = {name: [lab.OBJECTS[i % 24]] for i, name in enumerate(self.names)}
        self.files = types.SimpleNamespace(train=train, places={name: [[32, 28]] for name in train})


def training_waits(folder):
    """What the host waits for in the second of two epochs of five steps: as it should be, and with faults."""
    training.loss_weights = lambda *_, right=training.loss_weights: right(*_) if fault != "weights" else Stuck()
    training.open_examples = lambda *_, right=examples.open_examples: labels_stay(right(*_), fault == "labels")
    for fault, preset in (("none", "tokens"), ("none", "layout"), ("labels", "tokens"), ("weights", "tokens")):
        epochs = lab.train(settings_on_far(preset=preset), Pictures(), folder / fault / preset)
        next(epochs)
        far.WAITS.clear()
        last = next(epochs)
        yield f"{fault}, {preset}", {"loss": last.loss, "waits": counted()}


def labels_stay(opened, fault):
    """Examples whose labels, with a fault, stay on the CPU."""
    if fault:
        opened.labels = Pictures().labels
    return opened


class Stuck:
    """Weights of the loss that stay on the CPU, whatever device they are asked to go to."""

    def to(self, device):
        return torch.ones(1000)


def sampling_waits():
    """For every sampler and guidance: the waits of 2 steps, and of 4."""
    found, settings = {}, settings_on_far()
    pipe = lab.ICLEVRPipeline(lab.make_denoiser(settings).eval(), lab.make_scheduler(settings))
    pipe.classifier, noise = evaluator("resnet18"), pipe.scheduler
    for sampler in lab.SAMPLERS:
        for guidance in lab.GUIDANCES:
            if guidance == "classifier-1" and sampler != "ddpm":
                continue
            for count in (2, 4):
                settings = settings_on_far(sampler=sampler, guidance=guidance, guidance_scale=3.0, steps=count)
                pipe.scheduler = lab.make_sampler(sampler, noise)
                far.WAITS.clear()
                assert lab.sample(pipe, SETS[1:], settings).isfinite().all()
                found[f"{sampler}, {guidance}, {count}"] = sum(far.WAITS.values())
    return found


def evaluator(name):
    from lab6.evaluators import make_evaluator_network

    return lab.Evaluator(make_evaluator_network(name), name, device=far.DEVICE)


def evaluation_waits(folder):
    """Both evaluators are trained and score."""
    for name in ("resnet18", "judge"):
        settings = settings_on_far(evaluator_epochs=2)
        records = lab.train_evaluator(settings, Pictures(), folder / name, Pictures(), name)
        next(records)
        far.WAITS.clear()
        next(records)
        yield name, counted()
        score = lab.evaluate(evaluator(name), lab.to_float(Pictures().pixels), Pictures().labels)
        assert 0 <= score.metrics()["accuracy"] <= 1 and evaluator(name).features(torch.zeros(2, 3, 64, 64)).ndim == 2


def latent_waits(folder):
    """An autoencoder is trained, and latents by it."""
    settings, parts = settings_on_far(preset="latent", autoencoder_epochs=2, batch_size=8), []
    dataset = Pictures()
    with contextlib.suppress(FileNotFoundError):  # nothing was saved, so there is nothing to tidy up at the end
        for record in lab.train_autoencoder(settings, dataset, folder):
            parts.append(record.error)
    examples = lab.LatentDataset(dataset, lab.make_autoencoder(settings).eval().requires_grad_(False))
    far.WAITS.clear()
    batch = lab.training_batch(settings, examples, lab.make_scheduler(settings), 1)
    return {"errors": parts, "device": str(batch["x_t"].device), "waits": counted()}


def counted():
    return {f"{operation} at {place}": count for (operation, place), count in far.WAITS.items()}


def main(what):
    prepare()
    with far.FarMode(), tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        results = {
            "training": lambda: dict(training_waits(folder)),
            "sampling": sampling_waits,
            "evaluation": lambda: dict(evaluation_waits(folder)),
            "latents": lambda: latent_waits(folder),
        }
        print(json.dumps(results[what]()))


if __name__ == "__main__":
    main(*sys.argv[1:])
