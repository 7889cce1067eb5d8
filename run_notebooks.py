#!/usr/bin/env python3
"""Run the workbook's notebooks in order, then make the report from them.

    python run_notebooks.py                              all notebooks, then report.html and report.pdf
    python run_notebooks.py --profile shipped            tiny, quick, shipped, full, or auto (the default)
    python run_notebooks.py --only 04 -p split=test -p guidance_scale=3
    python run_notebooks.py --report                     only the report, from notebooks that ran before
    python run_notebooks.py --only 06 --sweep preset=tokens,linear-attn seed=0,1,2        every combination
    torchrun --nproc-per-node 8 run_notebooks.py --train -p epochs=50      notebook 03's training, in 8 processes
    LAB6_STUDENT_ID=... LAB6_STUDENT_NAME=... python run_notebooks.py --submission         what the course wants

`-p name=value` sets a variable of the cell tagged `parameters` in every chosen notebook that has it; unknown
names and wrong types are refused before anything runs. Executed notebooks go to
data/runs/notebooks/PROFILE/ (as NN_name.partial.ipynb until all of it ran) with a status.json beside them;
the report goes to the profile's figures folder. The run stops at the first failing notebook.

A sweep runs the chosen notebooks once for each combination, into sweep/ in that folder, makes no report, and goes on
past a failing one. Said again, it does what is not done yet; delete a combination's notebook to have it done again.
It runs on dask: on this machine as many at a time as there are GPUs, or as cores and memory allow (--workers), or on
the workers of a scheduler (--scheduler) that see the same folders and have a thread each (dask worker --nthreads 1).
What a worker did when it died is done again.

Exit status: 0 all ran, 1 a notebook failed, 2 a request that cannot be carried out, 130 interrupted.
"""

import argparse
import ast
import base64
import contextlib
import datetime
import difflib
import html
import io
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import nbformat
import papermill
from jinja2 import pass_context
from latex2mathml.converter import convert
from nbconvert.exporters import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from traitlets.config import Config

ROOT = Path(__file__).resolve().parent
NOTEBOOKS = ROOT / "notebooks"
LEFT_OUT = {"parameters", "injected-parameters", "interactive", "solution", "no-report"}  # cell tags


class Refused(Exception):
    """A request that cannot be carried out; the message is for the person who made it."""


class Failed(Exception):
    """A notebook did not run to its end; the message says where and why."""


# ── Choosing and checking ──────────────────────────────────────────────────────────────────────────────


def choose_notebooks(folder, only=None):
    """Paths of the notebooks NN_name.ipynb in `folder`, in order; `only` is "04" or "01,02"."""
    found = {int(path.name[:2]): path for path in sorted(folder.glob("[0-9][0-9]_*.ipynb"))}
    numbers = {int(n) for n in re.findall(r"\d+", only)} if only else set(found)
    if not numbers or numbers - set(found) or not re.fullmatch(r"[\d,]+", only or "1"):
        raise Refused(f"--only {only}: the notebooks are {', '.join(p.stem for p in found.values()) or 'none'}")
    return [found[n] for n in sorted(numbers)]


def read_parameters(path):
    """{name: default} of a notebook's `parameters` cell, which holds plain literals only."""
    try:
        found = papermill.inspect_notebook(path)
        defaults = {name: ast.literal_eval(parameter["default"]) for name, parameter in found.items()}
    except Exception as error:
        raise Refused(f"{path.name}: cannot read its parameters ({error})") from error
    if "profile" not in defaults:
        raise Refused(f"{path.name}: no variable `profile` in a cell tagged `parameters`")
    return defaults


