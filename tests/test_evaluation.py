"""Sections 7, 8 and 10 of lab6_utils: the evaluator and the course's protocol, figures, provenance, and what ships."""

import io
import json
import pickle
import re

import numpy as np
import pytest
import torch
from conftest import RESULT_FIELDS, make_pipeline, tiny
from PIL import Image
from torch import nn
from torchvision.models import resnet18

import lab6_utils as lab
from lab6 import evaluator_training, storage

# ── The course's protocol ────────────────────────────────────────────────────────────────────────────


def outputs(**chances):
    """(1, 24) probabilities: 0.01 but for what is named, as red_cube=0.9."""
    row = torch.full((1, 24), 0.01)
    for name, value in chances.items():
        row[0, lab.OBJECTS.index(name.replace("_", " "))] = value
    return row


def test_hits_by_hand():
    labels = lab.encode_labels([["red cube", "blue sphere"]])
    hits = lambda **chances: lab.count_hits(outputs(**chances), labels).item()
    assert hits(red_cube=0.9, blue_sphere=0.8, gray_cube=0.7) == 2, "a third object costs nothing"
    assert hits(red_cube=0.9, blue_sphere=0.6, gray_cube=0.7) == 1, "unless it outranks one"
    assert hits(red_cube=0.2, blue_sphere=0.1) == 2, "ranks count, not sizes"
    assert hits(gray_cube=0.9, cyan_cube=0.8, red_cube=0.7, blue_sphere=0.6) == 0
    one = lab.encode_labels(["red cube"])
    assert lab.count_hits(outputs(red_cube=0.4, blue_sphere=0.5), one).item() == 0


def the_courses_eval(probabilities, labels):
    """The documented protocol, image by image: the k highest outputs are looked for among the k labels."""
    correct = total = 0
    for out, wanted in zip(probabilities, labels, strict=True):
        k = int(wanted.sum())
        asked = set(wanted.topk(k).indices.tolist())
        correct += sum(index in asked for index in out.topk(k).indices.tolist())
        total += k
    return correct / total


def random_labels(count, generator):
    sizes = torch.randint(1, 6, (count,), generator=generator)
    return torch.stack(
        [nn.functional.one_hot(torch.randperm(24, generator=generator)[:k], 24).sum(0).float() for k in sizes]
    )


