"""lab6/layouts.py: where objects are to stand."""

import pytest
import torch

import lab6_utils as lab

FIRST, LEFT, RIGHT, NEAR = (32.0, 28.0), (10.0, 26.0), (54.0, 40.0), (36.0, 34.0)
APART, CLOSE = [FIRST, LEFT, RIGHT], [FIRST, LEFT, NEAR]
LAYOUTS = torch.tensor([APART, CLOSE])
SETS = [["red cube"], ["blue sphere", "gray cube"], list(lab.MANUAL_SET)]


def draw(kind, sets=SETS, layouts=LAYOUTS, seed=0):
    generators = [lab.make_generator(seed, i) for i in range(len(sets))]
    return lab.draw_places(lab.encode_labels(sets), kind, layouts, generators)


def standing(places):
    """The places of one label set's objects."""
    return places[places.isfinite().all(1)]


def test_natural_places_are_those_of_a_scene():
    places, again = draw("natural"), draw("natural")
    torch.testing.assert_close(places, again, equal_nan=True)
    assert not torch.equal(places.nan_to_num(), draw("natural", seed=1).nan_to_num())
    assert (places.isfinite().all(2) == lab.encode_labels(SETS).bool()).all(), "a place for what is asked for"
    for count, of_set in enumerate(places, 1):
        found = standing(of_set)
        scenes = [torch.cdist(found, scene[:count]).amin(1).amax() for scene in LAYOUTS]
        assert len(found) == count and min(scenes) < 6 * 0.5, "within the jitter of one scene's places"


def test_any_object_may_be_the_first():
    middle = [draw("natural", [["red cube", "gray cube"]] * 40, seed=s)[:, 0, 0] for s in range(2)]
    share = ((torch.cat(middle) - FIRST[0]).abs() < 3).float().mean()
    assert 0.3 < share < 0.7, "gray cube, object 0, stands in the middle as often as the other"


def test_separated_places_do_not_hide_each_other():
    sets = [list(lab.MANUAL_SET)] * 60
    of = {kind: torch.stack([standing(p) for p in draw(kind, sets)]) for kind in ("natural", "separated")}
    assert (lab.gaps(of["natural"]) < 9).any() and (lab.gaps(of["separated"]) > 8).all()


@pytest.mark.parametrize("kind", ["natural", "separated"])
def test_more_objects_than_a_scene_has(kind):
    many = [lab.OBJECTS[::5]]  # five
    layouts = torch.tensor([[FIRST, (5.0 + 9 * i, 14.0 + 5 * j), (60.0 - 9 * i, 58.0 - 5 * j)]
                            for i in range(3) for j in range(3)])  # fmt: skip
    found = standing(draw(kind, many, layouts)[0])
    least = 10.0 if kind == "separated" else lab.gaps(layouts).min()
    assert len(found) == 5 and lab.gaps(found) > least - 3


def test_where_no_place_is_known_none_is_drawn():
    assert draw("none").isnan().all()
    assert draw("natural", layouts=torch.full((4, 3, 2), torch.nan)).isnan().all()
    with pytest.raises(ValueError, match="places='left': choose from natural, separated, none"):
        draw("left")


def test_gaps_count_height_less():
    assert lab.gaps(torch.tensor([[0.0, 0.0], [0.0, 10.0]])) == 8
    assert lab.gaps(torch.tensor([[3.0, 4.0]])).isinf(), "one object is alone"
