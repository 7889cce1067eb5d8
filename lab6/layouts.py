"""Where objects are to stand: layouts drawn from those of training scenes. Notebook 04.

A model that is told places is p(places) p(image | labels, places): this room is the first factor. Stands on no other
room.
"""

from __future__ import annotations

import torch

#: Ways of choosing places: as in training scenes; so that no object hides another; not at all.
PLACES = ("natural", "separated", "none")
#: Objects at least this far apart, in pixels with y times 0.8 since they are taller than wide, do not hide each other.
SEPARATE = 10.0
#: Standard deviation, in pixels, by which drawn places differ from those of training scenes.
JITTER = 0.5


def gaps(places: torch.Tensor) -> torch.Tensor:
    """The smallest distance between two objects of each layout, in pixels with y times 0.8: (..., n, 2) -> (...);
    infinite for a single object."""
    scaled = places * torch.tensor([1.0, 0.8], device=places.device)
    distances = (scaled[..., :, None, :] - scaled[..., None, :, :]).norm(dim=-1)
    same = torch.eye(places.shape[-2], dtype=torch.bool, device=places.device)
    return distances.masked_fill(same, torch.inf).flatten(-2).amin(-1)


def draw_places(labels: torch.Tensor, kind: str, layouts: torch.Tensor, generators) -> torch.Tensor:
    """A place for each object of each label set, from a scene of the training data drawn at random.

    Which object gets which of its places is random, too. Objects beyond the scene's get places from other scenes, no
    nearer to the others than objects of training scenes are. All places move by half a pixel at random.

    Args:
        labels: (B, 24); kind: one of PLACES.
        layouts: (M, 3, 2) places of the objects of training scenes, in pixels, in the order in which they were placed.
        generators: one for each label set, or one for all.

    Returns:
        (B, 24, 2) x and y in pixels; nan for objects that are not asked for, and for all where kind is "none" or
        `layouts` knows no place.

    Raises:
        ValueError: kind is not one of PLACES.
    """
    if kind not in PLACES:
        raise ValueError(f"places={kind!r}: choose from {', '.join(PLACES)}, or give (x, y) for each object")
    places = torch.full((*labels.shape, 2), torch.nan)
    layouts = layouts.float().cpu()
    if kind == "none" or layouts.isnan().all():
        return places
    chooser = {count: _Chooser(layouts, kind, count) for count in labels.sum(1).int().unique().tolist() if count}
    generators = generators if isinstance(generators, list) else [generators] * len(labels)
    for row, (of_set, generator) in enumerate(zip(labels.cpu(), generators, strict=True)):
        present = of_set.nonzero().flatten()
        if not len(present):
            continue
        drawn = chooser[len(present)].draw(generator)
        places[row, present[torch.randperm(len(present), generator=generator)]] = drawn
    return places


class _Chooser:
    """Draws layouts of `count` objects."""

    def __init__(self, layouts, kind, count):
        complete = layouts[layouts[:, :count].isfinite().all((1, 2))][:, :count]  # those with as many objects
        self.count, self.layouts = count, complete if len(complete) else layouts[:, :1]
        every = layouts[layouts.isfinite().all((1, 2))]
        self.gap = SEPARATE if kind == "separated" else gaps(every).amin().item() if len(every) else SEPARATE
        self.pool = layouts[:, 1:][layouts[:, 1:].isfinite().all(2)]  # all places but those of first objects
        if kind == "separated":
            apart = gaps(self.layouts)
            self.layouts = self.layouts[apart >= min(SEPARATE, apart.max())]

    def draw(self, generator):
        random = lambda high: torch.randint(high, (), generator=generator).item()
        chosen = self.layouts[random(len(self.layouts))]
        while len(chosen) < self.count and len(self.pool):  # the best of some places from other scenes
            tried = self.pool[torch.randint(len(self.pool), (64,), generator=generator)]
            apart = gaps(torch.cat([chosen.expand(64, -1, -1), tried[:, None]], 1))
            free = (apart >= self.gap).nonzero().flatten()
            chosen = torch.cat([chosen, tried[free[0] if len(free) else apart.argmax()][None]])
        unknown = torch.full((self.count - len(chosen), 2), torch.nan)
        return torch.cat([chosen + JITTER * torch.randn(chosen.shape, generator=generator), unknown])
