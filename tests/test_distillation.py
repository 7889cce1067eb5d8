"""Distillation: one step of the distilled network leads where several guided steps of its teacher do, at any scale."""

import re
import shutil

import pytest
import torch
from conftest import make_pipeline, tiny

import lab6_utils as lab

SETS = [["red cube"], ["blue sphere", "gray cube"], list(lab.MANUAL_SET)]


@pytest.fixture(scope="module", params=["tokens", "layout"])
def teacher_folder(request, tmp_path_factory):
    """A pipeline with random weights, as it would be trained: told labels alone, or places too."""
    folder = tmp_path_factory.mktemp(request.param) / "pipeline"
    pipe = make_pipeline(tiny(preset=request.param))
    if pipe.takes_places:
        pipe.denoiser.condition.remember(torch.tensor([[[32.0, 28.0], [14.0, 34.0], [48.0, 40.0]]]))
        torch.nn.init.normal_(pipe.denoiser.condition.blob.weight)  # so that places change something
    pipe.save_pretrained(folder)
    return folder


def distilled(folder, **choices):
    """Settings of a network that is distilled from the pipeline in `folder`."""
    small = {name: getattr(tiny(), name) for name in ("channels", "token_dim", "norm_groups")}
    small["conditioning"] = "layout" if "layout" in str(folder) else "tokens"
    return tiny(preset="few-step", teacher=str(folder), **small | choices)


@pytest.fixture(scope="module")
def trajectories(synthetic, teacher_folder, tmp_path_factory):
    """Trajectories of the teacher."""
    settings = distilled(teacher_folder, place_dropout=0.5)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("LAB6_RUNS", str(tmp_path_factory.mktemp("runs")))
        patched.setattr("lab6.distillation._AT_A_TIME", 10)  # several parts, each with an s of its own
        folder = lab.sample_trajectories(settings, synthetic.labels, lab.load_teacher(settings))
        return lab.Trajectories(settings, synthetic.labels, folder)


def test_a_distilled_network_begins_as_its_teacher_with_labels(teacher_folder):
    settings = distilled(teacher_folder)
    teacher, network = lab.load_teacher(settings).denoiser, lab.make_denoiser(settings)
    assert network.load_state_dict(teacher.state_dict(), strict=False).missing_keys == [
        "unet.time_embedding.cond_proj.weight"
    ]
    x_t, t, labels = torch.randn(3, 3, 64, 64), torch.tensor([5, 500, 999]), lab.encode_labels(SETS)
    with torch.no_grad():
        for scale in (0.0, torch.tensor([1.0, 4.0, 7.5])):
            torch.testing.assert_close(network(x_t, t, labels, None, scale), teacher(x_t, t, labels))
        torch.nn.init.normal_(network.unet.time_embedding.cond_proj.weight)
        one, other = (network(x_t, t, labels, None, scale) for scale in (1.0, 4.0))
    assert (one - other).abs().amax((1, 2, 3)).min() > 1e-3, "the scale is an input"


def test_trajectories_are_what_the_teacher_samples(synthetic, teacher_folder, trajectories):
    teacher, rows = lab.load_teacher(distilled(teacher_folder)), slice(0, 5)
    assert trajectories.states.shape == (len(synthetic), 5, 3, 64, 64)
    assert 0 <= trajectories.scales.min() < trajectories.scales.max() <= lab.MAX_GUIDANCE_SCALE
    states = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("lab6.pipeline.randn_tensor", lambda *_, **__: trajectories.states[rows, 0].float())
        teacher(synthetic.labels[rows], 8, trajectories.scales[0].item(), output_type="pt",
                places=None if trajectories.asked is None else trajectories.asked[rows],
                callback_on_step_end=lambda pipe, i, t, seen: states.append(seen["x_t"]))  # fmt: skip
    for i in (1, 2, 3):
        torch.testing.assert_close(states[2 * i - 1], trajectories.states[rows, i].float(), rtol=1e-2, atol=1e-2)


def test_the_network_is_told_the_places_that_its_teacher_was_told(synthetic, teacher_folder, trajectories):
    settings = distilled(teacher_folder, place_dropout=0.5)
    batch = lab.training_batch(settings, trajectories, lab.make_scheduler(settings), step=0)
    if not settings.takes_places:
        assert trajectories.asked is None and batch["places"] is None
        return
    asked = synthetic.labels.bool()
    told = [
        part[of].isfinite().all().item()
        for part, of in zip(*(x.split(10) for x in (trajectories.asked, asked)), strict=True)
    ]
    assert set(told) == {True, False}, "in some parts places, in some none"
    same = lambda row: any(torch.equal(row.nan_to_num(-1), each.nan_to_num(-1)) for each in trajectories.asked)
    assert all(same(row) for row in batch["places"]), "neither moved nor left out"
    network, trajectories.teacher = lab.make_denoiser(settings), lab.load_teacher(settings).denoiser
    trajectories.prepare(network)
    assert network.condition.layouts.isfinite().all(), "its pipeline needs no data to draw places"


