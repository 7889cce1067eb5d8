"""lab6/runs.py: pipelines of trained runs and of those that ship."""

import re

import pytest
import torch
from conftest import make_pipeline, matrices, run, shipped, tiny

import lab6_utils as lab


def test_the_shipped_pipeline_draws_what_is_asked_for(real_files):
    file = shipped("tokens", "denoiser/diffusion_pytorch_model.safetensors")
    shipped("evaluator", "model.safetensors")
    assert file.stat().st_size <= 20e6 and matrices(file) == {"BF16"}
    settings = lab.make_settings("quick", device="cpu", steps=10)
    pipe = lab.load_pipeline(settings, "shipped")
    assert {p.dtype for p in pipe.denoiser.parameters()} == {torch.float32}, "stored in half, computed in float32"
    assert pipe.images_seen > 0 and pipe.weights_sha256
    sets = real_files.test[-8:]
    accuracy = lab.Evaluator.find().eval(lab.sample(pipe, sets, settings), lab.encode_labels(sets))
    assert accuracy >= 0.6, "one seed, few steps; labels that are ignored give 0.1"


def test_sampling_from_a_trained_folder(small, runs):
    settings = tiny(batch_size=8, epochs=1)
    with pytest.raises(FileNotFoundError, match="run notebook 03_model_and_training with profile='tiny'"):
        lab.load_pipeline(settings)
    (record,) = run(settings, small, lab.run_folder(settings))
    pipe = lab.load_pipeline(settings)
    assert runs in lab.run_folder(settings).parents
    assert pipe.images_seen == 40 and re.fullmatch("[0-9a-f]{16}", pipe.weights_sha256)
    record.pipeline.scheduler = lab.make_sampler(settings.sampler, record.pipeline.scheduler)
    expected = lab.sample(record.pipeline, ["red cube"], settings, guidance_scale=1.0)
    torch.testing.assert_close(
        lab.sample(pipe, ["red cube"], settings, guidance_scale=1.0), expected, rtol=0, atol=1e-4
    )
    untrained = lab.sample(make_pipeline(settings), ["red cube"], settings, guidance_scale=1.0)
    assert (untrained - expected).abs().max() > 0.01
    elsewhere = lab.load_pipeline(settings, str(lab.run_folder(settings) / "pipeline"))
    assert elsewhere.weights_sha256 == pipe.weights_sha256
