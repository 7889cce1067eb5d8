"""lab6/dataset.py: images as tensors: decoding, resizing, splits, the cache."""

import json
import os
import zipfile
import zlib

import numpy as np
import pytest
import torch
from conftest import REAL, make_data, noise_picture, png, tiny
from PIL import Image

import lab6_utils as lab


def test_folder_and_zip_give_the_same(tmp_path, runs, monkeypatch):
    sets = []
    for as_zip in (False, True):
        folder = make_data(tmp_path / str(as_zip), size=(320, 240), as_zip=as_zip)
        monkeypatch.setenv("LAB6_DATA", str(folder))
        sets.append(lab.ICLEVRDataset(lab.find_data(), "all"))
    assert sets[0].names == sets[1].names and len(sets[0]) == 9
    assert torch.equal(sets[0].pixels, sets[1].pixels) and torch.equal(sets[0].labels, sets[1].labels)


def test_pictures_of_64x64_are_taken_as_they_are(data):
    dataset = lab.ICLEVRDataset(lab.find_data(), "all")
    assert dataset.pixels.shape == (9, 3, 64, 64) and dataset.pixels.dtype == torch.uint8
    for index, name in enumerate(dataset.names):
        pixels = np.asarray(Image.open(data / "iclevr" / name), dtype=np.float32)
        image, labels = dataset[index]
        assert image.shape == (3, 64, 64) and image.dtype == torch.float32
        torch.testing.assert_close(image, torch.from_numpy((pixels / 255 - 0.5) / 0.5).permute(2, 0, 1))
        assert lab.decode_labels(labels)[0] == sorted(lab.find_data().train[name], key=lab.OBJECTS.index)


