#!/usr/bin/env python3
"""How close rendered scenes come to the real ones: the table in data/README.md.

    LAB6_DATA=FOLDER python benchmarks/render_calibration.py        FOLDER holds the course's files

It renders scenes (kept in data/runs/calibration/scenes) and trains two ResNet-18, one only on them and one only on real
scenes (kept beside them). It measures how well each scores the other kind, how fast one process renders, and the
brightness of both by rows. This takes about 75 minutes on two cores.
"""

import argparse
import re
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import lab6_utils as lab  # noqa: E402

MARKS = "<!-- made by benchmarks/render_calibration.py -->", "<!-- end -->"


def speed(renderer, scenes=10):
    """Images per second of one process with one thread, including placement and the visibility check."""
    renderer.use_one_thread()
    renderer.render_picture(renderer.draw_scene(0, 0, 3), 1)
    start = time.perf_counter()
    for number in range(scenes):
        scene = renderer.draw_scene(0, number, 3)
        for count in (1, 2, 3):
            renderer.render_picture(scene, count)
    return 3 * scenes / (time.perf_counter() - start)


def brightness(dataset, bands=8):
    """(bands, 2): mean level of a band of rows, and its standard deviation from image to image."""
    rows = dataset.pixels[2::3].float().mean((1, 3)).unflatten(1, (bands, -1)).mean(2)  # images of three objects
    return torch.stack([rows.mean(0), rows.std(0)], 1)


def read(evaluator, dataset):
    """The course's accuracy on the images of a dataset with its 95% interval over scenes, as text."""
    scenes = [lab.scene_of(name) for name in dataset.names]
    score = lab.evaluate(evaluator, lab.to_float(dataset.pixels), dataset.labels, scenes).metrics()
    interval = " ({:.4f} to {:.4f})".format(*score["ci95_sets"]) if score["ci95_sets"] else ""
    return f"**{score['accuracy']:.4f}**{interval} on {len(dataset):,} images"


def trained(settings, dataset, folder):
    """The evaluator in `folder`; it is trained on the dataset first if there is none yet."""
    if not (folder / "model.safetensors").is_file():
        for record in lab.train_evaluator(settings, dataset, folder):
            print(f"epoch {record['epoch']}/{record['epochs']}  loss {record['loss']:.4f}  "
                  f"{lab.format_seconds(record['seconds_left'])} left", flush=True)  # fmt: skip
    return lab.Evaluator.load(folder)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=6003)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seed", type=int, default=11, help="of the rendered scenes")
    args = parser.parse_args()
    real = lab.find_data()
    if real.source != "course files":
        parser.error("LAB6_DATA must name a folder with the course's files")
    settings = lab.make_settings("shipped", evaluator_epochs=args.epochs)
    folder, renderer = settings.runs / "calibration", lab.load_renderer()
    work = renderer.render_scenes(folder / "scenes", args.scenes, seed=args.seed)
    for _ in lab.progress(work, "rendering", args.scenes):
        pass
    rendered = lab.read_data(folder / "scenes")
    everything = lab.ICLEVRDataset(rendered, "all")
    of_rendered, of_real = (
        trained(settings, dataset, folder / f"evaluator-{name}-{args.epochs}-epochs")  # other choices, another folder
        for name, dataset in ((f"{args.scenes}-scenes", everything), ("real", lab.ICLEVRDataset(real, "train")))
    )
    held_out = lab.ICLEVRDataset(real, "held-out")
    per_second = speed(renderer)
    bands = zip(brightness(lab.ICLEVRDataset(real, "all")), brightness(everything), strict=True)
    table = [
        "| measured | |",
        "|---|---|",
        f"| rendered images, scored by a ResNet-18 trained only on real ones ({args.epochs} epochs) "
        f"| {read(of_real, everything)} |",
        f"| real held-out images, scored by a ResNet-18 trained only on {len(everything):,} rendered ones "
        f"({args.epochs} epochs) | {read(of_rendered, held_out)} |",
        f"| images per second on one core ({lab.device_name(settings).partition(',')[0]}), including checks "
        f"| {per_second:.1f} |",
        "",
        "| rows | real: mean brightness | from image to image | rendered: mean | from image to image |",
        "|---|---|---|---|---|",
        *(f"| {8 * i} to {8 * i + 7} | {a[0]:.1f} | ± {a[1]:.1f} | {b[0]:.1f} | ± {b[1]:.1f} |"
          for i, (a, b) in enumerate(bands)),
    ]  # fmt: skip
    page = ROOT / "data" / "README.md"
    text = page.read_text(encoding="utf-8")
    inside = re.compile(re.escape(MARKS[0]) + ".*" + re.escape(MARKS[1]), re.DOTALL)
    if not inside.search(text):
        parser.error(f"{page} has no place for the table between {MARKS[0]} and {MARKS[1]}")
    page.write_text(inside.sub(lambda _: "\n\n".join([MARKS[0], "\n".join(table), MARKS[1]]), text), encoding="utf-8")
    print("\n".join(table))


if __name__ == "__main__":
    main()
