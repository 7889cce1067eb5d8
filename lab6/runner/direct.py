"""Without a notebook: images for label sets of one's own, and the score of images of one's own.

Stands on parameters, evaluation, sampling, runs, evaluators, measures, figures, dataset, files, holdings, guidance,
machine, labels and storage. Those that need torch are imported late, since that takes seconds.
"""

from __future__ import annotations

import re
from pathlib import Path

from lab6.runner.parameters import Refused, refusing
from lab6.storage import WEIGHTS, from_project, read_json, write_json, write_whole

#: Most images of one grid; more are kept as single files only.
IN_A_GRID = 256


def read_sets(what: str) -> list[list[str]]:
    """Label sets of "red sphere, cyan cube; gray cylinder" or of a json file: a list of label sets, or {name: set}.

    Raises Refused, naming the file or the label.
    """
    from lab6.files import check_sets

    if not what.lower().endswith(".json"):
        sets = [[label.strip() for label in of.split(",") if label.strip()] for of in what.split(";") if of.strip()]
        return refusing(check_sets, sets, repr(what))
    path = Path(what) if Path(what).is_file() else from_project(what)
    said = refusing(read_json, path)
    return refusing(check_sets, list(said.values()) if isinstance(said, dict) else said, str(path))


def sample_sets(settings, weights, what: str, folder: Path | None):
    """Sample one image for each label set of `what` (see `read_sets`), into `folder` (default samples/own beside the
    figures): 0.png, 1.png, ..., grid.png, labels.json, and made_by.json, which says what made them."""
    from lab6.evaluators import Evaluator
    from lab6.figures import plot_images
    from lab6.files import find_evaluator
    from lab6.guidance import BY_CLASSIFIER, describe_guidance, guidance_record
    from lab6.labels import to_pil
    from lab6.machine import commit, device_name
    from lab6.runs import load_pipeline
    from lab6.sampling import places_of, sample

    sets = read_sets(what)
    pipe = refusing(load_pipeline, settings, weights)
    if settings.guidance in BY_CLASSIFIER:
        pipe.classifier = refusing(Evaluator.load, find_evaluator() or WEIGHTS / "evaluator", settings.device)
    folder = Path(folder) if folder else settings.figures / "samples" / "own"
    refusing(lambda: folder.mkdir(parents=True, exist_ok=True))
    images = refusing(sample, pipe, sets, settings, settings.seed)
    for number, image in enumerate(refusing(to_pil, images)):
        write_whole(folder / f"{number}.png", lambda temporary, image=image: image.save(temporary, "png"))
    for old in (path for path in folder.glob("*.png") if path.stem.isdecimal() and int(path.stem) >= len(images)):
        old.unlink()
    (folder / "grid.png").unlink(missing_ok=True)
    if len(sets) <= IN_A_GRID:
        fig = plot_images(images, sets, columns=min(8, len(sets)), width=min(8, 1.6 * len(sets)))
        write_whole(folder / "grid.png", lambda temporary: fig.savefig(temporary, format="png", bbox_inches="tight"))
    facts = dict(commit=commit(), preset=settings.preset, weights=pipe.weights_sha256, sampler=settings.sampler,
                 steps=settings.steps, guidance=describe_guidance(**guidance_record(settings)), seed=settings.seed,
                 places=places_of(pipe, settings), device=device_name(settings))  # fmt: skip
    write_json(folder / "labels.json", sets)
    write_json(folder / "made_by.json", facts)
    print(
        f"samples  {len(sets)} images in {folder.resolve()}", ", ".join(f"{k} {v}" for k, v in facts.items()), sep="\n"
    )


def numbered(folder: Path) -> list[Path]:
    """The PNG files of a folder whose names end in a number, in the order of these: 0.png, 1.png, ... 10.png."""
    ends = {path: re.search(r"(\d+)$", path.stem) for path in Path(folder).glob("*.png")}
    return sorted((path for path in ends if ends[path]), key=lambda path: (int(ends[path][1]), path.name))


def score_folder(settings, folder: Path, what: str | None):
    """Print what evaluator and judge find in the numbered PNG files of a folder, and keep it in its score.json.

    what: their label sets in this order (see `read_sets`); default labels.json in the folder.
    """
    import torch

    from lab6.dataset import open_image, to_pixels
    from lab6.evaluation import evaluate, print_course_result
    from lab6.evaluators import Evaluator
    from lab6.figures import markdown_table
    from lab6.files import find_evaluator
    from lab6.holdings import open_holding
    from lab6.labels import to_float
    from lab6.measures import with_interval

    folder = Path(folder)
    if not folder.is_dir():
        raise Refused(f"--score {folder}: no such folder")
    sets, files = read_sets(what or str(folder / "labels.json")), numbered(folder)
    if len(files) != len(sets):
        raise Refused(f"--score {folder}: {len(files)} files named by number (0.png, 1.png, ...) for {len(sets)} label "
                      "sets: these must agree, in the same order")  # fmt: skip
    holding = open_holding(folder)
    pixels = [torch.from_numpy(to_pixels(refusing(open_image, holding, path.name))) for path in files]
    images, lines, kept = to_float(torch.stack(pixels)), [], []
    for weights in (find_evaluator() or WEIGHTS / "evaluator", WEIGHTS / "judge"):
        scorer = refusing(Evaluator.load, weights, settings.device)
        evaluation = evaluate(scorer, images, sets)
        metrics = evaluation.metrics()
        if not kept:
            print_course_result(evaluation, str(folder))
        lines.append([scorer.name, scorer.sha256, with_interval(metrics["accuracy"], metrics["ci95_sets"]),
                      f"{metrics['exact_match']:.3f}"])  # fmt: skip
        kept.append({"evaluator": scorer.name, "sha256": scorer.sha256, "images": len(sets)} | metrics)
    write_json(folder / "score.json", kept)
    print(markdown_table(["evaluator", "weights", "accuracy, 95% over label sets", "exact match"], lines))
