"""Mixed devices and waits of the host, found without a GPU: training, sampling and evaluation on far_device.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration

import lab6_utils as lab

pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"), reason="this torch has no such API"
)


def on_far(tmp_path, *what):
    """What far_program.py prints; it runs in a process of its own, since it changes torch."""
    program = Path(__file__).with_name("far_program.py")
    environment = os.environ | dict(LAB6_RUNS=str(tmp_path / "runs"))
    done = subprocess.run([sys.executable, str(program), *what], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_training_waits_twice_an_epoch(tmp_path):
    found = on_far(tmp_path, "training")
    for preset in ("tokens", "layout"):
        waits = found[f"none, {preset}"]["waits"]
        of_order = {place for place in waits if "examples.py" in place}  # of shares of objects, once an epoch
        assert len(of_order) <= (2 if preset == "layout" else 0), waits
        places = waits.keys() - of_order  # for the loss, and to see that it and the weights are finite
        assert set(waits.values()) == {1} and len(places) == 2, waits
        assert all("training.py" in place for place in places), waits
        assert 0 < found[f"none, {preset}"]["loss"] < 2
    for fault in ("labels, tokens", "weights, tokens"):  # those of the batch, or of the loss, that stay on the CPU
        assert 5 in found[fault]["waits"].values(), f"a wait in each step: {found[fault]['waits']}"


def test_sampling_mixes_no_devices_and_seldom_waits(tmp_path):
    found = on_far(tmp_path, "sampling")
    assert len(found) == 2 * (len(lab.SAMPLERS) * len(lab.GUIDANCES) - len(lab.SAMPLERS) + 1), "every combination"
    for way in {name.rpartition(",")[0] for name in found}:
        steps = (found[f"{way}, 4"] - found[f"{way}, 2"]) / 2
        # A DDPM step brings its fresh noise to the device. UniPC solves small systems there, inside diffusers.
        assert steps <= {"ddpm": 3, "unipc": 6}.get(way.split(",")[0], 0), (way, steps)


def test_evaluators_wait_once_an_epoch(tmp_path):
    for name, waits in on_far(tmp_path, "evaluation").items():
        assert sum(waits.values()) <= 4 and set(waits.values()) <= {1, 2}, (name, waits)


def test_latents_stay_on_the_device(tmp_path):
    found = on_far(tmp_path, "latents")
    assert len(found["errors"]) == 2 and found["device"].startswith("far")
    assert sum(found["waits"].values()) <= 1, found["waits"]
