"""What an evaluator found, over seeds and label sets: accuracies, intervals, errors. Notebook 05.

Stands on evaluators, measures, machine and labels.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import torch

from lab6.evaluators import Evaluator, count_hits, top_k
from lab6.labels import COLOURS, OBJECTS, SHAPES, encode_labels
from lab6.machine import check_finite
from lab6.measures import bootstrap_intervals


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What an evaluator found in images of the same label sets, sampled with several seeds.

    Attributes:
        probabilities: (S, N, 24), seed by label set; labels: (N, 24) multi-hot.
        evaluator, sha256: the evaluator's name and the hash of its weights.
        groups: (N,) integers; images of one group (a scene) are resampled together. None: each on its own.
    """

    probabilities: torch.Tensor
    labels: torch.Tensor
    evaluator: str
    sha256: str = ""
    groups: np.ndarray | None = None

    @property
    def hits(self) -> torch.Tensor:
        """(S, N) labels found by the course's protocol."""
        return count_hits(self.probabilities, self.labels)

    @property
    def accuracy_by_seed(self) -> torch.Tensor:
        """(S,) the course's accuracy of each seed."""
        return self.hits.sum(1) / self.labels.sum()

    def found(self) -> torch.Tensor:
        """(S, N, 24) True where an object asked for is among the image's k highest outputs."""
        return top_k(self.probabilities, self.labels) & self.labels.bool()

    def errors(self) -> dict:
        """What is found in place of objects asked for: {kind: {"share", "ci95_sets"}}, of all labels asked for.

        An image's k highest outputs that were not asked for are its errors. "swapped": its colour and its shape
        were both asked for, of different objects, so that an attribute was bound to the wrong object; "colour": only
        its shape was asked for; "shape": only its colour; "both": neither.
        """
        asked = self.labels.bool().view(-1, len(SHAPES), len(COLOURS))
        colour, shape = (asked.any(dim, keepdim=True).expand_as(asked).flatten(1) for dim in (1, 2))
        wrong = top_k(self.probabilities, self.labels) & ~self.labels.bool()
        kinds = {"swapped": colour & shape, "colour": shape & ~colour, "shape": colour & ~shape,
                 "both": ~colour & ~shape}  # fmt: skip
        totals, result = self.labels.sum(1).numpy(), {}
        for name, kind in kinds.items():
            counts = (wrong & kind).sum(-1).numpy()
            share = round(float(counts.sum() / totals.sum() / len(counts)), 4)
            result[name] = {"share": share, "ci95_sets": bootstrap_intervals(counts, totals)[1]}
        return result

    def confusions(self) -> torch.Tensor:
        """(24, 26) how often an object asked for (row) was not found, by the object found in its place (column).

        The last two columns: "none", no output above 0.5 was left for it; "outranked", its own output is above 0.5
        too, but so are more outputs than objects asked for. If several of an image's objects are missed, they are
        paired with what was found so that pairs share as many colours and shapes as possible.
        """
        none, outranked = len(OBJECTS), len(OBJECTS) + 1
        counts = torch.zeros(len(OBJECTS), len(OBJECTS) + 2, dtype=torch.long)
        chosen, asked = top_k(self.probabilities, self.labels), self.labels.bool().expand_as(self.probabilities)
        shared = lambda a, b: (
            b < none and (a % len(COLOURS) == b % len(COLOURS)) + (a // len(COLOURS) == b // len(COLOURS))
        )
        for image in (chosen & ~asked).any(-1).nonzero().tolist():
            sure = self.probabilities[*image] > 0.5
            missed = asked[*image] & ~chosen[*image]
            counts[missed & sure, outranked] += 1
            missed = (missed & ~sure).nonzero().flatten().tolist()
            taken = (chosen[*image] & ~asked[*image] & sure).nonzero().flatten().tolist()
            taken += [none] * (len(missed) - len(taken))
            ways = [list(zip(missed, order, strict=True)) for order in itertools.permutations(taken, len(missed))]
            for pair in max(ways, key=lambda way: sum(shared(*pair) for pair in way)):
                counts[pair] += 1
        return counts

    def metrics(self) -> dict:
        """All measures, with 95% bootstrap intervals of the accuracy; the keys are those of results.json.

        accuracy: the course's, labels found over labels asked for. accuracy_per_image: the mean over images of
        the share found. accuracy_24: share of the 24 classes on the right side of 0.5 (an image of nothing has
        `accuracy_24_of_nothing`). exact_match: share of images whose outputs above 0.5 are exactly the labels.
        f1: micro-averaged at 0.5. ci95_seeds: seeds resampled, label sets fixed; ci95_sets: seeds and label sets
        resampled; None where there is too little to resample (see `bootstrap_intervals`).
        """
        wanted = self.labels.bool().expand_as(self.probabilities)
        given = self.probabilities > 0.5
        true_positives = (wanted & given).sum()
        hits, totals = self.hits.numpy(), self.labels.sum(1).numpy()
        if self.groups is not None:
            member = np.eye(self.groups.max() + 1)[self.groups]  # (N, groups)
            hits, totals = hits @ member, totals @ member
        seeds, sets = bootstrap_intervals(hits, totals)
        return {
            "accuracy": round(self.accuracy_by_seed.mean().item(), 4),
            "ci95_seeds": seeds,
            "ci95_sets": sets,
            "accuracy_per_image": round((self.hits / self.labels.sum(1)).mean().item(), 4),
            "accuracy_24": round((wanted == given).float().mean().item(), 4),
            "accuracy_24_of_nothing": round(1 - self.labels.mean().item(), 4),
            "exact_match": round((wanted == given).all(-1).float().mean().item(), 4),
            "f1": round((2 * true_positives / (wanted.sum() + given.sum())).item(), 4),
        }


def evaluate(evaluator: Evaluator, images: torch.Tensor, labels, groups=None) -> Evaluation:
    """Let `evaluator` score images.

    Args:
        images: (S, N, 3, 64, 64) in [-1, 1]: S seeds of N label sets ((N, 3, 64, 64) counts as one seed).
        labels: N label sets, or (N, 24).
        groups: N names; images with the same name (of a scene) are resampled together.
    """
    groups = None if groups is None else np.unique(groups, return_inverse=True)[1]
    labels = labels if isinstance(labels, torch.Tensor) else encode_labels(labels)
    images = images if images.ndim == 5 else images[None]
    if images.shape[1] != len(labels):
        raise ValueError(f"{images.shape[1]} images a seed for {len(labels)} label sets: these must agree")
    check_finite("a batch of images to be scored", images)
    probabilities = evaluator(images.flatten(0, 1)).unflatten(0, images.shape[:2])
    return Evaluation(probabilities, labels, evaluator.name, evaluator.sha256, groups)


#: The course's grades: the least accuracy -> share of the points.
GRADES = {0.8: "100%", 0.7: "90%", 0.6: "80%", 0.5: "70%", 0.4: "60%"}


def grade(accuracy: float) -> str:
    """The course's grade for an accuracy, as a share of the points ("0%" below 0.4)."""
    return next((points for limit, points in GRADES.items() if accuracy >= limit), "0%")


def print_course_result(evaluation: Evaluation, split: str, seed: int = 0):
    """Print one seed's accuracy, in the form in which the course wants to see it."""
    found, asked = int(evaluation.hits[seed].sum()), int(evaluation.labels.sum())
    accuracy = found / asked
    print(f"{split}: accuracy {accuracy:.4f} ({found} of {asked} labels), grade {grade(accuracy)}")
