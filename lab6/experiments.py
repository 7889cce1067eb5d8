"""Trainings that differ in one choice, found in results.json and compared. Notebook 06.

Stands on measures, figures and settings.
"""

from __future__ import annotations

import dataclasses
import typing

from lab6.figures import markdown_table, new_figure
from lab6.measures import with_interval
from lab6.settings import Settings, make_settings

if typing.TYPE_CHECKING:
    from matplotlib.figure import Figure


def settings_of(row: dict) -> Settings:
    """Every setting of an experiment in results.json, including those that it left to its preset and device."""
    device = "cpu" if row.get("device", "cpu").startswith(("cpu", "mps")) else "cuda"
    return make_settings(**{"preset": row["system"], "device": device, "precision": "fp32"} | row["experiment"])


def drop_unknown(rows: list[dict]) -> list[dict]:
    """The experiments whose settings this version knows; prints a line for each other one."""
    known = []
    for row in rows:
        try:
            settings_of(row)
            known.append(row)
        except ValueError as error:
            print(f"not compared: an experiment of {row['system']} in results.json ({error})")
    return known


def compare_experiments(rows: list[dict], *choice: str) -> dict[tuple, list[dict]]:
    """The group of experiments that differ only in the settings `choice` (and in the seed). Of several groups it is the
    one that was trained on most images, then the largest.

    Returns:
        {values of `choice`: the rows with these}, sorted; empty without rows.
    """
    groups = {}
    for row in rows:
        settings = settings_of(row)
        rest = dataclasses.asdict(settings) | dict.fromkeys([*choice, "seed", "seeds", "run", "device"])
        alike = str([rest, row["evaluator_sha256"], row["data"]])
        values = tuple(getattr(settings, name) for name in choice)
        groups.setdefault(alike, {}).setdefault(values, []).append(row)
    trained = lambda group: min(row["images_seen"] for rows in group.values() for row in rows)
    best = max(groups.values(), key=lambda group: (len(group) > 1, trained(group), len(group)), default={})
    return dict(sorted(best.items(), key=lambda item: [str(v) if isinstance(v, tuple) else v for v in item[0]]))


def _words(values):
    words = (("no", "yes")[v] if isinstance(v, bool) else str(v) for v in values)
    return ", ".join(words).replace("'", "")


def comparison_table(group: dict[tuple, list[dict]]) -> str:
    """A Markdown table of what `compare_experiments` found: each training's accuracy, with its 95% interval."""
    lines = []
    for values, rows in group.items():
        cells = [", ".join(with_interval(r["accuracy"], r["ci95_sets"]) for r in rows if r["split"] == split)
                 for split in ("test", "new_test")]  # fmt: skip
        lines.append([_words(values), f"{rows[0]['parameters'] / 1e6:.2f} M", *cells])
    return markdown_table(["choice", "parameters", "test.json, by training", "new_test.json, by training"], lines)


def plot_accuracy(ax, row: dict, y: float, lower: bool):
    """Plot a dot and the bar of its 95% interval in line y: red and a little higher, or blue and a little lower."""
    place, colour = (y + 0.13, "tab:blue") if lower else (y - 0.13, "tab:red")
    ax.plot(row["ci95_sets"] or [row["accuracy"]] * 2, [place] * 2, color=colour, alpha=0.3, linewidth=2)
    ax.plot(row["accuracy"], place, "o", color=colour, markersize=4)


def plot_comparisons(found: dict[tuple, dict]) -> Figure:
    """Dots for trainings, bars for their 95% intervals; {choice: what `compare_experiments` found for it}."""
    sizes = [len(group) + 0.6 for group in found.values()]
    fig, axes = new_figure(8, 0.7 + 0.28 * sum(sizes), rows=len(found), squeeze=False, sharex=True, height_ratios=sizes)
    for ax, (choice, group) in zip(axes[:, 0], found.items(), strict=True):
        for y, rows in enumerate(group.values()):
            for r in rows:
                plot_accuracy(ax, r, y, lower=r["split"] == "new_test")
        ax.set_yticks(range(len(group)), map(_words, group), fontsize=7)
        ax.set_title(", ".join(choice).replace("_", " "), fontsize=8)
        ax.set_ylim(len(group) - 0.5, -0.5)
    axes[-1, 0].set_xlabel("accuracy (upper, red: test.json; lower, blue: new_test.json)", fontsize=8)
    return fig
