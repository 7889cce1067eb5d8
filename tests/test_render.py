"""Rendered scenes: the course's layout, its rules, the same on every machine and after every stop."""

import json
import subprocess
import sys
from itertools import combinations, pairwise

import numpy as np
import pytest
from conftest import REAL, ROOT, Run
from PIL import Image

import lab6_utils as lab

renderer = lab.load_renderer()


def render(folder, scenes, **choices):
    """Render in one process of our own; returns the folder."""
    for _ in renderer.render_scenes(folder, scenes, **dict(workers=1) | choices):
        pass
    return folder


def pixels_of(folder):
    """{file name: (64, 64, 3) int} of all pictures."""
    return {p.name: np.asarray(Image.open(p)).astype(int) for p in sorted((folder / "iclevr").glob("*.png"))}


def as_data(folder, monkeypatch):
    monkeypatch.setenv("LAB6_DATA", str(folder))
    return lab.find_data()


@pytest.mark.parametrize("scenes, objects", [(24, 3), (4, 5)])
def test_the_courses_layout(rendered, tmp_path, monkeypatch, scenes, objects):
    folder = rendered if objects == 3 else render(tmp_path / "five", scenes, objects=objects)
    files = as_data(folder, monkeypatch)
    assert files.source == "rendered scenes"
    train = {name: labels for name, labels in files.train.items() if int(lab.scene_of(name)) < scenes}
    assert list(train) == [f"CLEVR_train_{s:06d}_{k}.png" for s in range(scenes) for k in range(objects)]
    for name, labels in train.items():
        assert len(labels) == len(set(labels)) == int(name[-5]) + 1
        if len(labels) > 1:
            assert labels[:-1] == train[name.replace(f"_{len(labels) - 1}.", f"_{len(labels) - 2}.")]
    images = pixels_of(folder)
    assert all(images[name].shape == (64, 64, 3) for name in train) and set(train) <= set(images)
    assert renderer.OBJECTS == lab.OBJECTS


def test_the_test_files_have_the_courses_make_up(rendered, monkeypatch):
    files = as_data(rendered, monkeypatch)
    for sets, sizes, labels in ((files.test, [6, 12, 14], 72), (files.new_test, [0, 12, 20], 84)):
        assert [sum(len(s) == k for s in sets) for k in (1, 2, 3)] == sizes and sum(map(len, sets)) == labels
        assert len({frozenset(s) for s in sets}) == 32
    assert renderer.draw_test_sets("test") == files.test, "whatever the seed"


def test_each_picture_adds_one_object_and_changes_nothing_else(rendered):
    images = list(pixels_of(rendered).items())
    for (before, a), (after, b) in pairwise(images):
        if before.rpartition("_")[0] == after.rpartition("_")[0]:
            change = np.abs(a - b).max(-1)
            assert 8 <= (change > 16).sum() < 0.15 * change.size, f"{after}: an object's share of the picture"
            assert np.median(change) <= 1 and (change <= 8).mean() > 0.8, f"{after}: the rest stays"


def test_placement_follows_the_rules():
    for number in range(12):
        scene = renderer.draw_scene(3, number, 4, margin=0.3)
        forward = renderer.camera_axes(scene["camera"])[1]
        assert len(set(scene["labels"])) == 4
        assert (scene["places"][0] == 0).all() and np.abs(scene["places"]).max() <= renderer.REACH
        for a, b in combinations(scene["places"], 2):
            assert np.hypot(*(a - b)) >= renderer.MIN_DISTANCE and abs((a - b) @ forward) >= 0.3
        assert renderer.count_visible(scene).min() >= renderer.MIN_PIXELS
    forward = renderer.camera_axes(renderer.CAMERA)[1]
    behind = dict(labels=["red sphere", "blue cube"], places=np.array([[0, 0], 1.3 * forward]), turns=[0, 0])
    scene = behind | dict(camera=renderer.CAMERA)
    front, hidden = renderer.count_visible(scene)
    alone = renderer.count_visible({key: value[1:] for key, value in behind.items()} | dict(camera=renderer.CAMERA))
    assert 800 < front < 1400 and 0 < hidden < 0.8 * alone[0], "of 320x240; the one behind shows less of itself"
    around = {key: value[::-1] for key, value in behind.items()}
    assert list(renderer.count_visible(scene | around)) == [hidden, front]


def test_shapes_are_drawn_before_colours():
    pairs = [renderer.draw_labels(np.random.default_rng(i), 2) for i in range(3000)]
    same = np.mean([a.split()[1] == b.split()[1] for a, b in pairs])
    assert abs(same - 1 / 3) < 0.03, "of the real scenes 0.3325; all 24 equally likely would give 7/23"


def test_held_out_sets_stay_out(tmp_path):
    sets = frozenset(frozenset(s) for split in renderer.MAKE_UP for s in renderer.draw_test_sets(split))
    draw = lambda forbidden: [renderer.draw_labels(np.random.default_rng(i), 3, forbidden) for i in range(400)]
    met = lambda scenes: sum(frozenset(s[: k + 1]) in sets for s in scenes for k in range(3))
    assert met(draw(sets)) == 0 < met(draw(frozenset()))
    train = json.loads((render(tmp_path / "out", 6, hold_out=True) / "train.json").read_text())
    assert not any(frozenset(labels) in sets for labels in train.values())


