"""lab6/evaluator_training.py: our evaluators are trained, kept and told apart by their data."""

import numpy as np
import pytest
import torch
from conftest import make_data, matrices, shipped, tiny
from torch import nn

import lab6_utils as lab
from lab6 import evaluator_training


def test_the_courses_checkpoint_comes_first(network, data, monkeypatch, tmp_path):
    monkeypatch.setattr("lab6.evaluators.WEIGHTS", tmp_path / "weights")
    evaluator_training.save_weights(network, tmp_path / "weights" / "evaluator" / "model.safetensors")
    files = lab.find_data()
    assert lab.Evaluator.find(files).name == lab.Evaluator.find().name == "resnet18"
    torch.save({"model": network.state_dict()}, data / "checkpoint.pth")
    assert lab.Evaluator.find(files).name == "course"
    assert lab.prepare_evaluator(tiny(), files).name == "course", "in every profile"


@pytest.fixture(scope="module")
def coloured(tmp_path_factory, environment):
    """96 pictures that a glance can tell apart: three colours of the whole picture, with a little noise."""
    rng = np.random.default_rng(0)
    colours = {"red cube": (200, 40, 40), "green sphere": (40, 180, 60), "blue cylinder": (40, 60, 200)}
    pixels = [
        np.clip(np.array(c) + rng.normal(0, 12, (64, 64, 3)), 0, 255).astype(np.uint8)
        for c in colours.values()
        for _ in range(32)
    ]

    class Coloured(torch.utils.data.Dataset):
        pass

    dataset = Coloured()
    dataset.pixels = torch.from_numpy(np.stack(pixels).transpose(0, 3, 1, 2).copy())
    dataset.labels = lab.encode_labels([[name] for name in colours for _ in range(32)])
    dataset.names = [f"CLEVR_train_{i:06d}_0.png" for i in range(96)]
    Coloured.__len__ = lambda self: len(self.pixels)
    return dataset


@pytest.mark.parametrize(("reader", "epochs", "seen", "size"), [("resnet18", 4, 64, 23e6), ("judge", 8, 64, 9e6)])
def test_an_evaluator_learns_and_is_kept(coloured, tmp_path, reader, epochs, seen, size):
    settings = tiny(evaluator_epochs=epochs)
    records = list(lab.train_evaluator(settings, coloured, tmp_path, held_out=coloured, name=reader))
    assert [r["epoch"] for r in records] == list(range(1, epochs + 1)) and records[0]["images_seen"] == seen
    assert records[-1]["loss"] < 0.3 * records[0]["loss"]
    assert records[-1]["accuracy"] >= 0.9, "chance is below 0.1"
    evaluator, again = lab.Evaluator.load(tmp_path), lab.Evaluator.load(tmp_path)
    images = lab.to_float(coloured.pixels)
    assert evaluator.name == reader and torch.equal(evaluator(images), again(images))
    assert evaluator.eval(images, coloured.labels) == pytest.approx(records[-1]["accuracy"], abs=0.03)
    assert (tmp_path / "model.safetensors").stat().st_size < size


def test_the_judge_leaves_every_fifth_scene_out(coloured, tmp_path, monkeypatch):
    """20 scenes whose pictures are white are 0, 5, 10, ...: the judge never sees one, the evaluator does."""
    pixels, seen = coloured.pixels.clone(), []
    pixels[::5] = 255
    monkeypatch.setattr(coloured, "pixels", pixels)
    for name in ("_augment", "_augment_for_judge"):
        monkeypatch.setattr(
            f"lab6.evaluator_training.{name}",
            lambda images, g: (seen.append((images == 1).flatten(1).all(1).sum()), images)[1],
        )
    for reader, whites in (("judge", False), ("resnet18", True)):
        seen.clear()
        list(lab.train_evaluator(tiny(evaluator_epochs=2), coloured, tmp_path / reader, name=reader))
        assert (sum(seen) > 0) == whites


