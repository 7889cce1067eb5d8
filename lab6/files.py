"""The course's files, or scenes rendered in their place: where they are and what their json files say. Notebook 01.

Stands on machine, labels and storage.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from lab6.labels import OBJECTS, encode_labels
from lab6.machine import progress
from lab6.storage import ROOT, exclusive, folder_named_by, read_json, runs_folder


@dataclasses.dataclass(frozen=True)
class DataFiles:
    """Where the data is, and what its json files say. Made by `find_data`.

    Attributes:
        images: the folder iclevr/ or the file iclevr.zip.
        train: {image file name: label set}; test, new_test: lists of label sets.
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


def find_data(rendered_scenes: int = 300) -> DataFiles:
    """The data, from the first of: the folder that LAB6_DATA names, data/, scenes rendered here.

    A folder qualifies with iclevr/ or iclevr.zip, train.json, test.json, new_test.json, and objects.json or
    object.json. Where LAB6_DATA is not set and data/ has none of them, `rendered_scenes` scenes are rendered into
    data/runs/rendered-N, once (see data/render_scenes.py).

    Raises:
        FileNotFoundError: names the folder that was looked in and what is missing there.
        ValueError: a json file that is not what the course ships, by name.
        RuntimeError: scenes are to be rendered, and Mitsuba does not work.
    """
    chosen = folder_named_by("LAB6_DATA")
    root = chosen or ROOT / "data"
    names = ("iclevr", "iclevr.zip", "objects.json", "object.json", "train.json", "test.json", "new_test.json")
    if not chosen and not any((root / name).exists() for name in names):
        root = render_into_runs(rendered_scenes)
    return read_data(root)


def read_data(root: Path) -> DataFiles:
    """What a folder of the course's layout holds, also one of rendered scenes; raises what `find_data` does."""
    images = root / "iclevr" if (root / "iclevr").is_dir() else root / "iclevr.zip"
    objects = root / "objects.json" if (root / "objects.json").is_file() else root / "object.json"
    missing = [] if images.exists() else ["iclevr/ or iclevr.zip"]
    missing += [] if objects.is_file() else ["objects.json or object.json"]
    missing += [f"{n}.json" for n in ("train", "test", "new_test") if not (root / f"{n}.json").is_file()]
    if missing:
        raise FileNotFoundError(
            f"No i-CLEVR data: {', '.join(missing)} not found in {root} (the folder that LAB6_DATA names, else data/). "
            "Put the course's files iclevr/ (or iclevr.zip), train.json, test.json, new_test.json and objects.json (or "
            "object.json) there, or set LAB6_DATA to the folder that has them; without any, and LAB6_DATA not set, "
            "scenes are rendered."
        )
    if read_json(objects) != {name: i for i, name in enumerate(OBJECTS)}:
        raise ValueError(f"{objects}: not the 24 objects of i-CLEVR with the indices 0 to 23")
    train = read_json(root / "train.json")
    if not isinstance(train, dict) or not train:
        raise ValueError(f"{root / 'train.json'}: expected {{image name: [labels]}}")
    for name in train:
        if Path(name).name != name or "\\" in name or name.count("_") < 2:
            raise ValueError(
                f"{root / 'train.json'}: {name!r} is not a plain file name such as CLEVR_train_001032_0.png"
            )
    sets = {"train": list(train.values())}
    for split in ("test", "new_test"):
        sets[split] = read_json(root / f"{split}.json")
    for split, label_sets in sets.items():
        try:
            if not label_sets or any(isinstance(label_set, str) for label_set in label_sets):
                raise ValueError("expected a list of labels for each of one or more images")
            encode_labels(label_sets)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{root / f'{split}.json'}: {error}") from None
    source = "rendered scenes" if (root / "render.json").is_file() else "course files"
    return DataFiles(root, images, train, sets["test"], sets["new_test"], source, _read_places(root, train))


def _read_places(root, train):
    """What places.json says of the images in train.json; empty where there is none."""
    file = root / "places.json"
    places = read_json(file) if file.is_file() else {}
    if places and any(len(places.get(name, ())) != len(labels) for name, labels in train.items()):
        raise ValueError(f"{file}: expected [x, y] of each object for each image in train.json; remove the file, or "
                         "render the scenes again")  # fmt: skip
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
