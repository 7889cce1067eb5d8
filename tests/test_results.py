"""lab6/results.py: results.json and its tables."""

import json

from conftest import HAND_MADE, RESULT_FIELDS, evaluation, make_pipeline, tiny

import lab6_utils as lab


def test_results_follow_the_schema(data, runs):
    files, score = lab.find_data(), evaluation(HAND_MADE[1], HAND_MADE[0])
    pipe = make_pipeline(tiny())
    pipe.weights_sha256, pipe.images_seen = "0123456789abcdef", 4800
    for scale, kind, passes in ((2.0, "classifier-free", 8), (1.0, "none", 4), (0.0, "classifier-free", 4)):
        settings = tiny(guidance_scale=scale)
        lab.save_result(settings, lab.result_record(settings, pipe, "test", score, files, seconds_per_64=1.234))
        record = json.loads((settings.figures / "results.json").read_text())["results"][-1]
        assert record.keys() >= RESULT_FIELDS
        assert record["guidance"] == {"kind": kind, "scale": scale} and record["evaluations"] == passes
    assert (record["system"], record["images_seen"], record["seeds"], record["steps"]) == ("tokens", 4800, 2, 4)
    for choice, said in (
        (dict(guidance="composition", guidance_scale=1.0), {"kind": "composition", "scale": 1.0}),
        (dict(guidance="classifier-2", guidance_scale=0.0), {"kind": "none", "scale": 0.0}),
        (dict(guidance="classifier-2", classifier_input="x_t"), {"kind": "classifier-2", "scale": 4.0, "shown": "x_t"}),
        (dict(guidance_interval=(0.0, 0.5)), {"kind": "classifier-free", "scale": 4.0, "interval": [0.0, 0.5]}),
    ):
        assert lab.result_record(tiny(**choice), pipe, "test", score, files)["guidance"] == said
    told = make_pipeline(tiny(preset="layout"))
    told.weights_sha256, told.images_seen = pipe.weights_sha256, pipe.images_seen
    for kind in ("natural", "separated"):
        assert lab.result_record(tiny(preset="layout", places=kind), told, "test", score, files)["places"] == kind
    assert lab.result_record(tiny(), pipe, "test", score, files)["places"] == "none", "it is not told"
    lab.save_result(settings, lab.result_record(settings, None, "real-held-out", score, files))
    stored = json.loads((settings.figures / "results.json").read_text())
    assert stored["schema"] == 1 and len(stored["results"]) == 4
    real = stored["results"][-1]
    assert real.keys() >= RESULT_FIELDS and real["weights_sha256"] is None and real["system"] == "real images"
    table = lab.results_table(stored["results"])
    assert table.count("\n") == 5 and "**0.8750**" in table and "real-held-out" in table


def test_the_same_measurement_takes_the_old_ones_place(runs):
    settings = tiny()
    key = dict(system="tokens", data="course files", split="test", evaluator="course", sampler="ddim", steps=20,
               guidance={"kind": "classifier-free", "scale": 2.0}, seeds=16)  # fmt: skip
    for change in (
        dict(accuracy=0.1),
        dict(accuracy=0.2),
        dict(accuracy=0.3, places="none"),  # earlier versions did not say that no places were told
        dict(split="new_test"),
        dict(guidance={"kind": "none", "scale": 1.0}),
        dict(places="natural"),
        dict(places="separated"),
    ):
        lab.save_result(settings, key | change)
    results = json.loads((settings.figures / "results.json").read_text())["results"]
    assert len(results) == 5 and results[0]["accuracy"] == 0.3
    assert len(lab.load_results(settings)) == 5, "and they are read as different ones"