def test_evaluators_learn_from_crowded_scenes_too(coloured, tmp_path, monkeypatch):
    """40 white pictures of eight scenes beside 96 others, told apart by their labels: the judge leaves scenes 0 and 5
    of both out."""
    crowded, seen = type(coloured)(), []
    crowded.pixels, crowded.labels = torch.full((40, 3, 64, 64), 255, dtype=torch.uint8), torch.zeros(40, 24)
    crowded.names = [f"CLEVR_train_{i // 5:06d}_{i % 5}.png" for i in range(40)]
    loss = torch.nn.functional.binary_cross_entropy_with_logits
    white = lambda images: (images == 1).flatten(1).all(1)
    for name in ("_augment", "_augment_for_judge"):
        monkeypatch.setattr(
            f"lab6.evaluator_training.{name}", lambda images, generator: (seen.append(white(images)), images)[1]
        )

    def check(logits, labels):
        assert torch.equal(seen[-1], labels.sum(1) == 0), "labels stay with their pictures"
        return loss(logits, labels)

    monkeypatch.setattr(lab.F, "binary_cross_entropy_with_logits", check)
    for reader, whites, total in (("resnet18", 40, 136), ("judge", 30, 106)):
        seen.clear()
        (record,) = lab.train_evaluator(tiny(evaluator_epochs=1), coloured, tmp_path / reader, None, reader, crowded)
        assert record["images_seen"] == 64 * (total // 64) == sum(map(len, seen))
        assert whites * record["images_seen"] / total / 2 < sum(int(w.sum()) for w in seen) <= whites


def test_evaluators_are_trained_once_for_each_choice(data, runs, coloured, monkeypatch):
    """And the scenes that train them are not those that test them in notebook 06 (seed 2)."""
    asked = []
    monkeypatch.setattr(
        evaluator_training, "crowded_scenes", lambda scenes, seed: (asked.append((scenes, seed)), coloured)[1]
    )
    files = lab.find_data()
    plain, crowded, again = (lab.prepare_judge(tiny(evaluator_scenes=n), files) for n in (0, 7, 7))
    assert asked == [(7, 1)] and plain.sha256 != crowded.sha256 == again.sha256


@pytest.mark.parametrize("augment", [evaluator_training._augment, evaluator_training._augment_for_judge])
def test_augmented_pictures_are_pictures_of_the_same(coloured, augment):
    images = lab.to_float(coloured.pixels[::8])
    varied, again = (augment(images, lab.make_generator(3)) for _ in range(2))
    assert varied.shape == images.shape and torch.equal(varied, again)
    assert (varied - images).abs().mean() > 0.02
    assert (varied.mean((2, 3)).argmax(1) == images.mean((2, 3)).argmax(1)).all(), "colour is what the label says"


@pytest.mark.parametrize(("name", "size"), [("evaluator", 23e6), ("judge", 9e6)])
def test_the_shipped_evaluators_read_real_pictures(real_files, name, size):
    file = shipped(name, "model.safetensors")
    assert file.stat().st_size <= size and matrices(file) == {"BF16"}
    held_out = lab.ICLEVRDataset(real_files, "held-out")
    evaluator = lab.Evaluator.load(lab.WEIGHTS / name)
    assert len(held_out) == 30 and evaluator.eval(lab.to_float(held_out.pixels), held_out.labels) >= 0.9
    soft = nn.functional.interpolate(lab.to_float(held_out.pixels), size=32, mode="bilinear", antialias=True)
    soft = nn.functional.interpolate(soft, size=64, mode="bilinear")
    assert evaluator.eval(soft, held_out.labels) >= 0.85, "upsampled from 32x32, as the course's was trained"


def test_an_evaluator_of_other_data_is_trained_anew(data, runs, tmp_path, monkeypatch):
    """As many images, but others: rendered scenes in place of the course's files."""
    one = lab.prepare_evaluator(tiny(evaluator_scenes=0), lab.find_data())
    pictures = {f"CLEVR_train_{s:06d}_{k}.png": (np.full((64, 64, 3), 40 * k, np.uint8), ["red cube"])
                for s in (0, 1, 5500) for k in range(3)}  # fmt: skip
    monkeypatch.setenv("LAB6_DATA", str(make_data(tmp_path / "other", pictures=pictures)))
    other = lab.prepare_evaluator(tiny(evaluator_scenes=0), lab.find_data())
    assert one.sha256 != other.sha256
    monkeypatch.setenv("LAB6_DATA", str(data))
    assert lab.prepare_evaluator(tiny(evaluator_scenes=0), lab.find_data()).sha256 == one.sha256, "it was kept"
