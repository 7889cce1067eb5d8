"""lab6/settings.py: choices of a run: what wins, what is refused."""

import dataclasses

import pytest
import torch
from conftest import ROOT, tiny

import lab6_utils as lab


def test_override_wins_over_profile_over_preset_over_default():
    settings = lab.make_settings("quick", preset="linear-512", batch_size=7)
    assert settings.batch_size == 7, "given here"
    assert settings.epochs == 4, "from the profile, not the preset's 300"
    assert settings.channels == (128, 128, 256, 256), "only the tiny profile shrinks a report's network"
    assert lab.make_settings("tiny", preset="linear-512").channels == (8, 8, 16, 16)
    assert settings.learning_rate == 1e-4 and settings.prediction == "epsilon", "from the preset"
    assert settings.num_train_timesteps == 1000, "the default"
    assert lab.make_settings("tiny").channels == (8, 16, 16)


@pytest.mark.parametrize("profile", lab.PROFILES)
@pytest.mark.parametrize("preset", lab.PRESETS)
def test_every_profile_goes_with_every_preset(profile, preset):
    settings = lab.make_settings(profile, preset=preset)
    assert (settings.profile, settings.preset) == (profile, preset)


@pytest.mark.parametrize("profile", lab.PROFILES)
@pytest.mark.parametrize("new", [dict(), dict(schedule="linear"), dict(lab.PRESETS["few-step"], student_steps=2)])
def test_a_new_preset_may_leave_anything_out(monkeypatch, profile, new):
    monkeypatch.setitem(lab.PRESETS, "mine", new)
    assert lab.make_settings(profile, preset="mine", device="cpu").preset == "mine"


def test_profile_auto_needs_a_gpu_for_full(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert lab.make_settings().profile == "quick"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80", "sm_90"])
    assert lab.make_settings(precision="fp32").profile == "full"
    recipe = lambda **given: [getattr(lab.make_settings(precision="fp32", **given), name)
                              for name in ("batch_size", "learning_rate", "epochs")]  # fmt: skip
    assert recipe() == [128, 1.6e-3, 200], "a GPU's own"
    assert recipe(batch_size=32) == [32, 8e-4, 50] == recipe(device="cpu"), "all of it, or nothing"


@pytest.mark.parametrize("cuda, mps, device", [(1, 1, "cuda"), (0, 1, "mps"), (0, 0, "cpu")])
def test_device_is_cuda_then_mps_then_cpu(monkeypatch, cuda, mps, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(cuda))
    monkeypatch.setattr("lab6.machine.has_cuda", lambda: bool(cuda))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: bool(mps))
    assert lab.make_settings("tiny", precision="fp32").device == device
    assert lab.make_settings("tiny", precision="fp32", device="cpu").device == "cpu"


def test_lists_become_tuples_and_whole_numbers_floats():
    settings = lab.make_settings("tiny", channels=[8, 8, 8], learning_rate=1)
    assert settings.channels == (8, 8, 8)
    assert type(settings.learning_rate) is float


def test_settings_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        tiny().seed = 3