def test_one_step_arrives_where_the_teacher_did(teacher_folder, trajectories):
    settings = distilled(teacher_folder)
    noise = lab.make_scheduler(settings)
    sampler = lab.make_sampler("ddim", noise)
    lab.set_times(sampler, settings.student_steps)
    rows = torch.arange(4)
    for i, t in enumerate(sampler.timesteps):
        batch = trajectories.batch(rows, torch.full((4,), int(t) - 7), None, noise)
        x_0, eps, begins, scale = (batch[name] for name in ("x_0", "eps", "t", "scale"))
        assert (begins == t).all() and torch.equal(scale, trajectories.scales[rows])
        x_t = noise.add_noise(x_0, eps, begins)
        torch.testing.assert_close(x_t, trajectories.states[rows, i].float(), rtol=0, atol=1e-4)
        arrived = sampler.step(noise.get_velocity(x_0, eps, begins), t, x_t).prev_sample
        torch.testing.assert_close(arrived, trajectories.states[rows, i + 1].float(), rtol=0, atol=1e-4)


def test_sampling_trajectories_continues_after_a_stop(synthetic, teacher_folder, runs, monkeypatch):
    settings = distilled(teacher_folder)
    monkeypatch.setattr("lab6.distillation._AT_A_TIME", 10)
    labels, count = synthetic.labels[:30], []

    class Teacher(lab.ICLEVRPipeline):
        def __call__(self, *arguments, **options):
            if len(count) == 2:
                count.append("stopped")
                raise KeyboardInterrupt
            count.append("sampled")
            return super().__call__(*arguments, **options)

    teacher = lab.load_teacher(settings)
    teacher.__class__ = Teacher
    with pytest.raises(KeyboardInterrupt):
        lab.sample_trajectories(settings, labels, teacher)
    folder = lab.sample_trajectories(settings, labels, teacher)
    assert count == ["sampled", "sampled", "stopped", "sampled"] and len(list(folder.iterdir())) == 3
    assert len(lab.Trajectories(settings, labels, folder)) == 30
    assert lab.sample_trajectories(settings, labels.flip(0), teacher, (1, 2)) != folder, (
        "of other labels, another folder"
    )
    assert len(count) == 5, "one of three parts is that of the second of two processes"


def test_a_distilled_network_is_trained_and_evaluated_once_a_step(synthetic, teacher_folder, runs):
    settings = distilled(teacher_folder, epochs=4, learning_rate=2e-3, run="taught")
    records = list(lab.train(settings, synthetic, lab.run_folder(settings)))
    assert records[-1].loss < records[0].loss
    pipe, asked = lab.load_pipeline(settings, "trained"), []
    pipe.denoiser.register_forward_hook(lambda m, arguments, out: asked.append(len(arguments[0])))
    few, many = (lab.sample(pipe, SETS, settings, guidance_scale=s) for s in (1.0, 5.0))
    assert asked == [3] * 8 and not torch.equal(few, many), "guidance costs nothing, and is there"
    assert lab.count_evaluations(settings, lab.encode_labels(SETS), distilled=True) == 4
    assert pipe.guidances == ("none", "classifier-free", "classifier-2")
    assert lab.samplers_for(pipe, settings) == ["ddim"]
    scale, steps = lab.guidance_explorer(pipe, settings).children[1].children[3:5]
    assert steps.disabled and scale.continuous_update and scale.max == lab.MAX_GUIDANCE_SCALE, "it follows the slider"
    with pytest.raises(ValueError, match="no composition"):
        lab.sample(pipe, SETS, settings, guidance="composition")


@pytest.mark.parametrize(
    "other, words",
    [
        (dict(channels=(16, 16, 16)), "its network differs from this run's in channels"),
        (dict(schedule="linear"), "its network differs from this run's in its noise schedule"),
        (dict(prediction="sample"), "its network differs from this run's in prediction_type"),
    ],
)
def test_a_teacher_of_another_kind(synthetic, teacher_folder, runs, other, words):
    settings = distilled(teacher_folder, **other)
    with pytest.raises(ValueError, match=words):
        list(lab.train(settings, synthetic, lab.run_folder(settings)))


def test_a_teacher_that_a_crash_put_aside_is_found(teacher_folder, tmp_path):
    folder = tmp_path / teacher_folder.parent.name
    shutil.copytree(teacher_folder, folder / "pipeline.previous")
    (folder / "pipeline.lock").touch()
    assert lab.load_teacher(distilled(folder / "pipeline")).weights_sha256


def test_no_such_teacher(synthetic, runs):
    settings = distilled("token")
    with pytest.raises(FileNotFoundError, match=r"teacher='token': no pipeline in .* give a preset"):
        list(lab.train(settings, synthetic, lab.run_folder(settings)))


@pytest.mark.parametrize(
    "given, words",
    [
        (dict(teacher=""), "distillation needs both"),
        (dict(student_steps=0), "distillation needs both"),
        (dict(student_steps=3), "student_steps=3: must divide num_train_timesteps=1000"),
        (dict(student_steps=8, teacher_steps=12), "must divide num_train_timesteps=1000 and teacher_steps=12"),
        (dict(steps=20), "distillation needs steps=4"),
        (dict(sampler="ddpm"), "distillation needs sampler='ddim'"),
        (dict(flip=True), "distillation needs flip=False"),
        (dict(label_dropout=0.1), "distillation needs label_dropout=0"),
        (dict(prediction="epsilon"), "distillation needs prediction='v_prediction'"),
        (dict(conditioning="linear", attention=["none"] * 3), "needs a conditioning that gives tokens (not 'linear')"),
        (
            dict(guidance="composition"),
            "guidance='composition' for a distilled network: choose from none, classifier-free, classifier-2",
        ),
    ],
)
def test_what_distillation_needs(given, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        lab.make_settings("full", device="cpu", preset="few-step", **given)
