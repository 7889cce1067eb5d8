"""What is asked of the runner: which notebooks, which parameters, of which types."""

import math

import pytest
from small_notebooks import PARAMETERS, write_notebook

from lab6.runner.parameters import Refused, check_parameters, choose_notebooks, parse_value


def test_choice_of_notebooks(tmp_path):
    for name in ("01_a", "02_b", "05_e", "06_f"):
        write_notebook(tmp_path / f"{name}.ipynb")
    assert [p.stem for p in choose_notebooks(tmp_path)] == ["01_a", "02_b", "05_e", "06_f"]
    assert [p.stem for p in choose_notebooks(tmp_path, "06,1")] == ["01_a", "06_f"]
    for only in ("03", "a", "1-2"):
        with pytest.raises(Refused, match="--only"):
            choose_notebooks(tmp_path, only)


def test_values_take_the_type_of_the_default():
    assert parse_value("3", 1) == 3 and parse_value("3", "test") == "3"
    assert parse_value("3", 1.0) == 3.0 and type(parse_value("3", 1.0)) is float
    assert parse_value("false", True) is False and parse_value("True", False) is True
    assert parse_value("gray cube, red cube", ["blue cube"]) == ["gray cube", "red cube"]
    assert parse_value('["gray cube", "red cube"]', ["blue cube"]) == ["gray cube", "red cube"]
    assert parse_value("1,2", [0.5]) == [1.0, 2.0]
    assert parse_value("3", None) == 3 and parse_value("linear-attn", None) == "linear-attn"
    assert parse_value("[8, 16]", None) == parse_value("8,16", None) == [8, 16] and parse_value("true", None) is True
    assert parse_value("sample", None) == "sample", "None stands for the preset's choice, of whatever type"
    wrong = (("x", 1), ("1.5", 1), ("true", 1), ("x", 1.0), ("true", 1.0), ("1", True), ("yes", True), ("1,x", [1]))
    for text, default in wrong:
        with pytest.raises((ValueError, SyntaxError)):
            parse_value(text, default)


def test_numbers_that_are_none_are_numbers():
    """So that settings refuse them by their value, not by their type."""
    assert math.isnan(parse_value("nan", None)) and parse_value("inf", 1.0) == math.inf


def test_parameters_go_to_the_notebooks_that_have_them(tmp_path):
    write_notebook(tmp_path / "01_a.ipynb", parameters=PARAMETERS + 'split = "test"  # or new_test\n')
    write_notebook(tmp_path / "02_b.ipynb", parameters=PARAMETERS + "scale = 2.0\nlabels = [\n    'gray cube',\n]\n")
    first, second = paths = choose_notebooks(tmp_path)
    given = check_parameters(paths, ["scale=3", "seed=7", "split=a=b"])
    assert given == {first: {"seed": 7, "split": "a=b"}, second: {"scale": 3.0, "seed": 7}}
    with pytest.raises(Refused, match=r"(?s)did you mean scale\?.*01_a has .*02_b has"):
        check_parameters(paths, ["scal=3"])
    with pytest.raises(Refused, match="no such parameter; it is a setting, but not a parameter of these notebooks"):
        check_parameters(paths, ["ema_decay=0.5"])
    more = "num_timesteps = 3\nguidance_scale = 2.0\nsteps = 1\n"
    write_notebook(tmp_path / "03_c.ipynb", parameters=PARAMETERS + more)
    for name, meant in (("guidance", "guidance_scale"), ("step", "steps")):
        with pytest.raises(Refused, match=rf"did you mean {meant}\?"):
            check_parameters(choose_notebooks(tmp_path, "03"), [f"{name}=3"])
    with pytest.raises(Refused, match=r"02_b wants float, such as its default 2\.0"):
        check_parameters(paths, ["scale=big"])
    with pytest.raises(Refused, match="use --profile"):
        check_parameters(paths, ["profile=quick"])
    with pytest.raises(Refused, match="write name=value"):
        check_parameters(paths, ["seed"])
