"""lab6/files.py: finding the course's files, and what is wrong with them."""

import json

import numpy as np
import pytest
from conftest import make_data, noise_picture

import lab6_utils as lab


def test_data_is_found_in_the_folder_of_the_environment(data):
    files = lab.find_data()
    assert (files.root, files.images) == (data, data / "iclevr")
    assert files.train == json.loads((data / "train.json").read_text())
    assert files.test == [["gray cube"], ["red cube", "blue sphere"]] and len(files.new_test) == 1


def test_data_is_found_in_the_workbooks_own_folder(tmp_path, monkeypatch):
    make_data(tmp_path / "data")
    monkeypatch.delenv("LAB6_DATA")
    monkeypatch.setattr("lab6.files.ROOT", tmp_path)
    assert lab.find_data().root == tmp_path / "data"


def test_object_json_serves_as_objects_json(tmp_path, monkeypatch):
    monkeypatch.setenv("LAB6_DATA", str(make_data(tmp_path / "data", objects="object.json")))
    assert lab.find_data().root == tmp_path / "data"


def test_missing_files_are_all_named(tmp_path, monkeypatch):
    monkeypatch.setenv("LAB6_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError) as error:
        lab.find_data()
    for words in ("iclevr/ or iclevr.zip", "objects.json or object.json", "train.json", "test.json", "new_test.json",
                  "LAB6_DATA", str(tmp_path)):  # fmt: skip
        assert words in str(error.value)


def test_only_the_missing_file_is_named(data):
    (data / "new_test.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"No i-CLEVR data: new_test\.json not found"):
        lab.find_data()


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("objects.json", json.dumps({n: i for i, n in enumerate(reversed(lab.OBJECTS))}), "not the 24 objects"),
        ("objects.json", "[]", "not the 24 objects"),
        ("train.json", "{", "not readable as json"),
        ("train.json", "[]", "expected"),
        ("train.json", '{"../CLEVR_train_000000_0.png": ["red cube"]}', "not a plain file name"),
        ("train.json", '{"..\\\\CLEVR_train_000000_0.png": ["red cube"]}', "not a plain file name"),
        ("train.json", '{"/etc/passwd": ["red cube"]}', "not a plain file name"),
        ("train.json", '{"CLEVR_train_000000_0.png": ["red cub"]}', "did you mean 'red cube'"),
        ("test.json", '[["red cube", "red cube"]]', "is twice"),
        ("new_test.json", '[["red cube"], 3]', ""),
        ("new_test.json", "[[]]", "is empty"),
        ("test.json", "[]", "one or more images"),
    ],
)
def test_a_wrong_json_file_is_named(data, name, text, words):
    (data / name).write_text(text)
    with pytest.raises(ValueError) as error:
        lab.find_data()
    assert str(data / name) in str(error.value) and words in str(error.value)


def test_the_held_out_scenes_are_those_of_the_design():
    assert sorted(map(int, lab.held_out_scenes())) == list(range(5500, 6003))


def test_the_unseen_sets(real_files):
    sets = {kind: [frozenset(names) for names in each] for kind, each in lab.unseen_sets().items()}
    assert {kind: (len(set(each)), set(map(len, each))) for kind, each in sets.items()} == {
        "pairs": (20, {2}), "triples of such a pair": (60, {3}), "triples": (120, {3})}  # fmt: skip
    tested = [frozenset(names) for names in real_files.test + real_files.new_test]
    bears_pair = lambda names: any(pair <= names for pair in sets["pairs"])
    assert not any(map(bears_pair, tested + sets["triples"])) and all(map(bears_pair, sets["triples of such a pair"]))
    assert not set(tested) & set(sets["triples"])
    for each in lab.unseen_sets().values():
        lab.encode_labels(each)  # raises for an unknown label


def test_names_that_no_scene_can_be_read_from_are_refused(tmp_path, runs, monkeypatch):
    pictures = {"holiday.png": (noise_picture(np.random.default_rng(0)), ["red cube"])}
    monkeypatch.setenv("LAB6_DATA", str(make_data(tmp_path / "data", pictures=pictures)))
    with pytest.raises(ValueError, match=r"holiday\.png"):
        lab.ICLEVRDataset(lab.find_data())