REFUSED = [
    (dict(learning_rat=1e-3), "unknown setting 'learning_rat': did you mean 'learning_rate'"),
    (dict(xyzzy=1), "unknown setting 'xyzzy'"),
    (dict(profile="huge"), "profile='huge': choose from auto, tiny, quick, shipped, full"),
    (dict(preset="token"), "preset='token': choose from layout, tokens"),
    (dict(seed="0"), "seed='0': expected int"),
    (dict(seed=True), "seed=True: expected int"),
    (dict(seed=1.5), "seed=1.5: expected int"),
    (dict(learning_rate="fast"), "learning_rate='fast': expected float"),
    (dict(flip=1), "flip=1: expected bool"),
    (dict(channels=8), "channels=8: expected tuple"),
    (dict(channels=[]), "channels=(): expected tuple"),
    (dict(channels=[8, 16.0, 16]), "channels=(8, 16.0, 16): expected tuple"),
    (dict(schedule="quadratic"), "schedule='quadratic': choose from linear, linear-rescaled, cosine"),
    (dict(prediction="eps"), "prediction='eps': choose from epsilon, v_prediction, sample"),
    (dict(sampler="euler"), "sampler='euler': choose from ddpm, ddim"),
    (dict(device="tpu"), "device='tpu': choose from cuda, mps, cpu"),
    (dict(precision="fp16"), "precision='fp16': choose from bf16, fp32"),
    (dict(patch=3), "patch=3: choose from 1, 2, 4"),
    (dict(attention=["none", "none", "all"]), "attention='all': choose from none, self, cross"),
    (dict(batch_size=0), "batch_size=0: must be at least 1"),
    (dict(epochs=-1), "epochs=-1: must be at least 1"),
    (dict(channels=[8, 16]), "one entry per resolution"),
    (dict(channels=[8, 12, 16]), "divisible by norm_groups=8"),
    (dict(object_shares=(0.5, 0.4)), "object_shares=(0.5, 0.4): shares of images must add up to 1"),
    (dict(optimizer="sgd"), "optimizer='sgd': choose from adamw, muon"),
    (dict(preset="tokens", places="separated"), "with conditioning='tokens': this network is not told where"),
    (dict(preset="few-step", start="tokens"), "start='tokens' with teacher='layout'"),
    (dict(places="left"), "places='left': choose from natural, separated, none"),
    (dict(conditioning="linear"), "cross-attention needs conditioning='layout' or 'tokens'"),
    (dict(label_dropout=1.0), "label_dropout=1.0: must be in [0, 1)"),
    (dict(steps=1001), "steps=1001 exceeds num_train_timesteps=1000"),
    (dict(zero_snr=True, prediction="epsilon"), "zero_snr=True with prediction='epsilon'"),
    (dict(zero_snr=True, sampler="heun"), "sampler='heun' with zero_snr=True"),
    (dict(zero_snr=True, loss_weighting="min-snr"), "zero_snr=True with loss_weighting='min-snr'"),
    (dict(label_dropout=0, guidance="classifier-free"), "label_dropout=0 with guidance='classifier-free'"),
    (dict(preset="linear-512", guidance="composition"), "label_dropout=0 with guidance='composition'"),
    (dict(guidance_interval=(0.8, 0.2)), "guidance_interval=(0.8, 0.2): give its lower and upper end, from 0 to 1"),
    (dict(guidance_interval=(0.8,)), "guidance_interval=(0.8,): give its lower and upper end, from 0 to 1"),
    (dict(guidance="classifier-1", sampler="ddim"), "guidance='classifier-1' with sampler='ddim'"),
    (dict(conditioning="mlp"), "with conditioning='mlp': cross-attention needs conditioning='layout' or 'tokens'"),
    (dict(conditioning="linear", attention=["none"] * 3, up_attention=["none", "none", "cross"]),
     "up_attention=('none', 'none', 'cross') with conditioning='linear'"),
    (dict(up_attention=["none", "cross"]), "and up_attention=('none', 'cross'): give both one entry per resolution"),
    (dict(space="latents", flip=True), "flip=True with space='latents'"),
    (dict(patch=4, channels=[16] * 6, attention=["cross"] * 6),
     "with patch=4: the lowest of these resolutions would be 0.5"),
    (dict(loss_weighting="snr"), "loss_weighting='snr': choose from none, min-snr"),
    (dict(learning_rate=float("nan")), "learning_rate=nan: must be a finite number"),
    (dict(gradient_clip=float("inf")), "gradient_clip=inf: must be a finite number"),
    (dict(guidance_scale=1e400), "guidance_scale=inf: must be a finite number"),
    (dict(guidance_interval=(0.0, float("nan"))), "guidance_interval=nan: must be a finite number"),
    (dict(weight_decay=-0.1), "weight_decay=-0.1: must be at least 0"),
    (dict(min_snr_gamma=0.0), "min_snr_gamma=0.0: must be more than 0"),
    (dict(ema_decay=1.5), "ema_decay=1.5: must be at most 1"),
    (dict(seed=2**64), f"seed={2**64}: must be at most"),
    (dict(seed=-1), "seed=-1: must be at least 0"),
    (dict(run="../../x"), "run='../../x': a run's name is also its folder's name"),
    (dict(run="/tmp/x"), "run='/tmp/x': a run's name"),
    (dict(preset="few-step", guidance_scale=6), "for a distilled network: it has learnt scales up to 4"),
    (dict(run="..\\x"), "a run's name is also its folder's name"),
    (dict(run=".."), "run='..': a run's name"),
]  # fmt: skip


@pytest.mark.parametrize("given, words", REFUSED, ids=[str(g) for g, _ in REFUSED])
def test_what_cannot_be_is_refused_in_one_line(given, words):
    with pytest.raises(ValueError) as error:
        lab.make_settings(**dict(profile="tiny") | given)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_none_leaves_the_choice_to_the_preset():
    assert tiny(schedule=None, channels=None, preset="linear-attn") == tiny(preset="linear-attn")
    assert tiny(schedule="sigmoid", preset="linear-attn").schedule == "sigmoid"


def test_no_steps_are_all_steps():
    assert tiny(steps=0).steps == 1000 and tiny(steps=0, num_train_timesteps=300).steps == 300
    assert lab.make_settings("full", preset="linear-512", num_train_timesteps=500).steps == 500


def test_folders_follow_profile_and_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("LAB6_RUNS", str(tmp_path / "r"))
    monkeypatch.setenv("LAB6_FIGURES", str(tmp_path / "f"))
    folder = lambda profile: lab.make_settings(profile).figures
    assert folder("shipped") == folder("full") == tmp_path / "f"
    assert folder("quick") == tmp_path / "f" / "quick"
    assert folder("tiny") == tmp_path / "r" / "tiny" / "figures", "tests never write over real figures"
    assert tiny().runs == tmp_path / "r"
    monkeypatch.delenv("LAB6_RUNS")
    monkeypatch.delenv("LAB6_FIGURES")
    assert tiny().runs == ROOT / "data" / "runs"
    assert folder("shipped") == ROOT / "figures" and folder("quick") == ROOT / "figures" / "quick"
