"""lab6/examples.py: what a training step sees."""

import pytest
import torch
from conftest import assert_same, batches, part_of, tiny

import lab6_utils as lab


def joined(parts):
    """The shares of all processes together; None where there is nothing."""
    parts = list(parts)
    return None if parts[0] is None else torch.cat(parts)


def test_time_steps_span_the_whole_range(small):
    corner = part_of(small, 40)
    corner.pixels = corner.pixels[:, :, :2, :2]  # less noise to draw
    times = torch.stack([b["t"] for b in batches(tiny(num_train_timesteps=50, batch_size=40), corner, 100)])
    counts = torch.bincount(times.flatten(), minlength=50)
    assert len(counts) == 50 and counts.min() > 40 and counts.max() < 130, "4,000 draws, 80 of each"
    assert len(set(times[0].tolist())) > 10, "each picture has its own"
    long = torch.cat([b["t"] for b in batches(tiny(batch_size=40), corner, 200)])
    assert long.min() < 5 and 994 < long.max() <= 999


def test_each_batch_has_times_from_everywhere(small, monkeypatch):
    for batch in batches(tiny(batch_size=8), small, 5):
        assert (batch["t"].sort().values // 125).tolist() == list(range(8)), "one from each eighth"
    draw = torch.rand
    almost_one = torch.tensor(1 - 2**-24)  # the largest that torch.rand gives
    monkeypatch.setattr(torch, "rand", lambda *size, **kw: almost_one if size == ((),) else draw(*size, **kw))
    assert batches(tiny(batch_size=40), small, 1)[0]["t"].max() == 999


def test_labels_are_dropped_at_their_rate(small):
    corner = part_of(small, 40)
    corner.pixels = corner.pixels[:, :, :2, :2]
    share = lambda rate: torch.cat([b["null"] for b in batches(tiny(label_dropout=rate, batch_size=40), corner, 50)])
    assert share(0.3).float().mean().item() == pytest.approx(0.3, abs=0.04)
    assert not share(0.0).any()


def test_each_picture_keeps_its_labels_and_comes_once_an_epoch(small):
    for flip in (False, True):
        rows, mirrored = [], 0
        for batch in batches(tiny(batch_size=8, flip=flip), small, 10):
            for image, labels in zip(lab.to_uint8(batch["x_0"]), batch["labels"], strict=True):
                same = [(small.pixels == x).flatten(1).all(1) for x in (image, image.flip(2))]
                mirrored += int(same[1].any())
                (row,) = (same[0] | same[1]).nonzero().flatten().tolist()
                assert torch.equal(labels, small.labels[row])
                rows.append(row)
        assert sorted(rows[:40]) == sorted(rows[40:]) == list(range(40)), "all pictures in each epoch"
        assert rows[:40] != rows[40:] and rows[:40] != sorted(rows[:40]), "in a new order"
        assert 25 < mirrored < 55 if flip else mirrored == 0


def test_targets_and_noise_are_the_closed_forms(small):
    settings = tiny(batch_size=40)
    a = lab.alphas_bar("cosine").float()
    for kind in ("epsilon", "v_prediction", "sample"):
        b = batches(tiny(batch_size=40, prediction=kind), small, 1)[0]
        signal, spread = a[b["t"]].sqrt().view(-1, 1, 1, 1), (1 - a[b["t"]]).sqrt().view(-1, 1, 1, 1)
        target = {"epsilon": b["eps"], "v_prediction": signal * b["eps"] - spread * b["x_0"], "sample": b["x_0"]}
        torch.testing.assert_close(b["target"], target[kind], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(b["x_t"], signal * b["x_0"] + spread * b["eps"], rtol=1e-4, atol=1e-4)
    eps = torch.cat([b["eps"] for b in batches(settings, small, 3)])
    assert eps.mean().abs() < 0.01 and eps.std().item() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("count", [3, 6])
def test_shares_may_cut_blocks(small, count):
    """24 pictures are eight blocks of three."""
    settings = tiny(batch_size=24)
    examples, scheduler = lab.open_examples(settings, small, None), lab.make_scheduler(settings)
    whole = lab.training_batch(settings, examples, scheduler, 0)
    parts = [lab.training_batch(settings, examples, scheduler, 0, (rank, count)) for rank in range(count)]
    assert_same(whole, {name: joined(part[name] for part in parts) for name in whole})


def test_a_batch_depends_on_seed_and_step_alone(small):
    settings, scheduler = tiny(), lab.make_scheduler(tiny())
    examples = lab.open_examples(settings, small, None)
    torch.manual_seed(1)
    one = lab.training_batch(settings, examples, scheduler, 3)
    torch.manual_seed(2)
    assert_same(one, lab.training_batch(settings, examples, scheduler, 3))
    for other in (
        lab.training_batch(settings, examples, scheduler, 4),
        lab.training_batch(tiny(seed=1), examples, scheduler, 3),
    ):
        assert not torch.equal(one["eps"], other["eps"]) and not torch.equal(one["t"], other["t"])


def test_processes_share_one_batch(small):
    settings, scheduler = tiny(), lab.make_scheduler(tiny())
    examples = lab.open_examples(settings, small, None)
    whole = lab.training_batch(settings, examples, scheduler, 2)
    for count in (2, 4, 8):  # eight blocks
        parts = [lab.training_batch(settings, examples, scheduler, 2, (rank, count)) for rank in range(count)]
        assert_same(whole, {name: joined(part[name] for part in parts) for name in whole})


def placed(scenes, monkeypatch, **overrides):
    """Batches of what a network that is told of places sees of rendered or real scenes, with the dataset."""
    monkeypatch.setenv("LAB6_DATA", str(scenes))
    settings = tiny(preset="layout", **dict(batch_size=30, max_images=90) | overrides)
    dataset = lab.training_set(settings, lab.find_data())
    return batches(settings, dataset, len(dataset) // 30), dataset


def test_a_share_of_the_images_shows_more_objects(scenes, monkeypatch):
    for shares in ((0.2, 0.3, 0.5), (0.0, 0.0, 1.0), (1.0, 0.0, 0.0)):
        found, _ = placed(scenes, monkeypatch, object_shares=shares)
        objects = torch.cat([b["labels"].sum(1) for b in found])
        counts = [(objects == n).sum().item() for n in (1, 2, 3)]
        assert counts == pytest.approx([share * 90 for share in shares], abs=1)


def test_places_go_with_their_images(scenes, monkeypatch):
    found, dataset = placed(scenes, monkeypatch, place_dropout=0.0, object_shares=())
    true = lab.places_by_object(dataset.files, dataset)
    for batch in found:
        assert (batch["places"].isfinite().all(2) == batch["labels"].bool()).all()
        for image, labels, told in zip(batch["x_0"], batch["labels"], batch["places"], strict=True):
            row = next(i for i in range(90) if torch.equal(lab.to_float(dataset.pixels[i]), image)
                       and torch.equal(dataset.labels[i], labels))  # fmt: skip
            assert (told - true[row]).nan_to_num().abs().max() < 3, "half a pixel to and fro"


def test_some_places_are_left_out(scenes, monkeypatch):
    known = {}
    for rate in (0.0, 0.5, 1.0):
        found, _ = placed(scenes, monkeypatch, place_dropout=rate)
        told, asked = (torch.cat([b[name] for b in found]) for name in ("places", "labels"))
        told, asked = told.isfinite().all(2).sum(1), asked.sum(1)
        known[rate] = [(told == asked).float().mean(), (told == 0).float().mean()]
    assert known[0.0][0] == 1 and known[0.0][1] == 0
    assert 0.3 < known[0.5][0] < 0.8
    assert known[1.0][0] < 0.3 and 0.4 < known[1.0][1] < 0.95, "of some images a part is known"


def test_a_mirrored_image_has_mirrored_places(scenes, monkeypatch):
    found, _ = placed(scenes, monkeypatch, place_dropout=0.0, flip=True)
    straight, _ = placed(scenes, monkeypatch, place_dropout=0.0, flip=False)
    mirrored = 0
    for a, b in zip(found, straight, strict=True):
        turned = (a["x_0"] - b["x_0"]).abs().amax((1, 2, 3)) > 0
        expected = torch.where(turned[:, None], 64 - b["places"][..., 0], b["places"][..., 0])
        torch.testing.assert_close(a["places"][..., 0], expected, equal_nan=True)
        mirrored += turned.sum().item()
    assert 20 < mirrored < 70
