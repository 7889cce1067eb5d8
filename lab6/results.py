"""results.json: one record a measurement, and the tables made from them."""

from __future__ import annotations

import json
import typing

from lab6.denoiser import count_parameters, make_denoiser
from lab6.guidance import describe_guidance, guidance_of
from lab6.machine import commit, device_name
from lab6.measures import with_interval
from lab6.presets import PRESETS, REPORTED
from lab6.sampling import count_evaluations
from lab6.settings import make_settings
from lab6.storage import ROOT, read_json, write_json

if typing.TYPE_CHECKING:
    from lab6.evaluation import Evaluation
    from lab6.files import DataFiles
    from lab6.pipeline import ICLEVRPipeline
    from lab6.settings import Settings


def result_record(settings: Settings, pipe: ICLEVRPipeline | None, split: str, score: Evaluation, files: DataFiles,
                  seconds_per_64: float | None = None) -> dict:  # fmt: skip
    """A measurement in the form of results.json; `pipe` None means the data's own images in place of drawn ones."""
    drawn = pipe is not None
    return {
        "system": settings.preset if drawn else "real images" if files.source == "course files" else files.source,
        "weights_sha256": pipe.weights_sha256 if drawn else None,
        "data": files.source,
        "images_seen": pipe.images_seen if drawn else None,
        "split": split,
        "evaluator": score.evaluator,
        "evaluator_sha256": score.sha256,
        "sampler": settings.sampler if drawn else None,
        "steps": settings.steps if drawn else None,
        "evaluations": count_evaluations(settings, score.labels, bool(pipe.denoiser.config.student_steps))
        if drawn
        else None,
        "guidance": guidance_of(settings) if drawn else {"kind": "none", "scale": None},
        "seeds": len(score.probabilities) if drawn else None,
        **score.metrics(),
        "seconds_per_64": seconds_per_64 and round(seconds_per_64, 2),
    }


def results_table(rows: list[dict]) -> str:
    """A Markdown table of result records: accuracy with both intervals, and what it was measured with."""
    several = len({r["system"] for r in rows if r["sampler"]}) > 1
    lines = ["| split | accuracy | 95% over seeds | 95% over seeds and sets | sampler | guidance | seeds | evaluator |"]
    lines += ["|" + "---|" * 8]
    for r in rows:
        spans = ["–" if r[k] is None else "{:.3f} to {:.3f}".format(*r[k]) for k in ("ci95_seeds", "ci95_sets")]
        how = f"{r['sampler']}, {r['steps']} steps" if r["sampler"] else "–"
        how = f"{r['system']}: {how}" if several and r["sampler"] else how
        guidance = describe_guidance(**r["guidance"]) if r["sampler"] else "–"
        cells = [r["split"], f"**{r['accuracy']:.4f}**", *spans, how, guidance, r["seeds"] or "–", r["evaluator"]]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def load_results(settings: Settings, kind: str = "results") -> list[dict]:
    """The measurements of settings.figures/results.json, and, but for the profile tiny, those that it does not have
    of the folder above quick/ and of figures/, which ships. Its own come last.

    kind: "results" of the workbook's model, or "experiments" and "trainings" (loss curves) of notebook 06.
    """
    folders = [settings.figures]
    if settings.profile != "tiny":
        folders += [settings.figures.parent] * (settings.figures.name == "quick") + [ROOT / "figures"]
    files = [folder / "results.json" for folder in reversed(folders)]
    last = {}
    for row in (row for file in files if file.exists() for row in read_json(file).get(kind, [])):
        key = json.dumps([row.get(name) for name in same_measurement(kind)])
        last.pop(key, None)  # so that it goes to the end
        last[key] = row
    return list(last.values())


def same_measurement(kind):
    """By which keys two rows of results.json are the same measurement."""
    what = "weights_sha256" if kind == "results" else "experiment"
    return (what, "system", "data", "split", "evaluator_sha256", "sampler", "steps", "guidance", "seeds")


def results_of_presets(settings: Settings, kind: str) -> list[dict]:
    """Rows of results.json (see `load_results`) of presets as they are: nothing was chosen, no profile shrank them,
    and what was scored was drawn as the preset says, by a network that a full training made."""

    whole_profile = "tiny" if settings.profile == "tiny" else "full"

    def as_it_is(row):
        chosen = row.get("experiment", {"profile": whole_profile})
        if row["system"] not in PRESETS or set(chosen) - {"profile", "seed", "epochs", "max_images"}:
            return False
        here, whole = (make_settings(p, preset=row["system"], device="cpu") for p in (chosen["profile"], whole_profile))
        if kind == "trainings":
            return here.channels == whole.channels
        alike = (row["sampler"], row["steps"], row["guidance"]) == (here.sampler, here.steps, guidance_of(here))
        return alike and chosen["profile"] == whole_profile

    return list(filter(as_it_is, load_results(settings, kind)))


def systems_table(settings: Settings) -> str:
    """A Markdown table of the presets: what its report says of each beside what was measured here, by the course's
    protocol, of the one that has seen most images; "not trained" where nothing was measured."""
    scored = results_of_presets(settings, "results") + results_of_presets(settings, "experiments")
    trained = scored + results_of_presets(settings, "trainings")
    lines = ["| system | parameters | its report: test | new_test | counted | here: test | new_test | drawn by "]
    lines = [lines[0] + "| images seen |", "|" + "---|" * 9]
    for name in PRESETS:
        cells = []
        for split in ("test", "new_test"):
            rows = [r for r in scored if (r["system"], r["split"]) == (name, split) and r["evaluator"] != "judge"]
            best = max(rows, key=lambda r: (r["data"] == "course files", r["images_seen"]), default=None)
            if best is None:
                cells.append("not trained")
                continue
            data = "" if best["data"] == "course files" else f", {best['data']}"
            cells.append(f"{with_interval(best['accuracy'], best['ci95_sets'])}, {best['evaluator']}{data}")
        seen = max((r["images_seen"] for r in trained if r["system"] == name), default=0)
        own = make_settings("full", preset=name, device="cpu")
        size = count_parameters(make_denoiser(own, "meta"))
        drawn = f"{own.sampler}, {own.steps} steps, guidance {describe_guidance(**guidance_of(own))}"
        cells = [name, f"{size / 1e6:.1f} M", *REPORTED.get(name, "–––"), *cells, drawn, f"{seen:,}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def save_result(settings: Settings, record: dict, kind: str = "results"):
    """Add a measurement to settings.figures/results.json; the same measurement made again takes its place.

    kind: as in `load_results`. In "experiments" and "trainings" the same choices (key `experiment`) are the same
    measurement, whatever weights they gave.
    """
    from filelock import FileLock

    path = settings.figures / "results.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    record = record | {"device": device_name(settings), "commit": commit()}
    same = same_measurement(kind)
    with FileLock(path.with_suffix(".lock")):  # runs side by side write to one file
        content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"schema": 1, "results": []}
        rows = [r for r in content.get(kind, []) if any(r.get(name) != record.get(name) for name in same)]
        write_json(path, content | {kind: [*rows, record]})
