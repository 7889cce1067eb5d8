"""lab6/guidance.py: every guidance by hand, and its evaluations of the network."""

import math

import pytest
import torch
from conftest import SETS, draw, make_pipeline, start, tiny, tiny_linear

import lab6_utils as lab
from lab6.guidance import Step


@torch.no_grad()
def ddim_by_hand(denoiser, sets, steps, scale):
    """Song et al. 2021, eq. 12 with sigma = 0, x_0 clipped, from a v-prediction; times T - 1, T - 1 - T / steps, ..."""
    T, labels, x = 1000, lab.encode_labels(sets), start(len(sets))
    null = torch.zeros(len(labels), dtype=torch.bool)
    f = lambda t: math.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2
    alpha_bar = lambda t: 1.0 if t < 0 else f(999) / f(0) * 0.001 if t == T - 1 else f(t + 1) / f(0)
    for t in range(T - 1, -1, -T // steps):
        a, before = alpha_bar(t), alpha_bar(t - T // steps)
        cond, uncond = (denoiser(x, torch.tensor(t), labels, which) for which in (null, ~null))
        v = uncond + scale * (cond - uncond)
        x_0 = (math.sqrt(a) * x - math.sqrt(1 - a) * v).clamp(-1, 1)
        eps = math.sqrt(a) * v + math.sqrt(1 - a) * x
        x = math.sqrt(before) * x_0 + math.sqrt(1 - before) * eps
    return x.clamp(-1, 1)


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.0, 5.0])
def test_ddim_and_guidance_are_the_closed_form(pipe, scale):
    expected = ddim_by_hand(pipe.denoiser, SETS, 4, scale)
    torch.testing.assert_close(draw(pipe, steps=4, guidance_scale=scale), expected, rtol=1e-3, atol=1e-3)


def test_scale_one_is_one_conditional_pass(pipe, calls):
    draw(pipe, guidance_scale=1.0)
    assert [count for count, _, _ in calls] == [3, 3, 3]
    assert not any(null.any() for _, null, _ in calls)
    assert all(torch.equal(labels, lab.encode_labels(SETS)) for _, _, labels in calls)


def test_scale_zero_is_one_pass_without_labels(pipe, calls):
    one = draw(pipe, guidance_scale=0.0)
    assert [count for count, _, _ in calls] == [3, 3, 3] and all(null.all() for _, null, _ in calls)
    other = draw(pipe, [["blue cube"], ["green cube"], ["gray sphere"]], guidance_scale=0.0)
    torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


def test_other_scales_ask_once_for_both(pipe, calls):
    images = draw(pipe, guidance_scale=2.0)
    assert [count for count, _, _ in calls] == [6, 6, 6]
    assert all(null.sum() == 3 for _, null, _ in calls)
    for scale in (0.0, 1.0, 4.0):
        assert (draw(pipe, guidance_scale=scale) - images).abs().max() > 1e-3


def test_no_guidance_is_the_labelled_prediction(pipe):
    assert torch.equal(draw(pipe, guidance="none", guidance_scale=5.0), draw(pipe, guidance_scale=1.0))


@pytest.mark.parametrize("guidance, most", [("classifier-free", 6), ("composition", 12)])
def test_guidance_acts_in_its_interval(pipe, calls, guidance, most):
    """Five steps at t = 999, 799, 599, 399, 199."""
    options = dict(guidance=guidance, guidance_scale=3.0, steps=5)
    images = draw(pipe, guidance_interval=(0.3, 0.7), **options)
    assert [count for count, _, _ in calls] == [3, 3, most, most, 3]
    assert (images - draw(pipe, **options)).abs().max() > 1e-3
    assert torch.equal(draw(pipe, guidance_interval=(0.0, 0.1), **options), draw(pipe, steps=5, guidance="none"))


def test_composition_adds_what_each_object_alone_changes(pipe, monkeypatch):
    """Liu et al. 2022: eps_uncond + s sum_i (eps_i - eps_uncond), at one step of the schedule."""
    predictions = []
    step = pipe.scheduler.step
    monkeypatch.setattr(pipe.scheduler, "step", lambda p, *a, **k: (predictions.append(p), step(p, *a, **k))[1])
    draw(pipe, steps=1, guidance="composition", guidance_scale=1.5)
    x, t, null = start(3), torch.tensor(999), torch.ones(1, dtype=torch.bool)
    with torch.no_grad():
        for i, names in enumerate(SETS):
            uncond = pipe.denoiser(x[i : i + 1], t, lab.encode_labels(names), null)
            alone = [pipe.denoiser(x[i : i + 1], t, lab.encode_labels([name])) for name in names]
            expected = uncond + 1.5 * sum(one - uncond for one in alone)
            torch.testing.assert_close(predictions[0][i : i + 1], expected, rtol=1e-3, atol=1e-4)


