#!/usr/bin/env python3
"""How fast the workbook is, and how fast the same work is when done as in the four reports.

    python benchmarks/speed.py                  everything; about ten minutes on two cores        (make bench)
    python benchmarks/speed.py --only sampling  one part: data, training, processes, sampling, memory or growth
    python benchmarks/speed.py --table          measure nothing, print the table of benchmarks/results.json

Each row is stored in benchmarks/results.json under its name and kind of device, and replaces the row measured there
before: {name: {ours, baseline, ratio, unit, device, date}}. In a row with `extrapolated`, only some steps of the
baseline were timed, and the time was scaled up. Both sides of a row run one after the other on an otherwise idle
machine, in one process, or in one each where memory is measured.

The baseline works as the reports and the course's examples do: each PNG is read and resized in every epoch, when it is
needed; single precision, default memory format, Adam, loss.item() at every step; images are sampled one at a time, in
all 1000 steps of ancestral sampling. The rows that compare something else say so.
"""

import argparse
import dataclasses
import datetime
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from baseline import EveryTime, baseline_trains, every_epoch, seconds_each  # noqa: E402, F401

import lab6_utils as lab  # noqa: E402

RESULTS = Path(__file__).with_name("results.json")
#: What NVIDIA states for dense bf16 products on an H100 (SXM) or H200; the model FLOPs utilisation (MFU) is the share
#: that is reached.
HOPPER_TERAFLOPS = 989
COLUMNS = ("ours", "baseline", "ratio", "unit", "device", "date")


def images_per_second_read(files, count=1000):
    """How fast one process reads the dataset of the baseline."""
    dataset = EveryTime(files)
    order = torch.randperm(len(dataset))[: min(count, len(dataset))].tolist()
    return 1 / seconds_each(lambda i: dataset[order[i]], len(order) - 1)


def unpacked(files, folder, count=None, size=None):
    """The first `count` images (all if None) as PNG files in a folder, as the course ships them, resized if `size`."""
    (folder / "iclevr").mkdir(parents=True)
    dataset = lab.ICLEVRDataset(files, "all", limit=count or 0)
    for name, picture in zip(dataset.names, lab.to_pil(lab.to_float(dataset.pixels)), strict=True):
        (picture.resize(size) if size else picture).save(folder / "iclevr" / name)
    lists = dict(train={name: files.train[name] for name in dataset.names}, **files.splits)
    for name, value in (lists | dict(objects={o: i for i, o in enumerate(lab.OBJECTS)})).items():
        lab.write_json(folder / f"{name}.json", value)
    return lab.read_data(folder)


def seconds_to_open(files, runs):
    """Seconds until all images of `files` can be used, and the dataset; `runs` is where the cache is or will be."""
    start = time.perf_counter()
    dataset = lab.ICLEVRDataset(files, "all", runs=runs)
    return time.perf_counter() - start, dataset


def measure_data(settings):
    """Reading images: once into the cache, from the cache, and as a share of a training step."""
    files = lab.find_data(settings.rendered_scenes)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        large = unpacked(files, folder / "large", 1500, (320, 240))
        seconds, dataset = seconds_to_open(large, folder / "cache of large")
        rates = len(dataset) / seconds, images_per_second_read(large)
        more = dict(images=len(dataset), files="enlarged from 64×64")
        yield "reading 320×240 PNG files into the cache", *rates, "images/s", more
        plain = unpacked(files, folder / "plain")
        cold, dataset = seconds_to_open(plain, folder / "cache")
        read = images_per_second_read(plain)
        yield "reading 64×64 PNG files into the cache", len(dataset) / cold, read, "images/s", dict(images=len(dataset))
        warm, dataset = seconds_to_open(plain, folder / "cache")
        yield "images ready: from the cache; baseline: making it", warm, cold, "s", dict(images=len(dataset))
    rows = lambda: torch.randint(len(dataset), (32,), device=settings.device)
    each = seconds_each(lambda i: dataset.images_at(rows()), 100, settings.device)
    yield "an epoch's images, once they are read", 32 / each, read, "images/s", {}
    step = 32 / ours_trains(settings, files, 32, 8)
    yield "data in a training step of tokens", 100 * each / step, 100 / (1 + step * read / 32), "%", {}


def ours_trains(settings, files, batch, steps, torch_compile=False):
    """Images per second of `lab.train` in its second epoch, without the time for saving after an epoch."""
    part = lab.ICLEVRDataset(files, "train", batch * steps)
    own = dict(preset=settings.preset, batch_size=batch, epochs=2, device=settings.device, torch_compile=torch_compile)
    own = lab.make_settings("full", **own)
    with tempfile.TemporaryDirectory() as folder:
        return [record.images_per_s for record in lab.train(own, part, folder)][1]