def parse_value(text, default):
    """`text` as a value of the type of `default`. Raises ValueError or SyntaxError where it is not one."""
    if isinstance(default, str):
        return text
    words = {"true": True, "false": False}
    if default is None:  # a setting that the preset chooses; lab6_utils knows its type
        try:
            value = words[text.lower()] if text.lower() in words else ast.literal_eval(text)
        except (ValueError, SyntaxError):
            return text
        return text if value is None else list(value) if isinstance(value, tuple) else value
    if isinstance(default, list) and not text.lstrip().startswith("["):
        return [parse_value(part.strip(), default[0] if default else "") for part in text.split(",")]
    value = words[text.lower()] if text.lower() in words else ast.literal_eval(text)
    if isinstance(default, float) and type(value) is int:
        value = float(value)
    if isinstance(default, list) and default:
        value = [parse_value(v if isinstance(v, str) else repr(v), default[0]) for v in value]
    if type(value) is not type(default):
        raise ValueError(f"{text} is a {type(value).__name__}")
    return value


def check_parameters(paths, assignments):
    """{path: {name: value}} of what each notebook is given. Raises Refused: unknown name, wrong type."""
    defaults = {path: read_parameters(path) for path in paths}
    given = {path: {} for path in paths}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals or name == "profile":
            raise Refused(f"-p {assignment}: " + ("use --profile" if equals else "write name=value"))
        takers = [path for path in paths if name in defaults[path]]
        if not takers:
            names = {n: None for known in defaults.values() for n in known}
            close = [n for n in names if name in n.split("_")] or difflib.get_close_matches(name, names, n=1)
            lines = [f"-p {assignment}: no such parameter" + (f"; did you mean {close[0]}?" if close else "")]
            lines += [f"  {path.stem} has {', '.join(n for n in defaults[path] if n != 'profile')}" for path in paths]
            raise Refused("\n".join(lines))
        for path in takers:
            default = defaults[path][name]
            try:
                given[path][name] = parse_value(text, default)
            except (ValueError, SyntaxError):
                wanted = f"{type(default).__name__}, such as its default {default!r}"
                raise Refused(f"-p {assignment}: {path.stem} wants {wanted}") from None
    return given


# ── Running ────────────────────────────────────────────────────────────────────────────────────────────


class ProgressLines(io.TextIOBase):
    """The file that papermill writes a notebook's prints to: "epoch..." and "progress..." lines pass."""

    rest = ""

    def __init__(self, prefix="  "):
        self.prefix = prefix

    def write(self, text):
        *lines, self.rest = (self.rest + text).split("\n")
        for line in lines:
            if line.lower().startswith(("epoch", "progress")):
                print(f"{self.prefix}{line}", flush=True)


def write_text(path, text):
    """Write a file so that `path` is either the old file or the whole new one."""
    partial = path.with_name(f"{path.stem}.partial{path.suffix}")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def read_json(path):
    """What a json file holds; {} where it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


#: What notebooks are told by environment variables, also those that run on other machines.
PASSED_ON = ("LAB6_DATA", "LAB6_RUNS", "LAB6_FIGURES", "LAB6_HEADLESS", "JUPYTER_PREFER_ENV_PATH", "PYTHONPATH",
             "PYDEVD_DISABLE_FILE_VALIDATION")  # fmt: skip


def set_environment():
    """What the kernels inherit: this interpreter, lab6_utils importable, no progress bars, absolute paths."""
    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"  # else a kernel of the user's named "python3" comes first
    os.environ["LAB6_HEADLESS"] = "1"
    os.environ["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"  # no debugger warning from every kernel
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    for name in ("LAB6_DATA", "LAB6_RUNS", "LAB6_FIGURES"):
        if os.environ.get(name):
            os.environ[name] = str(Path(os.environ[name]).expanduser().resolve())


def where_it_stopped(partial):
    """ "cell 7 of 31: its first line" for the last cell that began, numbered as in the stored notebook."""
    added = {"injected-parameters", "papermill-error-cell-tag"}  # by papermill
    cells = [c for c in read_json(partial).get("cells", []) if not added & set(c["metadata"].get("tags", []))]
    for number, cell in reversed(list(enumerate(cells, 1))):
        if cell["cell_type"] == "code" and cell["metadata"].get("papermill", {}).get("start_time"):
            first_line = "".join(cell["source"]).strip().partition("\n")[0]
            return f"cell {number} of {len(cells)}: {first_line}"
    return "before its first cell"


def explain(error):
    """An error's name and message, with the last lines of the traceback where a cell raised it."""
    if not hasattr(error, "traceback"):  # a time-out or a dead kernel
        return f"{type(error).__name__}: {error}".strip().splitlines()[0]
    lines = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(error.traceback)).splitlines()
    return "\n    ".join([*[line for line in lines if line.strip()][-8:-1], f"{error.ename}: {error.evalue}"])


