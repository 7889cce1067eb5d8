"""lab6/diffusion.py: schedules and samplers agree with closed forms and with diffusers."""

import inspect
import itertools
import math

import numpy as np
import pytest
import torch
from conftest import tiny
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

import lab6_utils as lab

NAMES = list(lab.SCHEDULES)


def test_linear_is_the_product_of_its_betas():
    product, expected = 1.0, []
    for t in range(1000):
        product *= 1 - (1e-4 + (0.02 - 1e-4) * t / 999)
        expected.append(product)
    np.testing.assert_allclose(lab.alphas_bar("linear").numpy(), expected, rtol=1e-9)
    assert lab.alphas_bar("linear")[-1].item() == pytest.approx(4.04e-5, rel=0.01), "as in Ho et al. 2020"


@pytest.mark.parametrize("T", [50, 1000])
def test_cosine_is_its_closed_form_up_to_the_last_step(T):
    f = lambda t: math.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2
    alpha_bar = lab.alphas_bar("cosine", T)
    np.testing.assert_allclose(alpha_bar[:-1].numpy(), [f(t + 1) / f(0) for t in range(T - 1)], rtol=1e-9)
    assert (alpha_bar[-1] / alpha_bar[-2]).item() == pytest.approx(0.001), "beta is at most 0.999"


@pytest.mark.parametrize(
    "name, theirs", [("linear", "linear"), ("cosine", "squaredcos_cap_v2"), ("sigmoid", "sigmoid")]
)
@pytest.mark.parametrize("T", [300, 1000])
def test_schedules_are_those_of_diffusers(name, theirs, T):
    scheduler = DDPMScheduler(T, beta_schedule=theirs, beta_start=1e-4, beta_end=0.02)
    np.testing.assert_allclose(lab.alphas_bar(name, T).numpy(), scheduler.alphas_cumprod, rtol=2e-4, atol=1e-7)


@pytest.mark.parametrize("reference", [16, 32, 64, 256])
def test_shifted_cosine_moves_the_log_snr(reference):
    log_snr = lambda *args: lab.snr(lab.alphas_bar(*args)).log()
    shift = log_snr("shifted-cosine", 1000, reference) - log_snr("cosine")
    np.testing.assert_allclose(shift.numpy(), 2 * math.log(reference / 64), atol=1e-6)


@pytest.mark.parametrize("T", [10, 1000])
@pytest.mark.parametrize("name", NAMES)
def test_alpha_bar_falls_from_almost_one_towards_zero(name, T):
    alpha_bar = lab.alphas_bar(name, T)
    assert alpha_bar.shape == (T,) and alpha_bar.dtype == torch.float64
    assert (alpha_bar.diff() < 0).all() and alpha_bar[-1] > 0 and alpha_bar[0] < 1
    if T == 1000:
        assert (alpha_bar[0] > 0.999 and alpha_bar[-1] < 0.01) or name in ("sigmoid", "shifted-cosine")


@pytest.mark.parametrize("name", NAMES)
def test_zero_terminal_snr(name):
    plain, rescaled = lab.alphas_bar(name), lab.alphas_bar(name, zero_snr=True)
    assert rescaled[-1] == 0 and rescaled[0].item() == pytest.approx(plain[0].item())
    beta = 1 - plain / torch.cat([torch.ones(1, dtype=plain.dtype), plain[:-1]])
    theirs = torch.cumprod(1 - rescale_zero_terminal_snr(beta), 0)
    np.testing.assert_allclose(rescaled.numpy(), theirs.numpy(), atol=1e-9)


def test_unknown_schedule():
    with pytest.raises(ValueError, match="schedule='quadratic': choose from linear"):
        lab.alphas_bar("quadratic")


def test_snr():
    assert lab.snr(torch.tensor([0.5, 0.8, 0.0])).tolist() == pytest.approx([1, 4, 0])


def test_q_sample_by_hand():
    x_t = lab.q_sample(
        torch.ones(2, 1, 1, 1), torch.tensor([1, 0]), 2 * torch.ones(2, 1, 1, 1), torch.tensor([0.36, 0.04])
    )
    assert x_t.flatten().tolist() == pytest.approx([0.2 + 2 * math.sqrt(0.96), 0.6 + 2 * 0.8])