def measure_training(settings):
    """Images per second in training, for a network of the reports and for ours, each in both ways."""
    files = lab.find_data(settings.rendered_scenes)
    choices = [("linear-512", 32, 100), ("tokens", 32, 100), ("layout", 32, 100)]
    if settings.device == "cpu":
        choices = [("linear-512", 8, 4), ("tokens", 32, 16), ("layout", 32, 16)]
    with tempfile.TemporaryDirectory() as folder:
        plain = unpacked(files, Path(folder) / "plain", 512)
        for preset, batch, steps in choices:
            own = lab.make_settings("full", preset=preset, device=settings.device)
            theirs = baseline_trains(own, plain, batch, steps)
            for compiled in (False, True) if settings.device == "cuda" else (False,):
                rate = ours_trains(own, files, batch, steps, compiled)
                done = 3 * lab.count_flops(own) * rate / 1e12
                more = dict(batch=batch, teraflops=round(done, 3))
                if any(card in lab.device_name(settings) for card in ("H200", "H100 SXM", "H100 80GB HBM3")):
                    more["mfu"] = round(done / HOPPER_TERAFLOPS, 3)
                yield f"training {preset}{', compiled' if compiled else ''}", rate, theirs, "images/s", more


def trains_in_processes(settings, count):
    """Images per second when notebook 03 trains in `count` processes, in the second epoch."""
    with tempfile.TemporaryDirectory() as runs, mock.patch.dict(os.environ, LAB6_RUNS=runs):
        own = dataclasses.replace(settings, run=f"in-{count}", epochs=2)
        lab.train_in_processes(own, count)
        return lab.load_history(lab.run_folder(own))[1]["images_per_s"]


def measure_processes(settings):
    """Training in one process per GPU; nothing is measured with fewer than two GPUs."""
    gpus = torch.cuda.device_count() if settings.device == "cuda" else 0
    own = lab.make_settings("full", preset="tokens", batch_size=256, device=settings.device)
    for count in (n for n in (1, 2, 4, 8) if gpus > 1 and n <= gpus):
        yield f"growth: training tokens in {count} processes", trains_in_processes(own, count), None, "images/s", {}