def execute(path, final, parameters, timeout=None, prefix="  "):
    """Run one notebook; `final` is replaced only when all of it ran. Raises Failed.

    prefix: of the lines on its progress.
    """
    partial = final.with_suffix(".partial.ipynb")
    try:
        executed = papermill.execute_notebook(
            path, partial, parameters, kernel_name="python3", cwd=path.parent, progress_bar=False,
            stdout_file=ProgressLines(prefix), execution_timeout=timeout, start_timeout=600, iopub_timeout=60,
            extra_arguments=["--log-level=40"],  # no advice on transports from every kernel
        )  # fmt: skip
    except Exception as error:
        reason = f"{explain(error)}\n  what ran is in {partial}"
        raise Failed(f"{where_it_stopped(partial)}\n    {reason}") from error
    code = [cell for cell in executed.cells if cell.cell_type == "code" and cell.source.strip()]
    if not all(cell.execution_count for cell in code):  # exit() in a cell is no error to papermill
        raise Failed(f"{where_it_stopped(partial)}\n    ended the kernel: the cells after it did not run")
    os.replace(partial, final)


def record(folder, name, state, seconds, parameters, **facts):
    """Enter how a notebook stands in status.json of its folder, and print it."""
    date = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    entry = {"state": state, "seconds": round(seconds, 1), "date": date, **facts, "parameters": parameters}
    status = read_json(folder / "status.json") | {name: entry}  # another run may have written too
    write_text(folder / "status.json", json.dumps(status, indent=1))
    print(f"{name:28}{state}" + ("" if state == "running" else f"  {seconds:.1f} s"), flush=True)