class Brightness:
    """A classifier whose log p(labels | x) is the sum of x times the first label's index plus one."""

    def __init__(self):
        self.seen = []

    def log_probability(self, images, labels):
        self.seen.append(images.detach())
        return (labels.argmax(1) + 1) * images.flatten(1).sum(1) / 100


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_algorithm_2_moves_eps(prediction, monkeypatch):
    """eps - s sqrt(1 - alpha_bar) grad, whatever the network predicts; the gradient of this classifier is constant."""
    pipe, classifier, predictions = make_pipeline(tiny(prediction=prediction)), Brightness(), []
    lab.set_times(pipe.scheduler, 2)
    times = pipe.scheduler.timesteps  # 999, 499: at the first there is nothing to read
    step = pipe.scheduler.step
    monkeypatch.setattr(
        pipe.scheduler, "step", lambda p, t, x, **k: (predictions.append((p, x)), step(p, t, x, **k))[1]
    )
    pipe.classifier, options = classifier, dict(guidance="classifier-2", classifier_input="x_t")
    draw(pipe, steps=2, guidance_scale=3.0, **options)
    alpha_bar, labels = pipe.scheduler.alphas_cumprod, lab.encode_labels(SETS)
    gradient = (labels.argmax(1) + 1).view(-1, 1, 1, 1) / 100
    for t, (guided, x), readable in zip(times, predictions, (0, 1), strict=True):
        with torch.no_grad():
            plain = pipe.denoiser(x, t, labels)
        a, b = alpha_bar[t].sqrt(), (1 - alpha_bar[t]).sqrt()
        of_x, of_p = {"epsilon": (0, 1), "v_prediction": (b, a), "sample": (1 / b, -a / b)}[prediction]
        expected = of_x * x + of_p * plain - readable * 3.0 * b * gradient
        torch.testing.assert_close(of_x * x + of_p * guided, expected, rtol=1e-3, atol=1e-4)
    assert torch.equal(classifier.seen[1], predictions[1][1]), "shown x_t"


def test_algorithm_1_moves_the_mean_by_the_variance():
    pipe = make_pipeline(tiny(), "ddpm")
    states = {0.0: [], 2.0: []}
    pipe.classifier, options = Brightness(), dict(steps=4, guidance="classifier-1", classifier_input="x_t")
    for scale, kept in states.items():
        keep = lambda p, i, t, state, kept=kept: kept.append(state["x_t"])
        draw(pipe, guidance_scale=scale, callback_on_step_end=keep, **options)
    assert torch.equal(states[0.0][0], states[2.0][0]), "nothing can be read at t = 999"
    alpha_bar = pipe.scheduler.alphas_cumprod.double()
    now, before = alpha_bar[749], alpha_bar[499]
    variance = (1 - before) / (1 - now) * (1 - now / before)  # Ho et al. 2020, eq. 7
    gradient = (lab.encode_labels(SETS).argmax(1) + 1).view(-1, 1, 1, 1) / 100
    moved = states[2.0][1] - states[0.0][1]
    torch.testing.assert_close(moved, (2.0 * variance * gradient).float().expand_as(moved), rtol=1e-3, atol=1e-5)


def test_the_classifier_is_shown_the_predicted_picture_through_the_network(pipe):
    pipe.classifier = classifier = Brightness()
    x_t, t, labels = start(3), torch.tensor(499), lab.encode_labels(SETS)
    step = Step(denoiser=pipe.denoiser, scheduler=pipe.scheduler, time=t, alpha_bar=pipe.scheduler.alphas_cumprod[499],
                x_t=x_t, labels=labels, scale=1.0, objects=3, decode=lambda x: x, classifier=classifier)  # fmt: skip
    prediction = lab.GUIDANCES["classifier-2"].ask(step)
    gradient, pipe.classifier = step.gradient, None
    x_0 = lab.to_x_0(prediction, x_t, pipe.scheduler.alphas_cumprod[499], "v_prediction").clamp(-1, 1)
    torch.testing.assert_close(classifier.seen[0], x_0)
    direction = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(1))

    @torch.no_grad()
    def log_p(x):
        x_0 = lab.to_x_0(pipe.denoiser(x, t, labels), x, pipe.scheduler.alphas_cumprod[499], "v_prediction")
        return classifier.log_probability(x_0.clamp(-1, 1), labels)

    h = 1e-3  # a difference quotient says the same as the gradient
    slope = (log_p(x_t + h * direction) - log_p(x_t - h * direction)) / (2 * h)
    torch.testing.assert_close((gradient * direction).sum((1, 2, 3)), slope, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("sampler", lab.SAMPLERS)
def test_classifier_guidance_raises_what_the_classifier_says(sampler):
    """On an untrained network, with every sampler: the brighter the label asks for, the brighter the picture."""
    pipe, classifier = make_pipeline(tiny(), sampler), Brightness()
    pipe.classifier, options = classifier, dict(steps=4, guidance="classifier-2")
    dark, bright = (draw(pipe, guidance_scale=scale, **options) for scale in (0.0, 5.0))
    assert (classifier.log_probability(bright, lab.encode_labels(SETS))
            > classifier.log_probability(dark, lab.encode_labels(SETS))).all()  # fmt: skip


@pytest.mark.parametrize("scale", [0.0, 2.0])
def test_a_model_without_null_condition_refuses_guidance(scale):
    pipe = make_pipeline(tiny_linear(label_dropout=0.0))
    assert draw(pipe, steps=1).shape == (3, 3, 64, 64)
    with pytest.raises(ValueError, match="use guidance_scale=1"):
        draw(pipe, guidance_scale=scale)


def test_composition_tells_no_places_without_labels():
    """Otherwise the other objects' places would be taken away from each object's part."""
    pipe, seen = make_pipeline(tiny(preset="layout")), []
    forward = pipe.denoiser.forward
    pipe.denoiser.forward = lambda *a, places, **k: seen.append((a[3], places)) or forward(*a, places=places, **k)
    names = ["red sphere", "cyan cube"]
    pipe(names, 1, guidance="composition", guidance_scale=2.0, places=[(20, 30), (44, 34)], output_type="pt")
    ((null, places),) = seen
    assert null.tolist() == [True, False, False]
    assert places[0].isnan().all() and (places[1:].isfinite().sum((1, 2)) == 4).all()
