"""The lock and the conda environment say what pyproject.toml asks for; ruff has nothing to say."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import lab6_utils

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def locked():
    """{name: [versions]} of requirements.txt; a few packages have one version for each Python."""
    versions = {}
    for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.lstrip().startswith("#"):
            requirement = Requirement(line)  # an option, such as an index's address, is none
            assert requirement.url is None
            versions.setdefault(requirement.name, []).append(str(requirement.specifier).removeprefix("=="))
    return versions


def test_requirements_lock_what_pyproject_asks_for(project, locked):
    for text in project["dependencies"] + project["optional-dependencies"]["test"]:
        requirement = Requirement(text)
        assert requirement.name in locked, f"{requirement.name}: say make lock"
        for version in locked[requirement.name]:
            assert requirement.specifier.contains(version), f"{text} is locked at {version}: say make lock"


def test_conda_environment_agrees(project, locked):
    rattler = pytest.importorskip("rattler")
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    assert environment["channels"] == ["conda-forge"]
    conda = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    names = [rattler.MatchSpec(entry, strict=True).name.normalized for entry in conda]
    assert names == ["python", "pip"]
    for version in ("3.11.0", "3.12.4"):
        python = SpecifierSet(conda[0].removeprefix("python"))
        assert python.contains(version) and SpecifierSet(project["requires-python"]).contains(version)
    assert not python.contains("3.10.9")
    (pip,) = (entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    direct = [Requirement(text).name for text in project["dependencies"]]
    assert pip == [f"{name}=={locked[name][0]}" for name in direct], "copy the versions of requirements.txt"
    for entry in pip:  # each is also a version that conda could name
        rattler.MatchSpec(entry, strict=True)


def test_ruff():
    for command in (["check"], ["format", "--check"]):
        checked = subprocess.run([sys.executable, "-m", "ruff", *command, ROOT], capture_output=True, text=True)
        assert checked.returncode == 0, checked.stdout


def test_readme_quotes_the_results(monkeypatch):
    monkeypatch.delenv("LAB6_FIGURES", raising=False)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = json.loads((ROOT / "figures" / "results.json").read_text(encoding="utf-8"))["results"]
    assert lab6_utils.results_table(rows) in readme, "README's table is not the one of figures/results.json"
    systems = lab6_utils.systems_table(lab6_utils.make_settings("shipped"))
    assert systems in readme, "README's table of systems is not the one of figures/results.json"


def test_committed_results_are_of_the_shipped_weights():
    rows = json.loads((ROOT / "figures" / "results.json").read_text(encoding="utf-8"))["results"]
    best = {(row["system"], row["split"]): row for row in rows if row["evaluator"] == "resnet18"}
    for row in (row for row in rows if row["weights_sha256"]):
        weights = lab6_utils.WEIGHTS / row["system"] / "denoiser" / "diffusion_pytorch_model.safetensors"
        assert row["weights_sha256"] == lab6_utils.sha256_of(weights)
        assert row["seeds"] >= 16 and (row["ci95_seeds"] or row["accuracy"] == 1), "seeds that agree have no interval"
        assert (row["ci95_sets"] is None) == (row["split"] == "manual" or row["accuracy"] == 1)
    readers = {"resnet18": "evaluator", "judge": "judge"}
    for row in rows:
        file = lab6_utils.WEIGHTS / readers[row["evaluator"]] / "model.safetensors"
        assert row["evaluator_sha256"] == lab6_utils.sha256_of(file), "read by an evaluator that does not ship"
    for system in ("layout", "tokens", "few-step"):
        assert min(best[system, split]["accuracy"] for split in ("test", "new_test")) >= 0.9
    assert best["real images", "real-held-out"]["accuracy"] >= 0.97
