"""lab6/conditioning.py: what a network that is told of places gets to know of them."""

import pytest
import torch
from conftest import tiny

import lab6_utils as lab

NAMES = ["red sphere", "cyan cube"]
LABELS = lab.encode_labels(NAMES)
PLACES = lab.encode_places([NAMES], [[(20, 30), (44.5, 40)]])
KNOWN = torch.zeros(1, dtype=torch.bool)


@pytest.fixture(scope="module")
def condition():
    torch.manual_seed(0)
    condition = lab.LayoutCondition(32, 16, True)
    torch.nn.init.normal_(condition.place[2].weight)  # as if it had learnt something: it begins with zeros
    return condition


def blobs(condition, places, null=KNOWN, size=32):
    _, tokens = condition(LABELS, null, places)
    return condition.paint(LABELS, tokens, places, size)[0]


def test_a_blob_is_painted_at_each_place(condition):
    alone = PLACES.clone()
    alone[0, lab.OBJECTS.index("cyan cube")] = torch.nan
    painted = blobs(condition, alone)
    strength = painted.abs().sum(0)
    y, x = divmod(strength.argmax().item(), 32)
    assert abs(2 * x + 1 - 20) <= 1 and abs(2 * y + 1 - 30) <= 1, "in pixels of the image, not of the map"
    torch.testing.assert_close(strength[y, x + 5] / strength[y, x], torch.tensor(2.0).neg().exp(), atol=0.1, rtol=0.2)
    assert painted.shape == (16, 32, 32)
    assert not torch.allclose(painted, blobs(condition, PLACES))


def test_unknown_places_leave_the_tokens_alone(condition):
    nowhere = torch.full_like(PLACES, torch.nan)
    plain = lab.TokenCondition.forward(condition, LABELS, KNOWN)
    for told in (condition(LABELS, KNOWN), condition(LABELS, KNOWN, nowhere)):
        torch.testing.assert_close(told, plain)
    assert blobs(condition, nowhere).abs().sum() == 0
    assert not torch.equal(condition(LABELS, KNOWN, PLACES)[1], plain[1])


def test_without_labels_the_blobs_say_where_but_not_what(condition):
    swapped = PLACES.clone()
    rows = [lab.OBJECTS.index(name) for name in NAMES]
    swapped[0, rows] = PLACES[0, rows[::-1]]
    torch.testing.assert_close(blobs(condition, PLACES, ~KNOWN), blobs(condition, swapped, ~KNOWN))
    assert blobs(condition, PLACES, ~KNOWN).abs().sum() > 0
    assert not torch.allclose(blobs(condition, PLACES), blobs(condition, swapped))


def test_a_network_learns_from_places_that_are_partly_unknown():
    network = lab.make_denoiser(tiny(preset="layout"))
    places = torch.cat([PLACES, torch.full_like(PLACES, torch.nan)])
    x = torch.randn(2, 3, 64, 64, generator=lab.make_generator(0))
    t, labels = torch.tensor([500, 500]), LABELS.repeat(2, 1)
    out = network(x, t, labels, places=places)
    out.square().mean().backward()
    assert all(p.grad.isfinite().all() for p in network.parameters() if p.grad is not None)
    assert network.condition.blob.weight.grad.abs().sum() > 0
    torch.testing.assert_close(network(x, t, labels)[1], out[1]), "no places are unknown places"


def test_layouts_are_kept_with_the_weights(tmp_path):
    network = lab.make_denoiser(tiny(preset="layout"))
    network.condition.remember(torch.arange(18.0).view(3, 3, 2))
    network.save_pretrained(tmp_path)
    kept = lab.Denoiser.from_pretrained(tmp_path).condition.layouts
    assert len(kept) == 2048 and set(kept[:, 0, 0].tolist()) == {0.0, 6.0, 12.0}
