"""The report: what it shows and leaves out, formulas, pages and pictures of the PDF, and life without a browser."""

import base64
import io
import json
import re
import types
import unicodedata

import nbformat
import numpy as np
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from lab6.runner import report
from lab6.runner.parameters import NOTEBOOKS, choose_notebooks

FORMULAS = [
    r"q(x_t \mid x_0) = \mathcal{N}\left(x_t;\, \sqrt{\bar\alpha_t}\,x_0,\, (1-\bar\alpha_t)\,\mathbf I\right)",
    r"\begin{aligned} \bar\alpha_t &= \prod_{s=1}^{t}(1-\beta_s) \\ &= \frac{1}{2} \end{aligned}",
    r"\mathbb{E}_{x_0,\varepsilon,t}\bigl\lVert \varepsilon-\varepsilon_\theta(x_t,t)\bigr\rVert^2 + \|x\|_2",
    r"\operatorname*{softmax}\left(\frac{QK^\top}{\sqrt d}\right)V,\ \arg\min_\theta",
    r"\boldsymbol{\epsilon}_\theta \sim \mathcal N(0, 1),\ \log x",
    r"f(x) = \begin{cases} 1 & x > 0 \\ 0 & \text{otherwise} \end{cases}",
]


def picture(seed):
    """Base64 of a PNG that is not of one colour."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (40, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def executed_notebooks():
    """Two chapters as papermill leaves them."""
    png = new_output("display_data", {"image/png": picture(0), "text/plain": "<Figure>"})
    rows = "".join("<tr>" + f"<td>{i / 7:.5f}</td>" * 14 + "</tr>" for i in range(80))
    table = new_output("display_data", {"text/html": f"<table border=1>{rows}</table>", "text/plain": "TEXT TWIN"})
    epochs = new_output("stream", name="stdout", text="".join(f"epoch {i}\n" for i in range(1, 51)) + "progress 3\n")
    warning = new_output("stream", name="stderr", text="WARNING SHOWN")
    bar = new_output("display_data", {"application/vnd.jupyter.widget-view+json": {}, "text/plain": "BAR SHOWN"})
    first = [
        new_markdown_cell("# 1 · First chapter\n\nIt costs \\$5; `a $ in code`; see [the next](02_second.ipynb)."),
        new_code_cell("HIDDEN = 'input'", outputs=[png, bar, warning, epochs]),
        new_code_cell("1", outputs=[new_output("stream", text="SLIDER SHOWN")], metadata={"tags": ["interactive"]}),
        new_markdown_cell("## SOLUTIONS SHOWN", metadata={"tags": ["solution"]}),
        new_code_cell("2", outputs=[new_output("stream", text="LEFT OUT SHOWN")], metadata={"tags": ["no-report"]}),
    ]
    math = [new_markdown_cell(f"## Formula {i}\n\nInline ${tex}$ and\n\n$${tex}$$") for i, tex in enumerate(FORMULAS)]
    second = [new_markdown_cell("# 2 · Second chapter"), *math, new_code_cell("3", outputs=[table])]
    return {"01_first": new_notebook(cells=first), "02_second": new_notebook(cells=second)}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(settings, HTML, notebooks' folder) of a report with results, a picture, a student and a missing chapter."""
    root = tmp_path_factory.mktemp("report")
    settings = types.SimpleNamespace(profile="tiny", runs=root / "runs", figures=root / "figures")
    folder, notebooks = settings.runs / "notebooks" / "tiny", root / "notebooks"
    for path in (folder, notebooks, settings.figures):
        path.mkdir(parents=True)
    for name, notebook in executed_notebooks().items():
        nbformat.write(notebook, folder / f"{name}.ipynb")
        (notebooks / f"{name}.ipynb").touch()
    (notebooks / "03_third.ipynb").touch()
    run = {"state": "ok", "seconds": 1.5, "date": "2026-01-02T03:04:05+00:00", "commit": "abcdef0123", "device": "cpu"}
    run |= {"data": "course files", "parameters": {"profile": "tiny"}}
    (folder / "status.json").write_text(json.dumps({"01_first": run, "02_second": run | {"data": "rendered scenes"}}))
    record = {"system": "tokens", "evaluator": "resnet18", "split": "new_test", "sampler": "ddim", "steps": 20,
              "guidance": {"kind": "classifier-free", "scale": 2.0}, "seeds": 16, "accuracy": 0.9312,
              "ci95_seeds": [0.9204, 0.9419], "ci95_sets": [0.89, 0.96]}  # fmt: skip
    real = record | {"split": "real-held-out", "sampler": None, "steps": None, "guidance": None, "ci95_seeds": None}
    (settings.figures / "results.json").write_text(json.dumps({"schema": 1, "results": [record, real]}))
    (settings.figures / "04_grid_test.png").write_bytes(base64.b64decode(picture(1)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAB6_STUDENT_ID", "312550000")
        patch.setenv("LAB6_STUDENT_NAME", "王小明")
        page = report.make_html(settings, notebooks)
    return settings, page.read_text(encoding="utf-8"), notebooks


@pytest.fixture(scope="module")
def pdf(made):
    """Text of each page of the PDF, and its pictures' sizes."""
    pypdf = pytest.importorskip("pypdf")
    if not report.find_browsers():
        pytest.skip("no Chrome, Chromium or Edge to print with")
    path = report.make_pdf(made[0].figures / "report.html")
    assert path, "no browser could print the report"
    reader = pypdf.PdfReader(path)
    sizes = [image.image.size for page in reader.pages for image in page.images]
    return [page.extract_text() for page in reader.pages], sizes


def test_html_loads_nothing(made):
    html = made[1]
    assert not re.search(r"<script|<link|<iframe|@import|url\(", html)
    assert all(source.startswith("data:") for source in re.findall(r'src="([^"]{0,40})', html))
    assert html.count("data:image/png;base64,") == 2


def test_html_leaves_out_what_is_tagged(made):
    html = made[1]
    assert not re.search("HIDDEN|[A-Z]+ SHOWN|TEXT TWIN|progress 3", html)
    assert "epoch 1\n" in html and "epoch 50" in html and "epoch 25" not in html


def test_html_front_page(made):
    front = made[1].split("<main>")[0]
    for words in ("312550000 · 王小明", "tiny", "data: course files and rendered scenes ·", "cpu", "abcdef0123",
                  "2026-01-02", "03_third", "new_test", "classifier-free, s = 2.0", "0.931", "0.920–0.942",
                  "0.890–0.960", "real-held-out"):  # fmt: skip
        assert words in front, words
    anchors = re.findall(r'href="#([^"]+)"', made[1])
    assert len(anchors) >= 8 and all(f'id="{anchor}"' in made[1] for anchor in anchors)


def test_formulas_become_mathml(made, capsys):
    text = re.sub(r"<(pre|code|style)\b.*?</\1>", "", made[1].split("<main>")[1], flags=re.S)
    text = re.sub(r"<[^>]+>", "", text)
    assert "\\" not in text and "&amp;" not in text
    assert text.count("$") == 1 and "$5" in text, "only the literal dollar is left"
    assert made[1].count("<math") == 2 * len(FORMULAS)
    assert r"a $ in code" in made[1]
    report.to_mathml(r"\unknowncommand{x}")
    assert r"\unknowncommand" in capsys.readouterr().err


def test_formulas_of_the_notebooks(capsys):
    book = report.assemble(choose_notebooks(NOTEBOOKS))
    resources = {"headings": [], "front": {"last": {}, "runs": {}}, "metadata": {"path": str(NOTEBOOKS)}}
    html, _ = report.make_exporter().from_notebook_node(book, resources)
    text = re.sub(r"<[^>]+>", "", re.sub(r"<(pre|code|style)\b.*?</\1>", "", html, flags=re.S))
    assert "$" not in text and not re.search(r"\\[A-Za-z]+", text)
    assert "typeset" not in capsys.readouterr().err


def test_pdf_pages(pdf):
    pages, sizes = pdf
    pages = [unicodedata.normalize("NFKC", page) for page in pages]  # some signs come back as their radicals
    text = "\n".join(pages)
    assert len(pages) >= 6
    assert "王小明" in pages[0] and "Results" in pages[0] and "Contents" in pages[1]
    for title in ("1 · First chapter", "2 · Second chapter"):
        starts = [i for i, page in enumerate(pages, 1) if page.startswith(f"{i}\n{title}")]
        assert len(starts) == 1, f"{title} begins a page, which has its number"
    assert not re.search(r"\\[A-Za-z]+", text)
    assert text.replace("$5", "").replace("a $ in code", "").count("$") == 0
    assert (80, 40) in sizes and len(sizes) == 2
    assert len(re.findall(r"\b0\.14286\b", text)) == 14, "wide tables stay on the page, their numbers whole"


def test_without_a_browser(made, capsys, monkeypatch):
    settings, _, notebooks = made
    monkeypatch.setattr("lab6.runner.report.find_browsers", lambda: [])
    pdf = settings.figures / "report.pdf"
    pdf.unlink(missing_ok=True)
    report.make_report(settings, notebooks)
    assert "apt install chromium" in capsys.readouterr().out
    assert (settings.figures / "report.html").exists() and not pdf.exists()


def test_a_browser_that_fails_is_passed_over(made, tmp_path, monkeypatch):
    page = tmp_path / "report.html"
    page.write_text("<p>text")
    works = report.find_browsers()
    monkeypatch.setattr("lab6.runner.report.find_browsers", lambda: ["false", "no-such-browser", *works])
    assert bool(report.make_pdf(page)) == bool(works)
    assert {path.name for path in tmp_path.iterdir()} <= {"report.html", "report.pdf"}, "nothing half made is left"
