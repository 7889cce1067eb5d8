"""results.json: a record for each measurement, and the tables made from them.

Stands on evaluation, sampling, measures, pipeline, denoiser, figures, files, settings, guidance, machine, presets and
storage.
"""

from __future__ import annotations

import json

from lab6.denoiser import count_parameters, make_denoiser
from lab6.evaluation import Evaluation
from lab6.figures import markdown_table
from lab6.files import DataFiles
from lab6.guidance import describe_guidance, guidance_record
from lab6.machine import commit, device_name
from lab6.measures import with_interval
from lab6.pipeline import ICLEVRPipeline
from lab6.presets import PRESETS, REPORTED
from lab6.sampling import count_evaluations, places_of
from lab6.settings import Settings, make_settings
from lab6.storage import ROOT, read_json, update_json


def result_record(settings: Settings, pipe: ICLEVRPipeline | None, split: str, score: Evaluation, files: DataFiles,
                  seconds_per_64: float | None = None) -> dict:  # fmt: skip
    """A measurement in the form of results.json; `pipe` None means the data's own images in place of sampled ones."""
    sampled = pipe is not None
    distilled = sampled and pipe.denoiser.config.student_steps > 0
    return {
        "system": settings.preset if sampled else "real images" if files.source == "course files" else files.source,
        "weights_sha256": pipe.weights_sha256 if sampled else None,
        "data": files.source,
        "images_seen": pipe.images_seen if sampled else None,
        "split": split,
        "evaluator": score.evaluator,
        "evaluator_sha256": score.sha256,
        "sampler": settings.sampler if sampled else None,
        "steps": settings.steps if sampled else None,
        "evaluations": count_evaluations(settings, score.labels, distilled) if sampled else None,
        "guidance": guidance_record(settings) if sampled else {"kind": "none", "scale": None},
        "places": places_of(pipe, settings) if sampled else None,
        "seeds": len(score.probabilities) if sampled else None,
        **score.metrics(),
        "seconds_per_64": seconds_per_64 and round(seconds_per_64, 2),
    }


def results_table(rows: list[dict]) -> str:
    """A Markdown table of result records: accuracy with both intervals, and how it was measured; by system, natural
    places before separated ones, many evaluations of the network before few."""
    order = {name: number for number, name in enumerate(PRESETS)}
    number = lambda r: (order.get(r["system"], len(order)), r.get("places") == "separated", -(r["evaluations"] or 0))
    rows = sorted(rows, key=number)
    several, lines = len({r["system"] for r in rows if r["sampler"]}) > 1, []
    header = ["split", "accuracy", "95% over seeds", "95% over seeds and sets", "sampler", "guidance", "seeds",
              "evaluator"]  # fmt: skip
    for r in rows:
        spans = ["–" if r[k] is None else "{:.3f} to {:.3f}".format(*r[k]) for k in ("ci95_seeds", "ci95_sets")]
        how = f"{r['sampler']}, {r['steps']} steps" if r["sampler"] else "–"
        how += f", {r['places']} places" if r.get("places") not in (None, "none") else ""
        how = f"{r['system']}: {how}" if several and r["sampler"] else how
        guidance = describe_guidance(**r["guidance"]) if r["sampler"] else "–"
        lines.append([r["split"], f"**{r['accuracy']:.4f}**", *spans, how, guidance, r["seeds"] or "–", r["evaluator"]])
    return markdown_table(header, lines)


def load_results(settings: Settings, kind: str = "results") -> list[dict]:
    """The measurements in settings.figures/results.json. In all profiles but tiny, those that it lacks are added from
    the folder above quick/ and from figures/, which ships; its own come last.

    kind: "results" of the workbook's models, or of notebook 06 "experiments", "trainings" (loss curves) and "studies".
    """
    folders = [settings.figures]
    if settings.profile != "tiny":
        folders += [settings.figures.parent] * (settings.figures.name == "quick") + [ROOT / "figures"]
    files = [folder / "results.json" for folder in reversed(folders)]
    last = {}
    for row in (row for file in files if file.exists() for row in read_json(file).get(kind, [])):
        key = json.dumps(_key(row, kind))
        last.pop(key, None)  # so that it goes to the end
        last[key] = row
    return list(last.values())


def _key(row, kind):
    """What makes two rows of results.json the same measurement. Rows of earlier versions do not say that their network
    was told no places."""
    what = "weights_sha256" if kind == "results" else "experiment"
    names = (what, "system", "data", "split", "evaluator_sha256", "sampler", "steps", "guidance", "seeds")
    return [*map(row.get, names), row.get("places") or "none"]


def results_of_presets(settings: Settings, kind: str) -> list[dict]:
    """Rows of results.json (see `load_results`) that measure a preset unchanged: nothing was overridden, no profile
    shrank it, a full training made the network, and it sampled as the preset says."""
    whole_profile = "tiny" if settings.profile == "tiny" else "full"

    def unchanged(row):
        chosen = row.get("experiment", {"profile": whole_profile})
        if row["system"] not in PRESETS or set(chosen) - {"profile", "seed", "epochs", "max_images"}:
            return False
        here, whole = (make_settings(p, preset=row["system"], device="cpu") for p in (chosen["profile"], whole_profile))
        if kind == "trainings":
            return here.channels == whole.channels
        alike = (row["sampler"], row["steps"], row["guidance"]) == (here.sampler, here.steps, guidance_record(here))
        told = here.places if here.takes_places else "none"
        return alike and (row.get("places") or "none") == told and chosen["profile"] == whole_profile

    return list(filter(unchanged, load_results(settings, kind)))


def systems_table(settings: Settings) -> str:
    """A Markdown table of the presets: the accuracy that its report gives beside the one measured here, by the course's
    protocol, of the network that has seen most images; "not trained" where nothing was measured."""
    scored = results_of_presets(settings, "results") + results_of_presets(settings, "experiments")
    trained = scored + results_of_presets(settings, "trainings")
    header = ["system", "parameters", "its report: test", "new_test", "counted", "here: test", "new_test", "sampled by",
              "images seen"]  # fmt: skip
    lines = []
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
        how = f"{own.sampler}, {own.steps} steps, guidance {describe_guidance(**guidance_record(own))}"
        how += f", {own.places} places" if own.takes_places else ""
        lines.append([name, f"{size / 1e6:.1f} M", *REPORTED.get(name, "–––"), *cells, how, f"{seen:,}"])
    return markdown_table(header, lines)


def save_result(settings: Settings, record: dict, kind: str = "results"):
    """Add a measurement to settings.figures/results.json; the same measurement made again takes its place.

    kind: as in `load_results`. In "experiments" and "trainings" the same choices (key `experiment`) are the same
    measurement, whatever weights they gave.
    """
    record = record | {"device": device_name(settings), "commit": commit()}

    def add(content):
        rows = [r for r in content.get(kind, []) if _key(r, kind) != _key(record, kind)]
        return content | {kind: [*rows, record]}

    update_json(settings.figures / "results.json", add, {"schema": 1, "results": []})
