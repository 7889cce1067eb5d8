"""Sections 6 and 9 of lab6_utils: the pipeline, guidance, samplers, and the widget that drives them."""

import math

import numpy as np
import pytest
import torch
from conftest import make_pipeline, tiny, tiny_linear
from PIL import Image

import lab6_utils as lab
from lab6.guidance import Step

SETS = [["red sphere"], ["cyan cube", "gray cube"], list(lab.MANUAL_SET)]


@pytest.fixture(scope="module")
def shared():
    return make_pipeline(tiny())


@pytest.fixture
def pipe(shared):
    """An untrained pipeline with the DDIM sampler."""
    shared.scheduler = lab.make_sampler("ddim", shared.scheduler)
    return shared


@pytest.fixture
def calls(pipe):
    """(batch size, null, labels) of each call of the network."""
    seen = []

    def note(module, arguments):
        x_t, _, labels, null = arguments
        seen.append((len(x_t), null, labels))

    hook = pipe.denoiser.register_forward_pre_hook(note)
    yield seen
    hook.remove()


def generators(count, seed=0):
    return [lab.make_generator(seed, i) for i in range(count)]


def draw(pipe, sets=SETS, steps=3, seed=0, **options):
    options = dict(generator=generators(len(sets), seed), output_type="pt") | options
    return pipe(sets, steps, **options).images


def start(count):
    return torch.cat([torch.randn(1, 3, 64, 64, generator=g) for g in generators(count)])


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


# ── Guidance ─────────────────────────────────────────────────────────────────────────────────────────


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
    pipe.scheduler.set_timesteps(2)
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


def test_evaluations_are_counted_as_the_network_is_asked(pipe, calls):
    labels = lab.encode_labels(SETS)
    for options in (dict(), dict(guidance_scale=1.0), dict(guidance_scale=0.0), dict(guidance="none"),
                    dict(guidance="composition"), dict(sampler="heun", guidance_scale=1.0),
                    dict(guidance_interval=(0.2, 0.6)),
                    dict(sampler="heun", guidance_interval=(0.5, 1.0))):  # fmt: skip
        settings = tiny(**options)
        pipe.scheduler = lab.make_sampler(settings.sampler, pipe.scheduler)
        calls.clear()
        lab.sample(pipe, SETS, settings)
        assert sum(count for count, _, _ in calls) == len(SETS) * lab.count_evaluations(settings, labels), options


def test_labels_change_the_picture_and_their_order_does_not(pipe):
    one, turned, other = (draw(pipe, [s], guidance_scale=2.0) for s in (SETS[2], SETS[2][::-1], SETS[1]))
    assert torch.equal(one, turned)
    assert (one - other).abs().max() > 1e-3


@pytest.mark.parametrize("scale", [0.0, 2.0])
def test_a_model_without_null_condition_refuses_guidance(scale):
    pipe = make_pipeline(tiny_linear(label_dropout=0.0))
    assert draw(pipe, steps=1).shape == (3, 3, 64, 64)
    with pytest.raises(ValueError, match="use guidance_scale=1"):
        draw(pipe, guidance_scale=scale)


# ── Samplers ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("settings", [tiny(), tiny(zero_snr=True), tiny_linear(), tiny(prediction="sample")],
                         ids=["v", "zero-snr", "epsilon", "x_0"])  # fmt: skip
@pytest.mark.parametrize("name", lab.SAMPLERS)
def test_samplers_draw_pictures(name, settings):
    if name == "heun" and settings.zero_snr:
        with pytest.raises(ValueError, match="sampler='heun' with zero_snr=True"):
            make_pipeline(settings, name)
        assert name not in lab.samplers_for(make_pipeline(settings), settings)
        return
    pipe = make_pipeline(settings, name)
    assert name in lab.samplers_for(pipe, settings)
    one = draw(pipe, steps=4, guidance_scale=2.0)
    assert one.shape == (3, 3, 64, 64) and one.dtype == torch.float32 and one.isfinite().all()
    assert one.abs().max() <= 1 and one.std() > 0.1
    assert torch.equal(draw(pipe, steps=4, guidance_scale=2.0), one), "the same noise, the same picture"
    assert (draw(pipe, steps=4, guidance_scale=2.0, seed=1) - one).abs().max() > 0.1


