"""Students: a step of theirs leads where several guided steps of their teacher do, at any scale."""

import pytest
import torch
from conftest import make_pipeline, tiny

import lab6_utils as lab

SETS = [["red cube"], ["blue sphere", "gray cube"], list(lab.MANUAL_SET)]


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory):
    """A pipeline with random weights, as it would be trained."""
    folder = tmp_path_factory.mktemp("teacher") / "pipeline"
    make_pipeline(tiny()).save_pretrained(folder)
    return folder


def student(folder, **choices):
    small = {name: getattr(tiny(), name) for name in ("channels", "token_dim", "norm_groups")}
    return tiny(preset="few-step", teacher=str(folder), **small | choices)


@pytest.fixture(scope="module")
def paths(synthetic, teacher_folder, tmp_path_factory):
    settings = student(teacher_folder)
    return lab.TeacherPaths(settings, synthetic, lab.load_teacher(settings), tmp_path_factory.mktemp("paths"))


def test_a_student_begins_as_its_teacher_with_labels(teacher_folder):
    settings = student(teacher_folder)
    teacher, network = lab.load_teacher(settings).denoiser, lab.make_denoiser(settings)
    lab._begin_as(teacher, network, settings)
    x_t, t, labels = torch.randn(3, 3, 64, 64), torch.tensor([5, 500, 999]), lab.encode_labels(SETS)
    with torch.no_grad():
        for scale in (0.0, torch.tensor([1.0, 4.0, 7.5])):
            torch.testing.assert_close(network(x_t, t, labels, None, scale), teacher(x_t, t, labels))
        torch.nn.init.normal_(network.unet.time_embedding.cond_proj.weight)
        one, other = (network(x_t, t, labels, None, scale) for scale in (1.0, 4.0))
    assert (one - other).abs().amax((1, 2, 3)).min() > 1e-3, "the scale is an input"


def test_paths_are_what_the_teacher_draws(synthetic, teacher_folder, paths):
    settings = student(teacher_folder)
    teacher, rows = lab.load_teacher(settings), slice(0, 5)
    assert paths.states.shape == (len(synthetic), 5, 3, 64, 64) and (paths.scales <= lab.MOST_GUIDANCE).all()
    noise = iter(paths.states[rows, 0].float())
    states = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(lab, "randn_tensor", lambda shape, **_: torch.stack([next(noise) for _ in range(shape[0])]))
        teacher(synthetic.labels[rows], 12, paths.scales[0].item(), output_type="pt",
                callback_on_step_end=lambda pipe, i, t, seen: states.append(seen["x_t"]))  # fmt: skip
    for i in (1, 2, 3):
        torch.testing.assert_close(states[3 * i - 1], paths.states[rows, i].float(), rtol=1e-2, atol=1e-2)


def test_one_step_arrives_where_the_teacher_did(teacher_folder, paths):
    settings = student(teacher_folder)
    noise = lab.make_scheduler(settings)
    sampler = lab.make_sampler("ddim", noise)
    sampler.set_timesteps(settings.student_steps)
    rows = torch.arange(4)
    for i, t in enumerate(sampler.timesteps):
        x_0, eps, begins, scale = paths.step_from(rows, torch.full((4,), int(t) - 7), noise)
        assert (begins == t).all() and torch.equal(scale, paths.scales[rows])
        x_t = noise.add_noise(x_0, eps, begins)
        torch.testing.assert_close(x_t, paths.states[rows, i].float(), rtol=0, atol=1e-4)
        arrived = sampler.step(noise.get_velocity(x_0, eps, begins), t, x_t).prev_sample
        torch.testing.assert_close(arrived, paths.states[rows, i + 1].float(), rtol=0, atol=1e-4)


def test_paths_that_were_drawn_are_read(synthetic, teacher_folder, tmp_path, monkeypatch):
    settings = student(teacher_folder)
    teacher, draw, drawn = lab.load_teacher(settings), lab.TeacherPaths._draw, []

    def stopped(self, settings, teacher, labels, number):
        if len(drawn) == 2:
            raise KeyboardInterrupt
        drawn.append(number)
        return draw(self, settings, teacher, labels, number)

    monkeypatch.setattr(lab.TeacherPaths, "at_a_time", 10)
    monkeypatch.setattr(lab.TeacherPaths, "_draw", stopped)
    with pytest.raises(KeyboardInterrupt):
        lab.TeacherPaths(settings, synthetic, teacher, tmp_path)
    first = (tmp_path / "0000.safetensors").read_bytes()
    monkeypatch.setattr(lab.TeacherPaths, "_draw", lambda *a: drawn.append(a[-1]) or draw(*a))
    whole = lab.TeacherPaths(settings, synthetic, teacher, tmp_path)
    assert drawn == list(range(-(-len(synthetic) // 10))) and len(whole) == len(synthetic)
    assert (tmp_path / "0000.safetensors").read_bytes() == first


def test_a_student_is_trained_and_asked_once_a_step(synthetic, teacher_folder, runs):
    settings = student(teacher_folder, epochs=2, run="taught")
    records = list(lab.train(settings, synthetic, lab.run_folder(settings)))
    assert records[1].loss < records[0].loss
    pipe, asked = lab.load_pipeline(settings, "trained"), []
    pipe.denoiser.register_forward_hook(lambda m, arguments, out: asked.append(len(arguments[0])))
    few, many = (lab.sample(pipe, SETS, settings, guidance_scale=s) for s in (1.0, 5.0))
    assert asked == [3] * 8 and not torch.equal(few, many), "guidance costs nothing, and is there"
    assert lab.count_evaluations(settings, lab.encode_labels(SETS)) == 4
    assert pipe.guidances == ("none", "classifier-free", "classifier-1", "classifier-2")
    with pytest.raises(ValueError, match="no null condition"):
        lab.sample(pipe, SETS, settings, guidance="composition")


def test_a_teacher_of_another_size(synthetic, teacher_folder, runs):
    settings = student(teacher_folder, channels=(16, 16, 16))
    with pytest.raises(ValueError, match="another network than this run's"):
        list(lab.train(settings, synthetic, lab.run_folder(settings)))


@pytest.mark.parametrize(
    "given, words",
    [
        (dict(teacher=""), "a student needs both"),
        (dict(student_steps=0), "a student needs both"),
        (dict(student_steps=3), "student_steps=3: must divide num_train_timesteps=1000"),
        (dict(conditioning="linear", attention=["none"] * 3), "can be told of the scale"),
        (dict(guidance="composition"), "label_dropout=0 with guidance='composition'"),
    ],
)
def test_no_student_without_a_teacher(given, words):
    with pytest.raises(ValueError, match=words):
        lab.make_settings("full", device="cpu", preset="few-step", **given)
