"""What is asked for: which notebooks, with which parameters, in which combinations. What cannot be is refused.

The lowest module of the runner. Stands on runs, evaluators, files, settings, options and storage.
Those that need torch are imported late, since that takes seconds.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import itertools
import math
import re

import papermill

from lab6.options import option_names
from lab6.storage import ROOT, from_project, read_json

NOTEBOOKS = ROOT / "notebooks"


class Refused(Exception):
    """A request that cannot be carried out; the message is for the person who made it."""


def refusing(function, *arguments):
    """What a function returns; what it raises for a file or a value that is not right becomes Refused."""
    try:
        return function(*arguments)
    except (OSError, ValueError, RuntimeError) as error:
        raise Refused(error) from None


# ── Notebooks and the names of their parameters ────────────────────────────────────────────────────────


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
    if default is None:  # a setting that the preset chooses; make_settings knows its type
        if text == "None":
            return None
        try:
            value = _literal(text)
        except (ValueError, SyntaxError):
            return [parse_value(part.strip(), None) for part in text.split(",")] if "," in text else text
        return text if value is None else list(value) if isinstance(value, tuple) else value
    if isinstance(default, list) and not text.lstrip().startswith("["):
        return [parse_value(part.strip(), default[0] if default else "") for part in text.split(",")]
    value = _literal(text)
    if isinstance(default, float) and type(value) is int:
        value = float(value)
    if isinstance(default, list) and default:
        value = [parse_value(v if isinstance(v, str) else repr(v), default[0]) for v in value]
    if type(value) is not type(default):
        raise ValueError(f"{text} is a {type(value).__name__}")
    return value


def _literal(text):
    words = {"true": True, "false": False, "nan": math.nan, "inf": math.inf}  # the last two are refused by name
    return words[text.lower()] if text.lower() in words else ast.literal_eval(text)


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
            raise Refused(f"-p {assignment}: no such parameter{_choices_instead(name, defaults)}")
        for path in takers:
            default = defaults[path][name]
            try:
                given[path][name] = parse_value(text, default)
            except (ValueError, SyntaxError):
                wanted = f"{type(default).__name__}, such as its default {default!r}"
                raise Refused(f"-p {assignment}: {path.stem} wants {wanted}") from None
    return given


def _choices_instead(name, defaults):
    """End of the message on an unknown name: a similar one, and what each notebook has."""
    names = {n: None for known in defaults.values() for n in known}
    close = [n for n in names if name in n.split("_")] or difflib.get_close_matches(name, names, n=1)
    known_elsewhere = "; it is a setting, but not a parameter of these notebooks" if name in option_names() else ""
    lines = [f"; did you mean {close[0]}?" if close else known_elsewhere]
    lines += [f"  {path.stem} has {', '.join(n for n in known if n != 'profile')}" for path, known in defaults.items()]
    return "\n".join(lines)


def combine(assignments):
    """Every combination of a sweep's "name=value,value", as lists of "name=value"; a list's commas do not count."""
    choices = []
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals or not text:
            raise Refused(f"--sweep {assignment}: write name=value,value")
        choices.append([f"{name}={value}" for value in re.split(r",(?![^\[]*\])", text)])
    return [list(combination) for combination in itertools.product(*choices)]


def plan_jobs(paths, assignments, sweep=(), by_itself=False):
    """{name of the executed notebook: (path, parameters)} for each notebook and each combination of a sweep.

    Without `by_itself` notebook 06 is given no preset and what belongs to one: beside the others it compares what is
    there; by itself it trains the preset that it is given.
    """
    jobs = {}
    for combination in combine(sweep):
        name = re.sub(r"[^\w=.,-]+", "_", ",".join(combination))
        for path, parameters in check_parameters(paths, [*assignments, *combination]).items():
            if path.stem == "06_experiments" and not by_itself:
                parameters = {k: v for k, v in parameters.items() if k in ("seed", "resume", "evaluator")}
            jobs[f"{path.stem},{name}".rstrip(",")] = path, parameters
    return jobs


# ── Their values, which take torch to check ────────────────────────────────────────────────────────────


def settings_with(profile, parameters):
    """The settings that a notebook makes of its parameters, some of which are no settings."""
    from lab6.settings import Settings, make_settings

    fields = {field.name for field in dataclasses.fields(Settings)}
    return make_settings(profile, **{name: value for name, value in parameters.items() if name in fields})


def read_settings(file):
    """The settings in a json file, as `train_in_processes` leaves it. Raises Refused."""
    from lab6.settings import settings_from

    try:
        return settings_from(read_json(file))
    except ValueError as error:
        raise Refused(f"--settings {file}: {error}") from None


def check_values(profile, jobs):
    """Raise Refused for a value that a notebook would stop at, perhaps after hours."""
    from lab6.files import choose_splits

    try:
        for _, parameters in jobs.values():
            files = {name: parameters[name] for name in ("weights", "evaluator") if name in parameters}
            check_files(settings_with(profile, parameters), **files)
            choose_splits(parameters.get("split", "both"))
    except (ValueError, FileNotFoundError) as error:
        raise Refused(error) from None


def check_files(settings, weights="auto", evaluator="auto"):
    """Raise FileNotFoundError where a pipeline, teacher, start or evaluator is named that is not there and that the run
    does not make. Arguments as for `load_pipeline` and `prepare_evaluator`."""
    from lab6.evaluators import Evaluator
    from lab6.runs import find_pipeline, find_weights, run_folder

    made_here = from_project(weights).resolve().is_relative_to(run_folder(settings))  # by notebook 03, perhaps
    if weights not in ("auto", "trained") and not made_here:
        find_pipeline(settings, weights)
    for option in ("teacher", "start"):
        if name := getattr(settings, option):
            find_weights(option, name)
    if evaluator != "auto":
        Evaluator.file_of(evaluator)