def run_all(jobs, folder, facts, timeout=None):
    """Run notebooks in order into `folder`, status.json beside them. Raises Failed at the first failure.

    jobs: {name of the executed notebook: (path, parameters)}.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, (path, parameters) in jobs.items():
        start = time.monotonic()
        record(folder, name, "running", 0, parameters, **facts)
        try:
            execute(path, folder / f"{name}.ipynb", parameters, timeout)
        except (Failed, KeyboardInterrupt) as error:
            reason = str(error) or "interrupted"
            record(folder, name, "failed", time.monotonic() - start, parameters, **facts, error=reason)
            raise
        record(folder, name, "ok", time.monotonic() - start, parameters, **facts)


def run_job(path, final, parameters, timeout, environment, gpus):
    """What a worker of a sweep does: one notebook. Returns the seconds it took and why it failed, or None.

    environment: variables that the notebook is to see; gpus: ids of this machine's, of which a worker has one.
    """
    from distributed import get_worker

    os.environ.update(environment)
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[get_worker().name % len(gpus)]
    start, failure = time.monotonic(), None
    print(f"{final.stem:28}running", flush=True)
    try:
        execute(path, final, parameters, timeout, f"  {final.stem}: ")
    except Failed as error:
        failure = str(error)
    return time.monotonic() - start, failure


@contextlib.contextmanager
def open_cluster(scheduler, workers):
    """A dask client of the scheduler at an address, or, where that is None, of so many workers on this machine."""
    from distributed import Client, LocalCluster

    if scheduler:
        try:
            client = Client(scheduler, timeout=10)
            client.wait_for_workers(1, timeout=60)
        except (OSError, ValueError) as error:  # a time-out is an OSError
            raise Refused(f"--scheduler {scheduler}: no dask scheduler with workers answers there ({error})") from None
        with client:
            if any(worker["nthreads"] > 1 for worker in client.scheduler_info(n_workers=-1)["workers"].values()):
                raise Refused(f"--scheduler {scheduler}: start its workers with --nthreads 1, a notebook each")
            yield client
        return
    threads = str(max(1, os.cpu_count() // workers))  # of each, or they would fight
    names = [name for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS") if name not in os.environ]
    os.environ.update(dict.fromkeys(names, threads))
    try:
        # The notebooks' memory is that of their kernels, which dask does not see.
        options = dict(threads_per_worker=1, memory_limit=0, dashboard_address="127.0.0.1:0")
        with LocalCluster(n_workers=workers, **options) as cluster, Client(cluster) as client:
            yield client
    finally:
        for name in names:
            del os.environ[name]


def how_many(gpus):
    """How many notebooks to run at a time: one a GPU; without, one a core as far as memory allows 4 GB to each."""
    import psutil

    return gpus or max(1, min(os.cpu_count(), psutil.virtual_memory().available // 4_000_000_000))


def run_sweep(jobs, folder, facts, timeout=None, scheduler=None, workers=None):
    """Run notebooks into `folder` on dask's workers, leaving out what was done before with the same parameters.

    Whatever runs on a worker that dies is given to another, and each is entered in status.json once, when it is done.

    Raises Failed at the end, when some did.
    """
    import torch
    from distributed import as_completed

    folder.mkdir(parents=True, exist_ok=True)
    status, left = read_json(folder / "status.json"), dict(jobs)
    for name, (_, parameters) in jobs.items():
        before = status.get(name, {})
        same = before.get("state") == "ok" and before.get("parameters") == parameters
        if same and (folder / f"{name}.ipynb").is_file():
            print(f"{name}  done before, at commit {before['commit']}", flush=True)
            del left[name]
    if not left:
        return
    gpus = [] if scheduler else [str(i) for i in range(torch.cuda.device_count())]
    if gpus and os.environ.get("CUDA_VISIBLE_DEVICES"):
        gpus = os.environ["CUDA_VISIBLE_DEVICES"].split(",")
    environment = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    failed = []
    with open_cluster(scheduler, min(len(left), workers or how_many(len(gpus)))) as client:
        doing = {}
        for name, (path, parameters) in left.items():
            target = folder / f"{name}.ipynb"
            doing[client.submit(run_job, path, target, parameters, timeout, environment, gpus, pure=False)] = name
        for number, future in enumerate(as_completed(doing), 1):
            name = doing[future]
            try:
                seconds, failure = future.result()
            except Exception as error:  # such as a worker that dies again and again
                seconds, failure = 0, f"{type(error).__name__}: {error}"
            print(f"{number} of {len(left)}:", end=" ")
            more = {"error": failure} if failure else {}
            record(folder, name, "failed" if failure else "ok", seconds, left[name][1], **facts, **more)
            if failure:
                failed.append(name)
                print(f"  {failure}", file=sys.stderr)
    if failed:
        raise Failed(f"{len(failed)} of {len(left)} failed: {'; '.join(failed)}")


def train(settings, resume):
    """Train as notebook 03 does, in as many processes as torchrun or accelerate started; prints a line an epoch."""
    from accelerate import PartialState

    import lab6_utils

    # The others wait while the first renders scenes or trains the autoencoder: longer than the usual ten minutes.
    state = PartialState(cpu=settings.device == "cpu", timeout=datetime.timedelta(hours=12))
    folder = lab6_utils.run_folder(settings)
    try:
        with state.main_process_first():  # the others find the cache
            dataset = lab6_utils.training_set(settings, lab6_utils.find_data(settings.rendered_scenes))
        if state.is_main_process:
            print(f"progress: {len(dataset)} images, {state.num_processes} processes, {folder}", flush=True)
            for epoch in lab6_utils.train_autoencoder(settings, dataset, folder):
                print(epoch, flush=True)
        state.wait_for_everyone()
        for epoch in lab6_utils.train(settings, dataset, folder, resume):
            if state.is_main_process:
                print(epoch, flush=True)
    except (OSError, ValueError, RuntimeError) as error:  # no data, or a checkpoint of other settings
        raise Refused(error) from None


def combine(assignments):
    """Every combination of a sweep's "name=value,value", as lists of "name=value"; a list's commas do not count."""
    choices = []
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals or not text:
            raise Refused(f"--sweep {assignment}: write name=value,value")
        choices.append([f"{name}={value}" for value in re.split(r",(?![^\[]*\])", text)])
    return [list(combination) for combination in itertools.product(*choices)]


# ── The report ─────────────────────────────────────────────────────────────────────────────────────────


def to_mathml(tex, display=False):
    """MathML of a formula; what latex2mathml does not know is first written in what it does."""
    source = re.sub(r"\\(begin|end)\{(aligned|gathered)\}", r"\\\1{align*}", tex.strip())
    source = re.sub(r"(\\[bB]igg?[lrm]?)?\s*\\([lr]?Vert\b|\|)", r"\\Vert ", source)
    source = re.sub(r"\\operatorname\*?\s*\{", r"\\mathrm{", re.sub(r"\\arg\b", r"\\mathrm{arg}", source))
    source = re.sub(r"\\(math(?:bf|bb|cal|rm)|boldsymbol)\s*([A-Za-z0-9]|\\[A-Za-z]+)", r"\\\1{\2}", source)
    try:
        mathml = convert(source, display="block" if display else "inline")
    except Exception:  # it has many
        mathml = html.escape(f"${tex}$")
    mathml = re.sub(r"<mi>(?:~|&#x0007E;)</mi>", "<mo>&#x223C;</mo>", mathml)  # \sim is a relation
    function = r"(?<!<msup>)(?<!<msub>)(<mi>(?:log|ln|exp|max|min|sin|cos)</mi>)(?=<m(?!o[ >]))"
    mathml = re.sub(function, r'\1<mspace width="0.17em"/>', mathml)
    mathml = mathml.replace('"negativethinmathspace"', '"-0.17em"')
    if re.search(r"[\\$]|&amp;", re.sub(r"<[^>]+>", "", mathml)):
        print(f"report: this TeX could not be typeset: {tex.strip()}", file=sys.stderr)
    return mathml


class Renderer(IPythonRenderer):
    """Markdown to HTML, formulas as MathML; `headings` collects what the table of contents shows."""

    def inline_math(self, body):
        return to_mathml(body)

    def block_math(self, body):
        return to_mathml(body, display=True)

    def latex_environment(self, name, body):
        return to_mathml(f"\\begin{{{name}}}{body}\\end{{{name}}}", display=True)

    def heading(self, text, level, **attrs):
        anchor = self.chapter if level == 1 else f"h{len(self.headings)}"
        self.headings.append({"text": text, "level": level, "anchor": anchor})
        return f'<h{level} id="{anchor}">{text}</h{level}>\n'


class ReportExporter(HTMLExporter):
    """nbconvert's HTML exporter with that renderer."""

    @pass_context
    def markdown2html(self, context, source):
        resources = context["resources"]
        renderer = Renderer(escape=False, embed_images=True, path=resources["metadata"]["path"])
        renderer.headings, renderer.chapter = resources["headings"], context["cell"].metadata.chapter
        text = MarkdownWithMath(renderer=renderer).render(source)
        return re.sub(r'href="(?:\./)?(\d\d_\w+)\.ipynb[^"]*"', r'href="#\1"', text)  # to the chapter


