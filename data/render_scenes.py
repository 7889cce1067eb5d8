#!/usr/bin/env python3
"""Render scenes that look like i-CLEVR's, for users who do not have the course's files or want more of them.

    python data/render_scenes.py --scenes 300 --out DIR                    300 scenes of 1, 2 and 3 objects, 64x64
    python data/render_scenes.py --scenes 50 --objects 5 --out DIR         up to five objects in a scene
    python data/render_scenes.py --scenes 4 --size native --out DIR        320x240, the size that CLEVR renders
    python data/render_scenes.py --scenes 300 --hold-out --out DIR         no image has a label set of test.json

DIR then has the layout of the course's files: iclevr/CLEVR_train_SSSSSS_K.png (scene S with K + 1 objects; each image
adds one object, and everything else stays), train.json, test.json, new_test.json and objects.json. Set LAB6_DATA to
DIR. Without it, `lab6_utils.find_data` renders scenes itself if it finds no course files.

A scene depends only on the seed and its number, not on what else is rendered or by how many workers. If the program
was stopped, the same command continues; a larger --scenes adds scenes to those that are there.

How the scenes were made to look like i-CLEVR: camera, lamps, sun, their jitter and the colours are those of CLEVR's
scene file (Johnson et al. 2017; the positions as in Kubric's CLEVR worker, Greff et al. 2022). The strengths of lamps,
sun and surrounding light were fitted by least squares to mean real images of single objects. The sizes of objects, the
square on which they stand and the least distance between two were measured in real images.
benchmarks/render_calibration.py measures the differences that remain.
"""

import argparse
import json
import math
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

SHAPES = ("cube", "sphere", "cylinder")
#: Colour -> diffuse reflectance, linear RGB (CLEVR's properties.json over 255).
COLOURS = {
    "gray": (87, 87, 87), "red": (173, 35, 35), "blue": (42, 75, 215), "green": (29, 105, 20),
    "brown": (129, 74, 25), "purple": (129, 38, 192), "cyan": (41, 208, 208), "yellow": (255, 238, 51),
}  # fmt: skip
#: The 24 objects in the course's order: index = 8 * shape + colour.
OBJECTS = tuple(f"{colour} {shape}" for shape in SHAPES for colour in COLOURS)

CAMERA = (7.48113, -6.50764, 5.34367)  # looks at the origin, z is up
CAMERA_JITTER = 0.5  # in each scene it is moved by up to this much along each axis
FOCAL = 35 / 32  # focal length over the width of the film
#: Lamp -> position, side of the square, radiance (linear RGB). They face the origin.
LAMPS = {
    "key": ((6.44671, -2.90517, 4.25840), 0.5, (77.9, 71.2, 60.6)),
    "fill": ((-4.67112, -4.01360, 3.01122), 0.5, (14.5, 15.7, 20.5)),
    "back": ((-1.16850, 2.64602, 5.81574), 1.0, (10.9, 10.4, 10.5)),
}
SUN = (-11.6608, 6.62799, -25.8232), (0.383, 0.411, 0.425)  # direction of its light, irradiance
SURROUNDING = (0.058, 0.052, 0.047)  # radiance from everywhere
LAMP_JITTER = 1.0  # in each scene, each lamp is moved by up to this much along each axis
FLOOR = 0.8  # reflectance
SIZE = {"cube": 0.565, "sphere": 0.59, "cylinder": 0.585}  # half the height, and half the side or the radius
REACH = 3.0  # objects stand within +-REACH along both axes of the floor
MIN_DISTANCE = 2.4  # between the middles of two objects
MIN_PIXELS = 200  # of 320x240; at least so many must show each object

#: How many label sets of one, two and three objects the course's files have.
MAKE_UP = {"test": (6, 12, 14), "new_test": (0, 12, 20)}
#: Width and height to render, then light paths per pixel: for the surrounding, and for each lamp and the sun.
FILM = {64: (192, 144, 1, 1), "native": (320, 240, 25, 9)}


