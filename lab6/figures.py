"""Figures, tables and image files. A plot_ function returns a matplotlib Figure for
`save_figure`, which shows and keeps it, or fills an axis that it is given.

Stands on settings, machine, labels and storage.
"""

from __future__ import annotations

import io
import json
import math
import textwrap
import typing
from pathlib import Path

import numpy as np
import torch

from lab6.labels import COLOURS, OBJECTS, to_pil, to_uint8
from lab6.machine import commit, device_name
from lab6.settings import Settings
from lab6.storage import write_json, write_whole

if typing.TYPE_CHECKING:  # matplotlib takes its time to load
    from matplotlib.figure import Figure


def save_images(images: torch.Tensor, folder: Path):
    """Write each image as folder/000.png, 001.png, ... in order, and remove older ones."""
    for i, image in enumerate(to_pil(images)):
        write_whole(Path(folder) / f"{i:03d}.png", lambda temporary, image=image: image.save(temporary, "png"))
    for old in sorted(Path(folder).glob("[0-9][0-9][0-9].png"))[len(images) :]:
        old.unlink()


def new_figure(width: float = 8, height: float = 4, rows: int = 1, columns: int = 1, **options):
    """(Figure, axes) in the workbook's style; size in inches, 8 being the width of a page.

    options: of `Figure.subplots`, such as sharey, squeeze, width_ratios.
    """
    from matplotlib.figure import Figure

    fig = Figure(figsize=(width, height), layout="constrained", dpi=150)
    axes = fig.subplots(rows, columns, **options)
    for ax in np.ravel(axes):
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=8)
        ax.xaxis.label.set_size(8)
        ax.yaxis.label.set_size(8)
    return fig, axes


def plot_image(ax, image: torch.Tensor, title: str = "", size: float = 7):
    """Put an image ((3, H, W) in [-1, 1] or uint8) on an axis, without ticks."""
    pixels = image if image.dtype == torch.uint8 else to_uint8(image)
    ax.imshow(pixels.permute(1, 2, 0).numpy(), interpolation="nearest")
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_visible(False)
    ax.set_title(title, fontsize=size, pad=2, linespacing=1.05)


def plot_images(images, titles=None, columns: int = 8, width: float = 8) -> Figure:
    """Images in rows of `columns`, each under its title; images: (B, 3, H, W) in [-1, 1] or uint8.

    Titles may be label sets: they are written one object a line.
    """
    rows = math.ceil(len(images) / columns)
    texts = ["" if titles is None else t if isinstance(t, str) else "\n".join(t) for t in titles or [""] * len(images)]
    lines = max(t.count("\n") + bool(t) for t in texts)
    cell = width / columns
    fig, axes = new_figure(width, rows * (cell + 0.115 * lines), rows, columns, squeeze=False)
    for ax in axes.flat[len(images) :]:
        ax.set_visible(False)
    for ax, image, text in zip(axes.flat, images, texts, strict=False):
        plot_image(ax, image, text, size=min(7, 6.2 * cell))
    return fig


def show_figure(fig: Figure):
    """Show a figure in the notebook without keeping it in a file."""
    _display(fig, _draw(fig))


def _draw(fig, metadata=None):
    """The figure as the bytes of a PNG; drawing takes its time, so it is done once."""
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", bbox_inches="tight", metadata=metadata)
    return buffer.getvalue()


def _display(fig, png):
    from IPython.display import Image, display

    display(Image(png, width=round(fig.get_figwidth() * 100)))


def save_figure(fig: Figure, name: str, settings: Settings, caption: str, **provenance):
    """Keep a figure as settings.figures/NAME.png, with NAME.json beside it, and show it in the notebook.

    The footer, the PNG's metadata and the json say what made the figure: commit, profile, seed and device, and
    everything in `provenance` (data, weights, sampler, ...; plain values).
    """
    from IPython.display import Markdown, display

    facts = {"figure": name, "caption": caption, "commit": commit(), "profile": settings.profile,
             "seed": settings.seed, "device": device_name(settings), **provenance}  # fmt: skip
    footer = " · ".join(f"{k} {v}" for k, v in facts.items() if k not in ("figure", "caption"))
    fig.text(
        0,
        0,
        "\n".join(textwrap.wrap(footer, int(fig.get_figwidth() * 24))) + "\n",
        fontsize=4.5,
        color="0.55",
        va="top",
    )
    path = settings.figures / f"{name}.png"
    metadata = {"Title": name, "Description": json.dumps(facts, ensure_ascii=False), "Software": "lab6_utils"}
    png = _draw(fig, metadata)
    write_whole(path, lambda temporary: temporary.write_bytes(png))
    write_json(path.with_suffix(".json"), facts)
    _display(fig, png)
    display(Markdown(f"**Figure** `{name}`. {caption}"))


def markdown_table(header: list[str], rows: list[list]) -> str:
    """A Markdown table; cells are anything that str() can write."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in lines)


def plot_confusions(counts: torch.Tensor, asked: int) -> Figure:
    """(24, 26) `Evaluation.confusions`, and their sums by kind; `asked`: the number of labels asked for."""
    fig, (ax, bars) = new_figure(8, 4.6, 1, 2, width_ratios=(3, 1))
    ax.imshow(counts, cmap="Oranges", vmin=0)
    for y, x in counts.nonzero().tolist():
        ax.text(x, y, int(counts[y, x]), ha="center", va="center", fontsize=5)
    ax.set_xticks(range(26), [*OBJECTS, "none", "outranked"], rotation=90, fontsize=6)
    ax.set_yticks(range(24), OBJECTS, fontsize=6)
    ax.set(xlabel="what was found in its place", ylabel="asked for and not found")
    shape, colour = torch.arange(24) // len(COLOURS), torch.arange(24) % len(COLOURS)
    same_shape, same_colour = (x[:, None] == x for x in (shape, colour))
    others = counts[:, :24]
    kinds = {"another\ncolour": others[same_shape], "another\nshape": others[same_colour],
             "another\nobject": others[~same_shape & ~same_colour], "none": counts[:, 24],
             "outranked": counts[:, 25]}  # fmt: skip
    bars.barh(list(kinds), [int(n.sum()) for n in kinds.values()], 0.6, color="tab:orange")
    bars.invert_yaxis()
    bars.set_xlabel(f"of {asked} labels asked for", fontsize=8)
    bars.tick_params(labelsize=7)
    return fig


def plot_errors(errors: dict[str, list[dict]]) -> Figure:
    """For each key, the mean of a list of `Evaluation.errors`, as shares of all errors."""
    kinds = {"swapped": ("swapped", "tab:red"), "colour": ("wrong colour", "tab:orange"),
             "shape": ("wrong shape", "tab:olive"), "both": ("both wrong", "tab:gray")}  # fmt: skip
    fig, ax = new_figure(8, 0.8 + 0.3 * len(errors))
    for y, each in enumerate(errors.values()):
        shares = np.array([sum(e[kind]["share"] for e in each) for kind in kinds])
        shares = shares / max(shares.sum(), 1e-9)
        for (name, colour), share, left in zip(kinds.values(), shares, shares.cumsum() - shares, strict=True):
            ax.barh(y, share, left=left, color=colour, label=name if y == 0 else None)
    ax.set_yticks(range(len(errors)), errors, fontsize=7)
    ax.set_ylim(len(errors) - 0.5, -0.5)
    ax.set_xlabel("share of the errors", fontsize=8)
    fig.legend(fontsize=7, frameon=False, ncols=4, loc="outside upper center")
    return fig