def make_exporter():
    """The exporter with the template in notebooks/templates, tagged cells removed, prints joined."""
    shown = ["text/html", "text/markdown", "image/svg+xml", "image/png", "image/jpeg", "text/plain"]
    config = Config(
        CoalesceStreamsPreprocessor={"enabled": True},
        TagRemovePreprocessor={"enabled": True, "remove_cell_tags": LEFT_OUT},
        NbConvertBase={"display_data_priority": shown},
    )
    templates = str(ROOT / "notebooks" / "templates")
    exporter = ReportExporter(config=config, template_name="report", extra_template_basedirs=[templates])
    exporter.register_filter("shorten", shorten)
    return exporter


def shorten(text, epochs=12):
    """Printed lines for paper: no progress lines, and of many epochs the first and the last."""
    lines = [line for line in text.splitlines() if not line.lower().startswith("progress")]
    printed = [i for i, line in enumerate(lines) if line.lower().startswith("epoch")]
    if len(printed) > epochs:
        lines[printed[epochs // 2] : printed[-epochs // 2]] = ["…"]
    return "\n".join(lines)


def assemble(paths):
    """One notebook of the cells of executed notebooks, each cell marked with its chapter."""
    book = nbformat.v4.new_notebook()
    for path in paths:
        for number, cell in enumerate(nbformat.read(path, as_version=4).cells):
            cell.id, cell.metadata["chapter"] = f"c{path.name[:2]}-{number}", path.stem
            book.cells.append(cell)
    return book


def make_html(settings, notebooks):
    """Write report.html from the executed notebooks of the settings' profile; returns its path."""
    folder, figures = settings.runs / "notebooks" / settings.profile, settings.figures
    paths = [path for path in sorted(folder.glob("[0-9][0-9]_*.ipynb")) if ".partial" not in path.name]
    if not paths:
        raise Refused(f"no executed notebooks in {folder}: run them first")
    status = read_json(folder / "status.json")
    runs = {path.stem: status.get(path.stem, {}) for path in paths}
    grids = sorted(figures.glob("*grid*.png"), key=lambda path: ("test" not in path.stem, len(path.stem)))
    front = {
        "student": list(filter(None, map(os.environ.get, ("LAB6_STUDENT_ID", "LAB6_STUDENT_NAME")))),
        "profile": settings.profile,
        "runs": runs,
        "last": max(runs.values(), key=lambda run: run.get("date", "")),
        "missing": [path.stem for path in choose_notebooks(notebooks) if path.stem not in runs],
        "results": read_json(figures / "results.json").get("results", []),
        "hero": base64.b64encode(grids[0].read_bytes()).decode() if grids else None,
    }
    resources = {"headings": [], "front": front, "metadata": {"name": "report", "path": str(notebooks)}}
    body, _ = make_exporter().from_notebook_node(assemble(paths), resources)
    figures.mkdir(parents=True, exist_ok=True)
    write_text(figures / "report.html", body)
    return figures / "report.html"


def find_browsers():
    """Commands of the Chrome, Chromium and Edge browsers on this computer."""
    names = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "microsoft-edge"]
    for name in ("Google Chrome", "Chromium", "Microsoft Edge"):
        names += [f"/Applications/{name}.app/Contents/MacOS/{name}"]
    for base in filter(None, map(os.environ.get, ("ProgramFiles", "ProgramFiles(x86)", "LocalAppData"))):
        names += [f"{base}/Google/Chrome/Application/chrome.exe", f"{base}/Microsoft/Edge/Application/msedge.exe"]
    return list(filter(None, map(shutil.which, names)))


def make_pdf(page):
    """Print an HTML file to a PDF beside it with the first browser that can; returns its path, or None."""
    partial = page.with_suffix(".partial.pdf")
    for old in (partial, page.with_suffix(".pdf")):  # a PDF of an earlier run must not stand beside this page
        old.unlink(missing_ok=True)
    flags = "--headless --disable-gpu --no-first-run --disable-background-networking --disable-sync "
    flags += "--disable-component-update --no-pdf-header-footer --generate-pdf-document-outline"
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        flags += " --no-sandbox"  # Chromium's sandbox does not run as root
    for browser in find_browsers():
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as own:  # not the user's open browser
            options = [*flags.split(), f"--user-data-dir={own}", f"--print-to-pdf={partial}", page.as_uri()]
            with contextlib.suppress(OSError, subprocess.SubprocessError):
                subprocess.run([browser, *options], capture_output=True, check=True, timeout=300)
                os.replace(partial, page.with_suffix(".pdf"))
                return page.with_suffix(".pdf")
    return None


def report(settings, notebooks=NOTEBOOKS):
    """Make report.html and, where there is a browser, report.pdf, whose path is returned, else None."""
    page = make_html(settings, notebooks).resolve()
    advice = "no report.pdf made: no working Chrome, Chromium or Edge found. Install one (Debian: apt install chromium "
    advice += "fonts-noto-cjk), then say python run_notebooks.py --report; or print report.html from any browser."
    pdf = make_pdf(page)
    print(f"report  {page}", pdf or advice, sep="\nreport  ")
    return pdf


def submission(settings, weights="auto", notebooks=NOTEBOOKS):
    """Write DL_LAB6_ID_NAME.zip (the report and the source) and DL_lab6_ID_NAME.pth (the weights) where one is.

    The student's number and name are those of LAB6_STUDENT_ID and LAB6_STUDENT_NAME, the report is made of what ran
    last. The .pth is {"model": state dict of the denoiser, "config": its arguments, "scheduler": those of the
    DDPMScheduler, ...}, read with weights_only=True.
    """
    import torch

    import lab6_utils

    student = [os.environ.get(name, "").strip() for name in ("LAB6_STUDENT_ID", "LAB6_STUDENT_NAME")]
    if not all(student) or any(re.search(r'[\\/:*?"<>|\x00-\x1f]', part) for part in student):
        raise Refused('say who you are: make submission STUDENT_ID=... NAME=... (no / \\ : * ? " < > | in them)')
    try:
        pipe = lab6_utils.load_pipeline(settings, weights)
    except (OSError, ValueError) as error:
        raise Refused(error) from None
    pdf = report(settings, notebooks)
    if pdf is None:
        raise Refused("a submission needs report.pdf")
    name = "_".join(student)
    tracked = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True).stdout
    files = [ROOT / file for file in tracked.split("\0") if file] or [*ROOT.glob("*.*"), *ROOT.glob("[nt]*/**/*.*")]
    left_out = {ROOT / "figures", ROOT / "data" / "weights", ROOT / ".ci"}
    target = Path(f"DL_LAB6_{name}.zip").resolve()
    partial = target.with_suffix(".partial.zip")
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(pdf, f"DL_LAB6_{name}/report.pdf")
        for file in files:
            if file.is_file() and not left_out & set(file.parents):
                archive.write(file, f"DL_LAB6_{name}/source/{file.relative_to(ROOT).as_posix()}")
    os.replace(partial, target)
    print(f"submission  {target}")
    config = {key: value for key, value in pipe.denoiser.config.items() if not key.startswith("_")}
    weights = dict(model=pipe.denoiser.state_dict(), config=config, scheduler=dict(pipe.scheduler.config))
    if pipe.autoencoder is not None:
        weights |= dict(autoencoder=pipe.autoencoder.state_dict(), autoencoder_config=dict(pipe.autoencoder.config))
    target = target.with_name(f"DL_lab6_{name}.pth")
    partial = target.with_suffix(".partial.pth")
    torch.save(weights, partial)
    os.replace(partial, target)
    print(f"submission  {target}")