@pytest.mark.parametrize("name", lab.SAMPLERS)
def test_a_picture_does_not_depend_on_its_batch(pipe, name):
    pipe.scheduler = lab.make_sampler(name, pipe.scheduler)
    sets = [*SETS, lab.OBJECTS[::5]]
    together = draw(pipe, sets, guidance_scale=2.0)
    for i, label_set in enumerate(sets):
        alone = draw(pipe, [label_set], guidance_scale=2.0, generator=[lab.make_generator(0, i)])
        # heun's states begin some 20,000 wide: there rounding shows in single pixels of an untrained network
        error = (together[i : i + 1] - alone).abs()
        assert error.mean() < 1e-4 and (error.max() < 2e-3 or name == "heun")


def test_ancestral_sampling_is_random_on_the_way(pipe):
    noise = lambda seed: [*generators(2), torch.Generator().manual_seed(seed)]
    for name, differs in (("ddpm", True), ("ddim", False)):
        pipe.scheduler = lab.make_sampler(name, pipe.scheduler)
        runs = [pipe(SETS, 3, generator=noise(s), output_type="pt", return_process=True).process for s in (5, 5)]
        assert torch.equal(*runs)
        x_t, t = runs[0][0], pipe.scheduler.timesteps[0]
        steps = [pipe.scheduler.step(x_t, t, x_t, generator=g).prev_sample for g in (noise(1)[2], noise(2)[2])]
        assert torch.equal(*steps) != differs


def test_any_scheduler_of_diffusers_fits(pipe):
    from diffusers import EulerDiscreteScheduler, UniPCMultistepScheduler

    for scheduler in (EulerDiscreteScheduler, UniPCMultistepScheduler):
        pipe.scheduler = scheduler.from_config(lab.make_scheduler(tiny()).config)
        images = draw(pipe, steps=4, guidance_scale=2.0)
        assert images.isfinite().all() and images.abs().max() <= 1 and images.std() > 0.1


# ── The pipeline's interface ─────────────────────────────────────────────────────────────────────────


