"""The notebooks: their anatomy as stored, and one run of all of them in the tiny profile on a few real images."""

import ast
import io
import itertools
import json
import os
import re
import subprocess
import sys
import unicodedata
import zipfile

import nbformat
import numpy as np
import pytest
import torch
from conftest import REAL, RESULT_FIELDS, ROOT, Run
from PIL import Image

import lab6_utils as lab
from lab6.runner.parameters import read_parameters
from lab6.runner.report import find_browsers

PATHS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
NAMES = [
    "01_data_exploration",
    "02_forward_noise",
    "03_model_and_training",
    "04_sampling_and_guidance",
    "05_evaluation",
    "06_experiments",
]
HELD_OUT = ("real-held-out", "rendered-held-out")
TAGS = {"parameters", "interactive", "exercise", "solution", "no-report"}


def test_the_six_notebooks_are_there():
    assert [path.stem for path in PATHS] == NAMES


# ── As stored ────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module", params=PATHS, ids=lambda path: path.stem)
def stored(request):
    notebook = nbformat.read(request.param, as_version=4)
    nbformat.validate(notebook)
    return notebook


def tags(cell):
    return cell.metadata.get("tags", [])


def code_of(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def headings(notebook):
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    return re.findall(r"^(#+) (.+)$", text, re.MULTILINE)


def test_stored_without_outputs(stored):
    assert all(not cell.outputs and cell.execution_count is None for cell in code_of(stored))
    assert stored.metadata.kernelspec.name == "python3" and stored.metadata.language_info.name == "python"
    assert "widgets" not in stored.metadata and all(cell.get("id") for cell in stored.cells)
    assert not any("execution" in cell.metadata or "papermill" in cell.metadata for cell in stored.cells)


def test_parameters_are_plain_values(stored):
    (cell,) = [cell for cell in stored.cells if "parameters" in tags(cell)]
    assert cell is code_of(stored)[0], "the first code cell"
    values = {}
    for line in ast.parse(cell.source).body:
        assert isinstance(line, ast.Assign) and len(line.targets) == 1
        values[line.targets[0].id] = ast.literal_eval(line.value)  # raises for anything but a literal
    assert values["profile"] == "auto" and values["seed"] == 0
    settings = code_of(stored)[1].source
    assert "make_settings(" in settings and "lab6_utils" in settings, "the next cell makes settings of them"
    rest = "\n".join(cell.source for cell in code_of(stored)[1:])
    assert [name for name in values if not re.search(rf"\b{name}\b", rest)] == [], "parameters that do nothing"


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_papermill_reads_every_parameter(path):
    """It skips a line whose comment it takes for code."""
    (cell,) = [cell for cell in nbformat.read(path, as_version=4).cells if "parameters" in tags(cell)]
    names = {line.targets[0].id for line in ast.parse(cell.source).body}
    assert set(read_parameters(path)) == names


def test_anatomy(stored):
    first = stored.cells[0]
    assert first.cell_type == "markdown" and re.match(r"# \d · \w", first.source)
    assert re.search(r"\?", first.source), "it begins with a question"
    found = headings(stored)
    assert [level for level, _ in found].count("#") == 1
    names = [text for _, text in found]
    assert {"What we learned", "Exercises", "Solutions"} <= set(names) and len(names) >= 6
    assert names.index("What we learned") < names.index("Exercises") < names.index("Solutions") == len(names) - 1
    assert {tag for cell in stored.cells for tag in tags(cell)} <= TAGS
    assert any("exercise" in tags(cell) for cell in stored.cells)
    (start,) = [i for i, cell in enumerate(stored.cells) if cell.source.startswith("## Solutions")]
    assert all("solution" in tags(cell) for cell in stored.cells[start:]) and start < len(stored.cells) - 1
    assert not any("solution" in tags(cell) for cell in stored.cells[:start])


def test_cells_are_short_and_thin(stored):
    lengths = [len(cell.source.splitlines()) for cell in code_of(stored)]
    assert sum(n <= 15 for n in lengths) >= 0.9 * len(lengths), sorted(lengths)[-5:]
    assert max(n for n, cell in zip(lengths, code_of(stored), strict=True) if "parameters" not in tags(cell)) <= 30
    for cell in code_of(stored):
        tree = list(ast.walk(ast.parse(cell.source)))
        assert not any(isinstance(node, ast.ClassDef) for node in tree), "classes belong into lab6_utils.py"
        calls = {node.func.attr for node in tree if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)}
        assert "backward" not in calls, "training loops belong into lab6_utils.py"