class CannotRender(RuntimeError):
    """Mitsuba is missing or fails, or the folder holds something else; the message says what to do."""


# ── What stands where ──────────────────────────────────────────────────────────────────────────────────


def draw_labels(rng, count, forbidden=frozenset()):
    """`count` different objects in the order in which they enter a scene, as names.

    The shape is drawn first, then a colour that this shape does not have yet, so that every shape has a third of the
    objects, as in the real scenes. No image of the scene, with its first one, two, ... objects, has a label set in
    `forbidden` (frozensets of names).
    """
    while True:
        names = []
        while len(names) < count:
            shape = rng.choice(SHAPES)
            names.append(rng.choice([f"{colour} {shape}" for colour in COLOURS if f"{colour} {shape}" not in names]))
        if not any(frozenset(names[: k + 1]) in forbidden for k in range(count)):
            return names


def draw_test_sets(split):
    """The label sets of test.json or new_test.json: all different, composed like the course's, always the same."""
    rng = np.random.default_rng([2019, list(MAKE_UP).index(split)])
    sets = []
    for objects, wanted in enumerate(MAKE_UP[split], 1):
        while wanted:
            names = draw_labels(rng, objects)
            if set(names) not in map(set, sets):
                sets.append(names)
                wanted -= 1
    return sets


def camera_axes(camera):
    """(2, 2): the directions on the floor to the right and forward, for a camera at `camera` (3,)."""
    forward = -np.array(camera[:2]) / math.hypot(*camera[:2])
    return np.array([[forward[1], -forward[0]], forward])


def draw_places(rng, count, camera=CAMERA, margin=0.0):
    """Places (count, 2) on the floor: the first in the middle, all at least MIN_DISTANCE apart.

    margin: two objects are also at least this far apart along the right and the forward direction of the camera. This
    is CLEVR's rule to keep "left of" and "behind" clear; the real i-CLEVR scenes show no such gap.
    """
    axes, places = camera_axes(camera), [np.zeros(2)]
    for _ in range(1000 * count):
        if len(places) == count:
            return np.array(places)
        place = rng.uniform(-REACH, REACH, 2)
        apart = place - np.array(places)
        if (np.hypot(*apart.T) >= MIN_DISTANCE).all() and (np.abs(apart @ axes.T) >= margin).all():
            places.append(place)
    return draw_places(rng, count, camera, margin)  # the first places left no room: start again


def draw_scene(seed, number, objects, forbidden=frozenset(), margin=0.0):
    """What scene `number` shows: {labels, camera (3,), lamps {name: (3,)}, places (n, 2), turns (n,) radians}.

    Places are drawn again until every object is visible (MIN_PIXELS) when all objects are there.
    """
    labels = draw_labels(np.random.default_rng([seed, number, 0]), objects, forbidden)
    rng = np.random.default_rng([seed, number, 1])
    camera = CAMERA + rng.uniform(-CAMERA_JITTER, CAMERA_JITTER, 3)
    lamps = {name: place + rng.uniform(-LAMP_JITTER, LAMP_JITTER, 3) for name, (place, _, _) in LAMPS.items()}
    while True:
        scene = dict(labels=labels, camera=camera, lamps=lamps, places=draw_places(rng, objects, camera, margin),
                     turns=rng.uniform(0, 2 * math.pi, objects))  # fmt: skip
        if count_visible(scene).min() >= MIN_PIXELS:
            return scene


# ── Mitsuba ────────────────────────────────────────────────────────────────────────────────────────────


def load_mitsuba():
    """The module mitsuba with the variant scalar_rgb, which needs neither LLVM nor a GPU."""
    try:
        import mitsuba

        mitsuba.set_variant("scalar_rgb")
        mitsuba.set_log_level(mitsuba.LogLevel.Error)
        return mitsuba
    except Exception as error:
        raise CannotRender(
            f"cannot use Mitsuba 3, which renders the scenes ({type(error).__name__}: {error}). Install it: "
            "pip install mitsuba; or put the course's files into data/ (see data/README.md)."
        ) from None


