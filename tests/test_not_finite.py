"""Numbers that go wrong: nothing that is not finite is trained on, saved, drawn or scored."""

import json
import math

import pytest
import torch
from conftest import make_pipeline, tiny

import lab6_utils as lab


@pytest.fixture
def broken(synthetic, monkeypatch):
    """A function (batches): from that batch on, the images of the dataset are nan."""
    real = lab.ICLEVRDataset.images_at

    def breaks(after):
        taken = iter(range(10**9))
        share = lambda: 1.0 if next(taken) < after else math.nan
        monkeypatch.setattr(lab.ICLEVRDataset, "images_at", lambda self, rows: share() * real(self, rows))

    yield breaks
    monkeypatch.setattr(lab.ICLEVRDataset, "images_at", real)


def files_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and "tensorboard" not in path.parts}


@pytest.mark.parametrize("choices", [dict(), dict(preset="layout")])
def test_training_stops_at_a_loss_that_is_not_finite_and_keeps_the_last_good_epoch(synthetic, runs, broken, choices):
    settings = tiny(epochs=4, keep="every", keep_every=1, checkpoint_minutes=1e-6, **choices)
    folder, steps = lab.run_folder(settings), len(synthetic) // 8
    training = lab.train(settings, synthetic, folder)
    next(training), next(training)
    kept = files_of(folder / "epochs") | {folder / "history.json": (folder / "history.json").read_bytes()}
    broken(after=1)
    words = f"epoch 3, step {2 * steps + 2}: loss or weights are no longer finite .*learning_rate=0.0008.*epoch 2"
    with pytest.raises(RuntimeError, match=words) as error:
        list(training)
    assert "\n" not in str(error.value)
    assert files_of(folder).items() >= kept.items(), "nothing of the good epochs is overwritten"
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert all(value.isfinite().all() for value in state["model"].values()) and state["part"]["steps"] <= 1
    broken(after=10**6)
    assert [record.epoch for record in lab.train(settings, synthetic, folder)] == [3, 4], "and training goes on there"


def test_weights_that_are_not_finite_are_not_saved(synthetic, runs, monkeypatch):
    """The last step of an epoch may break the weights after its loss was fine."""
    settings = tiny(epochs=1)
    steps, seen = len(synthetic) // 8, []

    def step(optimizer, closure=None):
        seen.append(1)
        if len(seen) == steps:
            optimizer.param_groups[0]["params"][0].data.fill_(math.inf)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with pytest.raises(RuntimeError, match=f"step {steps}: loss or weights"):
        list(lab.train(settings, synthetic, lab.run_folder(settings)))
    assert not list(lab.run_folder(settings).glob("*.pt")) and not (lab.run_folder(settings) / "pipeline").exists()


def test_the_autoencoder_stops_too(synthetic, runs, broken):
    broken(after=0)
    settings = tiny(preset="latent")
    with pytest.raises(ValueError, match="autoencoder's loss in epoch 1 holds numbers that are not finite"):
        list(lab.train_autoencoder(settings, synthetic, lab.run_folder(settings)))


def test_an_evaluator_stops_too(synthetic, tmp_path, monkeypatch):
    monkeypatch.setattr("lab6.evaluator_training._augment", lambda images, generator: images * math.nan)
    with pytest.raises(ValueError, match="the loss of resnet18 in epoch 1 holds numbers that are not finite"):
        list(lab.train_evaluator(tiny(), synthetic, tmp_path / "evaluator"))
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_images_that_are_not_finite_are_neither_drawn_nor_kept_nor_scored(bad, tmp_path):
    images = torch.zeros(2, 3, 64, 64)
    images[1, 0, 5, 5] = bad
    with pytest.raises(ValueError, match="not finite"):
        lab.save_images(images, tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="not finite"):
        lab.plot_images(images)
    with pytest.raises(ValueError, match="images to be scored holds numbers that are not finite"):
        lab.evaluate(lab.Evaluator.find(), images, [["red cube"], ["blue sphere"]])


def test_weights_that_are_not_finite_are_refused_when_loaded(tmp_path):
    pipe = make_pipeline(tiny())
    pipe.denoiser.unet.conv_in.bias.data[0] = math.nan
    pipe.save_pretrained(tmp_path / "pipeline")
    with pytest.raises(ValueError, match=r"pipeline holds numbers that are not finite .* make it again"):
        lab.load_pipeline(tiny(), str(tmp_path / "pipeline"))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_json_is_strict(tmp_path, bad):
    file = tmp_path / "results.json"
    lab.write_json(file, {"accuracy": 0.5})
    with pytest.raises(ValueError, match=r"results\.json: not written, since a number in it is not finite"):
        lab.write_json(file, {"accuracy": bad})
    assert json.loads(file.read_text()) == {"accuracy": 0.5}


def test_a_gpu_without_enough_memory_names_the_setting_to_lower(synthetic, runs, monkeypatch):
    def full(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr("lab6.training.training_batch", full)
    with pytest.raises(
        RuntimeError, match=r"not enough GPU memory to train with batch_size=8: lower it \(batch_size=4 "
    ):
        list(lab.train(tiny(), synthetic, lab.run_folder(tiny())))