@torch.no_grad()
def measure_sampling(settings):
    """64 label sets with the shipped weights, and one by one in all steps; also one evaluation of the network."""
    device, sets = settings.device, lab.find_data(settings.rendered_scenes).test
    sets = (sets * (64 // len(sets) + 1))[:64]
    labels = lab.encode_labels(sets).to(device)
    pipe = lab.load_pipeline(settings, "shipped")
    ours = seconds_each(lambda i: lab.sample(pipe, sets, settings, i), 1, device)
    networks = {name: lab.make_denoiser(lab.make_settings("full", preset=name, device=device)).eval()
                for name in ("linear-512", "linear-512-six", "tokens")}  # fmt: skip
    scheduler = lab.DDPMScheduler(1000, beta_schedule="linear")
    scheduler.set_timesteps(1000)
    scheduler.timesteps = scheduler.timesteps.to(device)
    for preset, at_once, steps in (("linear-512", 1, 60), ("tokens", 1, 60), ("tokens", 64, 10)):
        network = networks[preset].to(memory_format=torch.contiguous_format)
        state = [torch.randn(at_once, 3, 64, 64, device=device)]

        def step(i, network=network, state=state, at_once=at_once):
            t = scheduler.timesteps[i]
            state[0] = scheduler.step(network(state[0], t, labels[:at_once]), t, state[0]).prev_sample

        theirs = seconds_each(step, steps, device, 3) * (64 // at_once) * 1000
        more = dict(extrapolated=f"from {steps} of {64_000 // at_once:,} steps")
        how = "one by one" if at_once == 1 else "all at once"
        yield f"64 pictures by tokens; baseline: {preset}, 1000 steps, {how}", ours, theirs, "s", more
    few = lab.make_settings("full", preset="few-step", device=device)
    distilled = lab.load_pipeline(few, "shipped")
    all_by_it = seconds_each(lambda i: lab.sample(distilled, sets, few, i), 2, device)
    yield "64 pictures by few-step; baseline: by tokens", all_by_it, ours, "s", {}
    for count, words in ((1, "one picture, as for the guidance slider,"), (4, "four pictures")):
        both = (seconds_each(lambda i, p=p, s=s, n=count: lab.sample(p, sets[:n], s, i), 8, device)
                for p, s in ((distilled, few), (pipe, settings)))  # fmt: skip
        yield f"{words} by few-step; baseline: by tokens", *both, "s", {}
    x_t = torch.randn(16, 3, 64, 64, device=device)

    def milliseconds(network):
        def step(i):
            with lab.autocast(settings):
                network(x_t, torch.tensor(500, device=device), labels[:16])

        return 1000 / 16 * seconds_each(step, 10, device)

    six = networks["linear-512-six"].to(memory_format=torch.channels_last)
    both = milliseconds(pipe.denoiser), milliseconds(six)
    yield "one picture through tokens once; baseline: linear-512-six", *both, "ms", dict(batch=16)


def train_some(batch, size, preset, precision):
    """Print the peak memory in GB of two training steps and the seconds of the second; needs its own process."""
    settings = lab.make_settings("full", preset=preset, device="cpu", precision=precision)
    denoiser = lab.make_denoiser(settings)
    optimizer = torch.optim.AdamW(denoiser.parameters(), fused=True)
    x_t, labels = torch.randn(batch, 3, size, size), lab.encode_labels([list(lab.MANUAL_SET)] * batch)

    def step(i):
        with lab.autocast(settings):
            prediction = denoiser(x_t, torch.zeros(batch, dtype=torch.long), labels)
        prediction.float().pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    each = seconds_each(step, 1)
    print(json.dumps(dict(gigabytes=peak_memory(), seconds=each)))


def peak_memory():
    """The most memory in GB that this process has held; on Linux, ru_maxrss is never below that of the parent."""
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) / 1e6 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9  # macOS counts bytes


def in_a_process(batch, size=64, preset="tokens", precision="auto"):
    """What `train_some` prints with these arguments, in its own process."""
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import speed; "
    command = [sys.executable, "-c", code + f"speed.train_some({batch}, {size}, {preset!r}, {precision!r})"]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def measure_memory(settings):
    """Peak memory of training with a batch of 64, of the whole process with its libraries."""
    if settings.device == "cpu":
        both = [
            in_a_process(64, preset=n, precision=p)["gigabytes"]
            for n, p in (("tokens", "auto"), ("linear-512", "fp32"))
        ]
        yield "memory of training tokens; baseline: linear-512 in single precision", *both, "GB", dict(batch=64)


def measure_growth(settings):
    """What more and larger images, more objects and larger batches cost; there is no baseline."""
    if settings.device != "cpu":
        return
    files = lab.find_data(settings.rendered_scenes)
    with tempfile.TemporaryDirectory() as folder:
        for count in (1000, 4000, 16000):
            if count <= len(files.train):
                folder = Path(folder)
                seconds, dataset = seconds_to_open(
                    unpacked(files, folder / f"{count}", count), folder / f"cache{count}"
                )
                more = dict(megabytes=dataset.pixels.numel() / 1e6)
                yield f"growth: {count:,} images into the cache", seconds, None, "s", more
    for batch, size in ((8, 64), (32, 64), (128, 64), (32, 128)):
        found = in_a_process(batch, size)
        name = f"growth: a training step of tokens, {batch} pictures of {size}×{size}"
        yield name, found["seconds"], None, "s", dict(gigabytes=found["gigabytes"])
    pipe = lab.load_pipeline(settings, "shipped")
    for count in (1, 3, 5):
        labels = torch.zeros(8, 24)
        labels[:, :count] = 1
        each, composed = (seconds_each(lambda i, y=labels, g=kind: lab.sample(pipe, y, settings, guidance=g), 1)
                          for kind in ("classifier-free", "composition"))  # fmt: skip
        name = f"growth: drawing 8 pictures of {count} object{'s' * (count > 1)}"
        yield name, each, None, "s", dict(seconds_by_composition=composed)


PARTS = dict(data=measure_data, training=measure_training, processes=measure_processes, sampling=measure_sampling,
             memory=measure_memory, growth=measure_growth)  # fmt: skip


def better(row):
    """How many times better than the baseline: more images per second, or fewer seconds, bytes or per cent."""
    more_is_better = row["unit"].endswith("/s")
    return row["ours"] / row["baseline"] if more_is_better else row["baseline"] / row["ours"]


def say(value):
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def table(results):
    """A Markdown table of the comparisons, then one of how costs grow."""
    compared = {name: row for name, row in results.items() if row["baseline"] is not None}
    lines = ["| what | ours | baseline | times better | device | date |", "|---|---|---|---|---|---|"]
    for name, row in compared.items():
        mark = " (extrapolated)" if "extrapolated" in row else ""
        both = [f"{say(row[side])} {row['unit']}" for side in ("ours", "baseline")]
        cells = [
            name.rpartition(" @ ")[0],
            both[0],
            both[1] + mark,
            f"**{say(row['ratio'])}**",
            row["device"],
            row["date"],
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| as work grows | | |", "|---|---|---|"]
    for name, row in results.items():
        if name not in compared:
            more = [f"{say(v)} {k.replace('_', ' ')}" for k, v in row.items() if k not in COLUMNS]
            cells = [name.removeprefix("growth: ").rpartition(" @ ")[0], f"{say(row['ours'])} {row['unit']}", *more]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, help="measure one part")
    parser.add_argument("--table", action="store_true", help="only print the table")
    args = parser.parse_args()
    settings = lab.make_settings("shipped", preset="tokens")
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    for part, measure in PARTS.items():
        if args.table or args.only not in (None, part):
            continue
        for name, ours, baseline, unit, more in measure(settings):
            row = dict(ours=ours, baseline=baseline, ratio=None, unit=unit, device=lab.device_name(settings),
                       date=datetime.date.today().isoformat(), **more)  # fmt: skip
            row["ratio"] = baseline and better(row)
            row = {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in row.items()}
            results[f"{name} @ {settings.device}"] = row
            lab.write_json(RESULTS, results)
            print(f"progress: {name}: {say(ours)} {unit}, baseline {baseline and say(baseline)}", flush=True)
    print(table(results))


if __name__ == "__main__":
    main()
