"""What a rendered scene shows, and how Mitsuba renders it: objects, places, camera, lights, pixels.

How the scenes were made to look like i-CLEVR: camera, lamps, sun, their jitter and the colours are those of CLEVR's
scene file (Johnson et al. 2017; the positions as in Kubric's CLEVR worker, Greff et al. 2022). The strengths of lamps,
sun and surrounding light were fitted by least squares to mean real images of single objects. The sizes of objects, the
square on which they stand and the least distance between two were measured in real images.
benchmarks/render_calibration.py measures the differences that remain.
"""

import math

import numpy as np

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


def find_pixels(scene):
    """(n, 2) x and y where the middle of each object appears, in pixels of a 64x64 image."""
    camera = np.array(scene["camera"])
    forward = -camera / np.linalg.norm(camera)
    right = np.cross(forward, [0, 0, 1]) / math.hypot(*forward[:2])
    heights = [SIZE[name.split()[1]] for name in scene["labels"]]
    seen = np.column_stack([scene["places"], heights]) - camera
    across, up = seen @ right, seen @ np.cross(right, forward)
    scale = 64 * FOCAL / (seen @ forward)
    return np.column_stack([32 + across * scale, 32 - up * scale * 4 / 3])  # 4:3 is squeezed to a square


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