# ── As run ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="session")
def run(scenes, tmp_path_factory):
    done = Run(tmp_path_factory.mktemp("notebooks"), scenes)
    assert done.code == 0, f"{done.out}\n{done.err}"
    return done


def test_all_ran_in_order_within_minutes(run):
    ran = re.findall(r"^(\d\d_\w+) +ok", run.out, re.MULTILINE)
    assert ran == NAMES
    left = sorted(p.name for p in run.folder.iterdir())
    assert left == [*(f"{n}.ipynb" for n in NAMES), "status.json", "status.lock"]
    status = json.loads((run.folder / "status.json").read_text())
    assert all(status[name]["state"] == "ok" and status[name]["parameters"]["profile"] == "tiny" for name in NAMES)


def test_nothing_was_written_elsewhere(run):
    assert run.after == run.before, "the repository's notebooks and figures stay as they are"
    assert [p.name for p in run.home.iterdir()] == ["runs"]


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_ran_to_its_end(run, name):
    notebook = run.notebook(name)
    for cell in code_of(notebook):
        assert cell.execution_count or not cell.source.strip()
        assert not [o for o in cell.outputs if o.output_type == "error"]
        for output in cell.outputs:
            assert "it/s]" not in output.get("text", ""), "no progress bars in a saved notebook"
    shown = sum("image/png" in o.get("data", {}) for cell in code_of(notebook) for o in cell.outputs)
    assert shown >= 4, "figures are displayed"


EXPECTED = {
    "01": 4, "02": 4, "03": 4, "04": 6, "05": 4,
}  # fmt: skip


@pytest.mark.parametrize("number", EXPECTED)
def test_figures_are_kept_and_not_blank(run, number):
    pictures = sorted(run.figures.glob(f"{number}_*.png"))
    assert len(pictures) >= EXPECTED[number]
    called = {name for cell in code_of(run.notebook(NAMES[int(number) - 1]))
              for name in re.findall(r'save_figure\(\s*[^"]*?"(\w+)"', cell.source)}  # fmt: skip
    assert called <= {p.stem for p in pictures}
    for file in pictures:
        picture = Image.open(file)
        pixels = np.asarray(picture.convert("L"))
        drawn = pixels[: int(0.85 * len(pixels))]  # without the line that says what made it
        assert drawn.std() > 5 and len(np.unique(drawn)) > 20, f"{file.name} is blank"
        facts = json.loads(file.with_suffix(".json").read_text())
        assert (facts["profile"], facts["seed"], facts["figure"]) == ("tiny", 0, file.stem)
        assert facts["commit"] and facts["device"] and len(facts["caption"]) > 20
        assert json.loads(picture.text["Description"]) == facts


@pytest.mark.parametrize("split", ["test", "new_test"])
def test_each_label_set_has_its_picture(run, split):
    files = sorted((run.figures / "samples" / split).iterdir())
    assert [f.name for f in files] == [f"{i:03d}.png" for i in range(32)]
    pictures = [np.asarray(Image.open(f)) for f in files]
    assert all(p.shape == (64, 64, 3) and p.std() > 5 for p in pictures)
    assert len({p.tobytes() for p in pictures}) == 32


def test_pictures_are_in_the_files_order(run, scenes, monkeypatch):
    """Drawn again from the pipeline that notebook 03 trained, set by set."""
    monkeypatch.setenv("LAB6_DATA", str(scenes))
    monkeypatch.setenv("LAB6_RUNS", str(run.runs))
    settings = lab.make_settings("tiny")
    pipe, files = lab.load_pipeline(settings), lab.find_data()
    for split in ("test", "new_test"):
        label_sets = getattr(files, split)
        expected = lab.to_uint8(lab.sample(pipe, label_sets, settings))
        for i, image in enumerate(expected):
            kept = np.asarray(Image.open(run.figures / "samples" / split / f"{i:03d}.png")).transpose(2, 0, 1)
            assert np.abs(kept.astype(int) - image.numpy()).mean() < 1, f"{split} {i}"