def describe_objects(scene, count):
    """Mitsuba's description of the first `count` objects of a scene; names begin with the object's index."""
    to_world = load_mitsuba().ScalarTransform4f
    parts = {}
    for i in range(count):
        colour, shape = scene["labels"][i].split()
        place = to_world().translate([*scene["places"][i], SIZE[shape]])
        place = place @ to_world().rotate([0, 0, 1], math.degrees(scene["turns"][i])) @ to_world().scale(SIZE[shape])
        reflectance = {"type": "rgb", "value": [c / 255 for c in COLOURS[colour]]}
        matt = {"type": "twosided", "bsdf": {"type": "diffuse", "reflectance": reflectance}}
        if shape == "cylinder":
            parts[f"{i}_wall"] = {
                "type": "cylinder",
                "p0": [0, 0, -1],
                "p1": [0, 0, 1],
                "to_world": place,
                "bsdf": matt,
            }
            parts[f"{i}_top"] = {"type": "disk", "to_world": place @ to_world().translate([0, 0, 1]), "bsdf": matt}
        else:
            parts[f"{i}_{shape}"] = {"type": shape, "to_world": place, "bsdf": matt}
    return parts


def describe_camera(camera, width, height, samples, jitter=True):
    return {
        "type": "perspective",
        "fov_axis": "x",
        "near_clip": 5.5,  # behind the key lamp, which CLEVR's camera does not see, and in front of every object
        "fov": math.degrees(2 * math.atan(0.5 / FOCAL)),
        "to_world": load_mitsuba().ScalarTransform4f().look_at(origin=camera, target=[0, 0, 0], up=[0, 0, 1]),
        "film": {"type": "hdrfilm", "width": width, "height": height, "pixel_format": "rgb",
                 "rfilter": {"type": "box"}},
        "sampler": {"type": "multijitter", "sample_count": samples, "jitter": jitter},
    }  # fmt: skip


def find_surfaces(scene, count, width, height, jitter=True):
    """(height, width, 4): which of the first `count` objects each pixel shows (from 0; -1: none), and the normal there.

    jitter: look at the point where the first path of that pixel passes; otherwise at the middle of the pixel.
    """
    mitsuba = load_mitsuba()
    seen = np.array(mitsuba.render(mitsuba.load_dict({
        "type": "scene", "integrator": {"type": "aov", "aovs": "place:position,normal:sh_normal"},
        "sensor": describe_camera(scene["camera"], width, height, 1, jitter), **describe_objects(scene, count),
    }), seed=0))[..., -6:]  # fmt: skip
    place, normal = seen[..., :2], seen[..., 3:]
    nearest = ((place[..., None, :] - scene["places"][:count]) ** 2).sum(-1).argmin(-1)
    return np.concatenate([np.where(normal.any(-1), nearest, -1)[..., None], normal], -1)


def count_visible(scene):
    """(n,) how many pixels of 320x240 show each object, estimated with one ray per 4x4 pixels."""
    count = len(scene["labels"])
    return 16 * (find_surfaces(scene, count, 80, 60)[..., :1] == np.arange(count)).sum((0, 1))


