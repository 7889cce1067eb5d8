"""Kill a training again and again, and compare how it ends with a training that nobody killed.

    python benchmarks/kill.py                 50 kills at random moments; the result goes to benchmarks/kill.json
    python benchmarks/kill.py --kills 3

The training is tiny and its checkpoints are frequent, so that many kills meet one that is being written. Every third
time the newest checkpoint is damaged as well. The two pipelines must be the same, bit for bit.
"""

import argparse
import datetime
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import lab6_utils as lab  # noqa: E402

RESULT = Path(__file__).parent / "kill.json"
TRAINING = """
import sys, torch
from pathlib import Path
sys.path.insert(0, {root!r})
torch.set_num_threads(1)
import lab6_utils as lab
settings = lab.make_settings("tiny", preset="layout", device="cpu", epochs={epochs}, checkpoint_minutes=1e-5)
dataset = lab.ICLEVRDataset(lab.read_data(Path({data!r})), "train", limit=24)
for epoch in lab.train(settings, dataset, Path({folder!r})):
    print(epoch, flush=True)
"""


def start(folder, data, epochs):
    """Start the training in a process of its own, which continues what is in `folder`."""
    code = TRAINING.format(root=str(ROOT), data=str(data), folder=str(folder), epochs=epochs)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def kill_and_compare(kills, epochs=40, seed=0):
    """Train once undisturbed and once killed `kills` times; returns what happened."""
    chance, damaged = random.Random(seed), 0
    with tempfile.TemporaryDirectory() as home:
        os.environ["LAB6_RUNS"] = str(Path(home) / "runs")
        data = lab.find_data(24).root
        straight, disturbed = Path(home) / "straight", Path(home) / "disturbed"
        began = time.perf_counter()
        if start(straight, data, epochs).wait():
            raise SystemExit("the undisturbed training failed")
        whole = time.perf_counter() - began
        for kill in range(1, kills + 1):
            process = start(disturbed, data, epochs)
            while True:
                try:
                    process.wait(chance.uniform(0.3, 1.0) * whole)
                except subprocess.TimeoutExpired:
                    break
                shutil.rmtree(disturbed)  # it was through before: from the beginning
                process = start(disturbed, data, epochs)
            process.kill()
            process.wait()
            newest = disturbed / "checkpoint.pt"
            if kill % 3 == 0 and newest.exists() and (disturbed / "checkpoint.previous.pt").exists():
                newest.write_bytes(newest.read_bytes()[: chance.randrange(newest.stat().st_size)])
                damaged += 1
            print(f"progress: {kill} of {kills} kills", flush=True)
        process = start(disturbed, data, epochs)
        error = process.communicate()[1]
        same = process.returncode == 0 and same_weights(straight, disturbed)
    return dict(kills=kills, damaged=damaged, same=same, error=error[-500:] if process.returncode else "",
                device=lab.device_name(lab.make_settings("tiny", device="cpu")),
                date=datetime.date.today().isoformat())  # fmt: skip


def same_weights(one, other):
    """Are the pipelines of two runs, and all that their checkpoints hold of the network, the same bit for bit?"""
    states = [torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (one, other)]
    files = [(folder / "pipeline/denoiser/diffusion_pytorch_model.safetensors").read_bytes() for folder in (one, other)]
    return files[0] == files[1] and all(
        torch.equal(a, b) for a, b in zip(*(s["model"].values() for s in states), strict=True)
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    result = kill_and_compare(parser.parse_args().kills)
    lab.write_json(RESULT, result)
    print(result)
    sys.exit(not result["same"])
