"""Statistics that know nothing of networks: intervals, paired tests, distances, places of objects.

Stands on files and labels.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F

from lab6.files import load_renderer
from lab6.labels import COLOURS, SHAPES


def bootstrap_intervals(hits: np.ndarray, totals: np.ndarray, resamples: int = 10_000):
    """95% percentile intervals of sum(hits) / sum(totals) (Efron 1979).

    Args:
        hits: (S, N) labels found; totals: (N,) labels asked for.

    Returns:
        ([low, high] over seeds, or None with fewer than 5 or all alike, whose spread says too little; [low, high]
        over seeds and label sets, or None with one set, or where all have the same share, since resampling then shows
        no spread, whatever there is).
    """
    rng = np.random.default_rng(0)
    count, sets = hits.shape
    seed_weights = rng.multinomial(count, np.full(count, 1 / count), resamples) / count
    set_weights = rng.multinomial(sets, np.full(sets, 1 / sets), resamples)
    means = seed_weights @ hits  # (resamples, N)
    over_seeds = means.sum(1) / totals.sum()
    over_sets = (means * set_weights).sum(1) / (set_weights @ totals)
    interval = lambda values: [round(float(v), 4) for v in np.percentile(values, [2.5, 97.5])]
    enough = count >= 5 and np.ptp(hits.sum(1)) > 0
    return (interval(over_seeds) if enough else None), (
        interval(over_sets) if sets > 1 and np.ptp(over_sets) > 0 else None
    )


def paired_test(one, other, totals, resamples: int = 10_000) -> dict:
    """Is `one` more accurate than `other` on the same label sets? The mean over seeds is compared, set by set.

    Args:
        one, other: (S, N) labels found (`Evaluation.hits`), the same N label sets in the same order; S may differ.
        totals: (N,) labels asked for.

    Returns:
        difference of the accuracies; ci95_sets: label sets resampled (percentile bootstrap); p: how often a difference
        as large turns up if a coin says, for each label set, whose result is whose (two-sided permutation test,
        Fisher 1935).
    """
    one, other, totals = (np.asarray(x, dtype=float) for x in (one, other, totals))
    if not one.shape[-1] == other.shape[-1] == len(totals):
        raise ValueError(f"{one.shape[-1]} and {other.shape[-1]} results for {len(totals)} label sets: not in pairs")
    rng, gain = np.random.default_rng(0), one.mean(0) - other.mean(0)
    weights = rng.multinomial(len(gain), np.full(len(gain), 1 / len(gain)), resamples)
    shuffled = np.abs(rng.choice([-1, 1], (resamples, len(gain))) @ gain)
    extreme = (shuffled >= abs(gain.sum()) - 1e-9).sum()
    return {
        "difference": round(float(gain.sum() / totals.sum()), 4),
        "ci95_sets": [round(float(v), 4) for v in np.percentile(weights @ gain / (weights @ totals), [2.5, 97.5])],
        "p": round(float((1 + extreme) / (1 + resamples)), 4),
    }


def frechet_distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Distance of two Gaussians fitted to features, |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) (Heusel et al. 2017).

    Args:
        one, other: (N, D) and (M, D) features of images. The estimate falls with more images, so compare only
            equal numbers of them.
    """
    (mean_1, cov_1), (mean_2, cov_2) = ((x.double().mean(0), x.double().T.cov()) for x in (one, other))
    values, vectors = torch.linalg.eigh(cov_1)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    shared = torch.linalg.eigvalsh(root @ cov_2 @ root).clamp(min=0).sqrt().sum()
    return float((mean_1 - mean_2).square().sum() + cov_1.trace() + cov_2.trace() - 2 * shared)