def test_saving_and_loading(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    assert '"lab6_utils"' in (tmp_path / "model_index.json").read_text(), "importable: not of __main__"
    assert list((tmp_path / "denoiser").glob("*.safetensors"))
    again = lab.ICLEVRPipeline.from_pretrained(tmp_path)
    assert type(again.denoiser) is lab.Denoiser and type(again.scheduler) is type(pipe.scheduler)
    for name, value in pipe.denoiser.state_dict().items():
        assert torch.equal(value, again.denoiser.state_dict()[name])
    again.set_progress_bar_config(disable=True)
    torch.testing.assert_close(draw(again, guidance_scale=2.0), draw(pipe, guidance_scale=2.0), rtol=0, atol=1e-4)


def test_labels_may_be_given_in_three_ways(pipe):
    one = draw(pipe, [SETS[1]])
    assert torch.equal(draw(pipe, [SETS[1]], generator=generators(1)), one)
    flat, encoded = (
        pipe(s, 3, generator=generators(1), output_type="pt").images for s in (SETS[1], lab.encode_labels(SETS[1]))
    )
    assert torch.equal(flat, one) and torch.equal(encoded, one)


def test_the_process_goes_from_noise_to_picture(pipe):
    output = pipe(SETS, 5, 2.0, generator=generators(3), output_type="pt", return_process=True)
    assert output.process.shape == output.guesses.shape == (6, 3, 3, 64, 64)
    torch.testing.assert_close(output.process[0], start(3))
    assert torch.equal(output.process[-1], output.images) and torch.equal(output.guesses[-1], output.images)
    assert (output.process.diff(dim=0).flatten(1).abs().amax(1) > 1e-3).all(), "each frame is another"
    last, eps = output.guesses[-2].clamp(-1, 1), output.process[-2]
    torch.testing.assert_close(last, output.images, rtol=0, atol=1e-3), eps
    plain = pipe(SETS, 5, 2.0, generator=generators(3), output_type="pt")
    assert plain.process is None and torch.equal(plain.images, output.images)
    states, guesses = lab.sample_process(pipe, SETS[2], tiny(steps=4))
    assert states.shape == guesses.shape == (5, 3, 64, 64)


def test_output_types(pipe):
    pictures = pipe(SETS, 2, generator=generators(3)).images
    tensors = draw(pipe, steps=2)
    assert [p.size for p in pictures] == [(64, 64)] * 3 and all(p.mode == "RGB" for p in pictures)
    for picture, tensor in zip(pictures, tensors, strict=True):
        assert np.abs(np.asarray(picture).transpose(2, 0, 1) - (tensor.numpy() + 1) * 127.5).max() <= 0.51
    assert isinstance(pipe(SETS, 1, return_dict=False), tuple)
    with pytest.raises(ValueError, match="output_type='np': choose from pil, pt"):
        pipe(SETS, output_type="np")


def test_pil_conversion_by_hand():
    image = torch.tensor([-1.0, 0.0, 1.0]).view(1, 3, 1, 1).expand(1, 3, 2, 4)
    (picture,) = lab.to_pil(image)
    assert picture.size == (4, 2) and picture.getpixel((3, 1)) == (0, 128, 255)


@pytest.mark.parametrize(
    "labels, options, words",
    [
        (SETS, dict(generator=[torch.Generator()] * 2), "2 generators for 3 label sets: give one for each"),
        ([], {}, "name at least one object"),
        (["red spere"], {}, "did you mean 'red sphere'"),
        (SETS, dict(guidance="free"), "guidance='free': choose from none, classifier-free, composition"),
        (SETS, dict(guidance="classifier-2"), "guidance='classifier-2' needs a classifier: set pipe.classifier"),
        ([["red cube", "red cube"]], {}, "is twice"),
    ],
)
def test_wrong_requests(pipe, labels, options, words):
    with pytest.raises(ValueError, match=words):
        pipe(labels, **options)


def test_the_callback_sees_each_step(pipe):
    seen = []
    pipe(SETS, 3, callback_on_step_end=lambda p, i, t, state: seen.append((p, i, int(t), state["x_t"].shape)))
    assert [(i, t) for _, i, t, _ in seen] == [(0, 999), (1, 666), (2, 332)]
    assert all(p is pipe and shape == (3, 3, 64, 64) for p, _, _, shape in seen)


def test_sample_takes_more_sets_than_fit_a_batch(pipe):
    sets = [[lab.OBJECTS[i % 24]] for i in range(66)]
    images = lab.sample(pipe, sets, tiny(), seed=5, num_inference_steps=1, guidance_scale=1.0)
    assert images.shape == (66, 3, 64, 64)
    for i in (0, 63, 64, 65):
        alone = pipe(sets[i], 1, 1.0, generator=lab.make_generator(5, i), output_type="pt").images
        torch.testing.assert_close(images[i : i + 1], alone, rtol=0, atol=1e-3)


def test_sample_uses_the_settings(pipe, calls):
    lab.sample(pipe, SETS, tiny(steps=3, guidance_scale=2.0))
    assert [count for count, _, _ in calls] == [6, 6, 6]


def test_sample_seeds_are_seeds(pipe):
    drawn = lab.sample_seeds(pipe, SETS, tiny(seed=4, seeds=3), num_inference_steps=1)
    assert drawn.shape == (3, 3, 3, 64, 64)
    for i in range(3):
        assert torch.equal(drawn[i], lab.sample(pipe, SETS, tiny(), seed=4 + i, num_inference_steps=1))


def test_pictures_are_kept_in_order(tmp_path):
    colours = torch.linspace(-1, 1, 12).view(12, 1, 1, 1).expand(12, 3, 64, 64)
    lab.save_images(torch.zeros(20, 3, 64, 64), tmp_path)
    lab.save_images(colours, tmp_path)
    files = sorted(tmp_path.iterdir())
    assert [f.name for f in files] == [f"{i:03d}.png" for i in range(12)], "those of an earlier, longer list are gone"
    for file, colour in zip(files, lab.to_uint8(colours), strict=True):
        assert np.array_equal(np.asarray(Image.open(file)), colour.permute(1, 2, 0).numpy())


# ── The widget ───────────────────────────────────────────────────────────────────────────────────────


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
