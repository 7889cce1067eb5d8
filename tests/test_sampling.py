"""lab6/sampling.py: images of seeds, in batches and processes."""

import pytest
import torch
from conftest import SETS, make_pipeline, tiny

import lab6_utils as lab
from lab6 import evaluators


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


def test_what_does_not_fit_into_memory_is_sampled_in_smaller_batches(pipe, monkeypatch):
    sizes, whole = [], lab.ICLEVRPipeline.__call__

    def small_memory(self, labels, *arguments, **options):
        sizes.append(len(labels))
        if len(labels) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return whole(self, labels, *arguments, **options)

    expected = lab.sample(pipe, [*SETS, *SETS], tiny(), num_inference_steps=1)
    monkeypatch.setattr("lab6.sampling.AT_A_TIME", 8)
    monkeypatch.setattr(lab.ICLEVRPipeline, "__call__", small_memory)
    images = lab.sample(pipe, [*SETS, *SETS], tiny(), num_inference_steps=1)
    assert sizes == [6, 4, 2, 2, 2], "half as many until they fit"
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-4)
    monkeypatch.setattr("lab6.sampling.AT_A_TIME", 2)
    monkeypatch.setattr(lab.ICLEVRPipeline, "__call__", lambda *_, **__: small_memory(None, [0] * 3))
    with pytest.raises(torch.OutOfMemoryError):
        lab.sample(pipe, SETS, tiny(), num_inference_steps=1)


def test_signal_handlers_are_as_before():
    import signal

    from lab6.sampling import _same_signal_handlers

    before = signal.getsignal(signal.SIGTERM)
    with _same_signal_handlers():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")
def test_a_gpu_takes_all_seeds_together(pipe, monkeypatch):
    settings, sizes, whole = tiny(seeds=5), [], lab.ICLEVRPipeline.__call__
    expected = lab.sample_seeds(pipe, SETS, settings, num_inference_steps=1)
    object.__setattr__(settings, "device", "cuda")  # only the batches are tested; the network stays on the CPU
    note = lambda self, labels, *a, **k: (sizes.append(len(labels)), whole(self, labels, *a, **k))[1]
    monkeypatch.setattr(lab.ICLEVRPipeline, "__call__", note)
    images = lab.sample_seeds(pipe, SETS, settings, num_inference_steps=1)
    assert sizes == [15] and images.shape == (5, 3, 3, 64, 64)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("guidance", ["classifier-free", "classifier-2"])
def test_seeds_are_shared_among_processes(guidance, monkeypatch):
    settings = lab.make_settings("tiny", device="cpu", precision="fp32", seeds=3, guidance=guidance, seed=5)
    pipe = lab.ICLEVRPipeline(lab.make_denoiser(settings), lab.make_scheduler(settings))
    pipe.scheduler = lab.make_sampler("ddpm", pipe.scheduler)
    pipe.classifier = lab.Evaluator(evaluators.make_evaluator_network("judge"), "judge")
    sets = [["red cube"], ["blue sphere", "gray cube"]]
    expected = lab.sample_seeds(pipe, sets, settings)
    monkeypatch.setattr("lab6.sampling._sample_seeds", lambda *arguments: pytest.fail("drawn in this process"))
    found = lab.sample_seeds(pipe, sets, settings, processes=2)
    assert found.shape == (3, 2, 3, 64, 64)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_label_sets_are_sampled_at_their_places(tmp_path):
    """Given places go with their label sets through batches and seeds; drawn ones are the seed's own."""
    settings = tiny(preset="layout", seeds=2)
    pipe = make_pipeline(settings)
    pipe.denoiser.condition.remember(torch.tensor([[[32.0, 28], [10 + i, 26], [54, 40 - i]] for i in range(8)]))
    sets = [["red cube"], ["blue sphere"]]
    given = lab.encode_places(sets, [[(10, 20)], [(50, 40)]])
    images = lab.sample_seeds(pipe, sets, settings, places=[[(10, 20)], [(50, 40)]])
    for seed in range(2):
        for i in range(2):
            alone = lab.sample(pipe, sets[: i + 1], settings, seed, places=given[: i + 1])[i]
            torch.testing.assert_close(images[seed, i], alone, atol=1e-5, rtol=0)
    turned = lab.sample(pipe, sets, settings, 0, places=lab.encode_places(sets, [[(50, 40)], [(10, 20)]]))
    assert not torch.allclose(turned, images[0])
    process, _ = lab.sample_process(pipe, sets[0], settings)
    torch.testing.assert_close(process[-1], lab.sample(pipe, sets[:1], settings)[0], atol=1e-5, rtol=0)
