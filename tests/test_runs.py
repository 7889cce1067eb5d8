"""lab6/runs.py: pipelines of trained runs and of those that ship."""

import json
import re
import shutil

import pytest
import torch
from conftest import make_pipeline, matrices, run, shipped, tiny

import lab6_utils as lab
from lab6.runs import begin_with


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


@pytest.fixture
def older(tmp_path):
    """The folder of an untrained pipeline that is told labels alone, which has seen 1,234 images."""
    make_pipeline(tiny(seed=3)).save_pretrained(tmp_path / "older")
    (tmp_path / "older" / "history.json").write_text(json.dumps([{"images_seen": 1234}]))
    return tmp_path / "older"


def test_a_network_begins_as_the_one_whose_weights_it_gets(older):
    before = lab.ICLEVRPipeline.from_pretrained(older).denoiser
    now = lab.make_denoiser(tiny(preset="layout"))
    assert begin_with(now, older) == 1234
    names = ["red sphere", "cyan cube"]
    labels, places = lab.encode_labels(names), lab.encode_places([names], [[(20, 30), (44, 40)]])
    x, t = torch.randn(1, 3, 64, 64, generator=lab.make_generator(0)), torch.tensor([600])
    for how in (dict(), dict(places=places), dict(null=torch.ones(1, dtype=torch.bool))):
        expected = before(x, t, labels, null=how.get("null"))
        torch.testing.assert_close(now(x, t, labels, **how), expected, msg="whatever it is told of places")


def test_other_networks_do_not_fit(older):
    with pytest.raises(ValueError, match=r"less than half of this network fits.*; use start=''"):
        begin_with(lab.make_denoiser(tiny(channels=(24, 24, 24))), older)


def test_a_training_begins_with_given_weights(older, small, tmp_path):
    settings = tiny(start=str(older), learning_rate=0.0, batch_size=8, epochs=1, ema_decay=0.0)
    first = run(settings, small, tmp_path / "run")[-1]
    assert first.images_seen == 1234 + 40
    given = lab.ICLEVRPipeline.from_pretrained(older).denoiser.state_dict()
    for name, value in lab.ICLEVRPipeline.from_pretrained(tmp_path / "run" / "pipeline").denoiser.state_dict().items():
        torch.testing.assert_close(value, given[name], msg=name)
    shutil.rmtree(older)  # a run that goes on does not need them
    on = tiny(start="", learning_rate=0.0, batch_size=8, epochs=2, ema_decay=0.0)
    assert [r.images_seen for r in run(on, small, tmp_path / "run")] == [1234 + 80]
    with pytest.raises(FileNotFoundError, match="start='nowhere': no pipeline in"):
        run(tiny(start="nowhere"), small, tmp_path / "other")
