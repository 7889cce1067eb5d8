"""lab6/widgets.py: the sliders."""

from conftest import make_pipeline, tiny, tiny_linear

import lab6_utils as lab


def parts_of(explorer):
    """Picture, label pickers, {description: slider} and message of the explorer."""
    picture, controls = explorer.children
    *rest, message = controls.children
    sliders = {w.description: w for w in rest if w.description}
    return picture, [w for w in rest if not w.description], sliders, message


def test_the_explorer_draws_anew(pipe):
    picture, pickers, sliders, message = parts_of(lab.guidance_explorer(pipe, tiny(steps=2)))
    assert bytes(picture.value).startswith(b"\x89PNG") and [p.value for p in pickers] == list(lab.MANUAL_SET)
    seen = [picture.value]
    for change in (
        lambda: setattr(sliders["guidance s"], "value", 6.0),
        lambda: setattr(pickers[0], "value", "gray cube"),
        lambda: setattr(sliders["seed"], "value", 3),
        lambda: setattr(sliders["steps"], "value", 5),
    ):
        change()
        assert picture.value not in seen, "a new picture"
        seen.append(picture.value)
    assert "gray cube" in message.value


def test_the_explorer_says_what_is_wrong(pipe):
    picture, pickers, _, message = parts_of(lab.guidance_explorer(pipe, tiny(steps=2)))
    before = picture.value
    pickers[0].value = pickers[1].value
    assert f"{pickers[1].value}" in message.value and "twice" in message.value and picture.value == before
    for picker in pickers:
        picker.value = picker.options[0]
    assert "at least one object" in message.value
    pickers[0].value = "red cube"
    assert "twice" not in message.value and picture.value != before, "and goes on afterwards"


def test_the_explorer_of_a_network_without_guidance():
    picture, _, sliders, message = parts_of(
        lab.guidance_explorer(make_pipeline(tiny_linear(label_dropout=0.0)), tiny(steps=2))
    )
    sliders["guidance s"].value = 3.0
    assert "use guidance_scale=1" in message.value
    sliders["guidance s"].value = 1.0
    assert bytes(picture.value).startswith(b"\x89PNG") and "guidance_scale" not in message.value


def test_sliders_reach_what_the_notebook_was_told():
    settings = tiny(steps=100, guidance_scale=12.0, seed=312550000)
    explorer = lab.guidance_explorer(make_pipeline(settings), lab.dataclasses.replace(settings, steps=100))
    scale, steps, seed = explorer.children[1].children[3:6]
    assert (scale.value, steps.value, seed.value) == (12.0, 100, 312550000)