@pytest.mark.parametrize("name", NAMES)
def test_q_sample_is_what_diffusers_adds(name):
    x_0, eps = torch.randn(2, 6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0, 1, 250, 500, 998, 999])
    scheduler = lab.make_scheduler(tiny(schedule=name))
    x_t = lab.q_sample(x_0, t, eps, lab.alphas_bar(name))
    assert x_t.dtype == torch.float32
    torch.testing.assert_close(x_t, scheduler.add_noise(x_0, eps, t), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_to_x_0_undoes_the_target(prediction):
    x_0, eps = torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    a = torch.tensor(0.3)
    x_t, v = a.sqrt() * x_0 + (1 - a).sqrt() * eps, a.sqrt() * eps - (1 - a).sqrt() * x_0
    output = {"epsilon": eps, "v_prediction": v, "sample": x_0}[prediction]
    torch.testing.assert_close(lab.to_x_0(output, x_t, a, prediction), x_0)


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_the_scheduler_has_the_schedule(name, zero_snr, tmp_path):
    settings = tiny(schedule=name, zero_snr=zero_snr, schedule_reference=48, num_train_timesteps=500)
    expected = lab.alphas_bar(name, 500, 48, zero_snr)
    scheduler = lab.make_scheduler(settings)
    np.testing.assert_allclose(scheduler.alphas_cumprod, expected, rtol=1e-3, atol=1e-6)
    assert scheduler.config.prediction_type == settings.prediction
    scheduler.save_pretrained(tmp_path)
    again = DDPMScheduler.from_pretrained(tmp_path)
    assert torch.equal(again.alphas_cumprod, scheduler.alphas_cumprod), "kept exactly in the saved json"


@pytest.mark.parametrize("name", lab.SAMPLERS)
def test_a_sampler_is_the_same_after_any_other(name):
    fresh = lab.make_sampler(name, lab.make_scheduler(tiny()))
    lab.set_times(fresh, 10)
    for before in lab.SAMPLERS:
        sampler = lab.make_sampler(name, lab.make_sampler(before, lab.make_scheduler(tiny())))
        lab.set_times(sampler, 10)
        assert torch.equal(sampler.timesteps, fresh.timesteps)
        options = lambda s: {k: v for k, v in s.config.items() if k in inspect.signature(type(s).__init__).parameters}
        assert options(sampler) == options(fresh), "no option of the other came along"


@pytest.mark.parametrize("steps", [4, 20, 30])
@pytest.mark.parametrize("name", lab.SAMPLERS)
def test_samplers_start_at_the_noisiest_step(name, steps):
    scheduler = lab.make_scheduler(tiny())
    sampler = lab.make_sampler(name, scheduler)
    lab.set_times(sampler, steps)
    times = sampler.timesteps.tolist()
    if name == "heun":  # asks twice at every time but the first
        assert times[1::2] == times[2::2] and len(times) == 2 * steps - 1 and times[0] == 999
        levels = sampler.sigmas[:-1].log().unique(sorted=True).diff()
        assert len(levels) == steps - 1 and levels.min() > 0.99 * levels.max(), "even in log sigma"
        return
    assert len(times) == steps and times[0] == 999
    assert (np.diff(times) < 0).all() and np.ptp(np.diff(times)) <= 1, "evenly spaced"
    assert times[-1] == pytest.approx(1000 / steps - 1, abs=1), "trailing: the last step is one stride from the picture"
    assert torch.equal(sampler.alphas_cumprod, scheduler.alphas_cumprod)
    assert sampler.config.prediction_type == "v_prediction"


@pytest.mark.parametrize("T", [7, 100, 300, 1000])
@pytest.mark.parametrize("name", lab.SAMPLERS)
def test_as_many_times_as_asked_for_whatever_the_number(name, T):
    """All are times of training, each below the one before, and sampling ends where the image is clean."""
    sampler = lab.make_sampler(name, lab.make_scheduler(tiny(num_train_timesteps=T)))
    for steps in range(1, T + 1) if name != "heun" else {1, 2, 5, T // 2, T - 1, T}:
        lab.set_times(sampler, steps)
        times = sampler.timesteps.numpy()
        if name == "heun":
            assert (times[1::2] == times[2::2]).all()
            times = times[::2]
        assert len(times) == steps and times[-1] >= 0 and times[0] <= T - 1 and (np.diff(times) < 0).all(), steps
        if getattr(sampler, "sigmas", None) is not None:
            assert len(sampler.sigmas) == len(sampler.timesteps) + 1 and sampler.sigmas[-1] == 0, steps


SPREAD = 0.3  # standard deviation of data for which the best denoiser is known


def spread_of_samples(name, steps, schedule):
    """Standard deviation of what a sampler makes of noise with the exact denoiser of Gaussian data."""
    sampler = lab.make_sampler(name, lab.make_scheduler(tiny(schedule=schedule)))
    lab.set_times(sampler, steps)
    noise = torch.Generator().manual_seed(0)
    x = torch.randn(8000, 1, 1, 1, generator=noise)
    x = (x - x.mean()) / x.std() * sampler.init_noise_sigma
    random = {"generator": noise} if "generator" in inspect.signature(sampler.step).parameters else {}
    for i, t in enumerate(sampler.timesteps):
        a = 1 / (1 + sampler.sigmas[i] ** 2) if t.is_floating_point() else sampler.alphas_cumprod[t]
        x_t = sampler.scale_model_input(x, t)
        x_0 = a.sqrt() * SPREAD**2 * x_t / (a * SPREAD**2 + 1 - a)
        v = (a.sqrt() * x_t - x_0) / (1 - a).sqrt()
        x = sampler.step(v, t, x, **random).prev_sample
    return x.std().item()


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("name", lab.SAMPLERS)
def test_more_steps_come_nearer_to_the_truth(name, schedule):
    """Also where T is no multiple of the steps, and with the 61 that diffusers makes 62."""
    counts = (20, 50, 61, 100, 251, 501)
    off = [abs(spread_of_samples(name, steps, schedule) / SPREAD - 1) for steps in counts]
    chance = 0.012 if name == "ddpm" else 0.006
    assert all(more < max(fewer, 0.01) + chance for fewer, more in itertools.pairwise(off)), off
    # A step of first order is off by its length, whoever takes it.
    assert max(off[1:] if name in ("dpm-solver++", "unipc", "heun") else off[4:]) < 0.035, off


def test_ddim_is_that_of_diffusers_where_that_one_is_right():
    for prediction in ("epsilon", "v_prediction", "sample"):
        noise = lab.make_scheduler(tiny(prediction=prediction))
        own, theirs = lab.make_sampler("ddim", noise), DDIMScheduler.from_config(noise.config)
        for sampler in (own, theirs):
            sampler.set_timesteps(20)
        x, said = torch.randn(2, 2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        for t, eta in itertools.product(own.timesteps, (0.0, 0.7)):
            arrived = [s.step(said, t, x, eta=eta, generator=torch.Generator().manual_seed(1)).prev_sample
                       for s in (own, theirs)]  # fmt: skip
            torch.testing.assert_close(*arrived)


def test_ancestral_sampling_takes_every_step():
    sampler = lab.make_sampler("ddpm", lab.make_scheduler(tiny(num_train_timesteps=100)))
    lab.set_times(sampler, 100)
    assert sampler.timesteps.tolist() == list(range(99, -1, -1))


def test_unknown_sampler():
    with pytest.raises(ValueError, match="sampler='euler': choose from ddpm, ddim"):
        lab.make_sampler("euler", lab.make_scheduler(tiny()))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda T, reference: torch.linspace(1e-4, 0.02, T, dtype=torch.float64),  # beta
        lambda T, reference: torch.linspace(0.99, 0.01, 10, dtype=torch.float64),
        lambda T, reference: torch.linspace(1.0, 0.01, T, dtype=torch.float64),
    ],
)
def test_a_schedule_that_is_none(monkeypatch, wrong):
    monkeypatch.setitem(lab.SCHEDULES, "own", wrong)
    with pytest.raises(ValueError, match="schedule='own': it must return 100 values of alpha_bar"):
        lab.alphas_bar("own", 100)