def test_large_pictures_are_resized_with_antialiasing(tmp_path, runs, monkeypatch):
    from torchvision.transforms import Compose, Normalize, Resize, ToTensor

    folder = make_data(tmp_path / "data", scenes=[3], size=(320, 240))
    monkeypatch.setenv("LAB6_DATA", str(folder))
    dataset = lab.ICLEVRDataset(lab.find_data())
    course = Compose([Resize((64, 64)), ToTensor(), Normalize((0.5,) * 3, (0.5,) * 3)])
    for index, name in enumerate(dataset.names):
        picture = Image.open(folder / "iclevr" / name)
        torch.testing.assert_close(dataset[index][0], course(picture))
        by_pillow = np.asarray(picture.resize((64, 64), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
        assert np.abs(dataset.pixels[index].numpy().astype(int) - by_pillow).max() <= 1
    assert dataset.pixels.float().std() < 40, "noise of 320x240 is averaged (its own spread is 74)"


def test_real_pictures_at_their_native_size(iclevr, tmp_path, runs, monkeypatch):
    originals = sorted((REAL / "originals").glob("*.png"))[:3]
    pictures = {f"CLEVR_train_000001_{k}.png": (np.asarray(Image.open(p).convert("RGB")), ["red cube"])
                for k, p in enumerate(originals)}  # fmt: skip
    monkeypatch.setenv("LAB6_DATA", str(make_data(tmp_path / "data", pictures=pictures)))
    dataset = lab.ICLEVRDataset(lab.find_data())
    assert Image.open(originals[0]).size == (320, 240)
    for index, path in enumerate(originals):
        small = np.asarray(Image.open(path).convert("RGB").resize((64, 64), Image.Resampling.BILINEAR))
        assert np.abs(dataset.pixels[index].numpy().astype(int) - small.transpose(2, 0, 1)).max() <= 1


def test_the_split_is_by_scene(tmp_path, runs, monkeypatch):
    scenes = (0, 7, 5499, 5500, 5501, 6002)
    monkeypatch.setenv("LAB6_DATA", str(make_data(tmp_path / "data", scenes=scenes)))
    files = lab.find_data()
    train, held, every = (lab.ICLEVRDataset(files, split) for split in ("train", "held-out", "all"))
    scene_numbers = lambda dataset: {int(lab.scene_of(name)) for name in dataset.names}
    assert scene_numbers(train) == {0, 7, 5499} and scene_numbers(held) == {5500, 5501, 6002}
    assert sorted(train.names + held.names) == every.names and len(every) == 18
    for dataset in (train, held):
        for name, pixels, labels in zip(dataset.names, dataset.pixels, dataset.labels, strict=True):
            where = every.names.index(name)
            assert torch.equal(pixels, every.pixels[where]) and torch.equal(labels, every.labels[where])
    with pytest.raises(ValueError, match="choose from train, held-out, all"):
        lab.ICLEVRDataset(files, "test")


def test_pictures_that_show_an_unseen_set_are_left_out(data, monkeypatch):
    """Also those that show more than the set; as many at random otherwise; `max_images` counts what is left."""
    files = lab.find_data()
    every = lab.ICLEVRDataset(files)
    pair = next(files.train[name] for name in every.names if len(files.train[name]) == 2)
    monkeypatch.setattr("lab6.dataset.unseen_sets", lambda: {"pairs": [pair]})
    bears = [set(pair) <= set(files.train[name]) for name in every.names]
    assert 0 < sum(bears) < len(bears) and any(
        len(files.train[n]) == 3 for n, b in zip(every.names, bears, strict=True) if b
    )
    rest = lab.training_set(tiny(leave_out="unseen", max_images=0), files)
    assert rest.names == [name for name, out in zip(every.names, bears, strict=True) if not out]
    kept = [i for i, out in enumerate(bears) if not out]
    assert torch.equal(rest.pixels, every.pixels[kept]) and torch.equal(rest.labels, every.labels[kept])
    other = lab.training_set(tiny(leave_out="random", max_images=0), files)
    assert len(other) == len(rest) and set(other.names) < set(every.names)
    assert lab.training_set(tiny(max_images=0), files).names == every.names
    assert lab.training_set(tiny(leave_out="unseen", max_images=1), files).names == rest.names[:1]


def test_a_split_without_scenes_is_empty(tmp_path, runs, monkeypatch):
    monkeypatch.setenv("LAB6_DATA", str(make_data(tmp_path / "data", scenes=(0, 1))))
    empty = lab.ICLEVRDataset(lab.find_data(), "held-out")
    assert len(empty) == 0 and empty.pixels.shape == (0, 3, 64, 64) and empty.labels.shape == (0, 24)


def test_limit_keeps_the_first(data):
    files = lab.find_data()
    whole, first = lab.ICLEVRDataset(files), lab.ICLEVRDataset(files, limit=4)
    assert first.names == whole.names[:4] and len(first) == len(first.pixels) == len(first.labels) == 4
    assert len(lab.ICLEVRDataset(files, limit=0)) == len(lab.ICLEVRDataset(files, limit=99)) == 6


def test_the_cache_is_used_again(data, monkeypatch):
    first = lab.ICLEVRDataset(lab.find_data(), "all")
    monkeypatch.setattr("lab6.dataset._decode_all", lambda *_: pytest.fail("decoded again"))
    again = lab.ICLEVRDataset(lab.find_data(), "all")
    assert torch.equal(first.pixels, again.pixels)


def cached(runs):
    return sorted(p.name for p in (runs / "cache").iterdir()) if (runs / "cache").exists() else []


def test_the_cache_is_made_anew_when_a_file_changes(data, runs):
    old = lab.ICLEVRDataset(lab.find_data(), "all")
    file = data / "iclevr" / old.names[4]
    size, date = file.stat().st_size, file.stat().st_mtime_ns
    pixels = noise_picture(np.random.default_rng(9)) // 64
    Image.fromarray(pixels).save(file)
    os.utime(file, ns=(date, date))
    assert file.stat().st_size != size
    new = lab.ICLEVRDataset(lab.find_data(), "all")
    assert np.array_equal(new.pixels[4].numpy(), pixels.transpose(2, 0, 1)), "another size, the same date"
    before = cached(runs)
    file.write_bytes(file.read_bytes()[:-12] + bytes(12))  # PNG's end marker, which no pixel depends on
    os.utime(file, ns=(date + 10**9, date + 10**9))
    lab.ICLEVRDataset(lab.find_data(), "all")
    assert cached(runs) != before and len(cached(runs)) == 1, "the same size, another date; old caches go"


def test_the_cache_of_a_zip_is_made_anew_when_a_member_changes(tmp_path, runs, monkeypatch):
    monkeypatch.setenv("LAB6_DATA", str(make_data(tmp_path / "data", as_zip=True)))
    old = lab.ICLEVRDataset(lab.find_data(), "all")
    pixels = noise_picture(np.random.default_rng(9))
    with zipfile.ZipFile(tmp_path / "data" / "iclevr.zip") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members[f"iclevr/{old.names[4]}"] = png(pixels)
    with zipfile.ZipFile(tmp_path / "data" / "iclevr.zip", "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    new = lab.ICLEVRDataset(lab.find_data(), "all")
    assert np.array_equal(new.pixels[4].numpy(), pixels.transpose(2, 0, 1)) and len(cached(runs)) == 1


@pytest.mark.parametrize("as_zip", [False, True])
def test_a_missing_picture_is_named(tmp_path, runs, monkeypatch, as_zip):
    folder = make_data(tmp_path / "data", as_zip=as_zip)
    train = json.loads((folder / "train.json").read_text())
    (folder / "train.json").write_text(json.dumps(train | {"CLEVR_train_000009_0.png": ["red cube"]}))
    monkeypatch.setenv("LAB6_DATA", str(folder))
    with pytest.raises(FileNotFoundError, match=r"1 of the 10 images .* first is CLEVR_train_000009_0.png"):
        lab.ICLEVRDataset(lab.find_data())
    assert cached(runs) == []


def broken_pngs():
    whole = png(noise_picture(np.random.default_rng(1)))
    head = b"IHDR" + (60_000).to_bytes(4, "big") * 2 + whole[24:29]
    bomb = whole[:12] + head + zlib.crc32(head).to_bytes(4, "big") + whole[33:]  # claims 60,000 x 60,000 pixels
    return {"empty": b"", "no picture": b"hello" * 99, "cut": whole[:999], "bomb": bomb}


@pytest.mark.parametrize("kind", broken_pngs())
def test_a_broken_picture_is_named_and_leaves_no_cache(data, runs, kind):
    file = data / "iclevr" / "CLEVR_train_000001_1.png"
    whole = file.read_bytes()
    file.write_bytes(broken_pngs()[kind])
    with pytest.raises(ValueError, match=r"CLEVR_train_000001_1\.png: not (a )?readable .* get the file again"):
        lab.ICLEVRDataset(lab.find_data())
    assert cached(runs) == [], "nothing half written is left"
    file.write_bytes(whole)
    assert len(lab.ICLEVRDataset(lab.find_data(), "all")) == 9


def test_a_damaged_member_of_a_zip_is_named(tmp_path, runs, monkeypatch):
    file = make_data(tmp_path / "data", as_zip=True) / "iclevr.zip"
    monkeypatch.setenv("LAB6_DATA", str(file.parent))
    with zipfile.ZipFile(file) as archive:
        member = archive.getinfo("iclevr/CLEVR_train_000001_1.png")
    content = bytearray(file.read_bytes())
    start = member.header_offset + 30 + len(member.filename)
    for damage in (
        slice(start, start + 8),
        slice(start + 500, start + 508),
    ):  # where it is unpacked, where it is checked
        broken = bytearray(content)
        broken[damage] = b"\xff" * 8
        file.write_bytes(broken)
        with pytest.raises(ValueError, match=r"CLEVR_train_000001_1\.png: not (a )?readable .* get the file again"):
            lab.ICLEVRDataset(lab.find_data())
        assert cached(runs) == []


@pytest.mark.parametrize("path", ["../evil.png", "iclevr/../../evil.png", "/evil.png", "C:/evil.png", "..\\evil.png"])
def test_a_zip_that_points_outside_is_refused(tmp_path, runs, monkeypatch, path):
    folder = make_data(tmp_path / "data", as_zip=True)
    with zipfile.ZipFile(folder / "iclevr.zip", "a") as archive:
        archive.writestr(path, png(noise_picture(np.random.default_rng(0))))
    monkeypatch.setenv("LAB6_DATA", str(folder))
    with pytest.raises(FileNotFoundError, match="points outside the zip"):
        lab.ICLEVRDataset(lab.find_data())
    assert not list(tmp_path.rglob("evil.png")) and cached(runs) == []


def test_what_is_no_zip_is_named(tmp_path, runs, monkeypatch):
    folder = make_data(tmp_path / "data", as_zip=True)
    (folder / "iclevr.zip").write_bytes(b"hello")
    monkeypatch.setenv("LAB6_DATA", str(folder))
    with pytest.raises(
        FileNotFoundError, match=r"iclevr/ or iclevr\.zip not found .*iclevr\.zip: not a readable zip file"
    ):
        lab.ICLEVRDataset(lab.find_data())


def test_the_real_subset(real_files):
    train, held = lab.ICLEVRDataset(real_files), lab.ICLEVRDataset(real_files, "held-out")
    assert (len(train), len(held)) == (180, 30)
    assert len(real_files.test) == len(real_files.new_test) == 32
    assert sum(map(len, real_files.test)) == 72 and sum(map(len, real_files.new_test)) == 84
    assert train.labels.sum(1).tolist() == [1, 2, 3] * 60, "each scene gains an object from picture to picture"
    background = train.pixels[:, :, :4].float()
    assert 80 < background.mean() < 180 and background.std() < 30, "i-CLEVR's plain gray background"
    same = (train.pixels[0] == train.pixels[1]).float().mean()
    assert 0.5 < same < 1, "two pictures of a scene share most of their pixels"
