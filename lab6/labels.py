"""The 24 objects, and how label sets and images become tensors and come back. Notebook 01.

Stands on no other room.
"""

from __future__ import annotations

import difflib

import numpy as np
import torch
from PIL import Image

SHAPES = ("cube", "sphere", "cylinder")
COLOURS = ("gray", "red", "blue", "green", "brown", "purple", "cyan", "yellow")
#: The 24 objects in the course's order: index = 8 * shape + colour.
OBJECTS = tuple(f"{colour} {shape}" for shape in SHAPES for colour in COLOURS)
#: The label set whose denoising process the course wants to see.
MANUAL_SET = ("red sphere", "cyan cylinder", "cyan cube")


def encode_labels(label_sets) -> torch.Tensor:
    """Multi-hot vectors of label sets.

    Args:
        label_sets: one label set (["red sphere", "cyan cube"]) or a list of them.

    Returns:
        (B, 24) float32 of zeros and ones; B = 1 for one set.

    Raises:
        ValueError: an unknown, repeated or missing label.
    """
    if isinstance(label_sets, str):
        raise ValueError(f"{label_sets!r}: give a list of labels, such as [{label_sets!r}]")
    label_sets = list(label_sets)
    if not label_sets:
        raise ValueError("no labels: name at least one object")
    if isinstance(label_sets[0], str):
        label_sets = [label_sets]
    labels = torch.zeros(len(label_sets), len(OBJECTS))
    for row, names in enumerate(label_sets):
        if len(names) == 0:
            raise ValueError(f"label set {row} is empty: name at least one object")
        for name in names:
            if name not in OBJECTS:
                close = difflib.get_close_matches(str(name), OBJECTS, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"an object is one of {', '.join(OBJECTS)}"
                raise ValueError(f"unknown label {name!r} in label set {row}: {hint}")
            if labels[row, OBJECTS.index(name)]:
                raise ValueError(f"label {name!r} is twice in label set {row}")
            labels[row, OBJECTS.index(name)] = 1
    return labels


def encode_places(label_sets, places) -> torch.Tensor:
    """Places of the objects of label sets, by object, as networks take them.

    Args:
        label_sets: one label set or a list of them; for places by object also (B, 24) multi-hot.
        places: for each label of a set, in their order, (x, y) in pixels of the 64 x 64 image, or None where the object
            may stand anywhere; a list of these for a list of label sets. Or by object, (B, 24, 2), nan for anywhere.

    Returns:
        (B, 24, 2) float32, nan where nothing is said.

    Raises:
        ValueError: labels as `encode_labels` refuses them, not one place for each label, or one outside the image.
    """
    labels = label_sets if isinstance(label_sets, torch.Tensor) else encode_labels(label_sets)  # so names are checked
    if isinstance(places, torch.Tensor | np.ndarray):
        encoded = torch.as_tensor(places).float().cpu()
        if encoded.shape != (*labels.shape, 2):
            raise ValueError(f"places of shape {tuple(encoded.shape)}: expected {(*labels.shape, 2)}")
    elif isinstance(label_sets, torch.Tensor):
        raise ValueError("places in the order of the labels, but the labels are a tensor: name them, or give the "
                         "places by object, (B, 24, 2)")  # fmt: skip
    else:
        encoded = _by_object(list(label_sets), places)
    outside = (encoded < 0) | (encoded > 64)
    if outside.any():
        row, index = outside.any(2).nonzero()[0].tolist()
        raise ValueError(f"place {tuple(encoded[row, index].tolist())} of {OBJECTS[index]!r} in label set {row}: x and "
                         "y are pixels of the 64 x 64 image, from 0 to 64")  # fmt: skip
    return encoded


def _by_object(label_sets, places):
    if isinstance(label_sets[0], str):
        label_sets, places = [label_sets], [places]
    if len(label_sets) != len(places):
        raise ValueError(f"places of {len(places)} label sets for {len(label_sets)} label sets: give as many")
    encoded = torch.full((len(label_sets), len(OBJECTS), 2), torch.nan)
    for row, (names, of_set) in enumerate(zip(label_sets, places, strict=True)):
        if len(names) != len(of_set):
            raise ValueError(f"label set {row} has {len(names)} labels and {len(of_set)} places: give one for each, or "
                             "None where an object may stand anywhere")  # fmt: skip
        for name, place in zip(names, of_set, strict=True):
            if place is not None and np.shape(place) != (2,):
                raise ValueError(f"place {place!r} of {name!r} in label set {row}: give (x, y)")
            if place is not None:
                encoded[row, OBJECTS.index(name)] = torch.as_tensor(place, dtype=torch.float32)
    return encoded


def decode_labels(labels: torch.Tensor) -> list[list[str]]:
    """Names of the objects in (B, 24) multi-hot vectors (or one (24,) vector), in the order of OBJECTS."""
    return [[OBJECTS[i] for i in row.nonzero().flatten().tolist()] for row in torch.atleast_2d(labels) > 0.5]


def to_float(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 0 to 255 -> float32 in [-1, 1], as ToTensor and Normalize(0.5, 0.5) do."""
    return pixels.float() / 127.5 - 1


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """[-1, 1] -> uint8 0 to 255, rounded; values outside are clipped. Raises ValueError for nan and inf."""
    if not images.isfinite().all():  # they would turn black
        raise ValueError("images hold numbers that are not finite (nan, inf): the network's weights, or the sampling, "
                         "went wrong; use other weights")  # fmt: skip
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def to_pil(images: torch.Tensor) -> list[Image.Image]:
    """(B, 3, H, W) in [-1, 1] -> list of PIL images."""
    return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in to_uint8(images)]
