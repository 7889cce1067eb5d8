"""lab6/training.py: exact resume, EMA, checkpoints, the learning rate."""

import dataclasses
import json
import os
import re
import signal

import pytest
import torch
from conftest import assert_same, batches, part_of, run, tiny, tiny_linear

import lab6.training
import lab6_utils as lab


def weights(pipe_folder):
    return lab.ICLEVRPipeline.from_pretrained(pipe_folder).denoiser.state_dict()


def checkpoint(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


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


def interrupt_step_7(monkeypatch, settings, dataset, folder):
    """Train until step 7 begins, where someone stops it. A later training goes on undisturbed."""
    whole = lab.training_batch

    def interrupted(settings, examples, scheduler, step, *rest):
        if step == 7:
            raise KeyboardInterrupt
        return whole(settings, examples, scheduler, step, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("lab6.training.training_batch", interrupted)
        run(settings, dataset, folder)


def test_an_interruption_in_mid_epoch_loses_only_that_epoch(small, straight, tmp_path, monkeypatch):
    interrupt_step_7(monkeypatch, tiny(**VARIED), small, tmp_path)
    assert (
        [r["epoch"] for r in checkpoint(tmp_path)["history"]] == [1] == [r["epoch"] for r in lab.load_history(tmp_path)]
    )
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
    with pytest.raises(OSError, match="no space left"):
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


def test_the_best_epoch_is_kept(small, tmp_path, monkeypatch):
    """Report A's policy. The learning rate rises out of all reason, so the loss does too: an early epoch is best."""
    monkeypatch.setattr("lab6.training.rate_factor", lambda settings, step, total: 1.0 if step < 10 else 400.0)
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


def test_history_is_plain_json(straight):
    text = (straight[0] / "history.json").read_text()
    assert json.loads(text) == lab.load_history(straight[0]) and "NaN" not in text


def test_a_run_does_not_continue_on_other_data(small, synthetic, tmp_path):
    """As many images of the same labels, but not the same images."""
    run(tiny(epochs=1, batch_size=8), small, tmp_path)
    other = part_of(synthetic, 40)
    other.pixels = other.pixels.flip(0)
    with pytest.raises(ValueError, match=r"checkpoint\.pt was trained on other data: 40 images of .*name another run"):
        run(tiny(epochs=2, batch_size=8), other, tmp_path)
    assert [r.epoch for r in run(tiny(epochs=2, batch_size=8), small, tmp_path)] == [2]


def test_a_checkpoint_that_does_not_know_its_data_resumes(small, tmp_path):
    """One of an earlier version; only the number of images can be checked."""
    run(tiny(epochs=1, batch_size=8), small, tmp_path)
    state = checkpoint(tmp_path)
    del state["data"]
    torch.save(state, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="was trained on another number of images"):
        run(tiny(epochs=2, batch_size=8), part_of(small, 24), tmp_path)
    assert [r.epoch for r in run(tiny(epochs=2, batch_size=8), small, tmp_path)] == [2]


def test_each_process_has_dropout_masks_of_its_own(small, monkeypatch):
    """And makes the noise of its own share only, in an order of the images that is made once an epoch."""
    from lab6 import examples, machine, training

    settings, dropped, made = tiny(batch_size=8), [], []
    streams = lambda seed, *stream, device="cpu": made.append(stream) or machine.make_generator(seed, *stream)
    randomness = lambda device, *stream: dropped.append(stream) or machine.global_randomness(device, *stream)
    monkeypatch.setattr(training, "global_randomness", randomness)
    monkeypatch.setattr(examples, "make_generator", streams)
    opened, scheduler = lab.open_examples(settings, small, None), lab.make_scheduler(settings)
    for rank in range(2):
        loss_at = training._loss(settings, lab.make_denoiser(settings), opened, scheduler, (rank, 2), None, None)
        assert loss_at(0) > 0 and loss_at(1) > 0
    assert dropped == [(0, "dropout", step, rank) for rank in range(2) for step in range(2)]
    noise = [stream for stream in made if stream[0] == "noise"]
    assert len(noise) == len(set(noise)) == 16, "eight blocks in each of two steps, each made by one process"
    assert [stream for stream in made if stream[0] == "order"] == [("order", 0)]


def test_what_accelerate_launch_chose_does_not_leak_in(small, straight, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    run(tiny(**VARIED), small, tmp_path)
    assert_same(checkpoint(tmp_path), checkpoint(straight[0]))


def test_the_writer_of_tensorboard_is_closed(small, tmp_path, monkeypatch):
    from torch.utils import tensorboard

    closed = []

    class Noted(tensorboard.SummaryWriter):
        def close(self):
            closed.append(self)
            super().close()

    monkeypatch.setattr(tensorboard, "SummaryWriter", Noted)
    run(tiny(batch_size=40, epochs=1), small, tmp_path / "whole")
    stopped = lab.train(tiny(batch_size=40, epochs=2), small, tmp_path / "stopped")
    next(stopped)
    stopped.close()
    assert len(closed) == 2


ALL_NEW = dict(preset="layout", batch_size=8, epochs=2, max_images=40, warmup_steps=3)


def test_a_long_epoch_is_continued_in_the_middle(scenes, tmp_path, monkeypatch):
    """With every choice of the preset layout: Muon, balanced weights, places, shares of objects."""
    monkeypatch.setenv("LAB6_DATA", str(scenes))
    settings = tiny(**ALL_NEW, checkpoint_minutes=1e-9)
    dataset = lab.training_set(settings, lab.find_data())
    records = run(settings, dataset, tmp_path / "once")
    interrupt_step_7(monkeypatch, settings, dataset, tmp_path / "twice")
    state = checkpoint(tmp_path / "twice")
    assert len(state["history"]) == 1 and state["part"]["steps"] == 2, "seven steps of two epochs of five"
    seen, whole = [], lab.training_batch
    monkeypatch.setattr("lab6.training.training_batch", lambda *a: seen.append(a[3]) or whole(*a))
    again = run(settings, dataset, tmp_path / "twice")
    assert seen == [7, 8, 9] and again[-1].loss == records[-1].loss
    assert_same(checkpoint(tmp_path / "twice"), checkpoint(tmp_path / "once"))
    layouts = lab.ICLEVRPipeline.from_pretrained(tmp_path / "twice" / "pipeline").denoiser.condition.layouts
    assert layouts.isfinite().all() and (layouts[:, 0, 0] - 32).abs().max() < 1, "first objects stand in the middle"


def test_short_epochs_are_checkpointed_at_their_end(small, tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr("lab6.runs.write_json", lambda file, value: written.append(len(value)))
    run(tiny(batch_size=8, epochs=2), small, tmp_path)
    assert written == [1, 2]


def test_accelerates_environment_changes_nothing(small, tmp_path, monkeypatch):
    """The settings alone say how a network is trained."""
    train = lambda name: list(lab.train(tiny(batch_size=8, epochs=1), small, tmp_path / name))[-1].loss
    plain = train("plain")
    for name, value in dict(MIXED_PRECISION="bf16", GRADIENT_ACCUMULATION_STEPS="4", DYNAMO_BACKEND="INDUCTOR",
                            USE_CPU="yes", SPLIT_BATCHES="true").items():  # fmt: skip
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    assert train("with choices") == plain
    assert os.environ["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] == "4", "they stay for others"
    assert_same(weights(tmp_path / "plain" / "pipeline"), weights(tmp_path / "with choices" / "pipeline"))


# ── Stopped and damaged ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("steps", [3, 5])  # amid an epoch, and in its last step
def test_a_signal_leaves_the_step_it_came_at(small, straight, tmp_path, monkeypatch, number, steps):
    """The step is finished and kept, and the run that continues ends as if nothing had happened."""
    before, taken = signal.signal(signal.SIGTERM, signal.default_int_handler), []
    batch = lab6.training.training_batch

    def at_step(settings, examples, scheduler, step, part):
        taken.append(step)
        if len(taken) == steps:
            signal.raise_signal(number)
        return batch(settings, examples, scheduler, step, part)

    monkeypatch.setattr("lab6.training.training_batch", at_step)
    try:
        with pytest.raises(KeyboardInterrupt):
            list(lab.train(tiny(**VARIED), small, tmp_path))
        assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler, "others get their signals as before"
    finally:
        signal.signal(signal.SIGTERM, before)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert len(state["history"]) * (len(small) // tiny(**VARIED).batch_size) + state["part"]["steps"] == steps
    list(lab.train(tiny(**VARIED), small, tmp_path))
    assert taken[steps:] == list(range(steps, taken[-1] + 1)), "no step is taken twice"
    assert_same(weights(tmp_path / "pipeline"), weights(straight[0] / "pipeline"))


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "text"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(small, straight, tmp_path, capsys, damage):
    training = lab.train(tiny(**VARIED), small, tmp_path)
    next(training), next(training)
    training.close()
    file = tmp_path / "checkpoint.pt"
    whole = bytearray(file.read_bytes())
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes(b ^ 255 for b in whole[middle : middle + 64]) + whole[middle + 64 :]
    file.write_bytes({"cut": whole[:-999], "empty": b"", "flipped": flipped, "text": b"hello" * 99}[damage])
    list(lab.train(tiny(**VARIED), small, tmp_path))
    said = capsys.readouterr().out
    assert "checkpoint.pt: not a checkpoint of this workbook" in said
    assert "going on from checkpoint.previous.pt, the one before" in said
    assert_same(weights(tmp_path / "pipeline"), weights(straight[0] / "pipeline"))
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        (tmp_path / name).write_bytes(b"hello")
    with pytest.raises(ValueError, match=r"checkpoint\.pt: not .*checkpoint\.previous\.pt: not .*delete both to start"):
        list(lab.train(tiny(**VARIED), small, tmp_path))


def test_a_signal_that_is_ignored_stays_so(small, straight, tmp_path, monkeypatch):
    """As in the background of a shell: the training does not even stop between two steps."""
    before, batch = signal.signal(signal.SIGINT, signal.SIG_IGN), lab6.training.training_batch

    def at_step(*arguments):
        signal.raise_signal(signal.SIGINT)
        return batch(*arguments)

    monkeypatch.setattr("lab6.training.training_batch", at_step)
    try:
        list(lab.train(tiny(**VARIED), small, tmp_path))
    finally:
        signal.signal(signal.SIGINT, before)
    assert_same(weights(tmp_path / "pipeline"), weights(straight[0] / "pipeline"))
