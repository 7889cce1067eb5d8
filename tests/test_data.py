"""Sections 1 and 2 of lab6_utils: settings, labels, finding and reading the data."""

import dataclasses
import json
import os
import zipfile
import zlib

import numpy as np
import pytest
import torch
from conftest import REAL, ROOT, make_data, noise_picture, png, tiny
from PIL import Image

import lab6_utils as lab

# ── Settings ─────────────────────────────────────────────────────────────────────────────────────────


def test_override_wins_over_profile_over_preset_over_default():
    settings = lab.make_settings("quick", preset="linear-512", batch_size=7)
    assert settings.batch_size == 7, "given here"
    assert settings.epochs == 4, "from the profile, not the preset's 300"
    assert settings.channels == (128, 128, 256, 256), "only the tiny profile shrinks a report's network"
    assert lab.make_settings("tiny", preset="linear-512").channels == (8, 8, 16, 16)
    assert settings.learning_rate == 1e-4 and settings.prediction == "epsilon", "from the preset"
    assert settings.num_train_timesteps == 1000, "the default"
    assert lab.make_settings("tiny").channels == (8, 16, 16)


@pytest.mark.parametrize("profile", lab.PROFILES)
@pytest.mark.parametrize("preset", lab.PRESETS)
def test_every_profile_goes_with_every_preset(profile, preset):
    settings = lab.make_settings(profile, preset=preset)
    assert (settings.profile, settings.preset) == (profile, preset)


def test_profile_auto_needs_a_gpu_for_full(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert lab.make_settings().profile == "quick"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("lab6.machine._first_kernel", lambda: None)
    assert lab.make_settings(precision="fp32").profile == "full"


@pytest.mark.parametrize("cuda, mps, device", [(1, 1, "cuda"), (0, 1, "mps"), (0, 0, "cpu")])
def test_device_is_cuda_then_mps_then_cpu(monkeypatch, cuda, mps, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(cuda))
    monkeypatch.setattr("lab6.machine._first_kernel", lambda: None)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: bool(mps))
    assert lab.make_settings("tiny", precision="fp32").device == device
    assert lab.make_settings("tiny", precision="fp32", device="cpu").device == "cpu"


def test_lists_become_tuples_and_whole_numbers_floats():
    settings = lab.make_settings("tiny", channels=[8, 8, 8], learning_rate=1)
    assert settings.channels == (8, 8, 8)
    assert type(settings.learning_rate) is float


def test_settings_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        tiny().seed = 3


REFUSED = [
    (dict(learning_rat=1e-3), "unknown setting 'learning_rat': did you mean 'learning_rate'"),
    (dict(xyzzy=1), "unknown setting 'xyzzy'"),
    (dict(profile="huge"), "profile='huge': choose from auto, tiny, quick, shipped, full"),
    (dict(preset="token"), "preset='token': choose from tokens"),
    (dict(seed="0"), "seed='0': expected int"),
    (dict(seed=True), "seed=True: expected int"),
    (dict(seed=1.5), "seed=1.5: expected int"),
    (dict(learning_rate="fast"), "learning_rate='fast': expected float"),
    (dict(flip=1), "flip=1: expected bool"),
    (dict(channels=8), "channels=8: expected tuple"),
    (dict(channels=[]), "channels=(): expected tuple"),
    (dict(channels=[8, 16.0, 16]), "channels=(8, 16.0, 16): expected tuple"),
    (dict(schedule="quadratic"), "schedule='quadratic': choose from linear, linear-rescaled, cosine"),
    (dict(prediction="eps"), "prediction='eps': choose from epsilon, v_prediction, sample"),
    (dict(sampler="euler"), "sampler='euler': choose from ddpm, ddim"),
    (dict(device="tpu"), "device='tpu': choose from cuda, mps, cpu"),
    (dict(precision="fp16"), "precision='fp16': choose from bf16, fp32"),
    (dict(patch=3), "patch=3: choose from 1, 2, 4"),
    (dict(attention=["none", "none", "all"]), "attention='all': choose from none, self, cross"),
    (dict(batch_size=0), "batch_size=0: must be at least 1"),
    (dict(epochs=-1), "epochs=-1: must be at least 1"),
    (dict(channels=[8, 16]), "one entry a resolution"),
    (dict(channels=[8, 12, 16]), "divisible by norm_groups=8"),
    (dict(conditioning="linear"), "cross-attention needs conditioning='tokens'"),
    (dict(label_dropout=1.0), "label_dropout=1.0: must be in [0, 1)"),
    (dict(steps=1001), "steps=1001 exceeds num_train_timesteps=1000"),
    (dict(zero_snr=True, prediction="epsilon"), "zero_snr=True with prediction='epsilon'"),
    (dict(zero_snr=True, sampler="heun"), "sampler='heun' with zero_snr=True"),
    (dict(zero_snr=True, loss_weighting="min-snr"), "zero_snr=True with loss_weighting='min-snr'"),
    (dict(label_dropout=0, guidance="classifier-free"), "label_dropout=0 with guidance='classifier-free'"),
    (dict(preset="linear-512", guidance="composition"), "label_dropout=0 with guidance='composition'"),
    (dict(guidance_interval=(0.8, 0.2)), "guidance_interval=(0.8, 0.2): give its lower and upper end, from 0 to 1"),
    (dict(guidance_interval=(0.8,)), "guidance_interval=(0.8,): give its lower and upper end, from 0 to 1"),
    (dict(guidance="classifier-1", sampler="ddim"), "guidance='classifier-1' with sampler='ddim'"),
    (dict(conditioning="mlp"), "with conditioning='mlp': cross-attention needs conditioning='tokens' or 'multi-hot'"),
    (dict(conditioning="linear", attention=["none"] * 3, up_attention=["none", "none", "cross"]),
     "up_attention=('none', 'none', 'cross') with conditioning='linear'"),
    (dict(up_attention=["none", "cross"]), "and up_attention=('none', 'cross'): give both one entry a resolution"),
    (dict(space="latents", flip=True), "flip=True with space='latents'"),
    (dict(patch=4, channels=[16] * 6, attention=["cross"] * 6),
     "with patch=4: the last of so many resolutions would be 0.5"),
    (dict(loss_weighting="snr"), "loss_weighting='snr': choose from none, min-snr"),
]  # fmt: skip


