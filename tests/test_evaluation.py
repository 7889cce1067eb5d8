"""lab6/evaluation.py: measures by hand, errors, the course's output."""

import pytest
import torch
from conftest import HAND_MADE, evaluation, outputs

import lab6_utils as lab


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
    assert perfect["ci95_sets"] is None, "nor do sets that do"
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


def test_grades():
    expected = {1.0: "100%", 0.8: "100%", 0.7999: "90%", 0.7: "90%", 0.6999: "80%", 0.6: "80%", 0.5: "70%", 0.4: "60%",
                0.3999: "0%", 0.0: "0%"}  # fmt: skip
    assert {accuracy: lab.grade(accuracy) for accuracy in expected} == expected


def test_the_console_output_of_the_course(capsys):
    lab.print_course_result(evaluation(HAND_MADE[1], HAND_MADE[0]), "new_test.json", seed=1)
    line = capsys.readouterr().out
    assert "new_test.json" in line and "accuracy 0.7500" in line and "3 of 4" in line and "90%" in line


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
