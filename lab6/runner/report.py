"""The report: the executed notebooks as one HTML page, formulas as MathML, which a browser prints to a PDF.

Stands on parameters and storage. Its template is in notebooks/templates/report.
"""

from __future__ import annotations

import base64
import contextlib
import html
import os
import re
import shutil
import subprocess
import sys
import tempfile

import nbformat
from jinja2 import pass_context
from latex2mathml.converter import convert
from nbconvert.exporters import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from traitlets.config import Config

from lab6.runner.parameters import NOTEBOOKS, Refused, choose_notebooks
from lab6.storage import read_json, write_text, write_whole

LEFT_OUT = {"parameters", "injected-parameters", "interactive", "solution", "no-report"}  # cell tags


def make_report(settings, notebooks=NOTEBOOKS):
    """Make report.html and, where there is a browser, report.pdf, whose path is returned, else None."""
    page = make_html(settings, notebooks).resolve()
    advice = "no report.pdf made: no working Chrome, Chromium or Edge found. Install one (Debian: apt install chromium "
    advice += "fonts-noto-cjk), then run python run_notebooks.py --report; or print report.html from any browser."
    pdf = make_pdf(page)
    print(f"report  {page}", pdf or advice, sep="\nreport  ")
    return pdf


# ── HTML ───────────────────────────────────────────────────────────────────────────────────────────────


def make_html(settings, notebooks):
    """Write report.html from the executed notebooks of the settings' profile; returns its path."""
    folder = settings.runs / "notebooks" / settings.profile
    paths = [path for path in sorted(folder.glob("[0-9][0-9]_*.ipynb")) if ".partial" not in path.name]
    if not paths:
        raise Refused(f"no executed notebooks in {folder}: run them first")
    front = front_page(settings, paths, notebooks)
    resources = {"headings": [], "front": front, "metadata": {"name": "report", "path": str(notebooks)}}
    body, _ = make_exporter().from_notebook_node(assemble(paths), resources)
    write_text(settings.figures / "report.html", body)
    return settings.figures / "report.html"


def front_page(settings, paths, notebooks):
    """What the template shows on the first page, beside the table of contents."""
    status = read_json(paths[0].with_name("status.json"), default={})
    runs = {path.stem: status.get(path.stem, {}) for path in paths}
    grids = sorted(settings.figures.glob("*grid*.png"), key=lambda path: ("test" not in path.stem, len(path.stem)))
    return {
        "student": list(filter(None, map(os.environ.get, ("LAB6_STUDENT_ID", "LAB6_STUDENT_NAME")))),
        "profile": settings.profile,
        "runs": runs,
        "data": sorted({run["data"] for run in runs.values() if run.get("data")}),
        "last": max(runs.values(), key=lambda run: run.get("date", "")),
        "missing": [path.stem for path in choose_notebooks(notebooks) if path.stem not in runs],
        "results": read_json(settings.figures / "results.json", default={}).get("results", []),
        "hero": base64.b64encode(grids[0].read_bytes()).decode() if grids else None,
    }


def assemble(paths):
    """One notebook of the cells of executed notebooks, each cell marked with its chapter."""
    book = nbformat.v4.new_notebook()
    for path in paths:
        for number, cell in enumerate(nbformat.read(path, as_version=4).cells):
            cell.id, cell.metadata["chapter"] = f"c{path.name[:2]}-{number}", path.stem
            book.cells.append(cell)
    return book


# ── Cells and formulas ─────────────────────────────────────────────────────────────────────────────────


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
    templates = str(NOTEBOOKS / "templates")
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


# ── PDF ────────────────────────────────────────────────────────────────────────────────────────────────


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
    pdf = page.with_suffix(".pdf")
    pdf.unlink(missing_ok=True)  # that of an earlier run must not stand beside this page
    for browser in find_browsers():
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            write_whole(pdf, lambda temporary, browser=browser: print_page(browser, page, temporary))
            return pdf
    return None


def print_page(browser, page, pdf):
    """Print an HTML file with one browser. Raises OSError or SubprocessError where that fails."""
    flags = "--headless --disable-gpu --no-first-run --disable-background-networking --disable-sync "
    flags += "--disable-component-update --no-pdf-header-footer --generate-pdf-document-outline"
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        flags += " --no-sandbox"  # Chromium's sandbox does not run as root
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as own:  # not the user's open browser
        options = [*flags.split(), f"--user-data-dir={own}", f"--print-to-pdf={pdf}", page.as_uri()]
        subprocess.run([browser, *options], capture_output=True, check=True, timeout=300)