def test_training_went_over_its_epochs(run):
    history = lab.load_history(run.runs / "tiny" / "layout")
    assert [r["epoch"] for r in history] == [1, 2]
    assert re.findall(r"^ +epoch (\d)/2  loss", run.out, re.MULTILINE)[:2] == ["1", "2"], "progress is printed"
    assert (run.runs / "tiny" / "layout" / "pipeline" / "model_index.json").is_file()


def test_results_follow_the_design(run):
    stored = json.loads((run.figures / "results.json").read_text())
    assert stored["schema"] == 1
    results = {(r["split"], r["evaluator"]): r for r in stored["results"]}
    splits = ("test", "new_test", "manual", HELD_OUT[not (REAL / "unpack.py").is_file()])
    assert {(split, reader) for split in splits for reader in ("resnet18", "judge")} == results.keys()
    for (split, _), record in results.items():
        assert record.keys() >= RESULT_FIELDS
        assert record["commit"] and record["device"]
        assert split != "manual" or record["ci95_sets"] is None, "one label set has no other to draw"
        low, high = record["ci95_sets"] or (0, 1)
        for name in ("accuracy", "accuracy_per_image", "accuracy_24", "exact_match", "f1"):
            assert 0 <= record[name] <= 1
        assert low <= record["accuracy"] <= high
        if split not in HELD_OUT:
            assert (record["system"], record["seeds"], record["sampler"], record["steps"]) == ("layout", 2, "ddim", 4)
            assert record["guidance"] == {"kind": "classifier-free", "scale": 2.0} and record["evaluations"] == 8
            assert record["places"] == "natural"
            assert re.fullmatch("[0-9a-f]{16}", record["weights_sha256"]) and record["images_seen"] == 96
        assert record["ci95_seeds"] is None, "two seeds are too few for an interval over seeds"


def test_the_report_is_made_of_all_of_them(run):
    page = (run.figures / "report.html").read_text(encoding="utf-8")
    assert "could not be typeset" not in run.err
    assert page.count("data:image/png;base64") >= sum(EXPECTED.values())
    text = re.sub(r"<(script|style|annotation)\b.*?</\1>|<[^>]+>", " ", page, flags=re.DOTALL)
    assert not re.search(r"\\(frac|sqrt|bar|alpha|mathcal|epsilon)\b|\$\$", text), "no raw TeX"
    for name in NAMES:
        title = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4).cells[0].source.splitlines()[0]
        assert title.removeprefix("# ").split("·")[1].strip() in text


def test_parameters_reach_the_notebooks(scenes, tmp_path):
    """Other choices than the defaults, from training to the pictures."""
    chosen = "run=other schedule=sigmoid prediction=epsilon sampler=ddim steps=3 guidance_scale=2 split=test"
    arguments = [part for assignment in chosen.split() for part in ("-p", assignment)]
    done = Run(tmp_path, scenes, "--only", "03,04", "--no-report", *arguments)
    assert done.code == 0, f"{done.out}\n{done.err}"
    scheduler = done.runs / "tiny" / "other" / "pipeline" / "scheduler" / "scheduler_config.json"
    config = json.loads(scheduler.read_text())
    sigmoid = lab.make_scheduler(lab.make_settings("tiny", schedule="sigmoid"))
    assert config["prediction_type"] == "epsilon" and config["trained_betas"] == sigmoid.config.trained_betas
    assert [p.name for p in (done.figures / "samples").iterdir()] == ["test"], "split=test draws that file only"
    facts = json.loads((done.figures / "04_grid_test.json").read_text())
    assert (facts["sampler"], facts["steps"], facts["guidance"]) == ("ddim", 3, "s = 2")
    weights = scheduler.parents[1] / "denoiser" / "diffusion_pytorch_model.safetensors"
    assert facts["weights"] == lab.sha256_of(weights)


# ── Experiments ──────────────────────────────────────────────────────────────────────────────────────


