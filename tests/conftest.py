"""What the tests share: folders of their own, a few real images, synthetic data in the course's layout."""

import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import nbformat
import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
REAL = Path(os.environ.get("LAB6_TEST_ICLEVR") or ROOT.parent / "shared" / "iclevr")
os.environ["LAB6_HEADLESS"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: tiny networks lose by threads, notebooks too

import torch  # noqa: E402
from torch import nn  # noqa: E402
from torchvision.models import resnet18  # noqa: E402

import lab6_utils as lab  # noqa: E402

TRAIN_SCENES = range(60)
HELD_OUT_SCENES = range(5500, 5510)
#: What DESIGN.md asks of each record in results.json.
RESULT_FIELDS = {
    "system", "weights_sha256", "data", "images_seen", "split", "evaluator", "sampler", "steps", "evaluations",
    "guidance", "places", "seeds", "accuracy", "ci95_seeds", "ci95_sets", "accuracy_per_image", "accuracy_24",
    "exact_match", "f1", "seconds_per_64", "device", "commit",
}  # fmt: skip


@pytest.fixture(scope="session", autouse=True)
def environment(tmp_path_factory):
    """Runs, figures and data in temporary folders, whatever the caller's environment says."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAB6_HEADLESS", "1")
        patch.setenv("LAB6_RUNS", str(home / "runs"))
        patch.setenv("LAB6_FIGURES", str(home / "figures"))
        patch.setenv("LAB6_DATA", str(home / "no data"))
        yield home


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """An empty runs folder for one test."""
    monkeypatch.setenv("LAB6_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


@pytest.fixture(scope="session")
def iclevr(tmp_path_factory):
    """Folder with the course's layout: real images of 60 training scenes and 10 held-out ones. Skips without them."""
    if not (REAL / "unpack.py").is_file():
        pytest.skip(f"needs the real i-CLEVR images: no unpack.py in {REAL} (LAB6_TEST_ICLEVR names another folder)")
    wanted = {f"CLEVR_train_{scene:06d}" for scene in (*TRAIN_SCENES, *HELD_OUT_SCENES)}
    source, folder = tmp_path_factory.mktemp("packed"), tmp_path_factory.mktemp("iclevr")
    with (
        zipfile.ZipFile(REAL / "iclevr64_scenes.zip") as whole,
        zipfile.ZipFile(source / "iclevr64_scenes.zip", "w") as part,
    ):
        for name in whole.namelist():
            if Path(name).stem in wanted:
                part.writestr(name, whole.read(name))
    spec = importlib.util.spec_from_file_location("unpack", REAL / "unpack.py")
    unpack = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(unpack)
    unpack.HERE = source  # reading all 6,003 scenes would take ten seconds
    labels, train = json.loads((REAL / "train.json").read_text()), {}
    (folder / "iclevr").mkdir()
    for scene, frames in unpack.scenes():
        for k, frame in enumerate(frames):
            Image.fromarray(frame).save(folder / "iclevr" / f"{scene}_{k}.png")
            train[f"{scene}_{k}.png"] = labels[f"{scene}_{k}.png"]
    assert len(train) == 3 * len(wanted)
    (folder / "train.json").write_text(json.dumps(train))
    for name in ("test.json", "new_test.json", "objects.json"):
        shutil.copy(REAL / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def rendered(tmp_path_factory):
    """Folder of 24 rendered scenes of three objects."""
    folder = tmp_path_factory.mktemp("rendered") / "scenes"
    for _ in lab.load_renderer().render_scenes(folder, 24):
        pass
    return folder


@pytest.fixture(scope="session")
def scenes(request):
    """The real subset where there is one, else rendered scenes: for tests that need pictures of objects."""
    return request.getfixturevalue("iclevr" if (REAL / "unpack.py").is_file() else "rendered")


@pytest.fixture
def real_files(iclevr, monkeypatch):
    """What `find_data` makes of the real subset."""
    monkeypatch.setenv("LAB6_DATA", str(iclevr))
    return lab.find_data()


def noise_picture(rng, size=(64, 64)):
    """A picture of coloured noise, (height, width, 3) uint8, unlike any other."""
    return rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)


def png(pixels):
    """The bytes of a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def make_data(folder, scenes=(0, 1, 5500), size=(64, 64), as_zip=False, pictures=None, objects="objects.json"):
    """Write the course's layout with synthetic pictures; returns the folder.

    Scene s has three pictures of 1, 2 and 3 objects; `pictures` ({name: (pixels, label set)}) replaces them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    if pictures is None:
        pictures = {}
        for scene in scenes:
            labels = [lab.OBJECTS[i] for i in rng.permutation(24)[:3]]
            for k in range(3):
                pictures[f"CLEVR_train_{scene:06d}_{k}.png"] = noise_picture(rng, size), labels[: k + 1]
    if as_zip:
        with zipfile.ZipFile(folder / "iclevr.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for name, (pixels, _) in pictures.items():
                archive.writestr(f"iclevr/{name}", png(pixels))
    else:
        (folder / "iclevr").mkdir()
        for name, (pixels, _) in pictures.items():
            (folder / "iclevr" / name).write_bytes(png(pixels))
    train = {name: labels for name, (_, labels) in reversed(pictures.items())}  # in another order than the files
    write = lambda name, value: (folder / name).write_text(json.dumps(value))
    write("train.json", train)
    write("test.json", [["gray cube"], ["red cube", "blue sphere"]])
    write("new_test.json", [["cyan cylinder", "red cube", "blue sphere"]])
    write(objects, {name: i for i, name in enumerate(lab.OBJECTS)})
    return folder


@pytest.fixture
def data(tmp_path, runs, monkeypatch):
    """A folder of synthetic data that LAB6_DATA names."""
    folder = make_data(tmp_path / "data")
    monkeypatch.setenv("LAB6_DATA", str(folder))
    return folder


@pytest.fixture(scope="session")
def synthetic(tmp_path_factory, environment):
    """An ICLEVRDataset of 42 synthetic training pictures."""
    folder = make_data(tmp_path_factory.mktemp("synthetic") / "data", scenes=range(14))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAB6_DATA", str(folder))
        return lab.ICLEVRDataset(lab.find_data(), "train")


def tiny(**overrides):
    """Settings of the tiny profile on the CPU in float32, of the preset tokens if no other is named."""
    return lab.make_settings("tiny", **dict(preset="tokens", device="cpu", precision="fp32") | overrides)


def tiny_linear(**overrides):
    """The preset linear-512, shrunk by the profile, with labels dropped."""
    return tiny(**dict(preset="linear-512", label_dropout=0.1) | overrides)


def make_pipeline(settings, sampler="ddim"):
    """A pipeline of untrained weights."""
    pipe = lab.ICLEVRPipeline(lab.make_denoiser(settings).eval(), lab.make_scheduler(settings))
    pipe.scheduler = lab.make_sampler(sampler, pipe.scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Run:
    """One run of the notebooks by run_notebooks.py."""

    def __init__(self, home, iclevr, *arguments):
        self.runs, self.figures = home / "runs", home / "runs" / "tiny" / "figures"
        environment = os.environ | dict(
            LAB6_DATA=str(iclevr), LAB6_RUNS=str(self.runs), LAB6_FIGURES=str(home / "figures")
        )
        command = [sys.executable, str(ROOT / "run_notebooks.py"), "--profile", "tiny", "--timeout", "300"]
        command += arguments
        self.before, start = repository(), time.time()
        done = subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True)
        self.code, self.out, self.err, self.seconds = done.returncode, done.stdout, done.stderr, time.time() - start
        self.after, self.home = repository(), home
        self.folder = self.runs / "notebooks" / "tiny"

    def notebook(self, name):
        return nbformat.read(self.folder / f"{name}.ipynb", as_version=4)


def repository():
    """Names of the files that a run might leave in the repository."""
    return {str(p) for folder in ("notebooks", "figures") for p in (ROOT / folder).rglob("*") if p.is_file()}


# ── Evaluators ──────────────────────────────────────────────────────────────────────────────────────


def outputs(**chances):
    """(1, 24) probabilities: 0.01 but for what is named, as red_cube=0.9."""
    row = torch.full((1, 24), 0.01)
    for name, value in chances.items():
        row[0, lab.OBJECTS.index(name.replace("_", " "))] = value
    return row


@pytest.fixture(scope="module")
def network():
    """A ResNet-18 made with torchvision alone, as the course describes it, with its batch statistics stirred."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = resnet18(weights=None)
        network.fc = nn.Sequential(nn.Linear(512, 24), nn.Sigmoid())
        with torch.no_grad():
            network.fc[0].weight.mul_(20)  # outputs that differ from picture to picture
            for x in torch.rand(3, 8, 3, 64, 64) * 2 - 1:
                network(x)
    return network.eval()


def evaluation(rows, label_sets):
    """An Evaluation of rows[seed][set] = {name: probability}."""
    probabilities = torch.stack([torch.cat([outputs(**chances) for chances in seed]) for seed in rows])
    return lab.Evaluation(probabilities, lab.encode_labels(label_sets), "test")


HAND_MADE = (
    [["red cube"], ["gray cube", "blue sphere", "cyan cylinder"]],
    [
        [dict(red_cube=0.9), dict(gray_cube=0.9, blue_sphere=0.8, cyan_cylinder=0.7)],  # 1 of 1, 3 of 3
        [dict(red_cube=0.4), dict(gray_cube=0.9, blue_sphere=0.8, red_cube=0.7)],  # 1 of 1 (below 0.5), 2 of 3
    ],
)


def shipped(name, file):
    path = lab.WEIGHTS / name / file
    if not path.is_file():
        pytest.skip(f"data/weights/{name} is not there yet")
    return path


def matrices(file):
    from safetensors import safe_open

    with safe_open(file, "pt") as tensors:
        return {tensors.get_slice(k).get_dtype() for k in tensors.keys() if len(tensors.get_slice(k).get_shape()) > 1}  # noqa: SIM118


# ── Pipelines ───────────────────────────────────────────────────────────────────────────────────────


SETS = [["red sphere"], ["cyan cube", "gray cube"], list(lab.MANUAL_SET)]


@pytest.fixture(scope="module")
def shared():
    return make_pipeline(tiny())


@pytest.fixture
def pipe(shared):
    """An untrained pipeline with the DDIM sampler."""
    shared.scheduler = lab.make_sampler("ddim", shared.scheduler)
    return shared


@pytest.fixture
def calls(pipe):
    """(batch size, null, labels) of each call of the network."""
    seen = []

    def note(module, arguments):
        x_t, _, labels, null, *_ = arguments
        seen.append((len(x_t), null, labels))

    hook = pipe.denoiser.register_forward_pre_hook(note)
    yield seen
    hook.remove()


def generators(count, seed=0):
    return [lab.make_generator(seed, i) for i in range(count)]


def draw(pipe, sets=SETS, steps=3, seed=0, **options):
    options = dict(generator=generators(len(sets), seed), output_type="pt") | options
    return pipe(sets, steps, **options).images


def start(count):
    return torch.cat([torch.randn(1, 3, 64, 64, generator=g) for g in generators(count)])


# ── Training ────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def small(synthetic):
    """40 pictures: five steps of eight."""
    return part_of(synthetic, 40)


def part_of(dataset, count):
    class Part(torch.utils.data.Dataset):
        pixels, labels, split = dataset.pixels[:count], dataset.labels[:count], "train"

        images_at = lab.ICLEVRDataset.images_at

        def __len__(self):
            return count

    return Part()


def run(settings, dataset, folder, **options):
    return list(lab.train(settings, dataset, folder, **options))


def assert_same(a, b, where="checkpoint"):
    """Every tensor and number of two checkpoints is the same, bit for bit (but for what a clock says)."""
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a.keys() - {"images_per_s", "seconds_left"}:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


def batches(settings, dataset, count):
    scheduler = lab.make_scheduler(settings)
    examples = lab.open_examples(settings, dataset, None)
    return [lab.training_batch(settings, examples, scheduler, step) for step in range(count)]
