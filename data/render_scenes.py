#!/usr/bin/env python3
"""Render scenes that look like i-CLEVR's, for users who do not have the course's files or want more of them.

    python data/render_scenes.py --scenes 300 --out DIR                    300 scenes of 1, 2 and 3 objects, 64x64
    python data/render_scenes.py --scenes 50 --objects 5 --out DIR         up to five objects in a scene
    python data/render_scenes.py --scenes 4 --size native --out DIR        320x240, the size that CLEVR renders
    python data/render_scenes.py --scenes 300 --hold-out --out DIR         no image has a label set of test.json

DIR then has the layout of the course's files: iclevr/CLEVR_train_SSSSSS_K.png (scene S with K + 1 objects; each image
adds one object, and everything else stays), train.json, test.json, new_test.json and objects.json; places.json says
where each object stands. Set LAB6_DATA to DIR. Without it, `lab6_utils.find_data` renders scenes itself if it finds no
course files.

A scene depends only on the seed and its number, not on what else is rendered or by how many workers. If the program
was stopped, the same command continues; a larger --scenes adds scenes to those that are there.

What a scene shows and how it is rendered: rendered_scene.py beside this file.
"""

import argparse
import json
import os
import signal
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context, parent_process
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(folder) for folder in (HERE, HERE.parent) if str(folder) not in sys.path]
from rendered_scene import (  # noqa: E402
    CAMERA,
    COLOURS,
    MAKE_UP,
    MIN_DISTANCE,
    MIN_PIXELS,
    OBJECTS,
    REACH,
    CannotRender,
    camera_axes,
    count_visible,
    draw_labels,
    draw_scene,
    draw_test_sets,
    find_pixels,
    load_mitsuba,
    render_picture,
)

from lab6.storage import write_json, write_whole  # noqa: E402

__all__ = ["CAMERA", "COLOURS", "MIN_DISTANCE", "MIN_PIXELS", "REACH", "camera_axes", "count_visible"]  # for notebooks


def image_name(number, index):
    return f"CLEVR_train_{number:06d}_{index}.png"


def render_scene(folder, number, seed, objects, size, forbidden, margin):
    """Render the images of one scene that are not in `folder` yet; this is the work of one process.

    Returns [x, y] of each object, in pixels of a 64x64 image.
    """
    files = [folder / image_name(number, k) for k in range(objects)]
    scene = draw_scene(seed, number, objects, forbidden, margin)
    for count, file in enumerate(files, 1):
        if not file.exists():
            picture = Image.fromarray(render_picture(scene, count, size))
            write_whole(file, lambda temporary, picture=picture: picture.save(temporary, "png"))
    return find_pixels(scene).round(2).tolist()


def claim_folder(out, choices):
    """Note in `out`/render.json what its images are; raises CannotRender if the folder holds something else."""
    note = out / "render.json"
    if note.exists():
        try:
            there = json.loads(note.read_text(encoding="utf-8"))
        except ValueError:
            raise CannotRender(f"{note}: not readable; delete {out} to render it again") from None
        differ = [f"{k} {there.get(k)!r} there, {v!r} now" for k, v in choices.items() if there.get(k) != v]
        if differ:
            raise CannotRender(f"{out} holds other scenes ({'; '.join(differ)}): choose another folder, or delete it")
    elif out.exists() and any(out.iterdir()):
        raise CannotRender(f"{out} is not empty and was not rendered by this program: choose another folder")
    (out / "iclevr").mkdir(parents=True, exist_ok=True)
    write_json(note, choices)


def render_scenes(out, scenes, objects=3, size=64, seed=0, workers=None, hold_out=False, margin=0.0):
    """Render scenes 0 to `scenes` - 1 into `out`; a generator that yields the number of finished scenes after each.

    Args:
        out: a folder, new or rendered with the same choices; what is there is not rendered again.
        objects: images per scene, with one, two, ... objects; size: 64 or "native".
        workers: processes; by default one for each core that this process may use.
        hold_out: no image has a label set of test.json or new_test.json.

    Raises:
        CannotRender: Mitsuba does not work, or `out` holds something else.
    """
    load_mitsuba()
    out = Path(out)
    claim_folder(out, dict(objects=objects, size=size, seed=seed, hold_out=hold_out, margin=margin))
    sets = {split: draw_test_sets(split) for split in MAKE_UP}
    forbidden = frozenset(frozenset(names) for part in sets.values() for names in part) if hold_out else frozenset()
    for split, label_sets in sets.items():
        write_json(out / f"{split}.json", label_sets)
    write_json(out / "objects.json", {name: i for i, name in enumerate(OBJECTS)})
    workers = workers or count_cores()
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=start_worker)
    try:
        jobs = [pool.submit(render_scene, out / "iclevr", number, seed, objects, size, forbidden, margin)
                for number in range(scenes)]  # fmt: skip
        places = []
        for done, job in enumerate(jobs, 1):
            places.append(job.result())
            yield done
    finally:
        pool.shutdown(cancel_futures=True)
    train, known = {}, {}
    for number in range(scenes):  # last, so that the folder counts as data only when it is complete
        known |= {image_name(number, k): places[number][: k + 1] for k in range(objects)}
        names = draw_labels(np.random.default_rng([seed, number, 0]), objects, forbidden)
        train |= {image_name(number, k): names[: k + 1] for k in range(objects)}
    write_json(out / "places.json", known)
    write_json(out / "train.json", train)


def count_cores():
    """How many cores this process may use, which can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def start_worker():
    """Prepare a process for rendering: it uses one thread, since each core has a process, and ends with its parent."""
    use_one_thread()
    threading.Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()


def use_one_thread():
    load_mitsuba()
    import drjit

    drjit.set_thread_count(1)


def main(argv=None):
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=300, help="number of scenes (300)")
    parser.add_argument("--objects", type=int, default=3, choices=range(1, 6), help="objects per scene (3)")
    parser.add_argument("--size", default="64", choices=["64", "native"], help="64x64 (default) or native, 320x240")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write to")
    parser.add_argument("--workers", type=int, help="processes (one for each core)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hold-out", action="store_true", help="keep the label sets of the test files out")
    parser.add_argument("--margin", type=float, default=0.0, help="least distance along the camera's axes (0)")
    args = parser.parse_args(argv)
    if args.scenes < 1 or args.seed < 0 or (args.workers or 1) < 1 or not 0 <= args.margin <= 1:
        parser.error("--scenes and --workers must be at least 1, --seed at least 0, --margin from 0 to 1")
    from tqdm import tqdm

    size = args.size if args.size == "native" else int(args.size)
    work = render_scenes(args.out, args.scenes, args.objects, size, args.seed, args.workers, args.hold_out, args.margin)
    start = time.perf_counter()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so the processes end too, as with Ctrl-C
    try:
        for _ in tqdm(work, "rendering", args.scenes, unit="scene"):
            pass
    except CannotRender as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return 130
    print(f"{args.scenes * args.objects} pictures in {args.out}, {time.perf_counter() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