def test_samplers_and_guidance_are_studied(run):
    """Notebook 06 on what 03 trained: every sampler and kind of guidance, read by the evaluator and by the judge."""
    rows = json.loads((run.figures / "results.json").read_text())["studies"]
    of = lambda study: [r for r in rows if r["experiment"]["study"] == study]
    assert {r["sampler"] for r in of("samplers")} == set(lab.SAMPLERS)
    assert {r["experiment"]["guidance"] for r in of("guidance")} == set(lab.GUIDANCES) - {"none"}
    for study in ("samplers", "guidance"):
        assert {r["evaluator"] for r in of(study)} == {"resnet18", "judge"}
    figures = {p.stem for p in run.figures.glob("06_*.png")}
    assert {"06_samplers", "06_guidance", "06_gamed", "06_terminal_noise", "06_more_objects"} <= figures
    many = {(r["split"], r["system"], r["experiment"].get("guidance")) for r in of("more objects")}
    ways = {("layout", "classifier-free"), ("layout", "composition"), ("rendered scenes", None)}
    assert many == {(f"{count} objects", *way) for count in (4, 5) for way in ways}


def test_drawn_pictures_are_compared_with_real_ones(run):
    (row,) = (r for r in json.loads((run.figures / "results.json").read_text())["studies"] if "frechet" in r)
    assert {"06_nearest", "06_copies"} <= {p.stem for p in run.figures.glob("06_*.png")}
    assert set(row["nearest"]) == set(row["copies"]) == {"pixels", "resnet18"}
    assert set(row["readers"]) == {"resnet18", "judge"}
    for drawn, real in row["nearest"].values():
        assert drawn[0] > 2 * real[0] > 0, "what a network draws after two epochs is far from every picture"
    ((drawn, floor),) = row["frechet"].values()
    assert 0 < floor[1] <= floor[0] <= floor[2] < drawn[1]


def test_every_preset_trains_resumes_draws_and_is_scored(scenes, tmp_path, monkeypatch):
    """An epoch of every preset here, then a sweep of notebook 06, which goes on with another, and compares them all."""
    monkeypatch.setenv("LAB6_DATA", str(scenes))
    monkeypatch.setenv("LAB6_RUNS", str(tmp_path / "runs"))
    first = {}
    for preset in lab.PRESETS:
        run = lab.name_of(preset, {"epochs": 2, "seed": 0})
        settings = lab.make_settings("tiny", preset=preset, run=run, epochs=1, device="cpu")
        dataset, folder = lab.ICLEVRDataset(lab.find_data(), "train", settings.max_images), lab.run_folder(settings)
        list(lab.train_autoencoder(settings, dataset, folder))
        (first[preset],) = lab.train(settings, dataset, folder)
    done = Run(tmp_path, scenes, "--only", "06", "-p", "epochs=2", "--sweep", f"preset={','.join(lab.PRESETS)}")
    assert done.code == 0, f"{done.out}\n{done.err}"
    stored = json.loads((done.figures / "results.json").read_text())
    place = lambda r: (list(lab.PRESETS).index(r["system"]), r.get("split") == "new_test")
    rows = sorted(stored["experiments"], key=place)  # several ran at a time
    chosen_by = [r for r in rows if r["split"] == "held-out labels"]
    assert {(r["system"], r["evaluator"]) for r in chosen_by} == {("layout", "resnet18"), ("layout", "judge")}
    rows = [r for r in rows if r not in chosen_by and (r["system"], r["evaluator"]) != ("layout", "judge")]
    assert [(r["system"], r["split"]) for r in rows] == [(p, s) for p in lab.PRESETS for s in ("test", "new_test")]
    for r in rows:
        assert set(r) >= RESULT_FIELDS | {"parameters"} and r["experiment"]["epochs"] == 2
        assert 0 <= r["accuracy"] <= 1 and (r["ci95_sets"] or r["accuracy"] in (0, 1)) and r["evaluator"] == "resnet18"
        assert sum(kind["share"] for kind in r["errors"].values()) == pytest.approx(1 - r["accuracy"], abs=1e-3)
    assert [r["system"] for r in sorted(stored["trainings"], key=place)] == list(lab.PRESETS)
    for r in stored["trainings"]:
        before = first[r["system"]]
        assert r["loss"][0] == [before.images_seen, round(before.loss, 5)] and len(r["loss"]) == 2, "went on"
        assert r["images_seen"] == 2 * before.images_seen
        assert list((done.runs / "tiny" / f"{r['system']}_epochs=2_seed=0" / "tensorboard").glob("events*"))
    table = compare(done, tmp_path, scenes, stored)
    for r in rows[::2]:
        assert f"| {r['accuracy']:.3f}" in next(line for line in table.splitlines() if f"| {r['system']} |" in line)
    assert "0.6289" in table and "28.5 M" in table


