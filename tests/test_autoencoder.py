"""lab6/autoencoder.py: latent diffusion."""

import re

import pytest
import torch
from conftest import assert_same, part_of, run, tiny

import lab6_utils as lab

LATENT = dict(preset="latent", autoencoder_epochs=2, batch_size=8)


def test_the_autoencoder_comes_first_and_resumes(small, tmp_path):
    settings = tiny(**LATENT)
    with pytest.raises(FileNotFoundError, match="train it first, with train_autoencoder"):
        run(settings, small, tmp_path)
    whole = list(lab.train_autoencoder(settings, small, tmp_path / "straight"))
    stopped = lab.train_autoencoder(settings, small, tmp_path)
    assert next(stopped).epoch == 1
    stopped.close()
    assert [record.epoch for record in lab.train_autoencoder(settings, small, tmp_path)] == [2]
    assert list(lab.train_autoencoder(settings, small, tmp_path)) == [], "it is finished"
    one, other = (lab.load_autoencoder(settings, f).state_dict() for f in (tmp_path, tmp_path / "straight"))
    assert_same(one, other)
    assert whole[1].error < whole[0].error


def test_latents_are_those_of_the_pictures(small, tmp_path):
    settings = tiny(**LATENT)
    list(lab.train_autoencoder(settings, small, tmp_path))
    autoencoder = lab.load_autoencoder(settings, tmp_path)
    latents = lab.LatentDataset(small, autoencoder)
    assert latents.mean.shape == latents.std.shape == (40, 4, 16, 16)
    torch.testing.assert_close(latents.mean.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-4)

    def sampled(rows, seed):
        noise = lambda name, shape: torch.randn((len(rows), *shape), generator=lab.make_generator(seed, name))
        return latents.batch(rows, torch.zeros(len(rows)), noise, None)["x_0"]

    every = torch.cat([sampled(torch.arange(40), i) for i in range(20)])
    torch.testing.assert_close(every.std((0, 2, 3)), torch.ones(4), rtol=0, atol=2e-2)  # sampled ones, not their means
    spread = latents.mean.var((0, 2, 3)) + latents.std.square().mean((0, 2, 3))
    torch.testing.assert_close(spread.sqrt(), torch.ones(4), rtol=0, atol=1e-3)
    rows = torch.tensor([3, 1])
    many = torch.stack([sampled(rows, 100 + i) for i in range(400)])
    torch.testing.assert_close(many.mean(0), latents.mean[rows], rtol=0, atol=0.3 * latents.std.max().item())
    pictures = lab.to_float(small.pixels[rows])
    with torch.no_grad():
        expected = autoencoder.decode(autoencoder.encode(pictures).latent_dist.mean).sample
        torch.testing.assert_close(lab.decode_latents(autoencoder, latents.mean[rows]), expected, rtol=1e-3, atol=1e-3)


def test_latent_diffusion_trains_resumes_and_draws(small, runs):
    settings = tiny(**LATENT, epochs=2)
    folder = lab.run_folder(settings)
    list(lab.train_autoencoder(settings, small, folder))
    stopped = lab.train(settings, small, folder)
    next(stopped)
    stopped.close()
    (record,) = run(settings, small, folder)
    assert record.epoch == 2
    pipe = lab.load_pipeline(settings)
    assert pipe.denoiser.config.image_channels == 4 and pipe.autoencoder is not None
    assert not pipe.scheduler.config.clip_sample, "latents are not confined to [-1, 1]"
    images = lab.sample(pipe, [["red cube"], ["cyan sphere"]], settings)
    assert images.shape == (2, 3, 64, 64) and images.std() > 0.01
    states, guesses = lab.sample_process(pipe, ["red cube"], settings)
    assert states.shape == guesses.shape == (settings.steps + 1, 3, 64, 64)


def test_an_autoencoder_of_other_settings_or_data_is_not_reused(small, synthetic, tmp_path):
    settings = tiny(**LATENT)
    list(lab.train_autoencoder(settings, small, tmp_path))
    weights = lab.load_autoencoder(settings, tmp_path).state_dict()
    other = part_of(synthetic, 40)
    other.pixels = other.pixels.flip(0)
    for changed, dataset, words in (
        (dict(seed=1), small, "seed (0 there, 1 now)"),
        (dict(autoencoder_epochs=1), small, "autoencoder_epochs (2 there, 1 now)"),
        (dict(), other, "fingerprint"),
        (dict(), part_of(small, 24), "images (40 there, 24 now)"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            list(lab.train_autoencoder(tiny(**LATENT | changed), dataset, tmp_path))
    assert_same(weights, lab.load_autoencoder(settings, tmp_path).state_dict())
    afresh = list(lab.train_autoencoder(tiny(**LATENT | dict(seed=1)), small, tmp_path, resume=False))
    assert [record.epoch for record in afresh] == [1, 2]
    again = list(lab.train_autoencoder(tiny(**LATENT | dict(seed=1)), small, tmp_path, resume=False))
    assert again == [], "the same settings, seed and data would only give the same again"
    stopped = lab.train_autoencoder(tiny(**LATENT | dict(seed=2)), small, tmp_path / "stopped")
    next(stopped)
    stopped.close()
    with pytest.raises(ValueError, match=re.escape("seed (2 there, 0 now)")):
        list(lab.train_autoencoder(settings, small, tmp_path / "stopped"))
