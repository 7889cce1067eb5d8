"""lab6/experiments.py: experiments of results.json."""

import lab6_utils as lab


def test_an_experiment_on_a_gpu_had_a_gpus_recipe():
    row = {"system": "tokens", "experiment": {"profile": "full"}}
    assert lab.settings_of(row | {"device": "cpu, 2 threads"}).batch_size == 32
    assert lab.settings_of(row | {"device": "NVIDIA H100 80GB HBM3"}).batch_size == 128


def test_an_experiment_with_a_schedule_that_is_gone(capsys):
    row = {"system": "tokens", "experiment": {"schedule": "quadratic", "profile": "tiny"}}
    known = row | {"experiment": {"schedule": "cosine", "profile": "tiny"}}
    assert lab.drop_unknown([row, known]) == [known]
    assert "an experiment of tokens in results.json (schedule='quadratic': choose from" in capsys.readouterr().out
