"""lab6/files.py: finding the course's files, and what is wrong with them."""

import json
import shutil
import zipfile

import numpy as np
import pytest
import torch
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
    (data / "test.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"No i-CLEVR data: test\.json not found"):
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


# ── As it is handed out ────────────────────────────────────────────────────────────────────────────────


def zipped(folder, file, inside="", slash="/"):
    """Put all files below a folder into a zip, and remove the folder."""
    with zipfile.ZipFile(file, "w") as archive:
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            member = zipfile.ZipInfo("x")
            member.filename = (inside + path.relative_to(folder).as_posix()).replace("/", slash)
            archive.writestr(member, path.read_bytes())
    shutil.rmtree(folder)


def lists_in(folder):
    """Move the json files of a data folder into a folder of their own."""
    for file in folder.parent.glob("*.json"):
        folder.mkdir(exist_ok=True)
        file.rename(folder / file.name)


def nested(d):
    (d / "iclevr").rename(d / "inner")
    (d / "iclevr").mkdir()
    (d / "inner").rename(d / "iclevr" / "iclevr")


def beside_the_json(d):
    for file in (d / "iclevr").iterdir():
        file.rename(d / file.name)
    (d / "iclevr").rmdir()


def both_zips(d, suffix=""):
    lists_in(d / "file")
    zipped(d / "file", d / f"file{suffix}.zip", "file/")
    zipped(d / "iclevr", d / f"iclevr{suffix}.zip", "iclevr/")


def empty_beside_a_zip(d):
    zipped(d / "iclevr", d / "iclevr.zip", "iclevr/")
    (d / "iclevr").mkdir()


def with_marks(d):
    for file in d.glob("*.json"):
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())


HANDED_OUT = {
    "a folder in a folder": nested,
    "json in file/": lambda d: lists_in(d / "file"),
    "both zips": both_zips,
    "downloaded twice": lambda d: both_zips(d, " (1)"),
    "a zip with backslashes": lambda d: zipped(d / "iclevr", d / "iclevr.zip", "iclevr\\", "\\"),
    "images beside the json": beside_the_json,
    "an empty folder beside a good zip": empty_beside_a_zip,
    "all in a folder": lambda d: (shutil.copytree(d, d / "lab6"), shutil.rmtree(d / "iclevr"),
                                  [file.unlink() for file in d.glob("*.json")]),
    "byte order marks": with_marks,
    "Mac leftovers": lambda d: shutil.copytree(d / "iclevr", d / "__MACOSX" / "iclevr"),
    "a broken zip of something else": lambda d: (d / "homework.zip").write_bytes(b"hello"),
    "names in Chinese and spaces": lambda d: (d / "iclevr").rename(d / "圖片 資料"),
}  # fmt: skip


@pytest.mark.parametrize("how", HANDED_OUT)
def test_data_is_found_however_it_was_handed_out(data, runs, how, capsys):
    usual = lab.ICLEVRDataset(lab.find_data(), "all")
    HANDED_OUT[how](data)
    files = lab.find_data()
    dataset = lab.ICLEVRDataset(files, "all")
    assert dataset.names == usual.names and torch.equal(dataset.pixels, usual.pixels)
    assert (len(files.test), len(files.new_test), files.source) == (2, 1, "course files")
    said = capsys.readouterr().out
    if files.images in (data / "iclevr", data / "iclevr.zip") and (data / "train.json").exists():
        assert said == "", "all is in its usual place"
    else:
        assert said.count("progress: data: images from") == 1 and str(files.images) in said


def test_without_new_test_json_there_is_one_file_to_sample(data, capsys):
    (data / "new_test.json").unlink()
    files = lab.find_data()
    assert list(files.splits) == ["test"] and files.new_test == [] and "no new_test.json" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["checkpoint.pth", "classifier_weight.pth"])
def test_the_courses_evaluator_is_used_under_both_names(data, name):
    network = lab.Evaluator.find().network
    torch.save({"model": network.state_dict()}, data / name)
    assert lab.Evaluator.find(lab.find_data()).name == "course"


def test_what_is_ignored_in_the_workbooks_folder_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("LAB6_DATA")
    monkeypatch.setattr("lab6.files.ROOT", tmp_path)
    rendered = make_data(tmp_path / "rendered")
    monkeypatch.setattr("lab6.files.render_into_runs", lambda scenes: rendered)
    (tmp_path / "data").mkdir()
    assert lab.find_data().root == rendered and capsys.readouterr().out == ""
    (tmp_path / "data" / "best_model.pth").touch()
    assert lab.find_data().root == rendered
    assert "ignored in" in (said := capsys.readouterr().out) and "best_model.pth; scenes are rendered" in said
    (tmp_path / "data" / "lab6.zip").write_bytes(b"hello")
    with pytest.raises(FileNotFoundError, match=r"lab6\.zip: not a readable zip file"):
        lab.find_data()
    (tmp_path / "data" / "lab6.zip").unlink()
    (tmp_path / "data" / "my_sets.json").write_text("[]")
    assert lab.find_data().root == rendered, "what is not the course's does not stand in the way"
    (tmp_path / "data" / "test.json").write_text("[]")
    with pytest.raises(FileNotFoundError, match=r"not found in .*data"):
        lab.find_data()


def test_two_sets_of_data_are_not_mixed(data):
    """Rendered scenes have images of the same names as the course's."""
    shutil.copytree(data, data / "extra")
    (data / "extra" / "render.json").write_text("{}")
    (data / "extra" / "places.json").write_text("{}")
    files = lab.find_data()
    assert (files.source, files.images, files.places) == ("course files", data / "iclevr", {}), "a copy is the same"
    (data / "extra" / "test.json").write_text('[["red cube"]]')
    with pytest.raises(ValueError, match=r"data/test\.json and .*extra/test\.json differ: two sets of data"):
        lab.find_data()


def test_an_evaluator_is_found_where_the_json_is(data, capsys):
    (data / "file").mkdir()
    (data / "file" / "checkpoint.pth").touch()
    assert lab.find_data().evaluator == data / "file" / "checkpoint.pth"
    zipped(data / "file", data / "file.zip")
    assert lab.find_data().evaluator is None and "checkpoint.pth is in a zip in" in capsys.readouterr().out


def test_far_too_large_members_and_images_are_refused(data, runs, monkeypatch):
    monkeypatch.setattr("lab6.holdings.LARGEST", 100)
    zipped(data / "iclevr", data / "iclevr.zip", "iclevr/")
    with pytest.raises(
        ValueError, match=r"CLEVR_train_\d+_\d\.png: not readable \(.* bytes, which no file of the course"
    ):
        lab.ICLEVRDataset(lab.find_data())
    monkeypatch.setattr("lab6.holdings.LARGEST", 10**6)
    monkeypatch.setattr("lab6.dataset.LARGEST_IMAGE", 64 * 63)
    with pytest.raises(ValueError, match=r"not a readable image \(64 x 64 pixels"):
        lab.ICLEVRDataset(lab.find_data())
