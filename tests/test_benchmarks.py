"""benchmarks/speed.py and baseline.py: both sides of a row do the same work, and README shows what was measured."""

import importlib.util
import json
import subprocess
import sys

import pytest
import torch
from PIL import Image

import lab6_utils as lab

spec = importlib.util.spec_from_file_location("speed", lab.ROOT / "benchmarks" / "speed.py")
speed = importlib.util.module_from_spec(spec)
spec.loader.exec_module(speed)


def test_the_baseline_reads_the_same_images(data, tmp_path):
    files = lab.read_data(data)
    plain = speed.unpacked(files, tmp_path / "plain", 5)
    seconds, dataset = speed.seconds_to_open(plain, tmp_path / "cache")
    assert seconds > 0 and len(dataset) == 5
    assert torch.equal(dataset.pixels, lab.ICLEVRDataset(files, "all", limit=5).pixels), "files and cache agree"
    for (ours, labels), (theirs, same) in zip(dataset, speed.EveryTime(plain), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
        assert torch.equal(labels, same)
    large = speed.unpacked(files, tmp_path / "large", 2, (320, 240))
    assert Image.open(next(large.images.iterdir())).size == (320, 240)


def test_the_baseline_reads_its_files_in_every_epoch(data, tmp_path, monkeypatch):
    plain = speed.unpacked(lab.read_data(data), tmp_path / "plain", 4)
    opened, read = [], Image.open
    monkeypatch.setattr(Image, "open", lambda file: opened.append(file.name) or read(file))
    batches = speed.every_epoch(torch.utils.data.DataLoader(speed.EveryTime(plain), 2))
    for _ in range(4):
        next(batches)
    assert sorted(opened) == sorted([file.name for file in plain.images.iterdir()] * 2)


def test_memory_is_that_of_the_process_itself():
    mine = torch.ones(100_000_000)  # 0.4 GB, which a child would be charged with
    code = f"import sys; sys.path.insert(0, {str(lab.ROOT / 'benchmarks')!r}); import speed; print(speed.peak_memory())"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0.1 < float(child.stdout) < speed.peak_memory() - 0.2 and mine.sum() > 0


def test_both_train(data):
    files = lab.read_data(data)
    settings = lab.make_settings("tiny", device="cpu")
    small = dict(channels=(8, 16), attention=("none", "cross"), norm_groups=8, token_dim=8)
    make = lab.make_settings
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed.lab, "make_settings", lambda profile, **given: make(profile, **given | small))
        assert speed.ours_trains(settings, files, 2, 2) > 0
        assert speed.baseline_trains(settings, files, 2, 2) > 0


def test_several_processes_train(scenes, monkeypatch):
    monkeypatch.setenv("LAB6_DATA", str(scenes))
    assert speed.trains_in_processes(lab.make_settings("tiny", device="cpu"), 2) > 0


@pytest.mark.parametrize("unit, ours, baseline", [("images/s", 10, 5), ("s", 5, 10), ("GB", 1, 2), ("%", 1, 2)])
def test_twice_as_good(unit, ours, baseline):
    assert speed.better(dict(ours=ours, baseline=baseline, unit=unit)) == 2


def test_readme_shows_what_was_measured():
    results = json.loads(speed.RESULTS.read_text(encoding="utf-8"))
    readme = (lab.ROOT / "README.md").read_text(encoding="utf-8")
    assert speed.table(results) in readme, "README's table is not the one of benchmarks/results.json"
    for row in results.values():
        assert set(speed.COLUMNS) <= set(row)
        assert row["baseline"] is None or row["ratio"] == pytest.approx(speed.better(row), rel=1e-2)