@pytest.mark.parametrize("given, words", REFUSED, ids=[str(g) for g, _ in REFUSED])
def test_what_cannot_be_is_refused_in_one_line(given, words):
    with pytest.raises(ValueError) as error:
        lab.make_settings(**dict(profile="tiny") | given)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_none_leaves_the_choice_to_the_preset():
    assert tiny(schedule=None, channels=None, preset="linear-attn") == tiny(preset="linear-attn")
    assert tiny(schedule="sigmoid", preset="linear-attn").schedule == "sigmoid"


def test_no_steps_are_all_steps():
    assert tiny(steps=0).steps == 1000 and tiny(steps=0, num_train_timesteps=300).steps == 300
    assert lab.make_settings("full", preset="linear-512", num_train_timesteps=500).steps == 500


def test_folders_follow_profile_and_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("LAB6_RUNS", str(tmp_path / "r"))
    monkeypatch.setenv("LAB6_FIGURES", str(tmp_path / "f"))
    folder = lambda profile: lab.make_settings(profile).figures
    assert folder("shipped") == folder("full") == tmp_path / "f"
    assert folder("quick") == tmp_path / "f" / "quick"
    assert folder("tiny") == tmp_path / "r" / "tiny" / "figures", "tests never write over real figures"
    assert tiny().runs == tmp_path / "r"
    monkeypatch.delenv("LAB6_RUNS")
    monkeypatch.delenv("LAB6_FIGURES")
    assert tiny().runs == ROOT / "data" / "runs"
    assert folder("shipped") == ROOT / "figures" and folder("quick") == ROOT / "figures" / "quick"


def test_generators_repeat_and_differ():
    draw = lambda *stream: torch.randn(4, generator=lab.make_generator(*stream)).tolist()
    assert draw(0, 1, 2) == draw(0, 1, 2)
    assert len({str(draw(*s)) for s in [(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 1), (0, 1, 0)]}) == 7


# ── Labels ───────────────────────────────────────────────────────────────────────────────────────────


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


# ── Finding the data ─────────────────────────────────────────────────────────────────────────────────


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


# ── The dataset ──────────────────────────────────────────────────────────────────────────────────────


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
    with pytest.raises(ValueError, match=r"CLEVR_train_000001_1\.png is not a readable image"):
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
        with pytest.raises(ValueError, match=r"CLEVR_train_000001_1\.png is not a readable image"):
            lab.ICLEVRDataset(lab.find_data())
        assert cached(runs) == []


@pytest.mark.parametrize("path", ["../evil.png", "iclevr/../../evil.png", "/evil.png", "C:/evil.png", "..\\evil.png"])
def test_a_zip_that_points_outside_is_refused(tmp_path, runs, monkeypatch, path):
    folder = make_data(tmp_path / "data", as_zip=True)
    with zipfile.ZipFile(folder / "iclevr.zip", "a") as archive:
        archive.writestr(path, png(noise_picture(np.random.default_rng(0))))
    monkeypatch.setenv("LAB6_DATA", str(folder))
    with pytest.raises(ValueError, match="points outside the zip"):
        lab.ICLEVRDataset(lab.find_data())
    assert not list(tmp_path.rglob("evil.png")) and cached(runs) == []


def test_what_is_no_zip_is_named(tmp_path, runs, monkeypatch):
    folder = make_data(tmp_path / "data", as_zip=True)
    (folder / "iclevr.zip").write_bytes(b"hello")
    monkeypatch.setenv("LAB6_DATA", str(folder))
    with pytest.raises(ValueError, match=r"iclevr\.zip: not a readable zip file"):
        lab.ICLEVRDataset(lab.find_data())


def test_names_that_no_scene_can_be_read_from_are_refused(tmp_path, runs, monkeypatch):
    pictures = {"holiday.png": (noise_picture(np.random.default_rng(0)), ["red cube"])}
    monkeypatch.setenv("LAB6_DATA", str(make_data(tmp_path / "data", pictures=pictures)))
    with pytest.raises(ValueError, match=r"holiday\.png"):
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