def compare(done, folder, scenes, stored):
    """The table of systems of notebook 06, after more experiments, each of which differs in one choice."""
    others = [{"num_train_timesteps": 100, "schedule": "linear"}, {"num_train_timesteps": 300, "schedule": "linear"},
              {"schedule": "sigmoid"}, {"prediction": "epsilon"}, {"conditioning": "multi-hot"},
              {"channels": [16, 16, 16]}]  # fmt: skip
    tests = [r for r in stored["experiments"] if r["system"] == "tokens"]
    stored["experiments"] += [r | {"experiment": r["experiment"] | other} for other in others for r in tests]
    for left_out, split in itertools.product(("unseen", "random"), lab.unseen_sets()):
        apart = {"experiment": tests[0]["experiment"] | {"leave_out": left_out}, "split": f"unseen {split}"}
        stored["experiments"].append(tests[0] | apart)
    (done.figures / "results.json").write_text(json.dumps(stored))
    compared = Run(folder, scenes, "--only", "06", "--no-report")
    assert compared.code == 0, f"{compared.out}\n{compared.err}"
    wanted = "loss terminal_noise steps_or_noise diffusion conditioning binding size unseen"
    assert {f"06_{name}.png" for name in wanted.split()} <= {p.name for p in compared.figures.iterdir()}
    outputs = [o for cell in code_of(compared.notebook("06_experiments")) for o in cell.outputs]
    texts = [o.get("data", {}).get("text/markdown", "") for o in outputs]
    return next(text for text in texts if "its report: test" in text)


# ── What the course wants ────────────────────────────────────────────────────────────────────────────


def submit(run, folder, *more, **student):
    environment = os.environ | dict(LAB6_RUNS=str(run.runs), LAB6_FIGURES=str(run.home / "figures"))
    command = [sys.executable, str(ROOT / "run_notebooks.py"), "--profile", "tiny", "--submission", *more]
    folder.mkdir(exist_ok=True)
    return subprocess.run(command, env=environment | student, cwd=folder, capture_output=True, text=True)


def test_submission(run, tmp_path):
    if not find_browsers():
        pytest.skip("no Chrome, Chromium or Edge to print the report with")
    done = submit(run, tmp_path / "out", LAB6_STUDENT_ID="312550000", LAB6_STUDENT_NAME="王小明")
    assert done.returncode == 0, done.stderr
    name = "312550000_王小明"
    assert [p.name for p in (tmp_path / "out").iterdir()] == [f"DL_LAB6_{name}.zip"]
    with zipfile.ZipFile(tmp_path / "out" / f"DL_LAB6_{name}.zip") as archive:
        inside = {file.removeprefix(f"DL_LAB6_{name}/"): archive.read(file) for file in archive.namelist()}
    assert inside["report.pdf"].startswith(b"%PDF") and {"images/test/0.png", "images/new_test/0.png"} <= set(inside)
    assert inside["source/lab6_utils.py"] == (ROOT / "lab6_utils.py").read_bytes()
    assert {"source/README.md", "source/environment.yml", "source/notebooks/01_data_exploration.ipynb"} <= set(inside)
    assert not [file for file in inside if "weights" in file or file.startswith("source/figures")]
    pypdf = pytest.importorskip("pypdf")
    first_page = pypdf.PdfReader(io.BytesIO(inside["report.pdf"])).pages[0].extract_text()
    assert "312550000" in first_page and "王小明" in unicodedata.normalize("NFKC", first_page)
    done = submit(run, tmp_path / "out", "--layout", "earlier", LAB6_STUDENT_ID="312550000", LAB6_STUDENT_NAME="王小明")
    assert done.returncode == 0, done.stderr
    saved = torch.load(tmp_path / "out" / f"DL_lab6_{name}.pth", weights_only=True)
    denoiser = lab.Denoiser(**saved["config"])
    denoiser.load_state_dict(saved["model"])
    settings = lab.make_settings("tiny", device="cpu")
    scheduler = lab.DDPMScheduler.from_config(saved["scheduler"])
    assert torch.equal(scheduler.alphas_cumprod, lab.make_scheduler(settings).alphas_cumprod)
    trained = lab.ICLEVRPipeline.from_pretrained(run.runs / "tiny" / "layout" / "pipeline").denoiser
    assert all(torch.equal(a, b) for a, b in zip(denoiser.parameters(), trained.parameters(), strict=True))
