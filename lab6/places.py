"""Where the objects of a scene stand in its images: known for rendered scenes, found for all others. Notebook 01.

The images of a scene differ only by the object that each one adds, so the pixels that change are that object. Stands on
dataset, files and labels.
"""

from __future__ import annotations

import torch

from lab6.dataset import ICLEVRDataset
from lab6.files import DataFiles, scene_of
from lab6.labels import encode_places

#: x and y, in pixels, of the first object of every scene: the camera looks at the point of the floor where it stands.
#: (In 300 rendered scenes x is exactly this, and y has a standard deviation of 0.15.)
FIRST_PLACE = (32.0, 27.65)
#: A pixel belongs to an added object if one of its channels changes by more than this, of 255; shadows change less.
_CLEARLY = 40


def place_of_change(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """The place of the object that `after` adds to `before`: the mean position of the pixels that clearly change.

    Args:
        before, after: (N, 3, H, W) uint8.

    Returns:
        (N, 2) x and y in pixels, nan where no pixel changes clearly.
    """
    changed = ((torch.maximum(before, after) - torch.minimum(before, after)).amax(1) > _CLEARLY).float()
    y, x = (torch.arange(size) + 0.5 for size in changed.shape[1:])
    count = changed.sum((1, 2))
    return torch.stack([changed.sum(1) @ x, changed.sum(2) @ y], 1) / count[:, None]


def find_places(files: DataFiles, dataset: ICLEVRDataset) -> torch.Tensor:
    """The places of the objects in each image of `dataset`, in the order in which train.json names them.

    Known for rendered scenes; otherwise each object is found where it is added, in the image of the same scene with one
    object more than the one before, and the first object is taken to stand at FIRST_PLACE.

    Returns:
        (N, slots, 2) x and y in pixels, slots being the largest number of objects; nan in empty slots, and where an
        image of the scene is missing.
    """
    slots = max(map(len, files.train.values()))
    places = torch.full((len(dataset), slots, 2), torch.nan)
    known = files.places or _added_places(files)
    for row, name in enumerate(dataset.names):
        found = known.get(name, [])
        places[row, : len(found)] = torch.tensor(found).view(-1, 2)
    return places


def places_by_object(files: DataFiles, dataset: ICLEVRDataset, found: torch.Tensor | None = None) -> torch.Tensor:
    """What `find_places` finds, or has `found`, by object as networks take it: (N, 24, 2), nan for what is not in the
    image."""
    names = [files.train[name] for name in dataset.names]
    found = (find_places(files, dataset) if found is None else found).tolist()
    return encode_places(names, [places[: len(of)] for of, places in zip(names, found, strict=True)])


def _added_places(files):
    """{image: places of its objects} from the differences of the images; only images whose objects are all found."""
    whole = ICLEVRDataset(files, "all")
    rows = {(scene_of(name), tuple(files.train[name])): row for row, name in enumerate(whole.names)}
    pairs = [(rows[scene, names[:-1]], row) for (scene, names), row in rows.items() if (scene, names[:-1]) in rows]
    added = {}
    for part in torch.tensor(pairs).view(-1, 2).split(1024):
        before, after = (whole.pixels[index] for index in part.T)
        added |= dict(zip(part[:, 1].tolist(), place_of_change(before, after).tolist(), strict=True))
    places = {}
    for (scene, names), row in sorted(rows.items(), key=lambda item: len(item[0][1])):  # fewer objects first
        if len(names) == 1:
            places[scene, names] = [list(FIRST_PLACE)]
        elif row in added and (scene, names[:-1]) in places:
            places[scene, names] = [*places[scene, names[:-1]], added[row]]
    return {whole.names[rows[key]]: found for key, found in places.items()}