def render_picture(scene, count, size=64):
    """The image with the first `count` objects: uint8 (64, 64, 3), or (240, 320, 3) for size "native"."""
    mitsuba = load_mitsuba()
    to_world = mitsuba.ScalarTransform4f
    width, height, *samples = FILM[size]
    description = {
        "type": "scene",
        "integrator": {"type": "path", "max_depth": 4, "hide_emitters": True},
        "floor": {"type": "rectangle", "to_world": to_world().scale([60, 60, 1]),
                  "bsdf": {"type": "diffuse", "reflectance": {"type": "rgb", "value": FLOOR}}},
        **describe_objects(scene, count),
    }  # fmt: skip
    around, direct = (describe_camera(scene["camera"], width, height, n) for n in samples)
    rgb = lambda value: {"type": "rgb", "value": list(value)}
    passes = [
        {"sensor": around, "light": {"type": "constant", "radiance": rgb(SURROUNDING)}},
        {"sensor": direct, "light": {"type": "directional", "direction": SUN[0], "irradiance": rgb(SUN[1])}},
    ]
    for name, (_, side, radiance) in LAMPS.items():
        place = to_world().look_at(origin=scene["lamps"][name], target=[0, 0, 0], up=[0.01, 0, 1])
        lamp = {"type": "rectangle", "to_world": place @ to_world().scale(side / 2), "bsdf": {"type": "null"},
                "emitter": {"type": "area", "radiance": rgb(radiance)}}  # fmt: skip
        passes.append({"sensor": direct, "light": lamp})
    # One light at a time: this gives less noise than choosing one for each path. It also gives the same numbers each
    # time, since the order of several lights in Mitsuba's list varies. One seed for all images: as in i-CLEVR, what an
    # added object does not affect stays the same.
    linear = sum(np.array(mitsuba.render(mitsuba.load_dict(description | part), seed=0)) for part in passes)
    if size != "native":
        linear = shrink(linear, *(find_surfaces(scene, count, width, height, jitter) for jitter in (True, False)))
    srgb = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * np.maximum(linear, 0.0031308) ** (1 / 2.4) - 0.055)
    return (255 * srgb).clip(0, 255).round().astype(np.uint8)


def shrink(linear, rendered, middle):
    """(144, 192, 3) to (64, 64, 3) by linear interpolation without antialiasing, as for the course's images.

    So objects have hard edges. To avoid the noise of single paths, a point is the mean of those of the 5x5 pixels
    around it that show the same surface (`rendered` has the surface of each pixel, `middle` that at the point itself).
    """
    height, width, _ = linear.shape
    y, columns = (np.arange(64) + 0.5) * height / 64 - 0.5, 3 * np.arange(64) + 1
    small = 0.0
    for rows, weight in ((np.floor(y).astype(int), 1 - y % 1), (np.floor(y).astype(int) + 1, y % 1)):
        at = rows[:, None], columns
        total, number = 1e-6 * linear[at], 1e-6  # a sliver that no path hit keeps the value of its own pixel
        for down in range(-2, 3):
            for right in range(-2, 3):
                near = (at[0] + down).clip(0, height - 1), (columns + right).clip(0, width - 1)
                same = (abs(rendered[near] - middle[at]) < 0.5).all(-1, keepdims=True)
                total, number = total + same * linear[near], number + same
        small = small + weight[:, None, None] * total / number
    return small


# ── Files ──────────────────────────────────────────────────────────────────────────────────────────────


def write_whole(path, write):
    """Call `write(temporary path)`, then rename, so that `path` is either the whole file or does not exist.

    A copy of the function in lab6/storage.py, so that this program needs no other module of the workbook.
    """
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, value):
    write_whole(path, lambda temporary: temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8"))


def image_name(number, index):
    return f"CLEVR_train_{number:06d}_{index}.png"


def render_scene(folder, number, seed, objects, size, forbidden, margin):
    """Render the images of one scene that are not in `folder` yet; this is the work of one process."""
    files = [folder / image_name(number, k) for k in range(objects)]
    if all(file.exists() for file in files):
        return
    scene = draw_scene(seed, number, objects, forbidden, margin)
    for count, file in enumerate(files, 1):
        if not file.exists():
            picture = Image.fromarray(render_picture(scene, count, size))
            write_whole(file, lambda temporary, picture=picture: picture.save(temporary, "png"))


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
        for done, job in enumerate(jobs, 1):
            job.result()
            yield done
    finally:
        pool.shutdown(cancel_futures=True)
    train = {}
    for number in range(scenes):  # last, so that the folder counts as data only when it is complete
        names = draw_labels(np.random.default_rng([seed, number, 0]), objects, forbidden)
        train |= {image_name(number, k): names[: k + 1] for k in range(objects)}
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
