"""lab6/runner/direct.py: label sets and images of one's own, from the command line."""

import json

import numpy as np
import pytest
from conftest import make_pipeline, tiny
from PIL import Image

import lab6_utils as lab
import run_notebooks


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights") / "pipeline"
    make_pipeline(tiny()).save_pretrained(folder)
    return folder


def run(*arguments):
    return run_notebooks.main(["--profile", "tiny", *map(str, arguments)])


def sample(weights, what, out, *more):
    return run("--sample", what, "--out", out, "-p", f"weights={weights}", "-p", "preset=tokens", *more)


def test_label_sets_of_ones_own_are_sampled(weights, runs, tmp_path, capsys):
    assert (
        sample(weights, "red sphere, cyan cube; gray cylinder", tmp_path / "out", "-p", "seed=3", "-p", "steps=2") == 0
    )
    assert json.loads((tmp_path / "out" / "labels.json").read_text()) == [
        ["red sphere", "cyan cube"],
        ["gray cylinder"],
    ]
    made_by = json.loads((tmp_path / "out" / "made_by.json").read_text())
    assert (made_by["preset"], made_by["steps"], made_by["seed"]) == ("tokens", 2, 3)
    assert "samples  2 images in" in capsys.readouterr().out
    assert Image.open(tmp_path / "out" / "grid.png").width > 200
    settings = lab.make_settings("tiny", preset="tokens", steps=2)
    pipe = lab.load_pipeline(settings, str(weights))
    expected = lab.sample(pipe, [["red sphere", "cyan cube"], ["gray cylinder"]], settings, 3)
    for number, image in enumerate(lab.to_pil(expected)):
        assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / f"{number}.png")), np.asarray(image))


@pytest.mark.parametrize("said", [[["red cube"]], {"first.png": ["red cube"]}])
def test_a_json_file_is_sampled_and_older_images_go(weights, runs, tmp_path, said):
    (tmp_path / "my sets.json").write_text(json.dumps(said), encoding="utf-8-sig")
    assert sample(weights, "red cube; gray cube; blue cube", tmp_path / "out") == 0
    assert sample(weights, tmp_path / "my sets.json", tmp_path / "out") == 0
    assert sorted(p.name for p in (tmp_path / "out").glob("*.png")) == ["0.png", "grid.png"]
    for own in ("IMG_2019.png", "x_7.png"):
        (tmp_path / "out" / own).touch()
    assert sample(weights, "gray cube; blue cube", tmp_path / "out") == 0
    names = ["0.png", "1.png", "IMG_2019.png", "grid.png", "x_7.png"]
    assert sorted(p.name for p in (tmp_path / "out").glob("*.png")) == names, "what others put there stays"


def test_a_folder_is_scored_by_evaluator_and_judge(real_files, tmp_path, runs, capsys):
    """Real images, some of them larger, in the order of their numbers."""
    dataset = lab.ICLEVRDataset(real_files, "all", limit=11)
    for number, image in enumerate(lab.to_pil(lab.to_float(dataset.pixels))):
        image.resize((128, 128) if number == 3 else (64, 64)).save(tmp_path / f"image_{number}.png")
    (tmp_path / "grid.png").write_bytes(b"no image, and no number either")
    (tmp_path / "own.json").write_text(json.dumps(lab.decode_labels(dataset.labels)))
    assert run("--score", tmp_path, "--labels", tmp_path / "own.json") == 0
    said, kept = capsys.readouterr().out, json.loads((tmp_path / "score.json").read_text())
    assert [row["evaluator"] for row in kept] == ["resnet18", "judge"] and "grade" in said and "| judge |" in said
    assert all(row["accuracy"] > 0.8 and row["images"] == 11 for row in kept)
    wrong = [["gray cube"] for _ in range(11)]
    (tmp_path / "own.json").write_text(json.dumps(wrong))
    assert run("--score", tmp_path, "--labels", tmp_path / "own.json") == 0
    assert json.loads((tmp_path / "score.json").read_text())[0]["accuracy"] < 0.5


def test_one_image_is_scored_without_intervals(tmp_path, runs, capsys):
    Image.new("RGB", (64, 64)).save(tmp_path / "0.png")
    assert run("--score", tmp_path, "--labels", "red cube") == 0
    assert "None" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--sample", "red cub"], "'red cub': unknown label 'red cub' in label set 0: did you mean 'red cube'?"),
        (["--sample", "red cube, red cube"], "is twice"),
        (["--sample", ""], "one or more images"),
        (["--sample", "red cube, " * 99], "is twice"),
        (["--layout", "2026"], "--layout goes with --submission"),
        (["--sample", "nowhere.json"], "nowhere.json: not readable"),
        (["--sample", "red cube", "-p", "preset=nothing"], "preset='nothing': choose from"),
        (["--sample", "red cube", "-p", "colour=red"], "no such parameter"),
        (["--sample", "red cube", "-p", "weights=nowhere"], "no pipeline in"),
        (["--sample", "red cube", "--only", "04"], "go without --only"),
        (["--sample", "red cube", "--score", "."], "--out FOLDER goes with --sample"),
        (["--out", "."], "--out FOLDER goes with --sample"),
        (["--labels", "red cube"], "--labels LABELS with --score"),
        (["--score", "nowhere"], "--score nowhere: no such folder"),
        (["--score", "{folder}"], "labels.json: not readable"),
        (
            ["--score", "{folder}", "--labels", "red cube; gray cube"],
            "1 files named by number (0.png, 1.png, ...) for 2",
        ),
        (["--score", "{folder}", "--labels", "red cube"], "0.png: not a readable image"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(runs, tmp_path, capsys, arguments, words):
    (tmp_path / "0.png").write_bytes(b"hello")
    assert run(*(argument.format(folder=tmp_path) for argument in arguments)) == 2
    said = capsys.readouterr().err
    assert words in said and "Traceback" not in said
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "runs") == ["0.png"], "nothing is left behind"


def test_values_that_people_type():
    from lab6.runner.parameters import parse_value

    assert parse_value("None", None) is None and parse_value("none", None) == "none"
    assert parse_value("none,self, cross", None) == ["none", "self", "cross"]
    assert parse_value("16,32", None) == [16, 32] and parse_value("0.2, 0.8", None) == [0.2, 0.8]
    assert lab.make_settings("tiny", attention=parse_value("none,none,cross", None)).attention == (
        "none",
        "none",
        "cross",
    )