# ── Command line ───────────────────────────────────────────────────────────────────────────────────────


def run_facts(settings):
    """Commit, device and data of a run, for status.json and the report."""
    import lab6_utils

    try:
        data = lab6_utils.find_data(settings.rendered_scenes).source
    except (OSError, ValueError, RuntimeError) as error:
        raise Refused(error) from None
    return {"commit": lab6_utils.commit(), "device": lab6_utils.device_name(settings), "data": data}


def main(argv=None, notebooks=NOTEBOOKS):
    """Run the command line `argv` on a folder of notebooks; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="auto", help="tiny, quick, shipped, full, or auto (the default)")
    parser.add_argument("--only", metavar="NN[,NN]", help="run these notebooks only, by number")
    parser.add_argument("-p", dest="assignments", metavar="name=value", action="append", default=[])
    parser.add_argument("--sweep", metavar="name=value,value", nargs="+", help="run once for each combination")
    parser.add_argument("--scheduler", metavar="ADDRESS", help="sweep on the workers of this dask scheduler")
    parser.add_argument("--workers", type=int, metavar="N", help="sweep so many notebooks at a time on this machine")
    parser.add_argument("--train", action="store_true", help="run no notebook, train what notebook 03 would")
    parser.add_argument("--timeout", type=int, metavar="SECONDS", help="fail when one cell takes longer")
    parser.add_argument("--report", action="store_true", help="run nothing, only make the report again")
    parser.add_argument("--submission", action="store_true", help="run nothing, make the course's zip and pth")
    parser.add_argument("--no-report", action="store_true", help="run notebooks, make no report")
    args = parser.parse_args(argv)
    first = os.environ.get("LOCAL_RANK", "0") == "0"  # of several processes on a machine one speaks
    for number in (signal.SIGINT, signal.SIGTERM):  # both shut the kernels down; a shell may have had SIGINT ignored
        signal.signal(number, signal.default_int_handler)
    set_environment()
    try:
        if args.train and (args.only or args.sweep):
            raise Refused("--train trains what notebook 03 would: it goes without --only and --sweep")
        fits = args.sweep and (args.workers is None or args.workers > 0)
        if (args.workers is not None or args.scheduler) and (not fits or (args.workers and args.scheduler)):
            raise Refused("--workers N (1 or more) or --scheduler ADDRESS goes with --sweep")
        chosen = choose_notebooks(notebooks, "03" if args.train else args.only)
        jobs = {}
        for combination in combine(args.sweep or []):
            given = check_parameters(chosen, [*args.assignments, *combination])
            if not args.only and (six := notebooks / "06_experiments.ipynb") in given:
                # Beside the others it compares; by itself it trains the preset that it is given.
                given[six] = {k: v for k, v in given[six].items() if k in ("seed", "resume", "evaluator")}
            name = re.sub(r"[^\w=.,-]+", "_", ",".join(combination))
            jobs |= {f"{path.stem},{name}".rstrip(","): (path, parameters) for path, parameters in given.items()}
        sys.path.insert(0, str(ROOT))
        import lab6_utils  # takes seconds (torch), so after the checks

        try:
            settings = lab6_utils.make_settings(args.profile)
            settings_with = lambda given: lab6_utils.make_settings(
                args.profile, **{name: value for name, value in given.items() if name in vars(settings)}
            )
            for _, parameters in jobs.values():  # a value that cannot be is refused now, not in the notebook
                named = {name: parameters[name] for name in ("weights", "evaluator") if name in parameters}
                lab6_utils.check_files(settings_with(parameters), **named)
                lab6_utils.choose_splits(parameters.get("split", "both"))
        except (ValueError, FileNotFoundError) as error:
            raise Refused(error) from None
        if args.train:
            (_, given), *_ = jobs.values()
            train(settings_with(given), lab6_utils.goes_on(settings, given.get("resume", "auto")))
            return 0
        if args.submission:  # of the system that notebook 04 would draw with
            _, given = jobs.get("04_sampling_and_guidance", (None, {}))
            submission(settings_with(given), given.get("weights", "auto"), notebooks)
            return 0
        if not args.report:
            folder = settings.runs / "notebooks" / settings.profile / ("sweep" if args.sweep else "")
            jobs = {name: (path, {"profile": settings.profile, **given}) for name, (path, given) in jobs.items()}
            if args.sweep:
                run_sweep(jobs, folder, run_facts(settings), args.timeout, args.scheduler, args.workers)
            else:
                run_all(jobs, folder, run_facts(settings), args.timeout)
        if not args.no_report and not args.sweep:
            report(settings, notebooks)
    except Refused as error:
        if first:
            print(error, file=sys.stderr)
        return 2
    except Failed as error:
        print(f"  {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
