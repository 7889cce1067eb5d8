"""Section 5 of lab6_utils: what a training step sees, exact resume, EMA, checkpoints, the learning rate."""

import dataclasses
import json
import re

import pytest
import torch
from conftest import make_pipeline, tiny, tiny_linear

import lab6_utils as lab


@pytest.fixture(scope="module")
def small(synthetic):
    """40 pictures: five steps of eight."""
    return part_of(synthetic, 40)


def part_of(dataset, count):
    class Part(torch.utils.data.Dataset):
        pixels, labels, split = dataset.pixels[:count], dataset.labels[:count], "train"

        images_at = lab.ICLEVRDataset.images_at

        def __len__(self):
            return count

    return Part()


def checkpoint(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def run(settings, dataset, folder, **options):
    return list(lab.train(settings, dataset, folder, **options))


def assert_same(a, b, where="checkpoint"):
    """Every tensor and number of two checkpoints is the same, bit for bit (but for what a clock says)."""
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a.keys() - {"images_per_s", "seconds_left"}:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


# ── Resuming ─────────────────────────────────────────────────────────────────────────────────────────

VARIED = dict(batch_size=8, epochs=2, flip=True, warmup_steps=3, label_dropout=0.3)


@pytest.fixture(scope="module")
def straight(small, tmp_path_factory):
    """Ten steps in one go: the folder of the run and its records."""
    folder = tmp_path_factory.mktemp("straight")
    return folder, run(tiny(**VARIED), small, folder)


def test_ten_steps_are_five_a_stop_and_five(small, straight, tmp_path):
    first = lab.train(tiny(**VARIED), small, tmp_path)
    pipe = next(first).pipeline
    first.close()
    assert len(checkpoint(tmp_path)["history"]) == 1
    lab.sample(pipe, ["red cube"], tiny(), num_inference_steps=2)  # as notebook 03 does
    torch.manual_seed(99)  # a new process has other random numbers at hand
    assert [r.epoch for r in run(tiny(**VARIED), small, tmp_path)] == [2]
    state = checkpoint(tmp_path)
    assert {"model", "ema", "optimizer", "history", "settings"} <= state.keys()
    assert len(state["optimizer"]["state"]) == len(state["ema"]["shadow_params"]) == len(state["model"])
    assert state["history"][-1]["step"] == 10
    assert_same(state, checkpoint(straight[0]))


def test_an_interruption_in_mid_epoch_loses_only_that_epoch(small, straight, tmp_path, monkeypatch):
    whole = lab.training_batch

    def interrupted(settings, examples, scheduler, step, *rest):
        if step == 7:
            raise KeyboardInterrupt
        return whole(settings, examples, scheduler, step, *rest)

    monkeypatch.setattr("lab6.training.training_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tiny(**VARIED), small, tmp_path)
    assert (
        [r["epoch"] for r in checkpoint(tmp_path)["history"]] == [1] == [r["epoch"] for r in lab.load_history(tmp_path)]
    )
    monkeypatch.setattr("lab6.training.training_batch", whole)
    run(tiny(**VARIED), small, tmp_path)
    assert_same(checkpoint(tmp_path), checkpoint(straight[0]))


def test_a_full_disk_leaves_the_last_checkpoint(small, straight, tmp_path, monkeypatch):
    running = lab.train(tiny(**VARIED), small, tmp_path)
    next(running)
    whole = torch.save

    def half(state, path):
        path.write_bytes(b"half a checkpoint")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="No space left"):
        next(running)
    monkeypatch.setattr(torch, "save", whole)
    assert len(checkpoint(tmp_path)["history"]) == 1
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")], "no temporary file is left"
    run(tiny(**VARIED), small, tmp_path)
    assert_same(checkpoint(tmp_path), checkpoint(straight[0]))


def test_a_stop_while_the_pipeline_is_saved_is_made_good(small, straight, tmp_path, monkeypatch):
    monkeypatch.setattr(lab.ICLEVRPipeline, "save_pretrained", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(tiny(**VARIED), small, tmp_path)
    monkeypatch.undo()
    run(tiny(**VARIED), small, tmp_path)
    assert (tmp_path / "pipeline" / "model_index.json").is_file()
    assert_same(checkpoint(tmp_path), checkpoint(straight[0]))


def test_a_finished_run_is_left_alone(small, straight):
    folder, _ = straight
    before = (folder / "checkpoint.pt").read_bytes()
    assert run(tiny(**VARIED), small, folder) == []
    assert (folder / "checkpoint.pt").read_bytes() == before


def test_more_epochs_go_on_where_the_run_stopped(small, tmp_path):
    constant = VARIED | dict(decay_fraction=0.0)  # while the rate is constant, the length of training changes nothing
    run(tiny(**constant | dict(epochs=1)), small, tmp_path / "a")
    assert [r.epoch for r in run(tiny(**constant), small, tmp_path / "a")] == [2]
    run(tiny(**constant), small, tmp_path / "b")
    a, b = checkpoint(tmp_path / "a"), checkpoint(tmp_path / "b")
    assert a["history"][0].pop("epochs") == 1
    b["history"][0].pop("epochs")
    assert_same(a, b)


@pytest.mark.parametrize(
    "other", [dict(learning_rate=0.5), dict(channels=[8, 8, 16]), dict(seed=7), dict(schedule="linear")]
)
def test_a_run_of_other_settings_is_not_resumed(small, straight, other):
    (name,) = other
    there, now = getattr(tiny(**VARIED), name), getattr(tiny(**VARIED | other), name)
    with pytest.raises(ValueError, match=re.escape(f"{name} ({there!r} there, {now!r} now)")) as error:
        run(tiny(**VARIED | other), small, straight[0])
    assert str(straight[0] / "checkpoint.pt") in str(error.value)


def test_a_checkpoint_older_than_a_setting_resumes(small, tmp_path):
    """It was trained as the setting's default says, and with no other value it goes on."""
    run(tiny(epochs=1), small, tmp_path)
    state = checkpoint(tmp_path)
    del state["settings"]["leave_out"], state["settings"]["evaluator_scenes"]
    torch.save(state, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match=re.escape("leave_out ('none' there, 'unseen' now)")):
        run(tiny(leave_out="unseen"), small, tmp_path)
    assert [r.epoch for r in run(tiny(), small, tmp_path)] == [2]


def test_starting_afresh(small, straight, tmp_path):
    run(tiny(**VARIED | dict(epochs=1, seed=7)), small, tmp_path)
    assert [r.epoch for r in run(tiny(**VARIED), small, tmp_path, resume=False)] == [1, 2]
    assert_same(checkpoint(tmp_path), checkpoint(straight[0]))


@pytest.mark.parametrize(
    "content", [b"", b"garbage" * 100, b"PK\x03\x04 cut off", None], ids=["empty", "garbage", "cut", "other"]
)
def test_a_damaged_checkpoint_is_named(small, tmp_path, content):
    file = tmp_path / "checkpoint.pt"
    torch.save({"settings": 3}, file) if content is None else file.write_bytes(content)
    with pytest.raises(ValueError, match=r"checkpoint\.pt: not a checkpoint .* delete it to start afresh"):
        run(tiny(), small, tmp_path)


# ── What a run leaves behind ─────────────────────────────────────────────────────────────────────────


def test_records_and_history(straight):
    folder, records = straight
    history = lab.load_history(folder)
    assert [r.epoch for r in records] == [1, 2] and [r.step for r in records] == [5, 10]
    assert [r.images_seen for r in records] == [40, 80]
    fields = lambda record: {
        f.name: getattr(record, f.name) for f in dataclasses.fields(record) if f.name != "pipeline"
    }
    assert history == [fields(r) for r in records] == checkpoint(folder)["history"]
    assert all(r.loss > 0 and r.images_per_s > 0 for r in records) and records[-1].seconds_left == 0
    assert re.fullmatch(r"epoch 2/2  loss \d\.\d{4}  \d+ images/s  0 s left", str(records[-1]))
    assert lab.load_history(folder / "nothing") == []


def test_tensorboard_shows_every_epoch_of_a_resumed_run(small, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for epochs in (1, 2, 3):
        run(tiny(batch_size=40, epochs=epochs), small, tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    history = lab.load_history(tmp_path)
    for name in ("loss", "learning_rate", "images_per_s"):
        points = {event.step: event.value for event in events.Scalars(name)}
        assert points == {r["step"]: pytest.approx(r[name]) for r in history}


def test_the_saved_pipeline_holds_the_average(small, straight):
    folder, records = straight
    averaged, state = lab.ICLEVRPipeline.from_pretrained(folder / "pipeline").denoiser, checkpoint(folder)
    names = [name for name, _ in averaged.named_parameters()]
    assert not averaged.training
    for name, shadow in zip(names, state["ema"]["shadow_params"], strict=True):
        assert torch.equal(averaged.get_parameter(name), shadow)
        assert torch.equal(records[-1].pipeline.denoiser.get_parameter(name), shadow)
    lag = max((state["model"][name] - p).abs().max() for name, p in averaged.named_parameters())
    assert lag > 1e-5, "the average lags behind the raw weights"


def test_the_average_warms_up(small, tmp_path):
    """shadow <- d * shadow + (1 - d) * weights with d = min(0.999, 1 - (1 + n)^(-3/4)), n steps after the first."""
    settings = tiny(batch_size=40, epochs=4)  # one step an epoch, so that the weights after each step are seen
    shadow, name = None, "unet.conv_in.weight"
    for n, record in enumerate(lab.train(settings, small, tmp_path)):
        decay = min(0.999, 1 - (1 + n) ** -0.75)
        weights = checkpoint(tmp_path)["model"][name].clone()
        shadow = weights if shadow is None else decay * shadow + (1 - decay) * weights
        torch.testing.assert_close(record.pipeline.denoiser.get_parameter(name).data, shadow, rtol=1e-5, atol=1e-7)
    start = lab.make_denoiser(settings).get_parameter(name)
    assert not torch.equal(shadow, weights) and (weights - start).abs().max() > 1e-4


def test_the_yielded_pipeline_does_not_train_on(small, tmp_path):
    running = lab.train(tiny(batch_size=40, epochs=2), small, tmp_path)
    denoiser = next(running).pipeline.denoiser
    before = {name: p.clone() for name, p in denoiser.named_parameters()}
    next(running)
    assert all(torch.equal(before[name], p) for name, p in denoiser.named_parameters())
    assert not any(p.requires_grad for p in denoiser.parameters())


def test_nothing_to_train_on(synthetic, tmp_path):
    with pytest.raises(ValueError, match="no images to train on: the split 'train'"):
        run(tiny(), part_of(synthetic, 0), tmp_path)


# ── Learning ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("make", [tiny, tiny_linear], ids=["tokens", "linear"])
def test_the_loss_falls_on_a_few_pictures(synthetic, tmp_path, make):
    settings = make(batch_size=4, epochs=3, learning_rate=0.01, warmup_steps=5, prediction="epsilon", patch=2)
    flat = part_of(synthetic, 120)
    flat.pixels = synthetic.pixels[:4, :, :1, :1].expand(-1, -1, 64, 64).repeat(30, 1, 1, 1)  # four plain colours
    flat.labels = synthetic.labels[:4].repeat(30, 1)
    losses = [r.loss for r in run(settings, flat, tmp_path)]
    assert losses[-1] < 0.75 * losses[0], losses


def test_a_compiled_network_learns_the_same(small, straight, tmp_path, monkeypatch):
    # By the backend that compiles nothing: what is tested is that the network can be captured, and that it is.
    real, captured = torch.compile, []
    monkeypatch.setattr(torch, "compile", lambda network: captured.append(network) or real(network, backend="eager"))
    settings = tiny(**VARIED)
    object.__setattr__(settings, "torch_compile", True)  # it is refused off a GPU, where this test runs
    records = run(settings, small, tmp_path / "compiled")
    assert len(captured) == 1 and [r.loss for r in records] == pytest.approx([r.loss for r in straight[1]], rel=1e-4)


def test_compiling_is_refused_off_a_gpu():
    with pytest.raises(ValueError, match=r"torch_compile=True with device='cpu': .* use torch_compile=False"):
        tiny(torch_compile=True)


def test_bf16_trains_float32_weights(small, tmp_path):
    (record,) = run(tiny(precision="bf16", batch_size=8, epochs=1), small, tmp_path / "bf16")
    (exact,) = run(tiny(precision="fp32", batch_size=8, epochs=1), small, tmp_path / "fp32")
    assert record.loss == pytest.approx(exact.loss, rel=0.05) and record.loss != exact.loss
    assert {v.dtype for v in checkpoint(tmp_path / "bf16")["model"].values()} == {torch.float32}


def test_learning_rate_by_hand():
    settings = tiny(learning_rate=1.0, warmup_steps=10, decay_fraction=0.25)
    rate = lambda step: lab.learning_rate(settings, step, 100)
    assert [rate(s) for s in (0, 4, 9, 10, 50, 75)] == pytest.approx([0.1, 0.5, 1, 1, 1, 1])
    assert [rate(s) for s in (80, 90, 99)] == pytest.approx([20 / 25, 10 / 25, 1 / 25])
    constant = tiny(learning_rate=1.0, warmup_steps=0, decay_fraction=0.0)
    assert [lab.learning_rate(constant, s, 100) for s in (0, 50, 99)] == [1, 1, 1]


def test_the_optimiser_has_the_learning_rate(straight):
    folder, records = straight
    settings = tiny(**VARIED)
    assert checkpoint(folder)["optimizer"]["param_groups"][0]["lr"] == lab.learning_rate(settings, 9, 10)
    assert [r.learning_rate for r in records] == [lab.learning_rate(settings, s, 10) for s in (4, 9)]


# ── What a step sees ─────────────────────────────────────────────────────────────────────────────────


def batches(settings, dataset, count):
    scheduler = lab.make_scheduler(settings)
    examples = lab.open_examples(settings, dataset, None)
    return [lab.training_batch(settings, examples, scheduler, step) for step in range(count)]


def test_time_steps_span_the_whole_range(small):
    corner = part_of(small, 40)
    corner.pixels = corner.pixels[:, :, :2, :2]  # less noise to draw
    times = torch.stack([b["t"] for b in batches(tiny(num_train_timesteps=50, batch_size=40), corner, 100)])
    counts = torch.bincount(times.flatten(), minlength=50)
    assert len(counts) == 50 and counts.min() > 40 and counts.max() < 130, "4,000 draws, 80 of each"
    assert len(set(times[0].tolist())) > 10, "each picture has its own"
    long = torch.cat([b["t"] for b in batches(tiny(batch_size=40), corner, 200)])
    assert long.min() < 5 and 994 < long.max() <= 999


def test_each_batch_has_times_from_everywhere(small, monkeypatch):
    for batch in batches(tiny(batch_size=8), small, 5):
        assert (batch["t"].sort().values // 125).tolist() == list(range(8)), "one from each eighth"
    draw = torch.rand
    almost_one = torch.tensor(1 - 2**-24)  # the largest that torch.rand gives
    monkeypatch.setattr(torch, "rand", lambda *size, **kw: almost_one if size == ((),) else draw(*size, **kw))
    assert batches(tiny(batch_size=40), small, 1)[0]["t"].max() == 999


def test_labels_are_dropped_at_their_rate(small):
    corner = part_of(small, 40)
    corner.pixels = corner.pixels[:, :, :2, :2]
    share = lambda rate: torch.cat([b["null"] for b in batches(tiny(label_dropout=rate, batch_size=40), corner, 50)])
    assert share(0.3).float().mean().item() == pytest.approx(0.3, abs=0.04)
    assert not share(0.0).any()


def test_each_picture_keeps_its_labels_and_comes_once_an_epoch(small):
    for flip in (False, True):
        rows, mirrored = [], 0
        for batch in batches(tiny(batch_size=8, flip=flip), small, 10):
            for image, labels in zip(lab.to_uint8(batch["x_0"]), batch["labels"], strict=True):
                same = [(small.pixels == x).flatten(1).all(1) for x in (image, image.flip(2))]
                mirrored += int(same[1].any())
                (row,) = (same[0] | same[1]).nonzero().flatten().tolist()
                assert torch.equal(labels, small.labels[row])
                rows.append(row)
        assert sorted(rows[:40]) == sorted(rows[40:]) == list(range(40)), "all pictures in each epoch"
        assert rows[:40] != rows[40:] and rows[:40] != sorted(rows[:40]), "in a new order"
        assert 25 < mirrored < 55 if flip else mirrored == 0


def test_targets_and_noise_are_the_closed_forms(small):
    settings = tiny(batch_size=40)
    a = lab.alphas_bar("cosine").float()
    for kind in ("epsilon", "v_prediction", "sample"):
        b = batches(tiny(batch_size=40, prediction=kind), small, 1)[0]
        signal, spread = a[b["t"]].sqrt().view(-1, 1, 1, 1), (1 - a[b["t"]]).sqrt().view(-1, 1, 1, 1)
        target = {"epsilon": b["eps"], "v_prediction": signal * b["eps"] - spread * b["x_0"], "sample": b["x_0"]}
        torch.testing.assert_close(b["target"], target[kind], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(b["x_t"], signal * b["x_0"] + spread * b["eps"], rtol=1e-4, atol=1e-4)
    eps = torch.cat([b["eps"] for b in batches(settings, small, 3)])
    assert eps.mean().abs() < 0.01 and eps.std().item() == pytest.approx(1, abs=0.01)


def test_the_loss_is_the_mean_squared_error_of_the_target(small, tmp_path):
    settings = tiny(batch_size=40, epochs=1)
    (batch,), denoiser = batches(settings, small, 1), lab.make_denoiser(settings)
    with torch.no_grad():
        guess = denoiser(batch["x_t"], batch["t"], batch["labels"], batch["null"])
    assert run(settings, small, tmp_path)[0].loss == pytest.approx(
        (guess - batch["target"]).pow(2).mean().item(), rel=1e-5
    )


@pytest.mark.parametrize(("prediction", "of_snr"), [
    ("epsilon", lambda snr: min(snr, 5.0) / snr),
    ("v_prediction", lambda snr: min(snr, 5.0) / (snr + 1)),
    ("sample", lambda snr: min(snr, 5.0)),
])  # fmt: skip
def test_min_snr_weighs_the_error(small, tmp_path, prediction, of_snr):
    settings = tiny(batch_size=40, epochs=1, loss_weighting="min-snr", prediction=prediction)
    (batch,), denoiser = batches(settings, small, 1), lab.make_denoiser(settings)
    alpha_bar = lab.alphas_bar("cosine")
    with torch.no_grad():
        guess = denoiser(batch["x_t"], batch["t"], batch["labels"], batch["null"])
    errors = (guess - batch["target"]).pow(2).mean((1, 2, 3))
    ratios = [(alpha_bar[t] / (1 - alpha_bar[t])).item() for t in batch["t"]]
    expected = sum(of_snr(ratio) * e.item() for ratio, e in zip(ratios, errors, strict=True)) / 40
    assert run(settings, small, tmp_path)[0].loss == pytest.approx(expected, rel=1e-3)
    assert expected != pytest.approx(errors.mean().item(), rel=0.05)


def test_dropout_in_the_labels_network_resumes_too(small, tmp_path):
    settings = tiny_linear(conditioning="mlp", batch_size=8, epochs=2)
    run(settings, small, tmp_path / "straight")
    stopped = lab.train(settings, small, tmp_path / "stopped")
    next(stopped)
    stopped.close()
    torch.manual_seed(99)
    run(settings, small, tmp_path / "stopped")
    assert_same(checkpoint(tmp_path / "stopped"), checkpoint(tmp_path / "straight"))


# ── Whose weights are kept ───────────────────────────────────────────────────────────────────────────


def weights(pipe_folder):
    return lab.ICLEVRPipeline.from_pretrained(pipe_folder).denoiser.state_dict()


def test_the_best_epoch_is_kept(small, tmp_path, monkeypatch):
    """Report A's policy. The learning rate rises out of all reason, so the loss does too: an early epoch is best."""
    monkeypatch.setattr("lab6.training.learning_rate", lambda settings, step, total: 1e-3 if step < 10 else 3.0)
    kept = {}
    for record in lab.train(tiny(batch_size=8, epochs=4, ema_decay=0.0, keep="best"), small, tmp_path):
        kept[record.epoch] = {k: v.clone() for k, v in record.pipeline.denoiser.state_dict().items()}
    losses = [past["loss"] for past in lab.load_history(tmp_path)]
    best = losses.index(min(losses)) + 1
    assert best < 4
    assert_same(weights(tmp_path / "pipeline"), kept[best])
    assert [past["epoch"] for past in lab.load_history(tmp_path / "pipeline")] == list(range(1, best + 1))


def test_every_second_epoch_is_kept(small, tmp_path):
    kept = [
        {k: v.clone() for k, v in record.pipeline.denoiser.state_dict().items()}
        for record in lab.train(tiny(batch_size=8, epochs=5, keep="every", keep_every=2), small, tmp_path)
    ]
    assert sorted(p.name for p in (tmp_path / "epochs").iterdir()) == ["0002", "0004"]
    for number in (2, 4):
        assert_same(weights(tmp_path / "epochs" / f"{number:04d}"), kept[number - 1])
    assert_same(weights(tmp_path / "pipeline"), kept[4])


# ── Latent diffusion ─────────────────────────────────────────────────────────────────────────────────

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


def test_a_batch_depends_on_seed_and_step_alone(small):
    settings, scheduler = tiny(), lab.make_scheduler(tiny())
    examples = lab.open_examples(settings, small, None)
    torch.manual_seed(1)
    one = lab.training_batch(settings, examples, scheduler, 3)
    torch.manual_seed(2)
    assert_same(one, lab.training_batch(settings, examples, scheduler, 3))
    for other in (
        lab.training_batch(settings, examples, scheduler, 4),
        lab.training_batch(tiny(seed=1), examples, scheduler, 3),
    ):
        assert not torch.equal(one["eps"], other["eps"]) and not torch.equal(one["t"], other["t"])


def test_processes_share_one_batch(small):
    settings, scheduler = tiny(), lab.make_scheduler(tiny())
    examples = lab.open_examples(settings, small, None)
    whole = lab.training_batch(settings, examples, scheduler, 2)
    for count in (2, 4, 8):
        parts = [lab.training_batch(settings, examples, scheduler, 2, (rank, count)) for rank in range(count)]
        assert_same(whole, {name: torch.cat([part[name] for part in parts]) for name in whole})


def test_history_is_plain_json(straight):
    text = (straight[0] / "history.json").read_text()
    assert json.loads(text) == lab.load_history(straight[0]) and "NaN" not in text


def test_seconds_are_written_out():
    assert [lab.format_seconds(s) for s in (7.4, 75, 3600, 3725)] == ["7 s", "1 min 15 s", "1 h 00 min", "1 h 02 min"]


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
