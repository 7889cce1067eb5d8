"""lab6/pipeline.py: labels in, images out."""

import numpy as np
import pytest
import torch
from conftest import SETS, draw, generators, make_pipeline, start, tiny, tiny_linear

import lab6_utils as lab


def test_labels_change_the_picture_and_their_order_does_not(pipe):
    one, turned, other = (draw(pipe, [s], guidance_scale=2.0) for s in (SETS[2], SETS[2][::-1], SETS[1]))
    assert torch.equal(one, turned)
    assert (one - other).abs().max() > 1e-3


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


class Oracle(torch.nn.Module):
    """The exact eps where all pictures are one gray, from the noise level that the scheduler itself uses."""

    def __init__(self, denoiser, scheduler, gray):
        super().__init__()
        self.config, self.condition, self.scheduler, self.gray = denoiser.config, denoiser.condition, scheduler, gray
        self.expecting, self.device, self.dtype = denoiser.expecting, denoiser.device, denoiser.dtype

    def forward(self, x_t, t, labels, null=None, scale=1.0):
        sigma = self.scheduler.sigmas[self.scheduler.step_index]
        a, b = 1 / (1 + sigma**2).sqrt(), sigma / (1 + sigma**2).sqrt()
        return (x_t - a * self.gray) / b


@pytest.mark.parametrize("steps", [4, 10, 25])
def test_heun_guesses_right_between_the_steps_of_training(pipe, steps):
    """Its times are no whole numbers: alpha_bar of the nearest one made guesses wrong at the noisy end."""
    scheduler = lab.make_sampler("heun", lab.make_scheduler(tiny(prediction="epsilon")))
    exact = lab.ICLEVRPipeline(pipe.denoiser, scheduler)
    exact.set_progress_bar_config(disable=True)
    exact.__dict__["denoiser"] = Oracle(pipe.denoiser, scheduler, 0.25)
    guesses = exact(["red cube"], steps, output_type="pt", return_process=True).guesses
    torch.testing.assert_close(guesses, torch.full_like(guesses, 0.25), rtol=0, atol=0.02)


@pytest.fixture(scope="module")
def told():
    """An untrained pipeline whose network is told where objects stand."""
    pipe = make_pipeline(tiny(preset="layout"))
    layouts = [[[32.0, 28], [10 + i, 26], [54, 40 + i]] for i in range(8)]
    pipe.denoiser.condition.remember(torch.tensor(layouts))
    return pipe


def call(pipe, labels, **options):
    count = 1 if isinstance(labels[0], str) else len(labels)
    return pipe(labels, 2, generator=generators(count), output_type="pt", **options)


def test_places_are_drawn_or_given(told):
    names = ["red sphere", "cyan cube"]
    given = call(told, names, places=[(20, 30), (44, 34)])
    assert torch.equal(given.places.nan_to_num(), lab.encode_places([names], [[(20, 30), (44, 34)]]).nan_to_num())
    turned = call(told, names[::-1], places=[(44, 34), (20, 30)])
    assert torch.equal(given.images, turned.images)
    assert torch.equal(given.images, call(told, lab.encode_labels(names), places=given.places).images)
    natural, none = call(told, names), call(told, names, places="none")
    assert natural.places.isfinite().sum() == 4 and none.places.isnan().all()
    assert len({image.images.sum().item() for image in (given, natural, none)}) == 3
    part = call(told, [names, names], places=[[(20, 30), None], [None, None]])
    assert part.places.isfinite().sum() == 2
    assert not torch.allclose(part.images[0], part.images[1])


def test_an_image_has_its_places_and_noise_whatever_its_batch(told):
    both = call(told, [SETS[1], SETS[2]], return_process=True)
    own = [told([s], 2, generator=[g], output_type="pt", return_process=True)
           for s, g in zip(SETS[1:3], generators(2), strict=True)]  # fmt: skip
    for i, alone in enumerate(own):
        torch.testing.assert_close(alone.images[0], both.images[i], atol=1e-5, rtol=0)
        torch.testing.assert_close(alone.places[0], both.places[i], equal_nan=True)
    for places in ("none", [[(20, 30)] * len(names) for names in SETS[1:3]]):
        bare = call(told, [SETS[1], SETS[2]], places=places, return_process=True)
        assert torch.equal(bare.process[0], both.process[0]), "the noise does not depend on how places are chosen"
        drawn = [told(SETS[2], 2, generator=lab.make_generator(5), places=p, output_type="pt", return_process=True)
                 for p in ("natural", "none", [(20, 30)] * len(SETS[2]))]  # fmt: skip
        assert all(torch.equal(each.process[0], drawn[0].process[0]) for each in drawn)
    generator = lab.make_generator(5)
    first, second = (told(SETS[2], 2, generator=generator, output_type="pt") for _ in range(2))
    assert not torch.equal(first.places.nan_to_num(), second.places.nan_to_num())


@pytest.mark.parametrize("kind", [name for name, way in lab.GUIDANCES.items() if not way.needs_classifier])
def test_every_guidance_knows_the_places(told, kind):
    names = ["red sphere", "cyan cube"]
    one, other = (call(told, names, places=p, guidance=kind, guidance_scale=2.0).images
                  for p in ([(20, 30), (44, 34)], [(44, 34), (20, 30)]))  # fmt: skip
    assert not torch.allclose(one, other)


@pytest.mark.parametrize(
    "places, words",
    [
        ("left", "places='left': choose from"),
        ([(1, 2)], "1 places"),
        ((20, 30), "place 20 of 'red sphere' in label set 0: give (x, y)"),
        ([(20, 30), (20, float("inf"))], "from 0 to 64"),
        (torch.zeros(1, 24), "places of shape (1, 24): expected (1, 24, 2)"),
        (np.full((1, 24, 2), 70.0), "place (70.0, 70.0)"),
    ],
)
def test_places_that_cannot_be(told, places, words):
    with pytest.raises(ValueError) as error:
        call(told, ["red sphere", "cyan cube"], places=places)
    assert words in str(error.value)


@pytest.mark.parametrize("labels", ["red sphere", [["red spher"]]])
def test_labels_are_checked_before_their_places(told, labels):
    for ask in (lambda: told(labels, 2, places=[(20, 30)]), lambda: lab.encode_places(labels, [(20, 30)])):
        with pytest.raises(ValueError, match=r"give a list of labels, such as|unknown label 'red spher'"):
            ask()


def test_places_of_labels_that_are_a_tensor(told):
    """There is no order in which they were named."""
    labels = lab.encode_labels(["red sphere", "cyan cube"])
    with pytest.raises(ValueError, match="the labels are a tensor: name them"):
        call(told, labels, places=[(20, 30), (44, 34)])
    by_object = lab.encode_places(["red sphere", "cyan cube"], [(20, 30), (44, 34)])
    one, other = (call(told, labels, places=places).images for places in (by_object, by_object.numpy()))
    assert torch.equal(one, other)


def test_a_network_that_is_not_told_takes_no_places(pipe):
    for places in ("natural", [(20, 30)], np.zeros((1, 24, 2))):
        with pytest.raises(ValueError, match="not told where objects stand"):
            pipe(["red sphere"], 2, places=places)
    assert pipe(["red sphere"], 2, places="none").places is None
