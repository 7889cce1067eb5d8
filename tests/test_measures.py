"""lab6/measures.py: intervals, tests and distances by hand."""

import numpy as np
import pytest
import torch

import lab6_utils as lab


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


def test_a_lattice_and_blur_are_seen():
    rng, groups = lab.make_generator(0), np.arange(24) // 2
    grain = torch.randn(24, 3, 64, 64, generator=rng) * 0.1
    board = (torch.arange(64)[:, None] + torch.arange(64)) % 2 - 0.5
    stripes = (torch.arange(64) % 2 - 0.5).expand(64, 64)
    even, low, high = lab.lattice(grain, groups)
    assert 0.9 < low < even < high < 1.1, "white noise has as much power at each frequency"
    assert lab.lattice(grain + 0.05 * board, groups)[1] > high and lab.lattice(grain + 0.05 * stripes, groups)[1] > high
    smooth = torch.nn.functional.avg_pool2d(grain, 2, 1, padding=1)[:, :, :64, :64]
    assert lab.lattice(smooth, groups)[2] < low


def test_placement_errors_by_hand():
    sets = [["red cube", "cyan sphere"], ["red cube", "red sphere"], ["yellow cube", "brown cube"], ["gray cube"]]
    labels = lab.encode_labels(sets)
    images = torch.zeros(4, 3, 64, 64)
    for i, (x, y) in enumerate([(10, 20), (40, 50)]):
        colour = torch.tensor(lab.load_renderer().COLOURS[("red", "cyan")[i]]) / 127.5 - 1
        images[0, :, y : y + 8, x : x + 8] = colour[:, None, None]
    asked = [[(14, 24), (47, 58)], [(1, 1), (2, 2)], [(1, 1), (2, 2)], [(3, 3)]]
    distances = lab.placement_errors(images, labels, lab.encode_places(sets, asked))
    assert len(distances) == 2, "no colour twice, no yellow beside brown, no gray"
    assert distances.tolist() == pytest.approx([0, 5], abs=0.01)
    nothing = lab.placement_errors(torch.zeros_like(images), labels, lab.encode_places(sets, asked))
    assert nothing.isnan().all()
    unasked = lab.placement_errors(images, labels, torch.full((4, 24, 2), torch.nan))
    assert len(unasked) == 0


def test_objects_of_scenes_stand_where_they_were_found(scenes, monkeypatch):
    monkeypatch.setenv("LAB6_DATA", str(scenes))
    files = lab.find_data()
    dataset = lab.ICLEVRDataset(files, "all", limit=150)
    places = lab.places_by_object(files, dataset)
    errors = lab.placement_errors(lab.to_float(dataset.pixels), dataset.labels, places)
    assert len(errors) > 60 and errors.nanmedian() < 1 and errors.isnan().float().mean() < 0.02


def test_equal_values_are_no_certainty():
    """What resampling cannot vary has no interval, rather than one of no width."""
    totals = np.array([1, 2, 3])
    for found in (totals, 0 * totals):
        assert lab.bootstrap_intervals(np.tile(found, (16, 1)), totals) == (None, None)
    assert lab.bootstrap_intervals(np.array([[1, 2, 2]]), totals)[1] is not None
    assert lab.mean_by_group(np.zeros(4), list("aabb")) == [0, None, None]
