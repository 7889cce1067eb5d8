"""lab6/machine.py: devices that cannot be used are named, random streams have names and leave no trace."""

import collections
import traceback
import warnings

import pytest
import torch
from conftest import make_pipeline, tiny

import lab6_utils as lab
from lab6 import machine


@pytest.fixture
def fresh_warnings():
    machine._warn_once.cache_clear()
    yield
    machine._warn_once.cache_clear()


def test_a_gpu_without_a_driver_for_it_is_named(monkeypatch, fresh_warnings):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine, "_has_nvidia_gpu", lambda: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.warns(UserWarning, match="an NVIDIA GPU is there, but this torch cannot use it"):
        assert lab.make_settings().profile == "quick"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # hidden on purpose
    machine._warn_once.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert lab.make_settings().device == "cpu"


def test_a_gpu_without_kernels_is_named(monkeypatch, fresh_warnings):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla V100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_90", "compute_120"])
    with pytest.warns(UserWarning, match=r"Tesla V100 has compute capability 7\.0, for which this torch has no"):
        assert lab.make_settings().profile == "quick"


@pytest.mark.parametrize(
    ("card", "built", "fits"),
    [
        ((9, 0), ["sm_80", "sm_90"], True),
        ((8, 6), ["sm_80"], True),  # of the same major number
        ((8, 0), ["sm_86"], False),
        ((9, 0), ["sm_80"], False),
        ((9, 0), ["sm_80", "compute_80"], True),  # compiled when it is needed
        ((6, 0), ["sm_70", "compute_70"], False),
        ((9, 0), ["sm_90a"], True),
        ((12, 0), ["sm_100", "sm_120"], True),
        ((9, 4), [], True),  # a build that does not say, as for AMD
    ],
)
def test_kernels_fit_a_card(card, built, fits):
    assert machine._has_kernels(card, built) == fits


def test_global_randomness_begins_anew_and_leaves_no_trace():
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    with machine.global_randomness("cpu", 0, "dropout", 3, 0):
        one = torch.rand(4)
    with machine.global_randomness("cpu", 0, "dropout", 3, 1):
        other = torch.rand(4)
    assert torch.equal(torch.rand(2), expected) and not torch.equal(one, other), "each process has masks of its own"


def test_global_randomness_of_a_gpu_is_restored_too(monkeypatch):
    forked = []
    fork = torch.random.fork_rng
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: forked.append(devices) or fork(devices=[]))
    for device in ("cuda", "cpu"):
        with machine.global_randomness(device, 0, "dropout", 0, 0):
            pass
    assert forked == [[3], []]


def test_no_two_purposes_share_a_random_stream(synthetic, runs, monkeypatch, tmp_path):
    """Everything that is trained and sampled names its streams, but for sampling itself."""
    purposes = collections.defaultdict(set)
    whole = machine.make_generator

    def noted(seed, *stream, device="cpu"):
        frame = traceback.extract_stack(limit=2)[0]
        purposes[(seed, *stream)].add((frame.filename.rpartition("lab6")[2], frame.lineno))
        return whole(seed, *stream, device=device)

    for room in ("examples", "autoencoder", "distillation", "sampling", "evaluator_training", "denoiser", "machine"):
        monkeypatch.setattr(f"lab6.{room}.make_generator", noted)
    latent = tiny(preset="latent", run="latent", label_dropout=0.1)
    for settings in (tiny(epochs=1), latent):
        folder = lab.run_folder(settings)
        list(lab.train_autoencoder(settings, synthetic, folder))
        list(lab.train(settings, synthetic, folder))
    make_pipeline(tiny()).save_pretrained(tmp_path / "teacher")
    small = {name: getattr(tiny(), name) for name in ("channels", "token_dim", "norm_groups")}
    few = tiny(
        preset="few-step", teacher=str(tmp_path / "teacher"), conditioning="tokens", run="few", epochs=1, **small
    )
    list(lab.train(few, synthetic, lab.run_folder(few)))
    for name in ("resnet18", "judge"):
        list(lab.train_evaluator(tiny(), synthetic, tmp_path / name, name=name))
    lab.sample(make_pipeline(tiny()), [["red cube"]] * 4, tiny())
    assert len(purposes) > 30
    shared = {stream: places for stream, places in purposes.items() if len(places) > 1}
    assert not shared, shared
    unnamed = {places.pop()[0] for stream, places in purposes.items() if not isinstance(stream[1], str)}
    assert unnamed == {"/sampling.py"}


def test_generators_repeat_and_differ():
    draw = lambda *stream: torch.randn(4, generator=lab.make_generator(*stream)).tolist()
    assert draw(0, 1, 2) == draw(0, 1, 2)
    assert len({str(draw(*s)) for s in [(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 1), (0, 1, 0)]}) == 7


def test_seconds_are_written_out():
    assert [lab.format_seconds(s) for s in (7.4, 75, 3600, 3725)] == ["7 s", "1 min 15 s", "1 h 00 min", "1 h 02 min"]