def test_the_same_whoever_renders_it(rendered, tmp_path):
    few = pixels_of(render(tmp_path / "few", 4, workers=2))
    all_of_them = pixels_of(rendered)
    assert len(few) == 12 and all((few[name] == all_of_them[name]).all() for name in few)
    other = pixels_of(render(tmp_path / "other", 1, seed=1))
    assert any((other[name] != few[name]).any() for name in other)


def test_a_stopped_run_goes_on(tmp_path, monkeypatch):
    folder = tmp_path / "out"
    work = renderer.render_scenes(folder, 3, workers=1)
    next(work)
    work.close()
    assert not (folder / "train.json").exists(), "a folder that is not whole does not count as data"
    first, second = (folder / "iclevr" / renderer.image_name(0, k) for k in (0, 1))
    written, whole = first.stat().st_mtime_ns, second.read_bytes()
    second.unlink()
    second.with_name(f".1.{second.name}").write_bytes(whole[:100])  # as a killed process leaves it
    render(folder, 3)
    assert first.stat().st_mtime_ns == written and second.read_bytes() == whole
    assert len(lab.ICLEVRDataset(as_data(folder, monkeypatch), "all", runs=tmp_path / "runs")) == 9


def test_other_choices_and_other_folders_are_refused(rendered, tmp_path):
    with pytest.raises(renderer.CannotRender, match=r"holds other scenes \(seed 0 there, 7 now\): choose another"):
        render(rendered, 24, seed=7)
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(renderer.CannotRender, match="was not rendered by this program"):
        render(tmp_path, 1)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_the_command_line(tmp_path):
    command = [sys.executable, str(ROOT / "data" / "render_scenes.py"), "--out", str(tmp_path / "out")]
    choices = ["--scenes", "1", "--objects", "2", "--size", "native"]
    done = subprocess.run([*command, *choices], capture_output=True, text=True)
    assert done.returncode == 0 and "2 pictures" in done.stdout and "rendering" in done.stderr, done.stderr
    picture = Image.open(tmp_path / "out" / "iclevr" / renderer.image_name(0, 1))
    assert picture.size == (320, 240) and np.asarray(picture).std() > 5
    again = subprocess.run([*command, "--scenes", "1"], capture_output=True, text=True)
    assert again.returncode == 2 and "holds other scenes" in again.stderr and "Traceback" not in again.stderr
    assert subprocess.run([*command, "--scenes", "0"], capture_output=True).returncode == 2


def test_without_mitsuba_one_error_says_what_to_install(tmp_path, monkeypatch, runs):
    monkeypatch.setitem(sys.modules, "mitsuba", None)
    with pytest.raises(renderer.CannotRender, match="pip install mitsuba; or put the course's files into data/"):
        render(tmp_path / "out", 1)
    assert not (tmp_path / "out").exists()
    monkeypatch.delenv("LAB6_DATA")
    monkeypatch.setattr("lab6.files.ROOT", tmp_path)  # a workbook without course files
    with pytest.raises(RuntimeError, match="pip install mitsuba"):
        lab.find_data(1)


def test_find_data_renders_where_there_is_nothing(tmp_path, runs, monkeypatch):
    monkeypatch.delenv("LAB6_DATA")
    monkeypatch.setattr("lab6.files.ROOT", tmp_path)
    files = lab.find_data(3)
    assert files.root == runs / "rendered-3" and files.source == "rendered scenes" and len(files.train) == 9
    stamp = (files.root / "train.json").stat().st_mtime_ns
    assert lab.find_data(3) == files and (files.root / "train.json").stat().st_mtime_ns == stamp, "once"
    assert files.held_out == {"000002"}, "the last of the scenes, in proportion"
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.json").write_text('{"CLEVR_train_000000_0.png": ["red cube"]}')
    with pytest.raises(FileNotFoundError, match=r"iclevr/ or iclevr\.zip"):
        lab.find_data(3)


def test_they_look_like_the_real_ones(rendered, monkeypatch, runs):
    """The evaluator that ships has seen real pictures only."""
    dataset = lab.ICLEVRDataset(as_data(rendered, monkeypatch), "all")
    score = lab.evaluate(lab.Evaluator.find(), lab.to_float(dataset.pixels), dataset.labels)
    assert score.metrics()["accuracy"] >= 0.9
    if (REAL / "originals").is_dir():
        for count in (1, 3):
            real = np.asarray(Image.open(REAL / "originals" / f"scene_{count}_objects.png").convert("RGB"), float)
            scene = renderer.draw_scene(0, 0, 3)
            pair = real, renderer.render_picture(scene, count, "native")
            rows = [picture.mean((1, 2)).reshape(24, 10).mean(1) for picture in pair]
            assert np.abs(rows[0] - rows[1]).max() < 15, "levels of 255: as dark behind, as bright in front"


def test_a_notebook_says_that_its_scenes_are_rendered(rendered, tmp_path):
    done = Run(tmp_path, rendered, "--only", "01", "--no-report")
    assert done.code == 0, f"{done.out}\n{done.err}"
    facts = [json.loads(p.read_text()) for p in done.figures.glob("01_*.json")]
    assert len(facts) >= 8 and all("rendered scenes" in f["data"] for f in facts)
    text = str([cell.get("outputs") for cell in done.notebook("01_data_exploration").cells])
    assert "Data: rendered scenes. 72 pictures in 24 scenes" in text
