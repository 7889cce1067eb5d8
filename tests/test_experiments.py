"""lab6/experiments.py: experiments of results.json."""

import lab6_utils as lab


def test_an_experiment_with_a_schedule_that_is_gone(capsys):
    row = {"system": "tokens", "experiment": {"schedule": "quadratic", "profile": "tiny"}}
    known = row | {"experiment": {"schedule": "cosine", "profile": "tiny"}}
    assert lab.drop_unknown([row, known]) == [known]
    assert "an experiment of tokens in results.json (schedule='quadratic': choose from" in capsys.readouterr().out