def nearest_neighbours(queries: torch.Tensor, references: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For each row of (Q, D) the nearest row of (R, D): (distances, root mean square over D; indices), each (Q,)."""
    found = [torch.cdist(q.float(), references.float()).min(1) for q in queries.split(256)]
    distances, indices = (torch.cat(each) for each in zip(*found, strict=True))
    return distances / queries.shape[1] ** 0.5, indices


def frechet_by_halves(sampled: torch.Tensor, real: torch.Tensor, scenes, other: torch.Tensor, other_scenes) -> dict:
    """Are sampled images as similar to real ones as other real ones are? The scenes are halved at random five times.

    Args:
        sampled, real: (N, D) features of images with the same labels; scenes: (N,) names of the real ones' scenes.
        other, other_scenes: (M, D) features of real images of other scenes, of at least half as many scenes.

    Returns:
        {"sampled": with one half's labels, against the real images of the other half; "floor": `other`, of as many
        scenes, against the same}, each [mean, lowest, highest] of five.
    """
    each, every_other = np.unique(scenes), np.unique(other_scenes)
    half = len(each) // 2
    if not 1 < half <= len(every_other):
        raise ValueError(f"{len(each)} scenes and {len(every_other)} others: too few to halve")
    found = {"sampled": [], "floor": []}
    for i in range(5):
        rng = np.random.default_rng(i)
        first = torch.from_numpy(np.isin(scenes, rng.permutation(each)[:half]))
        extra = torch.from_numpy(np.isin(other_scenes, rng.permutation(every_other)[:half]))
        found["sampled"].append(frechet_distance(sampled[first], real[~first]))
        found["floor"].append(frechet_distance(other[extra], real[~first]))
    return {which: [round(float(v), 4) for v in (np.mean(f), min(f), max(f))] for which, f in found.items()}


def mean_by_group(values, groups) -> list[float]:
    """[mean, low, high] of (N,) values, 95% percentile bootstrap; values of one group (a scene) stay together. Where
    all are alike low and high are None."""
    return _ratio(np.asarray(values, dtype=float), np.ones(len(groups)), groups)


def _ratio(values, totals, groups):
    """[sum of values / sum of totals, low, high], 95% percentile bootstrap of the groups."""
    number = np.unique(groups, return_inverse=True)[1]
    values, totals = np.bincount(number, values), np.bincount(number, totals)
    interval = bootstrap_intervals(values[None], totals)[1] or [None, None]
    return [round(float(values.sum() / totals.sum()), 4), *interval]


def lattice(images: torch.Tensor, groups) -> list[float]:
    """How much a grid of single pixels stands out: the power of the gray images at the highest frequency, along rows
    and along columns, over that at the four frequencies below it. More than in real images means a lattice, less means
    blur.

    Args:
        images: (N, 3, 64, 64); groups: (N,) names; images of one group (a scene) stay together.

    Returns:
        [ratio, low, high], 95% percentile bootstrap of the groups.
    """
    gray = images.double().mean(1)
    size = gray.shape[-1]
    window = torch.hann_window(size, periodic=False, dtype=gray.dtype)  # or the image's edges would count as grain
    gray = (gray - gray.mean((1, 2), keepdim=True)) * window[:, None] * window
    power = torch.fft.fft2(gray).abs().square()
    along = (power.mean(1) + power.mean(2))[:, size // 2 - 4 : size // 2 + 1]
    return _ratio(along[:, -1].numpy(), along[:, :-1].mean(1).numpy(), groups)


#: Colours whose hue differs from all others and from the ground; yellow only where there is no brown.
HUES = ("red", "blue", "green", "purple", "cyan", "yellow")


def object_places(images: torch.Tensor, colour: str) -> torch.Tensor:
    """(N, 2) x and y, in pixels, of the centre of all pixels with this colour's hue (see HUES) in (N, 3, 64, 64); nan
    where there are fewer than 5."""
    grayless = lambda rgb, dim: rgb - rgb.mean(dim, keepdim=True)
    wanted = F.normalize(grayless(torch.tensor(load_renderer().COLOURS[colour]) / 255, 0), dim=0)
    found = grayless((images + 1) / 2, 1)
    alike = torch.einsum("nchw,c->nhw", F.normalize(found, dim=1), wanted)
    has = ((alike > 0.9) & (found.norm(dim=1) > 0.12)).float()
    at, count = torch.arange(images.shape[-1], dtype=torch.float32), has.sum((1, 2))
    places = torch.stack([has.sum(1) @ at, has.sum(2) @ at], 1) / count[:, None]
    return places.where(count[:, None] >= 5, math.nan)


def placement_errors(images: torch.Tensor, labels: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """How far from where they were asked to stand objects are found, by their hue (`object_places`).

    Only objects of a colour in HUES that is theirs alone in the label set are looked for. What is found is the middle
    of what can be seen: an object that is partly hidden is found beside its place.

    Args:
        images: (N, 3, 64, 64); labels: (N, 24); places: (N, 24, 2), in pixels.

    Returns:
        (M,) distances in pixels of the objects that could be looked for; nan where one was not found.
    """
    wanted, of = labels.bool().unflatten(1, (len(SHAPES), len(COLOURS))), []
    for colour in HUES:
        column = COLOURS.index(colour)
        alone = wanted[:, :, column].sum(1) == 1
        if colour == "yellow":
            alone &= ~wanted[:, :, COLOURS.index("brown")].any(1)
        asked = places[torch.arange(len(places)), wanted[:, :, column].int().argmax(1) * len(COLOURS) + column]
        rows = (alone & asked.isfinite().all(1)).nonzero().flatten()
        of.append((object_places(images[rows], colour) + 0.5 - asked[rows]).norm(dim=1))  # pixels have middles
    return torch.cat(of)


def spread_of_places(places: torch.Tensor) -> float:
    """Root mean square distance, in pixels, of (N, 2) places from their mean, without those that are nan."""
    places = places[~places.isnan().any(1)]
    return places.var(0).sum().sqrt().item()


def with_interval(share: float, interval) -> str:
    """ "0.612 (0.55 to 0.67)"; without an interval the share alone."""
    return f"{share:.3f}" + (" ({:.2f} to {:.2f})".format(*interval) if interval else "")
