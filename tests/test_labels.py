"""lab6/labels.py: labels and images as tensors."""

import numpy as np
import pytest
import torch
from conftest import make_data

import lab6_utils as lab


def test_objects_are_in_the_courses_order():
    assert len(lab.OBJECTS) == len(set(lab.OBJECTS)) == 24
    positions = {"gray cube": 0, "yellow cube": 7, "gray sphere": 8, "red sphere": 9, "yellow cylinder": 23}
    for name, index in positions.items():
        assert lab.OBJECTS[index] == name


def test_encoding_is_multi_hot_and_decoding_undoes_it():
    sets = [["cyan cube", "red sphere"], ["gray cube"], list(lab.OBJECTS)]
    labels = lab.encode_labels(sets)
    assert labels.shape == (3, 24) and labels.dtype == torch.float32
    assert labels[0].nonzero().flatten().tolist() == [6, 9]
    assert labels.sum(1).tolist() == [2, 1, 24]
    assert lab.decode_labels(labels) == sets
    assert torch.equal(lab.encode_labels(sets[0]), labels[:1]), "one set is a batch of one"
    assert torch.equal(lab.encode_labels(tuple(reversed(sets[0]))), labels[:1]), "the order does not matter"
    assert lab.decode_labels(labels[1]) == [["gray cube"]]


@pytest.mark.parametrize(
    "sets, words",
    [
        ("red cube", "'red cube': give a list of labels, such as ['red cube']"),
        (["red cube", "red spere"], "unknown label 'red spere' in label set 0: did you mean 'red sphere'?"),
        ([["red cube"], ["zzz"]], "unknown label 'zzz' in label set 1: an object is one of gray cube, red cube"),
        ([["red cube", "gray cube", "red cube"]], "label 'red cube' is twice in label set 0"),
        ([["red cube"], []], "label set 1 is empty: name at least one object"),
    ],
)
def test_wrong_labels_are_refused(sets, words):
    with pytest.raises(ValueError) as error:
        lab.encode_labels(sets)
    assert words in str(error.value)


def test_black_is_minus_one_white_is_one_and_both_return(tmp_path, runs, monkeypatch):
    ramp = np.arange(64 * 64 * 3, dtype=np.uint8).reshape(64, 64, 3)
    pictures = {f"CLEVR_train_000001_{k}.png": (p, ["red cube"])
                for k, p in enumerate((np.zeros_like(ramp), np.full_like(ramp, 255), ramp))}  # fmt: skip
    monkeypatch.setenv("LAB6_DATA", str(make_data(tmp_path / "data", pictures=pictures)))
    dataset = lab.ICLEVRDataset(lab.find_data())
    assert (dataset[0][0] == -1).all() and (dataset[1][0] == 1).all()
    assert dataset[2][0].min() == -1 and dataset[2][0].max() == 1
    assert torch.equal(lab.to_uint8(dataset[2][0]), dataset.pixels[2]), "256 values go there and back"


def test_to_uint8_rounds_and_clips():
    values = torch.tensor([-7.0, -1.0, 0.0, 1.0, 7.0, 2 * 100.4 / 255 - 1, 2 * 100.6 / 255 - 1])
    assert lab.to_uint8(values).tolist() == [0, 0, 128, 255, 255, 100, 101]


def test_pil_conversion_by_hand():
    image = torch.tensor([-1.0, 0.0, 1.0]).view(1, 3, 1, 1).expand(1, 3, 2, 4)
    (picture,) = lab.to_pil(image)
    assert picture.size == (4, 2) and picture.getpixel((3, 1)) == (0, 128, 255)


def test_places_by_object():
    places = lab.encode_places([["cyan cube", "red sphere"], ["gray cube"]], [[(1, 2), None], [(64, 0)]])
    assert places.shape == (2, 24, 2)
    assert places[0, lab.OBJECTS.index("cyan cube")].tolist() == [1, 2] and places[1, 0].tolist() == [64, 0]
    assert places.isfinite().sum() == 4, "nan where nothing is said"


@pytest.mark.parametrize(
    "places, words",
    [
        ([[(1, 2)]], "label set 0 has 2 labels and 1 places"),
        ([[(1, 2), (3, 4)]] * 2, "places of 2 label sets for 1 label sets"),
        ([[(1, 2), (3, 65)]], "place (3.0, 65.0) of 'red sphere' in label set 0: x and y are pixels"),
        ([[(1, 2), (1, 2, 3)]], "place (1, 2, 3) of 'red sphere' in label set 0: give (x, y)"),
    ],
)
def test_places_that_cannot_be(places, words):
    with pytest.raises(ValueError) as error:
        lab.encode_places([["cyan cube", "red sphere"]], places)
    assert words in str(error.value)
