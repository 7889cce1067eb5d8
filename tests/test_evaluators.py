"""lab6/evaluators.py: the course's protocol, and files of evaluators."""

import pickle
import re

import pytest
import torch
from conftest import outputs
from torch import nn
from torchvision.models import resnet18

import lab6_utils as lab


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
    with pytest.raises(
        ValueError, match=r"checkpoint\.pth: holds more than tensors, .* is not run\. Save its weights anew"
    ):
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


def test_features_are_what_the_last_layer_is_given(network):
    evaluator = lab.Evaluator(network, "none")
    images = torch.rand(5, 3, 64, 64, generator=lab.make_generator(0)) * 2 - 1
    features = evaluator.features(images)
    assert features.shape == (5, 512)
    torch.testing.assert_close(network.fc(features), evaluator(images), rtol=1e-4, atol=1e-5)
