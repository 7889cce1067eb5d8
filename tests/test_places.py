"""lab6/places.py: where objects stand, by hand, in rendered scenes (where it is known) and in real ones."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from conftest import make_data

import lab6_utils as lab


def squares(corners):
    """A gray picture with a square of 4x4 pixels at each (x, y)."""
    pixels = np.full((64, 64, 3), 120, np.uint8)
    for i, (x, y) in enumerate(corners):
        pixels[y : y + 4, x : x + 4, i % 3] = 255
    return pixels


def test_the_place_of_a_change_is_its_middle():
    one, two = (torch.from_numpy(squares(corners)).permute(2, 0, 1)[None] for corners in ([], [(10, 40)]))
    assert lab.place_of_change(one, two).tolist() == [[12.0, 42.0]] == lab.place_of_change(two, one).tolist()
    assert lab.place_of_change(one, one).isnan().all(), "nothing was added"
    shadow = (two.int() - 40).clamp(min=0).byte()
    assert lab.place_of_change(two, shadow).isnan().all(), "a shadow is no object"


@pytest.fixture
def scene(tmp_path, runs, monkeypatch):
    """Three images of two scenes; of the second scene the middle one is missing."""
    names, corners = ["red cube", "blue sphere", "gray cube"], [(30, 26), (8, 50), (44, 12)]
    pictures = {f"CLEVR_train_{s:06d}_{k}.png": (squares(corners[: k + 1]), names[: k + 1])
                for s in (0, 1) for k in range(3) if (s, k) != (1, 1)}  # fmt: skip
    monkeypatch.setenv("LAB6_DATA", str(make_data(tmp_path / "data", pictures=pictures)))
    return lab.find_data()


def test_places_are_in_the_order_in_which_objects_were_added(scene):
    dataset = lab.ICLEVRDataset(scene, "all")
    places = lab.find_places(scene, dataset)
    assert places.shape == (5, 3, 2)
    first, second, third = list(lab.FIRST_PLACE), [10.0, 52.0], [46.0, 14.0]
    expected = [[first], [first, second], [first, second, third], [first]]
    for found, wanted in zip(places, expected, strict=False):
        torch.testing.assert_close(found[: len(wanted)], torch.tensor(wanted))
        assert found[len(wanted) :].isnan().all()
    assert dataset.names[4] == "CLEVR_train_000001_2.png" and places[4].isnan().all(), "what it adds is not seen"


def test_a_part_of_the_data_has_the_places_of_the_whole(scene):
    whole, last = lab.ICLEVRDataset(scene, "all"), lab.ICLEVRDataset(scene, "all", without=["CLEVR_train_000000_1.png"])
    assert last.names[1] == "CLEVR_train_000000_2.png"
    assert torch.equal(lab.find_places(scene, last)[1], lab.find_places(scene, whole)[2])


def test_places_of_rendered_scenes_are_found_where_they_are(rendered, runs):
    """The truth is the middle of the object; what is found, the middle of what can be seen of it."""
    files = lab.read_data(rendered)
    dataset = lab.ICLEVRDataset(files, "all")
    known = lab.find_places(files, dataset)
    found = lab.find_places(dataclasses.replace(files, places={}), dataset)
    assert not (known.isnan() ^ found.isnan()).any() and (~known.isnan()).sum() == 2 * 24 * (1 + 2 + 3)
    error = (known - found).norm(dim=-1)[~known.isnan().any(-1)]
    assert error.median() < 0.5 and error.quantile(0.95) < 2.5, error.sort().values[-5:]
    assert (known[:, 0] - torch.tensor(lab.FIRST_PLACE)).abs().max() < 0.7


def test_places_that_do_not_fit_the_images_are_refused(rendered, tmp_path, runs):
    folder = tmp_path / "scenes"
    folder.mkdir()
    for file in rendered.iterdir():
        (folder / file.name).symlink_to(file)
    places = json.loads((rendered / "places.json").read_text())
    places["CLEVR_train_000003_2.png"].pop()
    (folder / "places.json").unlink()
    (folder / "places.json").write_text(json.dumps(places))
    with pytest.raises(ValueError, match=r"places\.json: expected \[x, y\] of each object"):
        lab.read_data(folder)


def test_places_in_real_scenes(real_files):
    dataset = lab.ICLEVRDataset(real_files, "all")
    places = lab.find_places(real_files, dataset)
    count = dataset.labels.sum(1)
    assert torch.equal((~places.isnan().any(-1)).sum(1), count.long()), "each object is found"
    there = places[~places.isnan().any(-1)]
    assert there.min() > 2 and there.max() < 62
    apart = torch.cdist(places[count == 3], places[count == 3]) + 99 * torch.eye(3)
    assert apart.amin((1, 2)).median() > 8, "objects do not stand in each other"
