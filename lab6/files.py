"""The course's files, or scenes rendered in their place: where they are and what their json files say. Notebook 01.

Stands on holdings, machine, labels and storage.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from lab6.holdings import look_into
from lab6.labels import OBJECTS, encode_labels
from lab6.machine import progress
from lab6.storage import ROOT, exclusive, folder_named_by, read_json, runs_folder


@dataclasses.dataclass(frozen=True)
class DataFiles:
    """Where the data is, and what its json files say. Made by `find_data`.

    Attributes:
        images: the folder or the zip that holds the images, such as iclevr/ or iclevr.zip.
        train: {image file name: label set}; test, new_test: lists of label sets, the second empty where it is missing.
        source: what every figure names as its data, "course files" or "rendered scenes".
        places: {image file name: [x, y] in pixels of each object, in the order of its label set}, of rendered scenes;
            empty where there is no places.json (`find_places` finds them).
    """

    root: Path
    images: Path
    train: dict[str, list[str]]
    test: list[list[str]]
    new_test: list[list[str]]
    source: str = "course files"
    places: dict[str, list[list[float]]] = dataclasses.field(default_factory=dict)

    @property
    def splits(self) -> dict[str, list[list[str]]]:
        """The label sets to sample, by the name of their file: "test" and, where there is one, "new_test"."""
        return {"test": self.test} | ({"new_test": self.new_test} if self.new_test else {})

    @property
    def evaluator(self) -> Path | None:
        """The course's evaluator, where it lies with the data, or, if scenes are rendered, in data/."""
        return find_evaluator(self.root) or (find_evaluator() if self.source == "rendered scenes" else None)

    @property
    def held_out(self) -> frozenset[str]:
        """Scenes kept out of training: those of `held_out_scenes`, or the last rendered ones, in proportion."""
        if self.source == "course files":
            return held_out_scenes()
        scenes = sorted({scene_of(name) for name in self.train})
        return frozenset(scenes[len(scenes) * 5500 // 6003 :])


def choose_splits(split: str) -> list[str]:
    """The course's lists of label sets that `split` names: "test", "new_test" or "both"."""
    splits = {"test": ["test"], "new_test": ["new_test"], "both": ["test", "new_test"]}
    if split not in splits:
        raise ValueError(f"split={split!r}: choose from {', '.join(splits)}")
    return splits[split]


#: json files of the course: what each is called in one year or another. The course's evaluator has two names, too.
_LISTS = {"objects": ("objects.json", "object.json"), "train": ("train.json",), "test": ("test.json",),
          "new_test": ("new_test.json",), "render": ("render.json",), "places": ("places.json",)}  # fmt: skip
EVALUATORS = ("checkpoint.pth", "classifier_weight.pth")


def find_data(rendered_scenes: int = 300) -> DataFiles:
    """The data, from the first of: the folder that LAB6_DATA names, data/, scenes rendered here.

    A folder is searched, two levels deep and into its zips, for the images of train.json, and for train.json,
    test.json, new_test.json and objects.json or object.json (see `read_data`). Where LAB6_DATA is not set and nothing
    of the kind is in data/, `rendered_scenes` scenes are rendered into data/runs/rendered-N, once (see
    data/render_scenes.py); what else lies there is named as ignored.

    Raises:
        FileNotFoundError: names the folder that was looked in and what is missing there.
        ValueError: a file that is not what the course ships, by name.
        RuntimeError: scenes are to be rendered, and Mitsuba does not work.
    """
    chosen = folder_named_by("LAB6_DATA")
    root = chosen or ROOT / "data"
    if not chosen and not _holds_data(root):
        root = render_into_runs(rendered_scenes)
    return read_data(root)


def _holds_data(root):
    """Does data/ hold anything of the course's, or a zip that cannot be opened? What else lies there is named."""
    names = {name for kind in ("train", "test", "new_test", "objects") for name in _LISTS[kind]}
    for holding in look_into(root):
        if holding.trouble or names & holding.files.keys() or any(n.startswith("CLEVR_") for n in _pictures(holding)):
            return True
    own = {"README.md", "held_out_scenes.json", "unseen_sets.json", "render_scenes.py", "rendered_scene.py", "runs",
           "weights", "__pycache__", *EVALUATORS}  # fmt: skip
    others = sorted(path.name for path in root.glob("*") if path.name not in own and not path.name.startswith("."))
    if others:
        print(f"progress: ignored in {root}, no images or label sets: {', '.join(others)}; scenes are rendered")
    return False


def find_evaluator(root: Path | None = None) -> Path | None:
    """The course's evaluator in a folder, two levels deep; by default the one that LAB6_DATA names, or data/. None
    where there is none."""
    root = root or folder_named_by("LAB6_DATA") or ROOT / "data"
    found = [h.files[name] for h in look_into(root) for name in EVALUATORS if name in h.files]
    unpacked = [entry for entry in found if isinstance(entry, Path)]
    if found and not unpacked:
        print(
            f"progress: {found[0].filename} is in a zip in {root}: unpack it, and it is used in place of our evaluator"
        )
    return unpacked[0] if unpacked else None


def read_data(root: Path) -> DataFiles:
    """What a folder of the course's files holds, also one of rendered scenes; raises what `find_data` does.

    The files may lie in it as the course hands them out (iclevr/ or iclevr.zip beside the json files), in folders or
    zips, whatever these are called. Of images in several places that with most of train.json is taken. new_test.json
    may be missing: then it has no label sets. Prints what was taken from where, unless all is in its usual place.
    """
    holdings = look_into(root)
    found = {kind: _find(holdings, names) for kind, names in _LISTS.items()}
    for kind in ("render", "places"):  # they belong to the train.json beside them
        if found[kind] and found[kind][0] is not (found["train"] or [None])[0]:
            found[kind] = None
    missing = [" or ".join(_LISTS[kind]) for kind in ("objects", "train", "test") if not found[kind]]
    said = {kind: of[0].json(of[1]) for kind, of in found.items() if of}
    train = _check_train(said["train"], found["train"]) if found["train"] else {}
    images = max(holdings, key=lambda h: len(train.keys() & h.files.keys() if train else _pictures(h)))
    if not (train.keys() & images.files.keys() if train else _pictures(images)):
        missing.insert(0, "iclevr/ or iclevr.zip")
    if missing:
        troubles = "".join(f" {h.trouble}." for h in holdings if h.trouble)
        raise FileNotFoundError(
            f"No i-CLEVR data: {', '.join(missing)} not found in {root} (the folder that LAB6_DATA names, else data/), "
            "two levels deep and in zips. Put the course's files iclevr/ (or iclevr.zip), train.json, test.json, "
            "new_test.json and objects.json (or object.json) there, or set LAB6_DATA to the folder that has them; "
            f"without any, and LAB6_DATA not set, scenes are rendered.{troubles}"
        )
    if said["objects"] != {name: i for i, name in enumerate(OBJECTS)}:
        raise ValueError(f"{_where(found['objects'])}: not the 24 objects of i-CLEVR with the indices 0 to 23")
    sets = {kind: check_sets(said.get(kind, []), _where(found[kind])) for kind in ("test", "new_test") if found[kind]}
    usual = (root / "iclevr", root / "iclevr.zip")
    if images.path not in usual or any(of and of[0].path != root for of in found.values()) or "new_test" not in sets:
        lists = ", ".join(_where(of) for of in found.values() if of)
        print(f"progress: data: images from {images.path}; {lists}" + "; no new_test.json" * ("new_test" not in sets))
    source = "rendered scenes" if found["render"] else "course files"
    places = _check_places(said.get("places", {}), train, found["places"])
    return DataFiles(root, images.path, train, sets["test"], sets.get("new_test", []), source, places)


def _find(holdings, names):
    """The first of these files, (holding, name), or None. Raises ValueError where there is another that says
    something else."""
    found = [(holding, name) for holding in holdings for name in names if name in holding.files]
    for other in found[1:]:
        if other[0].json(other[1]) != found[0][0].json(found[0][1]):
            raise ValueError(f"{_where(found[0])} and {_where(other)} differ: two sets of data in one folder. Remove "
                             "one, or set LAB6_DATA to the folder of the other")  # fmt: skip
    return found[0] if found else None


def _where(found):
    holding, name = found
    return holding.where(name)


def _pictures(holding):
    return [name for name in holding.files if name.lower().endswith(".png")]


def check_sets(label_sets, where) -> list[list[str]]:
    """These label sets, of a json file. Raises ValueError, which names `where`, unless they are one or more."""
    try:
        if not isinstance(label_sets, list) or not label_sets or any(isinstance(of, str) for of in label_sets):
            raise ValueError("expected a list of labels for each of one or more images")
        encode_labels(label_sets)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from None
    return label_sets


def _check_train(train, found):
    if not isinstance(train, dict) or not train:
        raise ValueError(f"{_where(found)}: expected {{image name: [labels]}}")
    for name in train:
        if Path(name).name != name or "\\" in name or name.count("_") < 2:
            raise ValueError(f"{_where(found)}: {name!r} is not a plain file name such as CLEVR_train_001032_0.png")
    check_sets(list(train.values()), _where(found))
    return train


def _check_places(places, train, found):
    """What places.json says of the images in train.json; empty where there is none."""
    if places and any(len(places.get(name, ())) != len(labels) for name, labels in train.items()):
        raise ValueError(f"{_where(found)}: expected [x, y] of each object for each image in train.json; remove the "
                         "file, or render the scenes again")  # fmt: skip
    return places


def load_renderer():
    """The module data/render_scenes.py, which needs Mitsuba only when it renders."""
    folder = str(ROOT / "data")
    if folder not in sys.path:  # it stays there: the renderer's processes look for the module again
        sys.path.append(folder)
    import render_scenes

    return render_scenes


def render_into_runs(scenes: int, objects: int = 3, seed: int = 0) -> Path:
    """The folder data/runs/rendered-N... of N rendered scenes of up to `objects` objects; made if it is not whole."""
    folder = runs_folder() / f"rendered-{scenes}{'' if (objects, seed) == (3, 0) else f'-{objects}-{seed}'}"
    with exclusive(folder.with_name(f"{folder.name}.lock")):
        if not (folder / "train.json").is_file():  # which the renderer writes last
            rendering = load_renderer().render_scenes(folder, scenes, objects, seed=seed)
            for _ in progress(rendering, "rendering scenes", scenes, lines=True):
                pass
    return folder


def scene_of(name: str) -> str:
    """Scene number of an image: CLEVR_train_005500_2.png is the third image of scene "005500"."""
    return name.removesuffix(".png").split("_")[-2]


def held_out_scenes() -> frozenset[str]:
    """The 503 scenes of the course (005500 to 006002) on which nothing that ships was trained."""
    return frozenset(read_json(ROOT / "data" / "held_out_scenes.json")["scenes"])


def unseen_sets() -> dict[str, list[list[str]]]:
    """200 label sets by kind that training with leave_out="unseen" never sees, not even within a fuller image. None
    of them is in the course's test files. "pairs": two objects; "triples of such a pair": such a pair and a third
    object; "triples": three objects of which each two do occur together."""
    return read_json(ROOT / "data" / "unseen_sets.json")["sets"]