@pytest.fixture(scope="module")
def network():
    """A ResNet-18 made with torchvision alone, as the course describes it, with its batch statistics stirred."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = resnet18(weights=None)
        network.fc = nn.Sequential(nn.Linear(512, 24), nn.Sigmoid())
        with torch.no_grad():
            network.fc[0].weight.mul_(20)  # outputs that differ from picture to picture
            for x in torch.rand(3, 8, 3, 64, 64) * 2 - 1:
                network(x)
    return network.eval()


def test_eval_is_the_courses(network):
    g = torch.Generator().manual_seed(0)
    evaluator = lab.Evaluator(network, "test")
    for count in (1, 7, 32):
        images, labels = torch.rand(count, 3, 64, 64, generator=g) * 2 - 1, random_labels(count, g)
        with torch.no_grad():
            expected = the_courses_eval(network(images), labels)
        assert evaluator.eval(images, labels) == pytest.approx(expected)
    probabilities, labels = torch.rand(2000, 24, generator=g), random_labels(2000, g)
    mine = lab.count_hits(probabilities, labels).sum() / labels.sum()
    assert mine.item() == pytest.approx(the_courses_eval(probabilities, labels))
    assert mine < 0.5, "a guess is not right by accident"


def test_batches_of_the_evaluator(network, monkeypatch):
    evaluator, images = lab.Evaluator(network, "test"), torch.rand(5, 3, 64, 64) * 2 - 1
    outputs = evaluator(images)
    assert outputs.shape == (5, 24) and (outputs >= 0).all() and (outputs <= 1).all()
    torch.testing.assert_close(outputs[3:4], evaluator(images[3:4]), rtol=1e-4, atol=1e-5)


# ── Weights files ────────────────────────────────────────────────────────────────────────────────────


def test_a_file_of_the_courses_format_is_read(network, tmp_path):
    file = tmp_path / "checkpoint.pth"
    torch.save({"model": network.state_dict()}, file)
    assert "fc.0.weight" in torch.load(file, weights_only=True)["model"]
    evaluator = lab.Evaluator.load(file)
    images = torch.rand(4, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        expected = network(images)
    torch.testing.assert_close(evaluator(images), expected, rtol=1e-4, atol=1e-5)
    assert expected.std() > 0.05, "the outputs say something"
    assert evaluator.name == "course" and re.fullmatch("[0-9a-f]{16}", evaluator.sha256)


class Malicious:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return eval, (f"open({str(self.trace)!r}, 'w').close()",)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_malicious_pickle_is_not_executed(tmp_path, legacy):
    file, trace = tmp_path / "checkpoint.pth", tmp_path / "trace"
    evil = {"model": Malicious(trace)}
    file.write_bytes(pickle.dumps(evil, protocol=2)) if legacy else torch.save(evil, file)
    with pytest.raises(ValueError, match=r"checkpoint\.pth: not an evaluator"):
        lab.Evaluator.load(file)
    assert not trace.exists()
    torch.load(file, weights_only=False) if not legacy else pickle.loads(file.read_bytes())
    assert trace.exists(), "the file would have done harm"


@pytest.mark.parametrize("content", [b"", b"hello" * 99, {"model": {}}, {"weights": 1}, {"model": 3}, [1]], ids=str)
def test_a_wrong_weights_file_is_named(tmp_path, content):
    file = tmp_path / "checkpoint.pth"
    file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
    with pytest.raises(ValueError, match=r"checkpoint\.pth: not an evaluator \(a ResNet-18"):
        lab.Evaluator.load(file)


def test_a_network_with_another_head_is_refused(tmp_path):
    torch.save({"model": resnet18(weights=None).state_dict()}, tmp_path / "checkpoint.pth")
    with pytest.raises(ValueError, match="not an evaluator"):
        lab.Evaluator.load(tmp_path / "checkpoint.pth")


def test_missing_weights_say_how_to_make_them(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No evaluator at .*model\.safetensors: name a"):
        lab.Evaluator.load(tmp_path)


def test_the_courses_checkpoint_comes_first(network, data, monkeypatch, tmp_path):
    monkeypatch.setattr("lab6.evaluators.WEIGHTS", tmp_path / "weights")
    evaluator_training.save_weights(network, tmp_path / "weights" / "evaluator" / "model.safetensors")
    files = lab.find_data()
    assert lab.Evaluator.find(files).name == lab.Evaluator.find().name == "resnet18"
    torch.save({"model": network.state_dict()}, data / "checkpoint.pth")
    assert lab.Evaluator.find(files).name == "course"
    assert lab.prepare_evaluator(tiny(), files).name == "course", "in every profile"


@pytest.fixture(scope="module")
def coloured(tmp_path_factory, environment):
    """96 pictures that a glance can tell apart: three colours of the whole picture, with a little noise."""
    rng = np.random.default_rng(0)
    colours = {"red cube": (200, 40, 40), "green sphere": (40, 180, 60), "blue cylinder": (40, 60, 200)}
    pixels = [
        np.clip(np.array(c) + rng.normal(0, 12, (64, 64, 3)), 0, 255).astype(np.uint8)
        for c in colours.values()
        for _ in range(32)
    ]

    class Coloured(torch.utils.data.Dataset):
        pass

    dataset = Coloured()
    dataset.pixels = torch.from_numpy(np.stack(pixels).transpose(0, 3, 1, 2).copy())
    dataset.labels = lab.encode_labels([[name] for name in colours for _ in range(32)])
    dataset.names = [f"CLEVR_train_{i:06d}_0.png" for i in range(96)]
    Coloured.__len__ = lambda self: len(self.pixels)
    return dataset


@pytest.mark.parametrize(("reader", "epochs", "seen", "size"), [("resnet18", 4, 64, 23e6), ("judge", 8, 64, 9e6)])
def test_an_evaluator_learns_and_is_kept(coloured, tmp_path, reader, epochs, seen, size):
    settings = tiny(evaluator_epochs=epochs)
    records = list(lab.train_evaluator(settings, coloured, tmp_path, held_out=coloured, name=reader))
    assert [r["epoch"] for r in records] == list(range(1, epochs + 1)) and records[0]["images_seen"] == seen
    assert records[-1]["loss"] < 0.3 * records[0]["loss"]
    assert records[-1]["accuracy"] >= 0.9, "chance is below 0.1"
    evaluator, again = lab.Evaluator.load(tmp_path), lab.Evaluator.load(tmp_path)
    images = lab.to_float(coloured.pixels)
    assert evaluator.name == reader and torch.equal(evaluator(images), again(images))
    assert evaluator.eval(images, coloured.labels) == pytest.approx(records[-1]["accuracy"], abs=0.03)
    assert (tmp_path / "model.safetensors").stat().st_size < size


def test_the_judge_leaves_every_fifth_scene_out(coloured, tmp_path, monkeypatch):
    """20 scenes whose pictures are white are 0, 5, 10, ...: the judge never sees one, the evaluator does."""
    pixels, seen = coloured.pixels.clone(), []
    pixels[::5] = 255
    monkeypatch.setattr(coloured, "pixels", pixels)
    for name in ("_augment", "_augment_for_judge"):
        monkeypatch.setattr(
            f"lab6.evaluator_training.{name}",
            lambda images, g: (seen.append((images == 1).flatten(1).all(1).sum()), images)[1],
        )
    for reader, whites in (("judge", False), ("resnet18", True)):
        seen.clear()
        list(lab.train_evaluator(tiny(evaluator_epochs=2), coloured, tmp_path / reader, name=reader))
        assert (sum(seen) > 0) == whites


def test_evaluators_learn_from_crowded_scenes_too(coloured, tmp_path, monkeypatch):
    """40 white pictures of eight scenes beside 96 others, told apart by their labels: the judge leaves scenes 0 and 5
    of both out."""
    crowded, seen = type(coloured)(), []
    crowded.pixels, crowded.labels = torch.full((40, 3, 64, 64), 255, dtype=torch.uint8), torch.zeros(40, 24)
    crowded.names = [f"CLEVR_train_{i // 5:06d}_{i % 5}.png" for i in range(40)]
    loss = torch.nn.functional.binary_cross_entropy_with_logits
    white = lambda images: (images == 1).flatten(1).all(1)
    for name in ("_augment", "_augment_for_judge"):
        monkeypatch.setattr(
            f"lab6.evaluator_training.{name}", lambda images, generator: (seen.append(white(images)), images)[1]
        )

    def check(logits, labels):
        assert torch.equal(seen[-1], labels.sum(1) == 0), "labels stay with their pictures"
        return loss(logits, labels)

    monkeypatch.setattr(lab.F, "binary_cross_entropy_with_logits", check)
    for reader, whites, total in (("resnet18", 40, 136), ("judge", 30, 106)):
        seen.clear()
        (record,) = lab.train_evaluator(tiny(evaluator_epochs=1), coloured, tmp_path / reader, None, reader, crowded)
        assert record["images_seen"] == 64 * (total // 64) == sum(map(len, seen))
        assert whites * record["images_seen"] / total / 2 < sum(int(w.sum()) for w in seen) <= whites


def test_evaluators_are_trained_once_for_each_choice(data, runs, coloured, monkeypatch):
    """And the scenes that train them are not those that test them in notebook 06 (seed 2)."""
    asked = []
    monkeypatch.setattr(
        evaluator_training, "crowded_scenes", lambda scenes, seed: (asked.append((scenes, seed)), coloured)[1]
    )
    files = lab.find_data()
    plain, crowded, again = (lab.prepare_judge(tiny(evaluator_scenes=n), files) for n in (0, 7, 7))
    assert asked == [(7, 1)] and plain.sha256 != crowded.sha256 == again.sha256


@pytest.mark.parametrize("augment", [evaluator_training._augment, evaluator_training._augment_for_judge])
def test_augmented_pictures_are_pictures_of_the_same(coloured, augment):
    images = lab.to_float(coloured.pixels[::8])
    varied, again = (augment(images, lab.make_generator(3)) for _ in range(2))
    assert varied.shape == images.shape and torch.equal(varied, again)
    assert (varied - images).abs().mean() > 0.02
    assert (varied.mean((2, 3)).argmax(1) == images.mean((2, 3)).argmax(1)).all(), "colour is what the label says"


def test_log_probability_is_the_specifications(network):
    """log sigma of the objects asked for and log(1 - sigma) of the others, also where sigma rounds to 0 or 1."""
    evaluator, images = lab.Evaluator(network, "test"), torch.rand(3, 3, 64, 64) * 2 - 1
    labels = random_labels(3, torch.Generator().manual_seed(0))
    p = evaluator(images).double()
    expected = (labels * p.log() + (1 - labels) * (1 - p).log()).sum(1)
    value = evaluator.log_probability(images, labels)
    torch.testing.assert_close(value.double(), expected, rtol=1e-3, atol=1e-3)
    far = (100 * images).requires_grad_()
    gradient = torch.autograd.grad(evaluator.log_probability(far, labels).sum(), far)[0]
    assert gradient.isfinite().all() and gradient.abs().max() > 0


# ── Measures ─────────────────────────────────────────────────────────────────────────────────────────


def evaluation(rows, label_sets):
    """An Evaluation of rows[seed][set] = {name: probability}."""
    probabilities = torch.stack([torch.cat([outputs(**chances) for chances in seed]) for seed in rows])
    return lab.Evaluation(probabilities, lab.encode_labels(label_sets), "test")


HAND_MADE = (
    [["red cube"], ["gray cube", "blue sphere", "cyan cylinder"]],
    [
        [dict(red_cube=0.9), dict(gray_cube=0.9, blue_sphere=0.8, cyan_cylinder=0.7)],  # 1 of 1, 3 of 3
        [dict(red_cube=0.4), dict(gray_cube=0.9, blue_sphere=0.8, red_cube=0.7)],  # 1 of 1 (below 0.5), 2 of 3
    ],
)


def test_measures_by_hand():
    score = evaluation(HAND_MADE[1], HAND_MADE[0])
    assert score.hits.tolist() == [[1, 3], [1, 2]]
    assert score.accuracy_by_seed.tolist() == pytest.approx([1, 3 / 4])
    metrics = score.metrics()
    assert metrics["accuracy"] == pytest.approx(7 / 8)
    assert metrics["accuracy_per_image"] == pytest.approx((1 + 1 + 1 + 2 / 3) / 4, abs=1e-4)
    assert metrics["accuracy_24"] == pytest.approx(1 - 3 / 96, abs=1e-4), (
        "red cube missed; cyan cylinder missed; red cube extra"
    )
    assert metrics["accuracy_24_of_nothing"] == pytest.approx(1 - 4 / 48, abs=1e-4)
    assert metrics["exact_match"] == 0.5
    assert metrics["f1"] == pytest.approx(2 * 6 / (2 * 6 + 1 + 2), abs=1e-4)
    found = score.found()
    assert found.shape == (2, 2, 24) and found.sum() == 7
    assert not found[1, 1, lab.OBJECTS.index("cyan cylinder")] and found[0, 1, lab.OBJECTS.index("cyan cylinder")]


def test_perfect_and_nothing():
    perfect = evaluation([[dict(red_cube=0.9), dict(red_cube=0.9)]] * 5, [["red cube"]] * 2).metrics()
    assert [perfect[k] for k in ("accuracy", "accuracy_per_image", "accuracy_24", "exact_match", "f1")] == [1] * 5
    assert perfect["ci95_seeds"] is None, "seeds that all agree say nothing about how others would"
    assert perfect["ci95_sets"] == [1, 1]
    one_set = evaluation([[dict(red_cube=0.9)]] * 4 + [[dict(gray_cube=0.9)]], [["red cube"]]).metrics()
    assert one_set["ci95_seeds"] == [0.4, 1] and one_set["ci95_sets"] is None, "there is no other set to draw"
    nothing = evaluation([[dict(gray_cube=0.02)]], [["red cube"]]).metrics()
    assert nothing["accuracy"] == nothing["f1"] == nothing["exact_match"] == 0
    assert nothing["accuracy_24"] == nothing["accuracy_24_of_nothing"] == pytest.approx(23 / 24, abs=1e-4)


def test_the_baseline_of_the_courses_files(real_files):
    nothing = lambda sets: lab.Evaluation(torch.zeros(1, 32, 24), lab.encode_labels(sets), "").metrics()["accuracy_24"]
    assert (nothing(real_files.test), nothing(real_files.new_test)) == (
        pytest.approx(0.9062, abs=1e-4),
        pytest.approx(0.8906, abs=1e-4),
    )


def test_evaluate_lays_out_seeds_and_sets(network):
    evaluator = lab.Evaluator(network, "test", "abc")
    images = torch.rand(2, 3, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    sets = [["red cube"], ["gray cube", "blue sphere"], list(lab.MANUAL_SET)]
    score = lab.evaluate(evaluator, images, sets)
    assert score.probabilities.shape == (2, 3, 24) and (score.evaluator, score.sha256) == ("test", "abc")
    torch.testing.assert_close(score.probabilities[1, 2], evaluator(images[1, 2:3])[0], rtol=1e-4, atol=1e-5)
    assert score.accuracy_by_seed[1].item() == pytest.approx(evaluator.eval(images[1], lab.encode_labels(sets)))
    assert lab.evaluate(evaluator, images[0], sets).probabilities.shape == (1, 3, 24)
    with pytest.raises(ValueError, match="3 images a seed for 2 label sets"):
        lab.evaluate(evaluator, images, sets[:2])


def test_intervals():
    rng = np.random.default_rng(1)
    totals = rng.integers(1, 4, 32)
    hits = lambda seeds: rng.binomial(totals, 0.8, (seeds, 32))
    few, many = hits(5), hits(64)
    widths = {}
    for name, h in (("few", few), ("many", many)):
        seeds, sets = lab.bootstrap_intervals(h, totals)
        mean = h.sum() / (len(h) * totals.sum())
        assert seeds[0] < mean < seeds[1] and sets[0] < mean < sets[1]
        assert 0 <= sets[0] < sets[1] <= 1
        widths[name] = seeds[1] - seeds[0]
    assert widths["many"] < 0.5 * widths["few"], "more seeds, narrower"
    by_seed = many.sum(1) / totals.sum()
    normal = 2 * 1.96 * by_seed.std() / np.sqrt(64)
    assert widths["many"] == pytest.approx(normal, rel=0.15), "about the normal approximation"
    seeds, sets = lab.bootstrap_intervals(few[:1], totals)
    assert seeds is None and sets[0] < sets[1], "one seed says nothing about seeds"


def test_label_sets_of_different_difficulty_widen_the_second_interval():
    totals = np.full(32, 2)
    hits = np.repeat([[2, 0] * 16], 8, 0)  # the same in every seed, which then say nothing
    seeds, sets = lab.bootstrap_intervals(hits, totals)
    assert seeds is None and sets[1] - sets[0] > 0.2


def test_grades():
    expected = {1.0: "100%", 0.8: "100%", 0.7999: "90%", 0.7: "90%", 0.6999: "80%", 0.6: "80%", 0.5: "70%", 0.4: "60%",
                0.3999: "0%", 0.0: "0%"}  # fmt: skip
    assert {accuracy: lab.grade(accuracy) for accuracy in expected} == expected


def test_the_console_output_of_the_course(capsys):
    lab.print_course_result(evaluation(HAND_MADE[1], HAND_MADE[0]), "new_test.json", seed=1)
    line = capsys.readouterr().out
    assert "new_test.json" in line and "accuracy 0.7500" in line and "3 of 4" in line and "90%" in line


# ── Figures and provenance ───────────────────────────────────────────────────────────────────────────


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


def test_json_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "deep" / "results.json"
    lab.write_json(file, {"caf\u00e9": 1})
    assert json.loads(file.read_text(encoding="utf-8")) == {"caf\u00e9": 1}
    with pytest.raises(TypeError):
        lab.write_json(file, {"x": object()})

    def half(path):
        path.write_text("{")
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space"):
        storage.write_whole(file, half)
    assert json.loads(file.read_text(encoding="utf-8")) == {"caf\u00e9": 1}
    assert [p.name for p in file.parent.iterdir()] == ["results.json"], "nothing temporary is left"


def test_errors_are_told_by_kind():
    """Red cube and blue sphere were asked for; of each picture, one is found and the other is read as ..."""
    labels = lab.encode_labels([["red cube", "blue sphere"]])
    kinds = {"red sphere": "swapped", "red cylinder": "shape", "gray sphere": "colour", "gray cylinder": "both"}
    for read, kind in kinds.items():
        score = lab.Evaluation(lab.encode_labels([["red cube", read]])[None], labels, "none")
        assert {name: error["share"] for name, error in score.errors().items() if error["share"]} == {kind: 0.5}
    right = lab.Evaluation(labels.repeat(5, 1, 1), labels, "none").errors()
    assert all(error["share"] == 0 for error in right.values())
    neither = lab.encode_labels([["gray cylinder", "green cylinder"]])
    two = lab.Evaluation(torch.cat([labels, neither]).expand(6, 2, 24), labels.expand(2, 24), "none")
    low, high = two.errors()["both"]["ci95_sets"]
    assert low == 0 and high == 1, "one label set read wholly right, one wholly wrong"


def test_what_is_read_in_place_of_a_missed_label():
    """Pictures of red cube and blue sphere: right; both turned; one gone; both gone; one outranked by a third."""
    labels = lab.encode_labels([["red cube", "blue sphere"]])
    read = [outputs(red_cube=0.9, blue_sphere=0.8), outputs(gray_sphere=0.9, red_cylinder=0.8),
            outputs(red_cube=0.9, cyan_cube=0.4), outputs(),
            outputs(red_cube=0.9, purple_cube=0.95, blue_sphere=0.8)]  # fmt: skip
    counts = lab.Evaluation(torch.stack(read), labels, "none").confusions()
    columns = (*lab.OBJECTS, "none", "outranked")
    named = {(lab.OBJECTS[a], columns[b]): int(counts[a, b]) for a, b in counts.nonzero().tolist()}
    assert counts.shape == (24, 26) and named == {
        ("red cube", "red cylinder"): 1, ("blue sphere", "gray sphere"): 1, ("blue sphere", "none"): 2,
        ("red cube", "none"): 1, ("blue sphere", "outranked"): 1}  # fmt: skip


def test_a_paired_test_sees_what_intervals_do_not():
    """32 sets of three, from hard to easy; one system finds one label more than the other in every second set."""
    totals = np.full(32, 3)
    low = np.array([[0, 1, 2, 1] * 8])
    high = low + [i % 2 for i in range(32)]
    test = lab.paired_test(high, low, totals)
    assert test["difference"] == pytest.approx(1 / 6, abs=1e-4) and test["p"] < 0.001
    assert 0 < test["ci95_sets"][0] < 1 / 6 < test["ci95_sets"][1] < 1 / 3
    (_, below), (_, above) = (lab.bootstrap_intervals(hits, totals) for hits in (low, high))
    assert above[0] < below[1], "the intervals of the two overlap all the same"
    back = lab.paired_test(low, high, totals)
    assert back["difference"] == -test["difference"] and back["p"] == pytest.approx(test["p"], abs=1e-3)
    assert lab.paired_test(low, low, totals)["p"] == 1
    assert lab.paired_test(low + (np.arange(32) == 0), low, totals)["p"] > 0.5, "one set proves nothing"
    seeds = lab.paired_test(np.concatenate([high, low]), low, totals)
    assert seeds["difference"] == pytest.approx(1 / 12, abs=1e-4), "the mean over seeds counts"
    with pytest.raises(ValueError, match="31 results for 32 label sets: not in pairs"):
        lab.paired_test(low, low[:, 1:], totals)


def test_features_are_what_the_last_layer_is_given(network):
    evaluator = lab.Evaluator(network, "none")
    images = torch.rand(5, 3, 64, 64, generator=lab.make_generator(0)) * 2 - 1
    features = evaluator.features(images)
    assert features.shape == (5, 512)
    torch.testing.assert_close(network.fc(features), evaluator(images), rtol=1e-4, atol=1e-5)


def test_the_frechet_distance_of_gaussians():
    """Known for independent coordinates: (m1 - m2)^2 + (s1 - s2)^2, summed."""
    draw = torch.randn(40_000, 4, generator=lab.make_generator(0), dtype=torch.float64)
    mean, spread = torch.tensor([1.0, 0, 0, 2]), torch.tensor([1.0, 2, 3, 0.5])
    wanted = mean.square().sum() + (spread - 1).square().sum()
    other = torch.randn(40_000, 4, generator=lab.make_generator(1)) * spread + mean
    assert lab.frechet_distance(draw, other) == pytest.approx(wanted.item(), rel=0.03)
    assert lab.frechet_distance(draw, draw.flip(0)) == pytest.approx(0, abs=1e-6)
    x, y = draw[:, :2].T
    up, down = (torch.stack([x, sign * 0.8 * x + 0.6 * y], 1) for sign in (1, -1))  # variances 1, correlated by +-0.8
    assert lab.frechet_distance(up, down) == pytest.approx(2 * (1.8**0.5 - 0.2**0.5) ** 2, rel=0.03)


def test_likeness_by_halves():
    """What is drawn from the same distribution is as near as the floor; what is shifted by 1 is 4 further off."""
    scenes, other_scenes = (np.repeat(np.arange(n).astype(str), 3) for n in (400, 300))
    normal = lambda n, stream: torch.randn(n, 4, generator=lab.make_generator(0, stream))
    drawn, real, other = normal(1200, 0), normal(1200, 1), normal(900, 2)
    alike = lab.frechet_by_halves(drawn, real, scenes, other, other_scenes)
    assert all(0 < low <= mean <= high < 0.1 for mean, low, high in alike.values())
    shifted = lab.frechet_by_halves(drawn + 1, real, scenes, other, other_scenes)
    assert shifted["floor"] == alike["floor"] and shifted["sampled"][0] == pytest.approx(4, rel=0.1)
    with pytest.raises(ValueError, match="too few to halve"):
        lab.frechet_by_halves(drawn, real, scenes, other[:300], other_scenes[:300])


def test_a_mean_with_its_interval_over_scenes():
    """Pictures of a scene are alike: thrice the pictures, the same interval."""
    values, scenes = np.random.default_rng(0).normal(5, 1, 60), np.arange(60)
    mean, low, high = lab.mean_by_group(values, scenes)
    assert mean == pytest.approx(values.mean(), abs=1e-4)
    assert (high - low) == pytest.approx(2 * 1.96 / 60**0.5, rel=0.25) and low < mean < high
    assert lab.mean_by_group(np.repeat(values, 3), np.repeat(scenes, 3)) == [mean, low, high]


@pytest.mark.parametrize("colour", lab.HUES)
def test_places_of_a_colour(colour):
    """A square of each colour, a gray one and a brown one, on gray ground; then without the one that is looked for."""
    pixels = torch.full((2, 3, 64, 64), 120, dtype=torch.uint8)
    rgb = lab.load_renderer().COLOURS
    corners = {name: (4 + 10 * i, 40 - 5 * i) for i, name in enumerate(lab.HUES)}
    for name, (x, y) in corners.items():
        pixels[: 1 if name == colour else 2, :, y : y + 7, x : x + 5] = torch.tensor(rgb[name])[:, None, None]
    pixels[:, :, 2:8, 2:8] = 60
    if colour != "yellow":
        pixels[:, :, 50:58, 50:58] = torch.tensor([129, 74, 25])[:, None, None]  # brown
    found, missing = lab.object_places(lab.to_float(pixels), colour)
    assert found.tolist() == pytest.approx([corners[colour][0] + 2, corners[colour][1] + 3])
    assert missing.isnan().all()


def test_places_in_real_pictures(real_files):
    """Every object with such a hue is found in pictures of two, and nothing where no object has it."""
    dataset = lab.ICLEVRDataset(real_files, "all")
    for colour in set(lab.HUES) - {"yellow"}:
        shows = dataset.labels.view(-1, 3, 8)[..., lab.COLOURS.index(colour)].sum(1)
        places = lab.object_places(lab.to_float(dataset.pixels), colour)
        two = dataset.labels.sum(1) == 2
        assert not places[two & (shows > 0)].isnan().any() and places[shows == 0].isnan().all()


def test_the_spread_of_places():
    places = torch.tensor([[10.0, 20], [14, 20], [12, 17], [12, 23]])
    assert lab.spread_of_places(places) == pytest.approx(((4 + 4 + 9 + 9) / 3) ** 0.5)
    gone = torch.cat([places, torch.full((2, 2), float("nan"))])
    assert lab.spread_of_places(gone) == lab.spread_of_places(places)


def test_the_nearest_picture():
    known = torch.rand(300, 3, 8, generator=lab.make_generator(0)).flatten(1)
    distance, index = lab.nearest_neighbours(known[[7, 290]] + 0.1, known)
    assert index.tolist() == [7, 290] and distance.tolist() == pytest.approx([0.1, 0.1], abs=1e-5)


def test_results_follow_the_schema(data, runs):
    files, score = lab.find_data(), evaluation(HAND_MADE[1], HAND_MADE[0])
    pipe = make_pipeline(tiny())
    pipe.weights_sha256, pipe.images_seen = "0123456789abcdef", 4800
    for scale, kind, passes in ((2.0, "classifier-free", 8), (1.0, "none", 4), (0.0, "classifier-free", 4)):
        settings = tiny(guidance_scale=scale)
        lab.save_result(settings, lab.result_record(settings, pipe, "test", score, files, seconds_per_64=1.234))
        record = json.loads((settings.figures / "results.json").read_text())["results"][-1]
        assert record.keys() >= RESULT_FIELDS
        assert record["guidance"] == {"kind": kind, "scale": scale} and record["evaluations"] == passes
    assert (record["system"], record["images_seen"], record["seeds"], record["steps"]) == ("tokens", 4800, 2, 4)
    for choice, said in (
        (dict(guidance="composition", guidance_scale=1.0), {"kind": "composition", "scale": 1.0}),
        (dict(guidance="classifier-2", guidance_scale=0.0), {"kind": "none", "scale": 0.0}),
        (dict(guidance="classifier-2", classifier_input="x_t"), {"kind": "classifier-2", "scale": 4.0, "shown": "x_t"}),
        (dict(guidance_interval=(0.0, 0.5)), {"kind": "classifier-free", "scale": 4.0, "interval": [0.0, 0.5]}),
    ):
        assert lab.result_record(tiny(**choice), pipe, "test", score, files)["guidance"] == said
    lab.save_result(settings, lab.result_record(settings, None, "real-held-out", score, files))
    stored = json.loads((settings.figures / "results.json").read_text())
    assert stored["schema"] == 1 and len(stored["results"]) == 4
    real = stored["results"][-1]
    assert real.keys() >= RESULT_FIELDS and real["weights_sha256"] is None and real["system"] == "real images"
    table = lab.results_table(stored["results"])
    assert table.count("\n") == 5 and "**0.8750**" in table and "real-held-out" in table


def test_the_same_measurement_takes_the_old_ones_place(runs):
    settings = tiny()
    key = dict(system="tokens", data="course files", split="test", evaluator="course", sampler="ddim", steps=20,
               guidance={"kind": "classifier-free", "scale": 2.0}, seeds=16)  # fmt: skip
    for change in (
        dict(accuracy=0.1),
        dict(accuracy=0.2),
        dict(split="new_test"),
        dict(guidance={"kind": "none", "scale": 1.0}),
    ):
        lab.save_result(settings, key | change)
    results = json.loads((settings.figures / "results.json").read_text())["results"]
    assert len(results) == 3 and results[0]["accuracy"] == 0.2


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


# ── What ships ───────────────────────────────────────────────────────────────────────────────────────


def shipped(name, file):
    path = lab.WEIGHTS / name / file
    if not path.is_file():
        pytest.skip(f"data/weights/{name} is not there yet")
    return path


def matrices(file):
    from safetensors import safe_open

    with safe_open(file, "pt") as tensors:
        return {tensors.get_slice(k).get_dtype() for k in tensors.keys() if len(tensors.get_slice(k).get_shape()) > 1}  # noqa: SIM118


@pytest.mark.parametrize(("name", "size"), [("evaluator", 23e6), ("judge", 9e6)])
def test_the_shipped_evaluators_read_real_pictures(real_files, name, size):
    file = shipped(name, "model.safetensors")
    assert file.stat().st_size <= size and matrices(file) == {"BF16"}
    held_out = lab.ICLEVRDataset(real_files, "held-out")
    evaluator = lab.Evaluator.load(lab.WEIGHTS / name)
    assert len(held_out) == 30 and evaluator.eval(lab.to_float(held_out.pixels), held_out.labels) >= 0.9
    soft = nn.functional.interpolate(lab.to_float(held_out.pixels), size=32, mode="bilinear", antialias=True)
    soft = nn.functional.interpolate(soft, size=64, mode="bilinear")
    assert evaluator.eval(soft, held_out.labels) >= 0.85, "upsampled from 32x32, as the course's was trained"


def test_the_shipped_pipeline_draws_what_is_asked_for(real_files):
    file = shipped("tokens", "denoiser/diffusion_pytorch_model.safetensors")
    shipped("evaluator", "model.safetensors")
    assert file.stat().st_size <= 20e6 and matrices(file) == {"BF16"}
    settings = lab.make_settings("quick", device="cpu", steps=10)
    pipe = lab.load_pipeline(settings, "shipped")
    assert {p.dtype for p in pipe.denoiser.parameters()} == {torch.float32}, "stored in half, computed in float32"
    assert pipe.images_seen > 0 and pipe.weights_sha256
    sets = real_files.test[-8:]
    accuracy = lab.Evaluator.find().eval(lab.sample(pipe, sets, settings), lab.encode_labels(sets))
    assert accuracy >= 0.6, "one seed, few steps; labels that are ignored give 0.1"


def test_an_experiment_with_a_schedule_that_is_gone(capsys):
    row = {"system": "tokens", "experiment": {"schedule": "quadratic", "profile": "tiny"}}
    known = row | {"experiment": {"schedule": "cosine", "profile": "tiny"}}
    assert lab.drop_unknown([row, known]) == [known]
    assert "an experiment of tokens in results.json (schedule='quadratic': choose from" in capsys.readouterr().out
