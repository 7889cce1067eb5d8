"""lab6/figures.py: figures say what made them; image files."""

import io
import json

import numpy as np
import pytest
import torch
from conftest import tiny
from PIL import Image

import lab6_utils as lab


def test_a_figure_says_what_made_it(runs, capsys):
    settings = tiny(seed=3)
    fig = lab.plot_images(torch.rand(5, 3, 64, 64) * 2 - 1, [["red cube", "gray cube"]] * 5, columns=3)
    lab.save_figure(fig, "99_test", settings, "A test.", data="course files", guidance=2.0)
    file = settings.figures / "99_test.png"
    facts = json.loads(file.with_suffix(".json").read_text())
    assert facts["figure"] == "99_test" and facts["caption"] == "A test." and facts["commit"] == lab.commit()
    assert (facts["profile"], facts["seed"], facts["data"], facts["guidance"]) == ("tiny", 3, "course files", 2.0)
    assert facts["device"].startswith("cpu")
    picture = Image.open(file)
    assert json.loads(picture.text["Description"]) == facts and picture.text["Title"] == "99_test"
    assert np.asarray(picture.convert("L")).std() > 20 and picture.width > 800, "it is not blank"
    assert sorted(p.name for p in settings.figures.iterdir()) == ["99_test.json", "99_test.png"]
    assert runs in settings.figures.parents


def test_a_figure_that_fails_leaves_the_old_one(runs):
    settings = tiny()
    lab.save_figure(lab.new_figure()[0], "99_test", settings, "Old.")
    before = {p.name: p.read_bytes() for p in settings.figures.iterdir()}
    with pytest.raises(TypeError):
        lab.save_figure(lab.new_figure()[0], "99_test", settings, "New.", data=object())
    assert {p.name: p.read_bytes() for p in settings.figures.iterdir()} == before


def test_images_are_drawn_where_they_belong():
    colours = torch.tensor([[1.0, -1, -1], [-1, 1, -1], [-1, -1, 1]]).view(3, 3, 1, 1).expand(3, 3, 64, 64)
    buffer = io.BytesIO()
    lab.plot_images(colours, columns=3, width=3).savefig(buffer, format="png")
    pixels = np.asarray(Image.open(buffer).convert("RGB"))
    middle = pixels[len(pixels) // 2]
    assert [tuple(middle[int(len(middle) * x)]) for x in (1 / 6, 1 / 2, 5 / 6)] == [
        (255, 0, 0),
        (0, 255, 0),
        (0, 0, 255),
    ]


def test_what_ships_is_known_wherever_figures_go_but_for_what_was_measured_again(runs, tmp_path, monkeypatch):
    ship = json.loads((lab.ROOT / "figures" / "results.json").read_text())["results"]
    monkeypatch.setenv("LAB6_FIGURES", str(tmp_path))
    settings = lab.make_settings("shipped", device="cpu")
    assert lab.load_results(settings) == ship
    lab.save_result(settings, ship[0] | dict(accuracy=0.5))
    lab.save_result(lab.make_settings("quick", device="cpu"), ship[1] | dict(accuracy=0.25))
    assert lab.load_results(settings)[-1]["accuracy"] == 0.5 and len(lab.load_results(settings)) == len(ship)
    quick = lab.load_results(lab.make_settings("quick", device="cpu"))
    assert [row["accuracy"] for row in quick[-2:]] == [0.5, 0.25] and len(quick) == len(ship)
    assert lab.load_results(lab.make_settings("tiny", device="cpu")) == []


def test_pictures_are_kept_in_order(tmp_path):
    colours = torch.linspace(-1, 1, 12).view(12, 1, 1, 1).expand(12, 3, 64, 64)
    lab.save_images(torch.zeros(20, 3, 64, 64), tmp_path)
    lab.save_images(colours, tmp_path)
    files = sorted(tmp_path.iterdir())
    assert [f.name for f in files] == [f"{i:03d}.png" for i in range(12)], "those of an earlier, longer list are gone"
    for file, colour in zip(files, lab.to_uint8(colours), strict=True):
        assert np.array_equal(np.asarray(Image.open(file)), colour.permute(1, 2, 0).numpy())
